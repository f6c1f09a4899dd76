"""The weights of an epoch on their way into the archive: piece by piece, so that nobody has to hold them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..digest import Hasher
from ..errors import InputError
from ..layout import ParameterLayout
from .format import chunk_rule

LOOK = 1 << 18
"""Values that are looked at together: what is found of them stays in the cache."""

Piece = tuple[slice, NDArray[np.float32]]


class WeightSource(Protocol):
    """The weights (N,) of an epoch, piece by piece: an array, or what reads or gathers them as they are asked for.

    It is asked for slices that follow each other from 0 to `size`, each once, with a start, a stop and at most 64 MiB.
    A piece is done with when the next one is asked for, so that its memory may be used again.
    """

    @property
    def size(self) -> int:
        """N."""

    def __getitem__(self, columns: slice, /) -> NDArray[np.float32]:
        """The weights of these columns."""


class PassingWeights:
    """The weights of one epoch, each piece the columns of one stored object; they pass once, from left to right.

    Afterwards `probe` (P,) holds those at `probe_index`, and `digest` is the hash of all. With `finite`, NaN and
    infinite weights are refused: those of an array at once, those of another source when they come.

    Raises `InputError`, at once or as they pass, where the weights are not those that the layout places.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        weights: WeightSource,
        probe_index: NDArray[np.int64],
        where: str,
        finite: bool = False,
    ) -> None:
        _require_placed(layout, weights, where)
        self._layout, self._weights, self._where = layout, weights, where
        self.probe_index = probe_index
        self.probe = np.empty(probe_index.size, dtype=np.float32)
        if finite and isinstance(weights, np.ndarray):
            self._require_finite(slice(0, weights.size), weights)
        self._finite = finite and not isinstance(weights, np.ndarray)
        self._peeked: list[Piece] = []
        self._coming = self._pieces()
        self._hasher = Hasher()

    def peek(self) -> NDArray[np.float32]:
        """The first piece, which has still to pass."""
        if not self._peeked:
            self._peeked.append(next(self._coming))
        return self._peeked[0][1]

    @property
    def digest(self) -> str:
        """Hash of the weights that have passed, as little-endian float32."""
        return self._hasher.hexdigest()

    def __iter__(self) -> Iterator[Piece]:
        while self._peeked:
            yield self._peeked.pop()
        yield from self._coming

    def _pieces(self) -> Iterator[Piece]:
        for columns in chunk_rule(self._layout.n_weights).objects():
            piece = self._weights[columns]
            self._require_piece(columns, piece)
            if self._finite:
                self._require_finite(columns, piece)
            inside = slice(*np.searchsorted(self.probe_index, [columns.start, columns.stop]))
            self.probe[inside] = piece[self.probe_index[inside] - columns.start]
            self._hasher.update(np.ascontiguousarray(piece, "<f4").view(np.uint8).data)
            yield columns, piece

    def _require_piece(self, columns: slice, piece: Any) -> None:
        found = _described(piece)
        expected = ("float32", (columns.stop - columns.start,))
        if found != expected:
            raise InputError(
                f"{self._where}: weights[{columns.start}:{columns.stop}] is {found}, the layout asks for {expected};"
                " give each slice as a float32 array of its length"
            )

    def _require_finite(self, columns: slice, values: NDArray[np.float32]) -> None:
        """Raise `InputError` naming the first of these values that is NaN or infinite, and how many there are."""
        blocks = (values[start : start + LOOK] for start in range(0, values.size, LOOK))
        n_bad = values.size - sum(int(np.count_nonzero(np.isfinite(block))) for block in blocks)
        if n_bad:
            first = int(np.argmin(np.isfinite(values)))
            name = self._layout.weight_at(columns.start + first)
            seen = f"{'' if columns.stop == self._layout.n_weights else 'the first '}{columns.stop}"
            raise InputError(
                f"{self._where}: '{name}' has {values[first]}, {n_bad} of {seen} weights are not finite,"
                " expected finite weights; record with nonfinite='record' (--nonfinite record) to keep them"
            )


def _require_placed(layout: ParameterLayout, weights: Any, where: str) -> None:
    """Raise `InputError` unless these are the weights that the layout places, as far as it shows before they pass."""
    size = getattr(weights, "size", None)
    if not isinstance(weights, np.ndarray) and not (hasattr(size, "__index__") and hasattr(weights, "__getitem__")):
        raise InputError(
            f"{where}: weights is {_described(weights)}, expected a float32 array ({layout.n_weights},), or an object"
            " with a size and slices that are such arrays; convert it"
        )
    found = _described(weights) if isinstance(weights, np.ndarray) else ("float32", (size,))
    expected = ("float32", (layout.n_weights,))
    if found != expected:
        raise InputError(
            f"{where}: weights is {found}, the layout asks for {expected}; pass the vectors that the layout places"
        )


def _described(values: Any) -> Any:
    return (str(values.dtype), values.shape) if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
