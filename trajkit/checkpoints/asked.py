"""Epochs that the caller gives: by a pattern, for each file, or by the order of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..run import PathLike
from .labels import CURE, Label, taken_twice
from .naming import natural
from .refs import Refs

Epochs = int | Sequence[int] | Mapping[PathLike, int]


def require_paths(files: Any) -> list[Path]:
    """Return the paths that were given, each once; raises `InputError` unless they are paths of files that exist."""
    if isinstance(files, str | bytes | os.PathLike):
        raise InputError(f"files is {str(files)!r:.200}, expected a list of paths; pass [{str(files)!r:.200}]")
    if not isinstance(files, Iterable):
        raise InputError(f"files is a {type(files).__name__}, expected a list of paths; pass a list")
    paths: list[Path] = []
    for file in files:
        if not isinstance(file, str | os.PathLike) or isinstance(os.fspath(file), bytes):
            raise InputError(f"files holds {file!r:.200}, expected paths of checkpoints; pass a list of paths")
        paths.append(Path(file))
    if not paths:
        raise InputError(
            "files is empty, expected the path of one checkpoint at least; check the pattern or the folder"
        )
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file, expected a checkpoint; check the name")
    return list(dict.fromkeys(paths))


def require_pattern(label: Any) -> re.Pattern[str] | None:
    """Return the pattern of labels, None for None; raises `InputError` unless it has a group."""
    if label is None:
        return None
    try:
        pattern: re.Pattern[str] = re.compile(label)
        found = pattern.groups > 0 and isinstance(pattern.pattern, str)
    except (re.error, TypeError) as error:
        raise InputError(f"label is {label!r:.200}, expected a regular expression ({error}); check it") from error
    if not found:
        raise InputError(
            f"label is {label!r:.200}, expected a group for the number; write one such as 'epoch_([0-9]+)'"
        )
    return pattern


def number_by(pattern: re.Pattern[str], path: Path, named: Path) -> int | None:
    """Return group 1 of a pattern in a file's name, or else in its path; None where the pattern is not found.

    named: the path with the names of refs. Raises `InputError` where the group is no number.
    """
    for text in (path.name, named.name, str(path), str(named)):
        found = pattern.search(text)
        if found is not None:
            number = found[1] or ""
            if not re.fullmatch(r"[0-9]{1,18}", number):
                raise InputError(
                    f"{path}: '{pattern.pattern}' finds {number!r:.80}, expected a number of at most 18 digits;"
                    " correct the label"
                )
            return int(number)
    return None


def asked_labels(
    paths: Sequence[Path], first_epoch: int | None, pattern: re.Pattern[str] | None, epochs: Epochs | None, refs: Refs
) -> dict[Path, Label] | None:
    """Return file -> label, rising, by the one thing that the caller gives; None where that is nothing.

    Raises `InputError` where several things are given, for a file without an epoch, and for one of two.
    """
    given = {"first_epoch": first_epoch, "label": pattern, "epochs": epochs}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} exclude each other; give one")
    if first_epoch is not None:
        ordered = sorted(paths, key=lambda path: natural(refs.named(path)))
        numbers = dict(zip(ordered, _count(_integer(first_epoch, "first_epoch"), len(paths)), strict=True))
    elif pattern is not None:
        numbers = {path: _required(pattern, path, refs) for path in paths}
    else:
        numbers = _by_file(epochs, paths)
    taken: dict[int, Path] = {}
    for path, number in sorted(numbers.items(), key=lambda item: item[1]):
        if number in taken:
            raise taken_twice(path, number, taken[number])
        taken[number] = path
    return {path: Label(number, "given") for number, path in taken.items()}


def _count(first: int, n: int) -> range:
    return range(first, first + n)


def _required(pattern: re.Pattern[str], path: Path, refs: Refs) -> int:
    number = number_by(pattern, path, refs.named(path))
    if number is None:
        raise InputError(f"{path}: '{pattern.pattern}' is not found in it, expected it in each name; {CURE}")
    return number


def _by_file(epochs: Any, paths: Sequence[Path]) -> dict[Path, int]:
    """Return file -> the epoch that is given for it."""
    if isinstance(epochs, Mapping):
        known = {Path(file): number for file, number in epochs.items()}
        missing = next((path for path in paths if path not in known), None)
        if missing is not None:
            raise InputError(f"{missing}: epochs does not have it, expected the epoch of each file; add it")
        numbers = [known[path] for path in paths]
    elif isinstance(epochs, str) or not isinstance(epochs, Iterable):
        numbers = [epochs]
    else:
        numbers = list(epochs)
    if len(numbers) != len(paths):
        raise InputError(f"epochs has {len(numbers)} of {len(paths)} files, expected one for each; give as many")
    return {path: _integer(number, "an epoch") for path, number in zip(paths, numbers, strict=True)}


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{what} is {value!r:.80}, expected an integer; pass a number")
    return int(value)
