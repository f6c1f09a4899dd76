"""Which epoch a checkpoint is: by the number in its name, or by what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

# What libraries call the files in a checkpoint folder: the folder's name is what tells checkpoints apart.
FIXED_NAME = re.compile(r"[a-z_]*model\.(safetensors|bin)|.*\.index\.json")

# What trainers say of themselves beside the weights. Only the global step is sure to rise from file to file.
GLOBAL_STEP = "global_step"
EPOCH = ("epoch", GLOBAL_STEP, "step", "iteration")


def by_epoch(epochs: Mapping[Path, int]) -> dict[int, Path]:
    """Epoch -> file, rising; raises `InputError` where two files are the same epoch."""
    found: dict[int, Path] = {}
    for path, epoch in epochs.items():
        if epoch in found:
            raise InputError(f"{path}: is epoch {epoch}, and so is {found[epoch]}; number with --first-epoch")
        found[epoch] = path
    return dict(sorted(found.items()))


def epoch_in_name(path: Path) -> int | None:
    """The number after "epoch" in a file's or folder's name, else the last number in it, None where it has none.

    Of a file that has the same name in every checkpoint folder it is the folder's.
    """
    title = _title(path)
    found = re.search(r"epoch\D{0,3}?(\d+)", title, re.IGNORECASE) or re.search(r"(\d+)\D*$", title)
    return int(found[1]) if found else None


def natural(path: Path) -> list[int | str]:
    """To sort by: the name cut into text and numbers, always text first, so that 9 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", _title(path))]


def number_in(fields: Any, *names: str) -> int | None:
    """The first of the named fields that holds an integer, or the text of one; None where none does."""
    for name in names if isinstance(fields, Mapping) else ():
        value = fields.get(name)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value, re.ASCII):
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
            return value
    return None


def _title(path: Path) -> str:
    """What tells a checkpoint from others: its name without suffix, or that of its folder."""
    if FIXED_NAME.fullmatch(path.name) and path.parent.name:
        return path.parent.name
    return path.name if path.suffix[1:].isdecimal() else path.stem
