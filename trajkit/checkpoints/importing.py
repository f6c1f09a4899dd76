"""Recording from checkpoint files and folders that a training left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, placed
from ..layout import stub_warning
from ..run import NonFinite, PathLike, RunWriter
from ..store.sources import Look
from .asked import Epochs, asked_labels, require_paths, require_pattern
from .comparing import RecordedEpochs
from .labels import By, Evidence, Label, Labelled, label_all
from .looks import look_at, may_change_unseen
from .naming import Said
from .reading import open_checkpoint
from .refs import Refs
from .selecting import EVERYTHING, Arranged, Selection, arrange
from .stored import Checkpoint
from .streaming import StreamedWeights, read_buffers

logger = logging.getLogger("trajkit")

HOW: Mapping[By, str] = {
    "name": "",
    "given": "",
    "content": ", by what it says",
    "number": ", by the number in its name",
}


@dataclass(frozen=True)
class Imported:
    """A checkpoint and the epoch it is recorded as.

    `new` is False where that epoch was recorded before, from the same values; `healed` is True where it was damaged and
    this put it right; `lost` is True where it is damaged and cannot be put right, since its commit record is lost. `by`
    says what the epoch comes from: a word of time in a ``name``, the ``content``, a bare ``number``, or what was
    ``given``.
    """

    path: Path
    epoch: int
    new: bool
    healed: bool = False
    lost: bool = False
    by: By = "name"

    @property
    def writes(self) -> bool:
        """Whether recording it changes the run."""
        return self.new or self.healed

    def __str__(self) -> str:
        if self.new:
            state = ""
        elif self.healed:
            state = ", heals it"
        else:
            state = ", is damaged beyond healing" if self.lost else ", recorded already"
        return f"epoch {self.epoch}: {self.path}{HOW[self.by]}{state}"


def import_checkpoints(
    run: PathLike,
    files: Iterable[PathLike],
    first_epoch: int | None = None,
    fsync: bool = True,
    nonfinite: NonFinite = "raise",
    progress: Callable[[Imported], None] | None = None,
    select: Selection = EVERYTHING,
    *,
    label: str | None = None,
    epochs: Epochs | None = None,
    dry_run: bool = False,
) -> list[Imported]:
    """Record checkpoints, files or folders, into a run, which is made if there is none.

    The epoch of a file follows from its name or its content by the rule of `trajkit.checkpoints.labels`, unless one of
    these is given. label: a regular expression whose group 1 is the number. epochs: the epoch of each file, in the
    order of the files or by file; an integer for one file. first_epoch: number the files from here on, in the natural
    order of their names and folders.

    An epoch that is recorded already has to have the same values in the file; one that is marked as bad is healed. The
    global step that a file says is recorded too, unless the run began without one, or the files are numbered.

    progress: called after each file. select: which of the tensors are recorded. dry_run: write nothing, and return what
    would become of each file. What becomes of each file is logged before anything is written.

    Raises `InputError` or `LayoutError`, before anything is written, naming the files whose epoch is not clear, that
    are no checkpoints, or that differ from what is recorded. A file that turns out not to fit as it is written is
    named, and the files before it are recorded.
    """
    paths, refs = require_paths(files), Refs()
    asked = asked_labels(paths, first_epoch, require_pattern(label), epochs, refs)
    recorded = RecordedEpochs(run, select)
    found = _labelled(paths, asked, recorded, select, refs)
    if dry_run or found.problems:
        return _planned(found, recorded, select, progress).items
    with RunWriter(run, fsync=fsync, nonfinite=nonfinite) as writer:
        if recorded.epochs != set(writer.epochs):  # another process has recorded meanwhile
            recorded = RecordedEpochs(run, select)
        plan = _planned(found, recorded, select, progress)
        epochs_after = recorded.epochs | {item.epoch for item in plan.items}
        importer = Importer(writer, select, recorded, steps=first_epoch is None, planned=len(epochs_after))
        for item, look, said in plan.compared:
            importer.keep(item, look, said)
        for item in plan.items:
            if item.writes:
                look = look_at(item.path)
                importer.record(item, open_checkpoint(item.path, select.key), look)
                if progress is not None:
                    progress(item)
    return plan.items


class Importer:
    """Records checkpoints into a run, one after the other.

    steps: record the global step that a file says, where the run has steps or has not begun. planned: how many epochs
    the run will have, for a forecast of its size before the first one is recorded.
    """

    def __init__(
        self, writer: RunWriter, select: Selection, recorded: RecordedEpochs, steps: bool = True, planned: int = 0
    ) -> None:
        self.writer, self.select, self.recorded = writer, select, recorded
        self._steps, self._planned = steps, planned
        self._has_begun = False
        self._said: set[str] = set()

    def record(self, item: Imported, checkpoint: Checkpoint, look: Look | None) -> None:
        """Record a checkpoint, or heal its epoch with it. look: the one that it had before it was opened."""
        with placed(str(item.path)):
            self._record(item, checkpoint)
        self.recorded.add(item.epoch)
        self.keep(item, look, checkpoint.said)

    def keep(self, item: Imported, look: Look | None, said: Said) -> None:
        """Keep what a checkpoint looked like whose values are those of its epoch, unless it has changed since."""
        if look is not None and look == look_at(item.path) and not may_change_unseen(look):
            self.writer.keep_source(self.recorded.source(item.path, item.epoch, look, said))

    def _record(self, item: Imported, checkpoint: Checkpoint) -> None:
        writer = self.writer
        with placed(f"{writer.path}: epoch {item.epoch}"):
            arranged = arrange(checkpoint, self.select, writer.layout)
            self._say(item.path, arranged)
            buffers = read_buffers(arranged)
        weights = StreamedWeights(arranged)
        if item.healed:
            writer.heal(arranged.layout, item.epoch, weights, buffers)
            return
        step = checkpoint.step if self._steps and (writer.has_steps or not writer.epochs) else None
        self._announce(arranged, step)
        writer.append(arranged.layout, item.epoch, weights, buffers, step=step)

    def _say(self, path: Path, arranged: Arranged) -> None:
        """Say once what was done to names or left out, and which weights have no values."""
        warning = stub_warning(arranged.layout)
        for level, said in [(logging.INFO, remark) for remark in arranged.remarks] + [(logging.WARNING, warning)]:
            if said is not None and said not in self._said:
                self._said.add(said)
                logger.log(level, "%s: %s", path, said)

    def _announce(self, arranged: Arranged, step: int | None) -> None:
        """Log what will be recorded, before the first checkpoint is."""
        if self._has_begun:
            return
        self._has_begun = True
        if self.select.trainable_only and not arranged.tells_trainable:
            logger.info("the checkpoints do not say which weights are trained: only buffers are left out")
        planned = max(self._planned, len(self.writer.epochs) + 1)
        logger.info("%s: %s", self.writer.path, self.writer.forecast(arranged.layout, planned, step is not None))


def state_of(path: Path, label: Label, recorded: RecordedEpochs) -> Imported:
    """Return what becomes of a checkpoint in a run that has recorded these epochs."""
    epoch = label.epoch
    new, healed, lost = epoch not in recorded.epochs, epoch in recorded.healable, epoch in recorded.lost
    if lost:
        logger.warning(
            "%s: epoch %s is damaged and its commit record is lost, %s cannot heal it;"
            " restore the record from a copy, or record into a new run",
            recorded.path,
            epoch,
            path,
        )
    return Imported(path, epoch, new, healed, lost, label.by)


def evidence_of(path: Path, recorded: RecordedEpochs, select: Selection, refs: Refs) -> Evidence:
    """Return what speaks for a checkpoint's epoch; it is opened, unless it looks as it did when it was recorded."""
    said = recorded.said(look_at(path))
    if said is None:
        said = open_checkpoint(path, select.key).said
    return Evidence.of(path, refs.named(path), said)


def _labelled(
    paths: Sequence[Path], asked: dict[Path, Label] | None, recorded: RecordedEpochs, select: Selection, refs: Refs
) -> Labelled:
    """Return the labels of all files that are checkpoints, and what is wrong with the others."""
    files: list[Evidence] = []
    problems: list[InputError] = []
    for path in paths:
        try:
            files.append(evidence_of(path, recorded, select, refs))
        except InputError as error:
            problems.append(error)
    if asked is None:
        found = label_all(files, recorded.next_epoch)
    else:
        opened = {file.path for file in files}
        found = Labelled({path: label for path, label in asked.items() if path in opened})
    found.problems[:0] = problems
    return found


@dataclass
class _Plan:
    """What becomes of each file, and the files that were compared with their recorded epochs, with their looks."""

    items: list[Imported] = field(default_factory=list)
    compared: list[tuple[Imported, Look | None, Said]] = field(default_factory=list)


def _planned(
    found: Labelled,
    recorded: RecordedEpochs,
    select: Selection,
    progress: Callable[[Imported], None] | None,
) -> _Plan:
    """Return what becomes of each file, and log it; those of recorded epochs are compared.

    Raises `InputError` naming all that have a problem already, differ from what is recorded, or come too late.
    """
    plan, problems = _Plan(), list(found.problems)
    for path, label in found.labels.items():
        item = state_of(path, label, recorded)
        plan.items.append(item)
        try:
            if item.new:
                with placed(str(path)):
                    recorded.require_next(item.epoch)
            elif not item.writes and not item.lost and not recorded.is_unchanged(item.epoch, look := look_at(path)):
                plan.compared.append(
                    (item, look, require_same(item, open_checkpoint(path, select.key), recorded, select))
                )
        except InputError as error:
            problems.append(error)
        if progress is not None and not item.writes:
            progress(item)
    _raise(problems)
    for item in plan.items:
        logger.info("%s", item)
    return plan


def require_same(item: Imported, checkpoint: Checkpoint, recorded: RecordedEpochs, select: Selection) -> Said:
    """Compare a checkpoint with its recorded epoch, and return what it says; raises `InputError` where they differ."""
    with placed(str(item.path)):
        recorded.require_same(item.epoch, checkpoint, select)
    return checkpoint.said


def _raise(problems: Sequence[InputError]) -> None:
    """Raise one problem as it is, and several as one error that lists them."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(f"{len(problems)} checkpoints cannot be recorded, and nothing is written:\n{lines}")
