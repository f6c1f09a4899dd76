"""Recording from checkpoint files and folders that a training left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, placed
from ..run import NonFinite, PathLike, RunWriter
from .naming import by_epoch, epoch_in_name, natural
from .reading import open_checkpoint
from .selecting import EVERYTHING, Selection, arrange
from .stored import Checkpoint
from .streaming import StreamedWeights, read_buffers

logger = logging.getLogger("trajkit")


@dataclass(frozen=True)
class Imported:
    """A checkpoint and the epoch it is recorded as.

    `new` is False where that epoch was recorded before; `healed` is True where it was damaged and this put it right;
    `lost` is True where it is damaged and cannot be put right, since its commit record is lost.
    """

    path: Path
    epoch: int
    new: bool
    healed: bool = False
    lost: bool = False


def import_checkpoints(
    run: PathLike,
    files: Sequence[PathLike],
    first_epoch: int | None = None,
    fsync: bool = True,
    nonfinite: NonFinite = "raise",
    progress: Callable[[Imported], None] | None = None,
    select: Selection = EVERYTHING,
) -> list[Imported]:
    """Record checkpoints, files or folders, into a run, which is made if there is none; epochs recorded already are
    skipped, and bad ones are healed.

    first_epoch: number the files from here on in natural order of their names; by default an epoch is the number in
    the file's name, see `epoch_in_name`, or where that has none, the epoch or step that the file says of itself.
    progress: called after each file. select: which of the tensors are recorded.

    Raises `InputError` or `LayoutError` naming the file that cannot be recorded; the files before it are.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file, expected a checkpoint; check the name")
    epochs = _numbered(paths, first_epoch, select)
    done: list[Imported] = []
    with RunWriter(run, fsync=fsync, nonfinite=nonfinite) as writer:
        for epoch, path in epochs.items():
            done.append(record_checkpoint(writer, path, epoch, select))
            if progress is not None:
                progress(done[-1])
    return done


def record_checkpoint(
    writer: RunWriter, path: Path, epoch: int, select: Selection, checkpoint: Checkpoint | None = None
) -> Imported:
    """Record one checkpoint unless its epoch is recorded already, heal it where that is damaged.

    checkpoint: the one at the path, where it is open already.
    """
    known = epoch in writer.epochs
    imported = Imported(path, epoch, not known, epoch in writer.healable_epochs, epoch in writer.lost_epochs)
    if imported.new:
        writer.require_next(epoch)
    if imported.new or imported.healed:
        _record(writer, imported, checkpoint or open_checkpoint(path, select.key), select)
    return imported


def own_epoch(checkpoint: Checkpoint) -> int | None:
    """The epoch that a checkpoint says it is of, or else the step."""
    return checkpoint.step if checkpoint.epoch is None else checkpoint.epoch


def _numbered(paths: Sequence[Path], first_epoch: int | None, select: Selection) -> dict[int, Path]:
    """Epoch -> file, rising."""
    if first_epoch is not None:
        return dict(enumerate(sorted(paths, key=natural), start=first_epoch))
    return by_epoch({path: _epoch_of(path, select) for path in paths})


def _epoch_of(path: Path, select: Selection) -> int:
    epoch = epoch_in_name(path)
    epoch = own_epoch(open_checkpoint(path, select.key)) if epoch is None else epoch
    if epoch is None:
        raise InputError(
            f"{path}: expected the epoch's number in the name, or in the file as epoch or step, found none;"
            " number with --first-epoch"
        )
    return epoch


def _record(writer: RunWriter, imported: Imported, checkpoint: Checkpoint, select: Selection) -> None:
    with placed(str(imported.path)):
        with placed(f"{writer.path}: epoch {imported.epoch}"):
            arranged = arrange(checkpoint, select, writer.layout)
            buffers = read_buffers(arranged)
        weights = StreamedWeights(arranged)
        if imported.new:
            writer.append(arranged.layout, imported.epoch, weights, buffers)
        else:
            writer.heal(arranged.layout, imported.epoch, weights, buffers)
