"""Files and folders that appear whole: written to the side, on the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import InputError, PathExistsError

OpenAside = Callable[[str], AbstractContextManager[IO[bytes]]]


def require_free_file(target: Path, overwrite: bool) -> None:
    """Raise `InputError` where a file cannot be, `PathExistsError` where there is one and `overwrite` is False."""
    if target.is_dir():
        raise InputError(f"{target}: a folder, expected a file to write; choose another name")
    if target.exists() and not overwrite:
        raise PathExistsError(f"{target}: exists already; choose another name or overwrite it (--force)")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted, none where there is no such folder; raises `PathExistsError` for a file."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise PathExistsError(f"{folder}: a file, expected a folder to write; choose another name") from error


@contextmanager
def new_files(folder: Path, old: Collection[str] = ()) -> Iterator[OpenAside]:
    """Files that take their names in `folder`, in order, when the block ends well, and leave no trace otherwise.

    The last one makes them a checkpoint: the index of the others, or the only one. They take the place of those named
    in `old`, which stay until all the new ones have reached the disk.
    """
    asides: dict[str, Path] = {}
    no_way_back = False

    @contextmanager
    def open_aside(name: str) -> Iterator[IO[bytes]]:
        asides[name] = _beside(folder / name)
        with _cannot_be_written(folder / name):
            file = asides[name].open("xb")
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    try:
        yield open_aside
        *parts, head = asides
        if set(parts) & set(old):  # the old index would name some old parts and some new ones
            no_way_back = True
            (folder / head).unlink(missing_ok=True)
        for name, aside in asides.items():
            os.replace(aside, folder / name)
        for name in set(old) - set(asides):
            (folder / name).unlink()
        _sync(folder)
    finally:
        if not no_way_back:  # else what has no name yet is all that there is of the new ones
            for aside in asides.values():
                aside.unlink(missing_ok=True)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder, made if there is none, which goes again where the block fails and leaves it empty."""
    is_new = not folder.is_dir()
    if is_new:
        with _cannot_be_written(folder):
            folder.mkdir()
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise
    if is_new:
        _sync(folder.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` when the block ends well, and leaves no trace otherwise."""
    target = Path(os.path.realpath(target))  # a link stays, and leads to the new one
    aside, old = _beside(target), _beside(target)
    with _cannot_be_written(target):
        aside.mkdir()
    try:
        yield aside
        _sync(aside)
        if target.is_dir():
            os.rename(target, old)
        os.rename(aside, target)
        _sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        for folder in (aside, old):
            shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def _cannot_be_written(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place") from error


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
