"""What a run has recorded already, for checkpoints of epochs that it has: are they the same, bit for bit?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..digest import canonical_json, digest
from ..errors import InputError, RunNotFoundError, placed
from ..layout import ParameterLayout, TensorEntry, require_same_layout
from ..run import PathLike, Run, open_run
from ..store.commit import LostRecord
from ..store.format import WEIGHTS, buffer_path, chunk_rule
from ..store.sources import Look, Source, read_sources
from .naming import Said
from .selecting import Arranged, Selection, arrange
from .stored import Checkpoint
from .streaming import StreamedWeights, read_buffers


class RecordedEpochs:
    """The epochs of a run, none where there is no run yet, and the checkpoints that they were recorded from.

    epochs: the recorded labels. healable: those that are marked as damaged and can be put right. lost: those whose
    commit record is lost. next_epoch: whether all checkpoints that say an epoch say the one after their label.
    """

    def __init__(self, run: PathLike, select: Selection) -> None:
        self.path = run
        self._selection = digest(canonical_json(asdict(select)))
        try:
            self._run: Run | None = open_run(run)
        except RunNotFoundError:
            self._run = None
        records = self._run.archive.records if self._run is not None else ()
        marks = self._run.archive.marks if self._run is not None else {}
        self.epochs = {record.epoch for record in records}
        self.healable = {mark.epoch for mark in marks.values() if mark.layout is None}
        self.lost = {record.epoch for record in records if isinstance(record, LostRecord)}
        sources = read_sources(self._run.archive.objects, [r.epoch for r in records]) if self._run is not None else {}
        said = [source.said_epoch - epoch for epoch, source in sources.items() if source.said_epoch is not None]
        self.next_epoch = bool(said) and set(said) == {1}
        self._sources = {epoch: source for epoch, source in sources.items() if source.selection == self._selection}
        self._said = {source.look: Said(source.said_epoch, source.said_step) for source in self._sources.values()}

    @property
    def layout(self) -> ParameterLayout | None:
        """The run's layout, None before its first epoch."""
        return None if self._run is None else self._run.layout

    def said(self, look: Look | None) -> Said | None:
        """Return what a checkpoint says that was recorded and has this look still, None where none has."""
        return None if look is None else self._said.get(look)

    def is_sound(self, epoch: int) -> bool:
        """Return whether an epoch is recorded, and not marked as damaged."""
        return epoch in self.epochs and epoch not in self.healable and epoch not in self.lost

    def is_unchanged(self, epoch: int, look: Look | None) -> bool:
        """Return whether an epoch was recorded from a checkpoint that had this look, and is sound."""
        source = self._sources.get(epoch)
        return source is not None and source.look == look and self.is_sound(epoch)

    def source(self, path: Path, epoch: int, look: Look, said: Said) -> Source:
        """Return what is kept of a checkpoint that an epoch was recorded from, or is the same as."""
        return Source(epoch, str(path), look, self._selection, said.epoch, said.step)

    def add(self, epoch: int) -> None:
        """Take in that an epoch was recorded or healed."""
        self.epochs.add(epoch)
        self.healable.discard(epoch)

    def require_next(self, epoch: int) -> None:
        """Raise `InputError` unless a new epoch comes after all that are recorded."""
        last = max(self.epochs, default=epoch - 1)
        if epoch < last:
            raise InputError(
                f"{self._root}: epoch {epoch} comes before the last one, {last}; go on after epoch {last}"
                " or record into a new run"
            )

    def require_same(self, epoch: int, checkpoint: Checkpoint, select: Selection) -> None:
        """Raise `InputError` unless a checkpoint has, bit for bit, what was recorded as an epoch; a piece at a time."""
        run = self._run
        if run is None or epoch not in run.epochs:
            run = self._run = open_run(self.path)
        where = f"{run.path}: epoch {epoch}"
        with placed(where):
            arranged = arrange(checkpoint, select, run.layout)
        require_same_layout(arranged.layout, run.layout, where)
        with placed(where):
            name = next(_differing(run, run.row_of(epoch), arranged), None)
        if name is not None:
            raise InputError(
                f"{where} is recorded already, with other values: '{name}' differs; give another epoch with --label"
                " or --epoch, or record into a new run"
            )

    @property
    def _root(self) -> PathLike:
        return self.path if self._run is None else self._run.path


def _differing(run: Run, row: int, arranged: Arranged) -> Iterator[str]:
    """Yield the names of tensors whose values differ from a row's, as far as they are asked for."""
    weights, read = StreamedWeights(arranged), run.archive.read
    for columns in chunk_rule(run.layout.n_weights).objects():
        recorded = read(WEIGHTS, [row], (columns.start, columns.stop))[0]
        different = np.flatnonzero(weights[columns].view(np.uint32) != recorded.view(np.uint32))
        if different.size:
            yield run.layout.weight_at(columns.start + int(different[0]))
    for dtype, vector in read_buffers(arranged).items():
        recorded = read(buffer_path(dtype), [row], (0, vector.size))[0]
        entries = [entry for entry in run.layout.buffers if entry.size and entry.vector == dtype]
        yield from (entry.name for entry in entries if _part(vector, entry) != _part(recorded, entry))


def _part(vector: NDArray[np.generic], entry: TensorEntry) -> bytes:
    return vector[entry.offset : entry.stop].tobytes()
