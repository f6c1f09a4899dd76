"""Reading an archive: what is committed, as lazily opened arrays that refuse damage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..digest import digest
from ..errors import DamagedRunError, RunNotFoundError
from ..layout import ParameterLayout
from .arrays import open_array, whole_chunks, with_rows
from .commit import CommitRecord, StoredObject, read_records
from .format import METADATA, PROBE_INDEX, WEIGHTS
from .objects import LocalObjects
from .root import layout_of_root, read_document

Columns = tuple[int, int]


@dataclass(frozen=True)
class Archive:
    """A run's committed state at the moment of opening. Later commits are seen by opening again."""

    objects: LocalObjects
    layout: ParameterLayout
    records: tuple[CommitRecord, ...]

    @classmethod
    def open(cls, root: Path) -> Archive:
        """Open the archive in a directory.

        Raises `RunNotFoundError` where there is none or nothing was committed yet, `UnsupportedFormatError` for
        another format, `DamagedRunError` where metadata or commit records are damaged.
        """
        objects = LocalObjects(root)
        if not objects.exists(METADATA):
            raise RunNotFoundError(f"{root}: no run here, expected a directory with a {METADATA}; check the path")
        layout = layout_of_root(objects)
        records = read_records(objects)
        if not records:
            raise RunNotFoundError(f"{root}: the run has no epoch yet; wait for the first one to be recorded")
        if any(record.layout != layout.digest for record in records):
            raise DamagedRunError(
                f"{root}: the layout in {METADATA} is not the one that was recorded; restore {METADATA} from a copy"
            )
        return cls(objects, layout, records)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def committed(self) -> dict[str, StoredObject]:
        """Every object that a commit names."""
        return {key: stored for record in self.records for key, stored in record.objects.items()}

    def document(self, path: str) -> dict[str, Any]:
        """The ``zarr.json`` of an array."""
        return read_document(self.objects, f"{path}/{METADATA}")

    def array(self, path: str) -> Any:
        """The zarr array at `path` with exactly the committed rows; it checks nothing, `read` does."""
        document = self.document(path)
        if path != PROBE_INDEX:
            document = with_rows(document, len(self.records))
        return self._arrays.setdefault(path, open_array(self.objects, path, document))

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return {}

    def read(self, path: str, rows: Sequence[int] | NDArray[np.integer[Any]], columns: Columns) -> NDArray[Any]:
        """Values (len(rows), stop - start) of an array with rows, in the order of `rows`.

        Raises `DamagedRunError` naming epoch, tensor and object where an object that it needs is damaged.
        """
        array = self._arrays.get(path)
        if array is None:
            array = self.array(path)
        start, stop = columns
        whole = whole_chunks(array, start, stop, axis=1)
        wanted = np.asarray(rows, dtype=np.int64)
        keys = list(self._keys(path, array, wanted, columns))
        self.require(keys)
        try:
            if wanted.size and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + wanted.size)):
                found = np.asarray(array[int(wanted[0]) : int(wanted[0]) + wanted.size, whole])
            else:
                found = np.empty((wanted.size, whole.stop - whole.start), dtype=array.dtype)
                for position, row in enumerate(wanted):
                    found[position] = array[int(row), whole]
            return found[:, start - whole.start : stop - whole.start]
        except (ValueError, RuntimeError, OSError) as error:
            self.blame(keys)
            raise DamagedRunError(f"{self.objects.root}: {path} cannot be read ({error})") from error

    def read_vector(self, path: str) -> NDArray[Any]:
        """All values of a one-dimensional array without rows, such as the probe's indices."""
        key = f"{path}/c/0"
        self.require([key])
        try:
            return np.asarray(self.array(path)[:])
        except (ValueError, RuntimeError, OSError) as error:
            self.blame([key])
            raise DamagedRunError(f"{self.objects.root}: {path} cannot be read ({error})") from error

    def require(self, keys: Iterable[str]) -> None:
        """Raise `DamagedRunError` if an object is missing or has another length than was committed.

        Zarr would read such an object as fill values, without a word.
        """
        for key in keys:
            found, expected = self.objects.size(key), self.committed[key].length
            if found != expected:
                state = "missing" if found is None else f"{found} bytes long"
                raise self._damage(key, f"is {state}, {expected} bytes were committed")

    def blame(self, keys: Iterable[str]) -> None:
        """Raise `DamagedRunError` for the first object whose content is not what was committed."""
        for key in keys:
            if digest(self.objects.read(key)) != self.committed[key].hash:
                raise self._damage(key, "does not have the content that was committed")

    def _keys(self, path: str, array: Any, rows: NDArray[np.int64], columns: Columns) -> Iterable[str]:
        """The objects that hold the given rows and columns of an array with rows."""
        stored = array.shards or array.chunks
        for row in rows:
            if array.ndim == 1:
                yield f"{path}/c/{row}"
            else:
                for piece in range(columns[0] // stored[1], -(-columns[1] // stored[1])):
                    yield f"{path}/c/{row}/{piece}"

    def _damage(self, key: str, what: str) -> DamagedRunError:
        path, _, position = key.partition("/c/")
        indices = [int(index) for index in position.split("/")]
        where = f"{self.objects.root}: "
        if path != PROBE_INDEX:
            where += f"epoch {self.records[indices[0]].epoch}: "
        if path == WEIGHTS:
            array = self.array(path)
            width = (array.shards or array.chunks)[1]
            first = self.layout.weight_at(indices[1] * width)
            last = self.layout.weight_at(min((indices[1] + 1) * width, self.layout.n_weights) - 1)
            where += f"'{first}': " if first == last else f"'{first}' to '{last}': "
        return DamagedRunError(f"{where}object {key} {what}; restore it from a copy of the run")
