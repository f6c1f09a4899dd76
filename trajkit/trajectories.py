"""The (E, N) matrix of a run as an array that reads where it is indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .store.archive import Archive
from .store.format import WEIGHTS, chunk_rule


@dataclass(frozen=True)
class Trajectories:
    """E recorded epochs of N weights, float32, read from the archive where it is indexed.

    Indexes like a NumPy array: integers, slices, and an array or list of integers or booleans along one axis.
    `numpy.asarray` reads all of it, `dask.array.from_array` takes it as it is. A read that meets a damaged object
    raises `DamagedRunError`.
    """

    archive: Archive

    @property
    def shape(self) -> tuple[int, int]:
        """(E, N)"""
        return len(self.archive), self.archive.layout.n_weights

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32"""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """2"""
        return 2

    @property
    def size(self) -> int:
        """E · N"""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix in memory."""
        return self.size * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, int]:
        """(1, c): what one read decodes at least."""
        return 1, chunk_rule(self.shape[1]).chunk

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the trajectories lie on disk, an array of them is always a copy; leave out copy=False")
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        row_key, column_key = self._two_axes(key)
        rows = np.arange(self.shape[0])[row_key]
        if rows.ndim > 1:
            raise IndexError(f"epochs are indexed by integers, slices, masks or lists of them; found {row_key!r}")
        wanted = np.atleast_1d(rows)
        if isinstance(column_key, slice):
            start, stop, step = column_key.indices(self.shape[1])
            if step == 1:
                columns = (start, max(start, stop))
                self.archive.check(WEIGHTS, wanted, columns)
                out = self.archive.read(WEIGHTS, wanted, columns)
            else:
                out = self.gather(wanted, np.arange(start, stop, step))
        else:
            index = self._columns(column_key)
            out = self.gather(wanted, np.atleast_1d(index))
            out = out[:, 0] if index.ndim == 0 else out
        return out[0] if rows.ndim == 0 else out

    def gather(self, rows: NDArray[np.int64] | Any, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), k) values of the columns in `index`, any order; one stored chunk at a time."""
        out = np.empty((len(rows), index.size), dtype=self.dtype)
        width = self.chunks[1]
        order = np.argsort(index, kind="stable")
        chunk_of = index[order] // width
        for chunk in np.unique(chunk_of):
            places = order[np.searchsorted(chunk_of, chunk) : np.searchsorted(chunk_of, chunk, side="right")]
            start, stop = int(index[places[0]]), int(index[places[-1]]) + 1
            out[:, places] = self.archive.read(WEIGHTS, rows, (start, stop))[:, index[places] - start]
        return out

    def _two_axes(self, key: Any) -> tuple[Any, Any]:
        keys = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in keys):
            if sum(part is Ellipsis for part in keys) > 1:
                raise IndexError("an index can only have a single ellipsis ('...')")
            place = next(i for i, part in enumerate(keys) if part is Ellipsis)
            keys = (*keys[:place], *[slice(None)] * (3 - len(keys)), *keys[place + 1 :])
        keys = (*keys, *[slice(None)] * (2 - len(keys)))
        if len(keys) > 2 or any(part is None for part in keys):
            raise IndexError(f"trajectories have two axes, epoch and weight; found the index {key!r}")
        if any(isinstance(part, bool | np.bool_) for part in keys):
            raise IndexError(f"trajectories are indexed by numbers, slices and masks; found {key!r}")
        if not any(isinstance(part, (slice, int, np.integer)) for part in keys):
            raise IndexError("index epochs or weights by an array, not both at once; use weights[epochs][:, columns]")
        return keys[0], keys[1]

    def _columns(self, key: Any) -> NDArray[np.int64]:
        """Column numbers, 0-d for an integer, checked and counted from the left."""
        n = self.shape[1]
        columns = np.asarray(key)
        if columns.dtype == bool:
            if columns.shape != (n,):
                raise IndexError(f"a mask over weights has shape {columns.shape}, expected {(n,)}")
            return np.flatnonzero(columns)
        if columns.size == 0:
            return np.empty(0, dtype=np.int64)
        if columns.ndim > 1 or columns.dtype.kind not in "iu":
            raise IndexError(f"weights are indexed by integers, slices or masks; found {key!r}")
        if columns.min() < -n or columns.max() >= n:
            raise IndexError(f"a column of {key!r} is out of bounds for {n} weights")
        return np.where(columns < 0, columns + n, columns).astype(np.int64)
