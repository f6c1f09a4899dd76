"""Appending epochs by the commit protocol of `trajkit.store.format`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PathExistsError
from ..layout import ParameterLayout
from .arrays import encode, with_rows
from .commit import CommitRecord, StoredObject, read_records, record_hash
from .format import (
    BUFFERS,
    COMMITS,
    EPOCH,
    LOCKS,
    METADATA,
    PROBE,
    PROBE_INDEX,
    TEMPORARY,
    WEIGHTS,
    array_document,
    buffer_path,
    chunk_rule,
    commit_key,
    group_document,
    row_arrays,
    saves_enough,
)
from .lock import WriterLock
from .objects import LocalObjects
from .root import create_root, layout_of_root, read_document, refresh_root, write_document


class ArchiveWriter:
    """The one writer of an archive, from construction until `close`.

    Opening makes an existing archive whole: epochs that were committed become visible, what was not is cleared.
    Raises `RunLockedError` while another writer holds the archive, and `PathExistsError` where the directory holds
    something else.
    """

    def __init__(self, objects: LocalObjects) -> None:
        self._objects = objects
        self._writer = uuid.uuid4().hex
        self._require_ours()
        self._lock = WriterLock(objects.path(f"{LOCKS}/writer"), f"{objects.root}: the run")
        self.records: tuple[CommitRecord, ...] = ()
        self._arrays: dict[str, dict[str, Any]] = {}
        self._whole = False
        try:
            self._make_whole()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let the next writer in."""
        self._lock.release()

    @property
    def layout(self) -> ParameterLayout | None:
        """The layout of the archive, None until the first epoch is committed."""
        return layout_of_root(self._objects) if self.records else None

    def append(
        self,
        layout: ParameterLayout,
        epoch: int,
        weights: NDArray[np.float32],
        buffers: Mapping[str, NDArray[Any]],
        probe_index: NDArray[np.int64],
        metrics: Mapping[str, float],
    ) -> CommitRecord:
        """Commit one epoch: `weights` (N,), `buffers` stored dtype -> (size,), `probe_index` (P,).

        The epoch is recorded when this returns. If it raises, the archive is as it was, or as after a crash: the next
        append, or the next writer, makes it whole.
        """
        if not self._whole:
            self._make_whole()
        self._whole = False
        began = time.perf_counter()
        row = len(self.records)
        written: dict[str, StoredObject] = {}
        if row == 0:
            self._arrays = self._create_arrays(layout, weights, probe_index, written)
        self._write_row(row, epoch, weights, buffers, weights[probe_index], written)
        if row == 0:
            self._objects.sync_names()
            create_root(self._objects, layout)
        self._objects.sync_names()
        record = CommitRecord(
            row=row,
            epoch=epoch,
            metrics=dict(metrics),
            recorded_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=round(time.perf_counter() - began, 6),
            layout=layout.digest,
            writer=self._writer,
            previous=record_hash(self.records[-1]) if row else None,
            objects=written,
        )
        self._objects.create_atomically(commit_key(row), record.to_bytes())
        self.records = (*self.records, record)
        self._grow()
        self._whole = True
        return record

    def _create_arrays(
        self,
        layout: ParameterLayout,
        weights: NDArray[np.float32],
        probe_index: NDArray[np.int64],
        written: dict[str, StoredObject],
    ) -> dict[str, dict[str, Any]]:
        arrays = row_arrays(layout, probe_index.size, zstd=saves_enough(weights))
        if layout.buffer_sizes:
            write_document(self._objects, BUFFERS, group_document())
        for path, document in arrays.items():
            write_document(self._objects, path, document)
        document = array_document("int64", probe_index.shape, probe_index.shape, ("probe_weight",))
        write_document(self._objects, PROBE_INDEX, document)
        self._put_objects(PROBE_INDEX, document, (slice(None),), probe_index, written)
        return arrays

    def _write_row(
        self,
        row: int,
        epoch: int,
        weights: NDArray[np.float32],
        buffers: Mapping[str, NDArray[Any]],
        probe: NDArray[np.float32],
        written: dict[str, StoredObject],
    ) -> None:
        here = slice(row, row + 1)
        grown = {path: with_rows(document, row + 1) for path, document in self._arrays.items()}
        for columns in chunk_rule(weights.size).objects():
            self._put_objects(WEIGHTS, grown[WEIGHTS], (here, columns), weights[None, columns], written)
        self._put_objects(PROBE, grown[PROBE], (here, slice(None)), probe[None], written)
        for dtype, values in buffers.items():
            path = buffer_path(dtype)
            self._put_objects(path, grown[path], (here, slice(None)), values[None], written)
        self._put_objects(EPOCH, grown[EPOCH], (here,), np.array([epoch]), written)

    def _put_objects(
        self,
        path: str,
        document: dict[str, Any],
        region: tuple[slice, ...],
        values: NDArray[Any],
        written: dict[str, StoredObject],
    ) -> None:
        for key, data in encode(path, document, region, values).items():
            self._objects.create(key, data)
            written[key] = StoredObject.of(data)

    def _grow(self) -> None:
        """Make the shapes say what is committed."""
        for path, document in self._arrays.items():
            if document["shape"][0] < len(self.records):
                self._arrays[path] = with_rows(document, len(self.records))
                write_document(self._objects, path, self._arrays[path])
        refresh_root(self._objects)
        self._objects.sync_names()

    def _make_whole(self) -> None:
        self.records = read_records(self._objects)
        self._objects.delete_tree(TEMPORARY)
        if not self.records:
            self._clear_unborn()
            self._arrays = {}
        else:
            layout = layout_of_root(self._objects)
            paths = row_arrays(layout, n_probe=1, zstd=False)
            self._arrays = {path: read_document(self._objects, f"{path}/{METADATA}") for path in paths}
            for path in paths:
                for row in self._objects.names(f"{path}/c"):
                    if int(row) >= len(self.records):
                        self._objects.delete_tree(f"{path}/c/{row}")
                        self._objects.delete(f"{path}/c/{row}")
            self._grow()
        self._whole = True

    def _clear_unborn(self) -> None:
        """Remove what a first epoch left that was never committed."""
        self._objects.delete(METADATA)
        for path in (WEIGHTS, PROBE, PROBE_INDEX, BUFFERS, f"{EPOCH}/c"):
            self._objects.delete_tree(path)
        self._objects.delete(f"{EPOCH}/{METADATA}")

    def _require_ours(self) -> None:
        """Refuse a directory that holds something else; nothing is ever written into it."""
        names = self._objects.names("")
        if names and not self._objects.path(LOCKS).is_dir() and not self._objects.path(COMMITS).is_dir():
            raise PathExistsError(
                f"{self._objects.root}: expected a run or an empty folder, found '{names[0]}';"
                " choose another path for the run"
            )


def open_writer(root: Path, fsync: bool = True) -> ArchiveWriter:
    """The writer of the archive in directory `root`, which is made if it does not exist."""
    if root.exists() and not root.is_dir():
        raise PathExistsError(f"{root}: expected a folder, found a file; choose another path for the run")
    return ArchiveWriter(LocalObjects(root, fsync=fsync))
