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
from .selecting import EVERYTHING, Arranged, Selection, arrange
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

    The global step that a file says is recorded too, unless the run began without one, or files are numbered.

    Raises `InputError` or `LayoutError` naming the file that cannot be recorded; the files before it are.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file, expected a checkpoint; check the name")
    epochs = _numbered(paths, first_epoch, select)
    done: list[Imported] = []
    with RunWriter(run, fsync=fsync, nonfinite=nonfinite) as writer:
        importer = Importer(writer, select, steps=first_epoch is None, planned=len({*writer.epochs, *epochs}))
        for epoch, path in epochs.items():
            done.append(importer.record(path, epoch))
            if progress is not None:
                progress(done[-1])
    return done


class Importer:
    """Records checkpoints into a run, one after the other.

    steps: record the global step that a file says, where the run has steps or has not begun. planned: how many epochs
    the run will have, for a forecast of its size before the first one is recorded.
    """

    def __init__(self, writer: RunWriter, select: Selection, steps: bool = True, planned: int = 0) -> None:
        self.writer, self.select = writer, select
        self._steps, self._planned = steps, planned
        self._has_begun = False

    def record(self, path: Path, epoch: int, checkpoint: Checkpoint | None = None) -> Imported:
        """Record one checkpoint unless its epoch is recorded already, and heal it where that is damaged.

        checkpoint: the one at the path, where it is open already.
        """
        writer = self.writer
        imported = Imported(
            path, epoch, epoch not in writer.epochs, epoch in writer.healable_epochs, epoch in writer.lost_epochs
        )
        if imported.lost:
            logger.warning(
                "%s: epoch %s is damaged and its commit record is lost, %s cannot heal it;"
                " restore the record from a copy, or record into a new run",
                writer.path,
                epoch,
                path,
            )
        if imported.new:
            writer.require_next(epoch)
        if imported.new or imported.healed:
            self._record(imported, checkpoint or open_checkpoint(path, self.select.key))
        return imported

    def _record(self, imported: Imported, checkpoint: Checkpoint) -> None:
        writer = self.writer
        with placed(str(imported.path)):
            with placed(f"{writer.path}: epoch {imported.epoch}"):
                arranged = arrange(checkpoint, self.select, writer.layout)
                buffers = read_buffers(arranged)
            weights = StreamedWeights(arranged)
            if not imported.new:
                writer.heal(arranged.layout, imported.epoch, weights, buffers)
                return
            step = checkpoint.step if self._steps and (writer.has_steps or not writer.epochs) else None
            self._announce(arranged, step)
            writer.append(arranged.layout, imported.epoch, weights, buffers, step=step)

    def _announce(self, arranged: Arranged, step: int | None) -> None:
        """Say what will be recorded, before the first checkpoint is."""
        if self._has_begun:
            return
        self._has_begun = True
        if self.select.trainable_only and not arranged.tells_trainable:
            logger.info("the checkpoints do not say which weights are trained: only buffers are left out")
        planned = max(self._planned, len(self.writer.epochs) + 1)
        logger.info("%s: %s", self.writer.path, self.writer.forecast(arranged.layout, planned, step is not None))


def _numbered(paths: Sequence[Path], first_epoch: int | None, select: Selection) -> dict[int, Path]:
    """Epoch -> file, rising."""
    if first_epoch is not None:
        return dict(enumerate(sorted(paths, key=natural), start=first_epoch))
    named = by_epoch({path: epoch for path in paths if (epoch := epoch_in_name(path)) is not None})
    for path in paths:
        if path in named.values():
            continue
        epoch = _own_epoch(path, select)
        if epoch in named:  # such as the last.ckpt beside the others
            logger.info("%s: left out, it says that it is epoch %s, as %s is", path, epoch, named[epoch])
        else:
            named[epoch] = path
    return dict(sorted(named.items()))


def _own_epoch(path: Path, select: Selection) -> int:
    """What a checkpoint without a number in its name says of itself."""
    epoch = open_checkpoint(path, select.key).epoch
    if epoch is None:
        raise InputError(
            f"{path}: expected the epoch's number in the name, or in the file as epoch or step, found none;"
            " number with --first-epoch"
        )
    return epoch
