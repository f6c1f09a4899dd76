"""Recording from checkpoint files that a training left."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, LayoutError, placed
from ..layout import ParameterLayout
from ..run import NonFinite, PathLike, RunWriter
from ..vector import flatten, layout_of
from .reading import read_checkpoint


@dataclass(frozen=True)
class Imported:
    """A checkpoint file and the epoch it is recorded as.

    `new` is False where that epoch was recorded before; `healed` is True where it was damaged and this put it right.
    """

    path: Path
    epoch: int
    new: bool
    healed: bool = False


def import_checkpoints(
    run: PathLike,
    files: Sequence[PathLike],
    first_epoch: int | None = None,
    fsync: bool = True,
    nonfinite: NonFinite = "raise",
    progress: Callable[[Imported], None] | None = None,
) -> list[Imported]:
    """Record checkpoint files into a run, which is made if there is none; epochs recorded already are skipped,
    and bad ones are healed.

    first_epoch: number the files from here on in natural order of their names; by default an epoch is the number in
    the file's name, see `epochs_of`. progress: called after each file.

    Raises `InputError` or `LayoutError` naming the file that cannot be recorded; the files before it are.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file, expected a checkpoint; check the name")
    done: list[Imported] = []
    with RunWriter(run, fsync=fsync, nonfinite=nonfinite) as writer:
        healable = writer.healable_epochs
        for epoch, path in epochs_of(paths, first_epoch).items():
            imported = Imported(path, epoch, epoch not in writer.epochs, epoch in healable)
            if imported.new or imported.healed:
                _record(writer, imported)
            done.append(imported)
            if progress is not None:
                progress(imported)
    return done


def epochs_of(paths: Sequence[Path], first_epoch: int | None = None) -> dict[int, Path]:
    """Epoch -> file, rising.

    An epoch is the number after "epoch" in the file's name, else the last number in it. Raises `InputError` where a
    name has no number, or where two files would be the same epoch; `first_epoch` is the way out.
    """
    if first_epoch is not None:
        ordered = sorted(paths, key=lambda path: [int(part) if part.isdecimal() else part for part in _parts(path)])
        return dict(enumerate(ordered, start=first_epoch))
    epochs: dict[int, Path] = {}
    for path in paths:
        found = re.search(r"epoch\D{0,3}?(\d+)", path.stem, re.IGNORECASE) or re.search(r"(\d+)\D*$", path.stem)
        if found is None:
            raise InputError(f"{path}: expected the epoch's number in the name, found none; number with --first-epoch")
        epoch = int(found[1])
        if epoch in epochs:
            raise InputError(
                f"{path}: its name says epoch {epoch}, and so does {epochs[epoch]}; number with --first-epoch"
            )
        epochs[epoch] = path
    return dict(sorted(epochs.items()))


def _record(writer: RunWriter, imported: Imported) -> None:
    path, epoch = imported.path, imported.epoch
    if imported.new:
        writer.require_next(epoch)
    tensors = read_checkpoint(path)
    known, parameters = writer.layout, None
    with placed(str(path)):
        with placed(f"{writer.path}: epoch {epoch}"):
            if known is not None:
                tensors = _arranged(known, tensors)
                parameters = {name for entry in known.weights for name in entry.names}
            layout = layout_of(tensors, parameters)
            weights, buffers = flatten(layout, tensors)
        if imported.new:
            writer.append(layout, epoch, weights, buffers)
        else:
            writer.heal(layout, epoch, weights, buffers)


def _arranged(known: ParameterLayout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the run's order, tied as in the run: files sort them, and keep one of a tied pair or copies."""
    arranged: dict[str, Tensor] = {}
    for entry in known.tensors:
        present = [tensors[name] for name in entry.names if name in tensors]
        if any(not _same_bits(present[0], copy) for copy in present[1:]):
            raise LayoutError(f"{' and '.join(entry.names)} differ, the run has them tied; record into a new run")
        if present:
            arranged |= dict.fromkeys(entry.names, present[0])
    return arranged | {name: tensor for name, tensor in tensors.items() if name not in known}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN included."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _parts(path: Path) -> list[str]:
    """The name cut into text and numbers, always text first, so that names compare naturally."""
    return re.split(r"(\d+)", path.name)
