"""What is in each row of each tensor, bit by bit, in one look at each value: compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_MIX = np.uint64(0x9E3779B97F4A7C15)
_EXPONENT = {"float32": (0x7FFFFFFF, 0x7F800000), "float64": (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)}
"""Bits of the magnitude, and those of infinity: bits order magnitudes as the values do, NaN above infinity."""


@dataclass(frozen=True)
class Contents:
    """What S tensors hold in E rows, (S, E) each; parts of one tensor are put together by `add`."""

    changed: NDArray[np.int64]
    """How many values have other bits than in the row before."""
    nonfinite: NDArray[np.int64]
    largest: NDArray[np.float64]
    """The largest finite magnitude; 0 for integers."""
    fingerprint: NDArray[np.uint64]
    """Equal for equal bits, and else different but for about one pair in 2**32."""

    @classmethod
    def zeros(cls, n_tensors: int, n_rows: int) -> Contents:
        """The contents of nothing."""
        shape = (n_tensors, n_rows)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.uint64))

    def add(self, part: Contents, first_tensor: int, first_row: int = 0) -> None:
        """Take in what some values of some tensors hold in some rows."""
        n_tensors, n_rows = part.changed.shape
        here = np.s_[first_tensor : first_tensor + n_tensors, first_row : first_row + n_rows]
        self.changed[here] += part.changed
        self.nonfinite[here] += part.nonfinite
        self.fingerprint[here] += part.fingerprint
        np.maximum(self.largest[here], part.largest, out=self.largest[here])


def contents_of(block: NDArray[Any], bounds: NDArray[np.int64], first_column: int, has_before: bool) -> Contents:
    """The contents of S tensors in the rows of a block (E, n), or in all but the first with `has_before`.

    bounds: (S + 1,) where in the block each tensor begins, and the last one ends. `first_column` is the place of the
    block in its array; the fingerprint of a tensor is the sum of those of its parts. Without a row before, all values
    of the first row count as changed. It releases the GIL.
    """
    words = block.view(f"u{block.dtype.itemsize}")
    if words.dtype.itemsize not in (4, 8):
        words = words.astype(np.uint32)
    magnitude, infinity = _EXPONENT.get(str(block.dtype), (0, 1))
    kind = words.dtype.type
    n_rows = len(block) - has_before
    found = Contents.zeros(bounds.size - 1, n_rows)
    largest = np.zeros(found.largest.shape, words.dtype)
    before = words[0] if has_before else ~words[0]
    keys = _keys(first_column, block.shape[1])
    _look(
        words[len(block) - n_rows :],
        before,
        bounds,
        keys,
        kind(magnitude),
        kind(infinity),
        found.changed,
        found.nonfinite,
        largest,
        found.fingerprint,
    )
    if magnitude:
        found.largest[:] = largest.view(block.dtype)
    return found


@numba.njit(nogil=True, cache=True)
def _keys(first: int, n: int) -> NDArray[np.uint64]:
    """(n,) random odd numbers, those of the columns from `first` on: splitmix64."""
    keys = np.empty(n, np.uint64)
    for i in range(n):
        key = np.uint64(first + i + 1) * _MIX
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys[i] = (key ^ (key >> np.uint64(31))) | np.uint64(1)
    return keys


@numba.njit(nogil=True, cache=True)
def _look(
    words: NDArray[Any],
    before: NDArray[Any],
    bounds: NDArray[np.int64],
    keys: NDArray[np.uint64],
    magnitude: Any,
    infinity: Any,
    changed: NDArray[np.int64],
    nonfinite: NDArray[np.int64],
    largest: NDArray[Any],
    fingerprint: NDArray[np.uint64],
) -> None:
    """Fill the contents of the rows of words (E, n); `before` (n,) is the row before the first one."""
    zero = magnitude ^ magnitude
    for row in range(len(words)):
        last = words[row - 1] if row > 0 else before
        for tensor in range(bounds.size - 1):
            start, stop = bounds[tensor], bounds[tensor + 1]
            here, there, key = words[row, start:stop], last[start:stop], keys[start:stop]
            n_changed, n_nonfinite, top, total = 0, 0, zero, np.uint64(0)
            for i in range(stop - start):
                word = here[i]
                size = word & magnitude
                n_changed += word != there[i]
                n_nonfinite += size >= infinity
                top = max(top, size if size < infinity else zero)
                wide = np.uint64(word)
                total += (wide ^ (wide >> np.uint64(32))) * key[i]  # or two flipped signs of float64 would cancel
            changed[tensor, row] = n_changed
            nonfinite[tensor, row] = n_nonfinite
            largest[tensor, row] = top
            fingerprint[tensor, row] = total
