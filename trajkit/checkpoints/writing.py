"""Recorded, modelled or averaged weights as checkpoints: which weights and which format are chosen on their own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from ..averages import Averaging
from ..decomposition import Decomposition
from ..errors import InputError, named_type
from ..run import PathLike, Run
from ..store.place import is_url
from ..weights import source_of
from .writing_dcp import write_dcp
from .writing_safetensors import write_safetensors
from .writing_torch import write_pt

Format = Literal["safetensors", "pt", "dcp"]

FORMAT_OF_SUFFIX: dict[str, Format] = {".safetensors": "safetensors", ".pt": "pt"}

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def write_checkpoint(
    run: Run | PathLike,
    epoch: int | None,
    path: PathLike,
    fit: str | Decomposition | None = None,
    overwrite: bool = False,
    *,
    average: str | Iterable[int] | None = None,
    ema: float | None = None,
    ema_half_life: float | None = None,
    format: Format | None = None,  # noqa: A002 (as the command line has it)
    max_shard_size: int | str | None = None,
) -> Path:
    """Write the weights of an epoch, as recorded, as modelled by a saved `fit` or averaged up to it, with the buffers
    recorded then. Returns the path.

    Names, shapes and dtypes are the original ones; tied tensors stand under each of their names. A checkpoint appears
    whole or not at all, and an old one stays until the new one is whole.

    epoch, fit, average, ema, ema_half_life: as for `load_weights`. format: by default what the name ends in.

    - ``safetensors``: streamed. A name that ends in ``.safetensors`` is a file, any other one a folder as Hugging Face
      has it: one file, or several of at most `max_shard_size` (bytes, or a text such as ``"5GB"``, the default) and
      their index. A larger tensor is a file of its own.
    - ``pt``: a file of `torch.save`; the model is held in memory once.
    - ``dcp``: a folder of `torch.distributed.checkpoint`; the model is held in memory once.

    Raises `InputError` for a place or a choice that cannot be, `PathExistsError` where there is a checkpoint and
    `overwrite` is False, `UnknownNameError` for an epoch or fit that does not exist. Warns as `load_weights` does.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {named_type(path)}, expected a file or folder to write; pass its path")
    if is_url(path):
        raise InputError(f"{path}: a URL, checkpoints are written to a disk; name a path here and copy it there")
    target = Path(path)
    chosen = _format_of(target, format)
    shard_bytes = None if max_shard_size is None else _bytes_of(max_shard_size)
    if shard_bytes is not None and chosen != "safetensors":
        raise InputError(f"a {chosen} checkpoint is not split, found max_shard_size; leave it out, or take safetensors")
    source = source_of(run, epoch, fit, Averaging(average, ema, ema_half_life))
    if chosen == "safetensors":
        write_safetensors(source, target, overwrite, shard_bytes)
    elif chosen == "pt":
        write_pt(source, target, overwrite)
    else:
        write_dcp(source, target, overwrite)
    return target


def _format_of(target: Path, asked: Format | None) -> Format:
    named = FORMAT_OF_SUFFIX.get(target.suffix)
    chosen = asked or named
    if chosen is None:
        raise InputError(
            f"{target}: expected a name that ends in .safetensors or .pt; choose one of these, or name the format"
        )
    if chosen not in get_args(Format):
        raise InputError(f"format is {chosen!r}, expected {', '.join(get_args(Format))}; choose one of these")
    if named not in (None, chosen):
        raise InputError(f"{target}: a name of {named} files, expected one for {chosen}; choose another name")
    return chosen


def _bytes_of(size: int | str) -> int:
    """A size as users write it, ``5GB`` or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip(), re.ASCII)
    units = {unit.upper(): factor for unit, factor in UNITS.items()}
    n_bytes = int(float(found[1]) * units.get(found[2].upper(), 0)) if found else 0
    if n_bytes < 1:
        raise InputError(f"max_shard_size is {size!r}, expected bytes or a size such as 5GB or 500MiB; write one")
    return n_bytes
