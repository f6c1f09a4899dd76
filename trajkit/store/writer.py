"""Appending epochs by the commit protocol of `trajkit.store.format`."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedRunError, InputError, PathExistsError, RunLockedError, TrajkitError
from ..layout import ParameterLayout, require_same_layout
from .archive import committed_documents, place_of, read_all_records
from .arrays import store, with_rows
from .commit import CommitRecord, LostRecord, StoredObject
from .damage import mark_key, move_aside, read_marks
from .format import (
    BUFFERS,
    COMMITS,
    EPOCH,
    IDENTITY,
    LAYOUT_COPIES,
    LOCKS,
    METADATA,
    PROBE,
    PROBE_INDEX,
    STEP,
    WEIGHTS,
    all_arrays,
    buffer_path,
    commit_key,
    group_document,
    saves_enough,
)
from .origin import identity_of
from .pieces import PassingWeights, WeightSource
from .place import Objects, PathLike, is_url, objects_at, require_place
from .root import (
    RootSpelling,
    read_root,
    require_readable,
    root_document,
    spelled,
    with_arrays,
    with_identity,
    write_documents,
    write_layout_copies,
)
from .sources import Source, source_key

WRITER = "writer"
"""The lock of whoever records, and the owner of its temporary files."""


@dataclass(frozen=True)
class EpochValues:
    """What is recorded of one epoch: `weights` (N,) float32, `buffers` stored dtype -> (size,), metrics, and a step.

    With `finite`, NaN and infinite weights are refused.
    """

    epoch: int
    weights: WeightSource
    buffers: Mapping[str, NDArray[Any]]
    metrics: Mapping[str, float]
    step: int | None = None
    finite: bool = False


@dataclass(frozen=True)
class _Grown:
    """The metadata of an archive with more epochs, and the objects that it is written as."""

    root: dict[str, Any]
    documents: dict[str, dict[str, Any]]
    contents: dict[str, bytes]


class ArchiveWriter:
    """The one writer of an archive, from construction until `close`; threads may share it.

    Opening makes an existing archive whole: epochs that were committed become visible, what was not is cleared.
    Raises `RunLockedError` while another writer holds the archive, and `PathExistsError` where the directory holds
    something else. `records` are those of the committed epochs, `layout` is None before the first.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._writer = uuid.uuid4().hex
        self._require_ours()
        self._lock = objects.lock(WRITER, "the run")
        self._one_at_a_time = threading.Lock()
        self.records: tuple[CommitRecord, ...] = ()
        self.layout: ParameterLayout | None = None
        self._root: dict[str, Any] = {}
        self._root_spelling = RootSpelling()
        self._documents: dict[str, dict[str, Any]] = {}
        self._whole = False
        try:
            self._make_whole()
        except BaseException:
            self._lock.release()
            raise

    @property
    def root(self) -> Path | str:
        """The directory of the archive, absolute, or its URL."""
        return self._objects.root

    @property
    def healable_epochs(self) -> tuple[int, ...]:
        """The recorded epochs that are marked as bad, and whose commit record says what they were; rising."""
        return tuple(mark.epoch for _, mark in sorted(read_marks(self._objects).items()) if mark.layout is None)

    @property
    def lost_epochs(self) -> tuple[int, ...]:
        """The recorded epochs whose commit record is lost; rising."""
        return tuple(record.epoch for record in self.records if isinstance(record, LostRecord))

    def close(self) -> None:
        """Let the next writer in."""
        with contextlib.suppress(OSError):  # what shows the epochs to plain Zarr; they are safe already
            self._objects.sync_names()
        self._lock.release()

    def require_next(self, epoch: int) -> None:
        """Raise `InputError` unless the epoch is later than the last one and a 64-bit integer."""
        recorded = [record.epoch for record in self.records]
        if recorded and epoch <= recorded[-1]:
            state = "is recorded already" if epoch in recorded else f"comes before the last one, {recorded[-1]}"
            raise InputError(
                f"{self._objects.root}: epoch {epoch} {state}; go on after epoch {recorded[-1]}"
                " or record into a new run"
            )
        if not -(2**63) <= epoch < 2**63:
            raise InputError(f"{self._objects.root}: epoch {epoch} is no 64-bit integer; number the epochs from 0")

    def require_step(self, epoch: int, step: int | None) -> None:
        """Raise `InputError` unless the step is a 64-bit integer after the last one, or None as all others."""
        where, last = f"{self._objects.root}: epoch {epoch}", self.records[-1] if self.records else None
        if step is not None and not -(2**63) <= step < 2**63:
            raise InputError(f"{where}: step {step} is no 64-bit integer; count the steps of the training from 0")
        if last is None or step is last.step is None:
            return
        if step is None:
            raise InputError(f"{where} has no step, the epochs before it have one; pass the training's step")
        if last.step is None:
            raise InputError(
                f"{where} has step {step}, the epochs before it have none; leave it out or record into a new run"
            )
        if step <= last.step:
            raise InputError(
                f"{where} has step {step}, expected one after {last.step}, that of epoch {last.epoch};"
                " pass the training's step, which rises, or record into a new run"
            )

    def append(self, layout: ParameterLayout, values: EpochValues, probe_index: NDArray[np.int64]) -> CommitRecord:
        """Commit one epoch; `probe_index` (P,) are the weights of the probe, the same for every epoch.

        The epoch is recorded when this returns. If it raises, the epoch is recorded or not, and never in part: the
        next append, or the next writer, makes the archive whole.
        """
        with self._one_at_a_time:
            self._require_held()
            if not self._whole:
                self._make_whole()
            self.require_next(values.epoch)
            self.require_step(values.epoch, values.step)
            where = f"{self._objects.root}: epoch {values.epoch}"
            if self.layout is not None:
                require_same_layout(layout, self.layout, where)
                layout = self.layout  # whose hash is known
            weights = PassingWeights(layout, values.weights, probe_index, where, values.finite)
            _require_buffers(layout, values.buffers, where)
            self._whole = False
            record = self._write(layout, values, weights)
            data = require_readable(record.to_bytes(), where)
            grown = self._grown((*self.records, record))
            self._objects.stage({commit_key(record.row): data} | grown.contents)
            self._objects.sync_names()
            self._require_lock(self._lock.confirmed)
            self._commit(record, data)
            self.records, self.layout = (*self.records, record), layout
            # The epoch is recorded. Where its shapes cannot grow now (a full disk), the next append makes up for it.
            # Nobody waits until they have reached the disk: whoever opens the run after a power cut grows them again.
            with contextlib.suppress(OSError):
                self._grow(grown)
                self._whole = True
            return record

    def heal(self, layout: ParameterLayout, values: EpochValues, probe_index: NDArray[np.int64]) -> tuple[str, ...]:
        """Put back the damaged objects of a recorded epoch, which `values` must give bit for bit; their keys.

        Raises `InputError` where the values are others than were recorded, or nothing says what was. Objects that come
        before the first other value are back in place then, as they were committed.
        """
        with self._one_at_a_time:
            self._require_held()
            record = next(record for record in self.records if record.epoch == values.epoch)
            where = f"{self._objects.root}: epoch {values.epoch}"
            if self.layout is None or isinstance(record, LostRecord):
                raise InputError(
                    f"{where}: its commit record is lost, so nothing says what was recorded;"
                    " restore the record from a copy, or record into a new run"
                )
            require_same_layout(layout, self.layout, where)
            weights = PassingWeights(layout, values.weights, probe_index, where)
            _require_buffers(layout, values.buffers, where)
            healed: list[str] = []

            def put_back(key: str, *parts: bytes | memoryview) -> None:
                if StoredObject.of(*parts) != record.objects[key]:
                    place = place_of(key, layout, lambda _: values.epoch)
                    raise InputError(
                        f"{self._objects.root}: {place}the values are not those that were recorded as object {key};"
                        " give the checkpoint of this epoch"
                    )
                if not self._is_sound(key, record.objects[key]):
                    self._require_held()
                    move_aside(self._objects, key, self._writer)
                    self._objects.create_atomically(key, b"".join(parts))
                    healed.append(key)

            self._store_row(put_back, record.row, replace(values, step=record.step), weights)
            move_aside(self._objects, mark_key(record.row), self._writer)
            self._objects.sync_names()
            return tuple(healed)

    def keep_source(self, source: Source) -> None:
        """Keep what a recorded epoch was recorded from; where that cannot be kept, nothing is lost but a comparison."""
        with self._one_at_a_time, contextlib.suppress(OSError, TrajkitError):
            self._require_held()
            row = bisect_left(self.records, source.epoch, key=lambda record: record.epoch)
            if row < len(self.records) and self.records[row].epoch == source.epoch:
                self._objects.replace({source_key(row): source.to_bytes()})

    def _is_sound(self, key: str, stored: StoredObject) -> bool:
        try:
            self._objects.sound_file(key, stored.length, stored.hash)
        except DamagedRunError:
            return False
        return True

    def _commit(self, record: CommitRecord, data: bytes) -> None:
        """Put the record where there is none; raises `RunLockedError` where somebody has taken the archive over."""
        where = f"{self._objects.root}: epoch {record.epoch}"
        try:
            self._objects.create_atomically(commit_key(record.row), data)
        except FileExistsError as error:
            raise RunLockedError(f"{where}: another writer has recorded one here; open the run again") from error
        if not self._lock.confirmed:
            raise RunLockedError(f"{where}: another writer has taken the run over; open it again")

    def _write(self, layout: ParameterLayout, values: EpochValues, weights: PassingWeights) -> CommitRecord:
        """Write the objects of an epoch, which nobody sees yet; the record that will name them."""
        began = time.perf_counter()
        row = len(self.records)
        written: dict[str, StoredObject] = {}
        if row == 0:
            self._create_arrays(layout, weights, values.step is not None, written)
        written |= self._store_row(self._objects.create, row, values, weights)
        if row == 0:
            self._objects.sync_names()
            write_documents(self._objects, {"": with_arrays(self._root, self._documents)})
        return CommitRecord(
            row=row,
            epoch=values.epoch,
            metrics=dict(values.metrics),
            recorded_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=round(time.perf_counter() - began, 6),
            layout=layout.digest,
            writer=self._writer,
            previous=self.records[-1].hash if row else None,
            objects=written,
            step=values.step,
            weights=weights.digest,
        )

    def _create_arrays(
        self, layout: ParameterLayout, weights: PassingWeights, steps: bool, written: dict[str, StoredObject]
    ) -> None:
        probe_index = weights.probe_index
        self._root = root_document(layout)
        self._documents = all_arrays(layout, probe_index.size, saves_enough(weights.peek()), steps)
        groups = {BUFFERS: group_document()} if layout.buffer_sizes else {}
        write_layout_copies(self._objects, layout)
        write_documents(self._objects, groups | self._documents)
        written |= store(self._objects.create, PROBE_INDEX, self._documents[PROBE_INDEX], (slice(None),), probe_index)

    def _store_row(
        self, write: Callable[..., None], row: int, values: EpochValues, weights: PassingWeights
    ) -> dict[str, StoredObject]:
        """Store a row of every array that has them, see `store`."""
        written: dict[str, StoredObject] = {}
        here = slice(row, row + 1)
        grown = {path: with_rows(document, row + 1) for path, document in self._documents.items()}
        for columns, piece in weights:
            written |= store(write, WEIGHTS, grown[WEIGHTS], (here, columns), piece[None])
        written |= store(write, PROBE, grown[PROBE], (here, slice(None)), weights.probe[None])
        for dtype, vector in values.buffers.items():
            path = buffer_path(dtype)
            written |= store(write, path, grown[path], (here, slice(None)), vector[None])
        for path, label in ((EPOCH, values.epoch), (STEP, values.step)):
            if label is not None:
                written |= store(write, path, grown[path], (here,), np.array([label]))
        return written

    def _grown(self, records: Sequence[CommitRecord]) -> _Grown:
        """Return the metadata that shows these epochs; `contents` has of it what is not written so already."""
        rows = len(records)
        grown = {
            path: with_rows(document, rows)
            for path, document in self._documents.items()
            if path != PROBE_INDEX and document["shape"][0] < rows
        }
        documents = self._documents | grown
        root = self._root if IDENTITY in self._root["attributes"] else with_identity(self._root, identity_of(records))
        root = with_arrays(root, documents)
        contents = spelled(grown)
        if root != self._root:
            contents[METADATA] = self._root_spelling.of(root)
        return _Grown(root, documents, contents)

    def _grow(self, grown: _Grown) -> None:
        """Make the shapes say what is committed."""
        self._objects.replace(grown.contents)
        self._documents, self._root = grown.documents, grown.root

    def _make_whole(self) -> None:
        self.records = read_all_records(self._objects, read_marks(self._objects))
        self._objects.clear_temporary()
        if not self.records:
            self._clear_unborn()
        else:
            root = read_root(self._objects)
            self._root, self.layout = root.document, root.layout
            self._documents = committed_documents(self._objects, self.layout, self.records)
            for path in self._documents.keys() - {PROBE_INDEX}:
                for row in self._objects.names(f"{path}/c"):
                    if row.isdecimal() and int(row) >= len(self.records):
                        self._objects.delete_tree(f"{path}/c/{row}")
                        self._objects.delete(f"{path}/c/{row}")
            self._grow(self._grown(self.records))
        # After a crash nobody knows which names had reached the disk; before the first commit, not even the run's own.
        above = self._objects.above
        self._objects.sync_names(*(above[:1] if self.records else above), "", EPOCH, COMMITS)
        self._whole = True

    def _clear_unborn(self) -> None:
        """Remove what a first epoch left that was never committed."""
        self._objects.delete(METADATA)
        for path in (WEIGHTS, PROBE, PROBE_INDEX, STEP, BUFFERS, f"{EPOCH}/c"):
            self._objects.delete_tree(path)
        self._objects.delete(f"{EPOCH}/{METADATA}")
        self._objects.delete(LAYOUT_COPIES[0])

    def _require_held(self) -> None:
        self._require_lock(self._lock.held or self._lock.confirmed)  # nobody may have wanted a lease that ran out

    def _require_lock(self, ours: bool) -> None:
        if not ours:
            raise InputError(
                f"{self._objects.root}: the writer is closed, or has lost the run to another, or belongs to the process"
                " that this one was forked from; record with a new one"
            )

    def _require_ours(self) -> None:
        """Refuse a directory that holds something else; nothing is ever written into it."""
        names = self._objects.names("")
        if names == [EPOCH] and not self._objects.names(EPOCH):
            return  # a writer was killed before it could lock
        if names and not {LOCKS, COMMITS} & {f"{EPOCH}/{name}" for name in self._objects.names(EPOCH)}:
            raise PathExistsError(
                f"{self._objects.root}: expected a run or an empty folder, found '{names[0]}';"
                " choose another path for the run"
            )


def _require_buffers(layout: ParameterLayout, buffers: Mapping[str, NDArray[Any]], where: str) -> None:
    """Raise `InputError` unless the buffers are exactly those that the layout places."""
    expected = {dtype: (dtype, (size,)) for dtype, size in layout.buffer_sizes.items()}
    found = {dtype: (str(vector.dtype), vector.shape) for dtype, vector in buffers.items()}
    for name in expected.keys() | found.keys():
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{where}: buffers['{name}'] is {found.get(name, 'missing')}, the layout asks for"
                f" {expected.get(name, 'none')}; pass the vectors that the layout places"
            )


def is_being_written(place: PathLike) -> bool:
    """Whether a writer holds the archive at a path or URL."""
    return objects_at(place).is_locked(WRITER)


def open_writer(place: PathLike, fsync: bool = True) -> ArchiveWriter:
    """The writer of the archive at a path or URL; it is made if it does not exist."""
    require_place(place)
    if not is_url(place) and os.path.exists(place) and not os.path.isdir(place):
        raise PathExistsError(f"{place}: expected a folder, found a file; choose another path for the run")
    return ArchiveWriter(objects_at(place, fsync, owner=WRITER))
