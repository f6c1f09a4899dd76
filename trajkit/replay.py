"""What online CMD would have been at every epoch of a recorded training, from its warm-up's fit and the run itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .blocks import READ_BYTES
from .decomposition import Decomposition
from .errors import InputError
from .kernels.affine import References
from .kernels.running import ReferenceMoments, RunningBlock, Step
from .store.format import WEIGHTS, chunk_rule


@dataclass(frozen=True)
class _Taken:
    """What an epoch after the warm-up does to the weights, and the references' moments once it is taken."""

    row: int
    step: Step
    moments: ReferenceMoments


@dataclass(frozen=True, repr=False)
class OnlineDecomposition(Decomposition):
    """Online CMD over a run: the fit of the warm-up, its first epochs, and scales and offsets that go on from there.

    `epochs`, `scale`, `offset`, `mean`, `correlation` and `quality` are those of the warm-up. The modelled weights at a
    later epoch are a·r + b with the a and b of all epochs up to that one, which is what `OnlineCMD` had then, to the
    bit on the same arithmetic; at an earlier one the recorded weights, for there was no model yet. To model an epoch
    reads all those between the warm-up and it; `one_by_one` reads each epoch once.
    """

    def covers(self, epoch: int) -> bool:  # noqa: ARG002
        """Return True: the weights at an epoch after the warm-up are modelled by all epochs up to it."""
        return True

    def modelled(
        self, epochs: Iterable[int], start: int = 0, stop: int | None = None, dtype: DTypeLike = np.float32
    ) -> NDArray[Any]:
        """(k, n) modelled values of the weights ``start : stop`` at recorded epochs, block by block.

        They are computed in float32. Raises as `Decomposition.modelled` does, and `InputError` for weights that are not
        finite at an epoch between the warm-up and the modelled one.
        """
        rows = [self.run.row_of(epoch) for epoch in epochs]
        first, last, _ = slice(start, stop).indices(self.run.layout.n_weights)
        out = np.empty((len(rows), max(last - first, 0)), dtype=dtype)
        for piece in _grid(first, last, chunk_rule(self.run.layout.n_weights).chunk):
            found = out[:, piece.start - first : piece.stop - first]
            for row, values in self._block(piece, set(rows)):
                found[[place for place, wanted in enumerate(rows) if wanted == row]] = values
        return out

    def one_by_one(self, epochs: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """(N,) modelled weights at rising recorded epochs, in one pass; the memory is used again for the next ones.

        Beside these it holds 6 bytes a weight, and 5 a candidate.
        """
        rows = [self.run.row_of(epoch) for epoch in epochs]
        n = self.run.layout.n_weights
        pieces = [(piece, self._start(piece)) for piece in _grid(0, n, chunk_rule(n).chunk)]
        out = np.empty(n, np.float32)
        later = iter(self._later)
        now = self._moments
        reached = self._last_row
        for row in rows:
            while reached < row and (taken := next(later, None)) is not None and taken.row <= row:
                for piece, block in pieces:
                    self._take(block, self._read(taken.row, piece)[0], taken, piece)
                reached, now = taken.row, taken.moments
            for piece, block in pieces:
                if row < self._last_row:
                    out[piece] = self._read(row, piece)[0]
                else:
                    block.modelled(now, out[piece])
            yield out

    def _block(self, piece: slice, rows: set[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The modelled weights of a piece at each of some rows; the memory is used again for the next one."""
        for row in rows:
            if row < self._last_row:
                yield row, self._read(row, piece)[0]
        if max(rows, default=-1) < self._last_row:
            return
        block = self._start(piece)
        values = np.empty(piece.stop - piece.start, np.float32)
        if self._last_row in rows:
            block.modelled(self._moments, values)
            yield self._last_row, values
        wanted = [taken for taken in self._later if taken.row <= max(rows)]
        together = max(READ_BYTES // (4 * values.size), 1)
        for first in range(0, len(wanted), together):
            some = wanted[first : first + together]
            weights = self.run.archive.read(WEIGHTS, [taken.row for taken in some], (piece.start, piece.stop))
            for taken, epoch in zip(some, weights, strict=True):
                self._take(block, epoch, taken, piece)
                if taken.row in rows:
                    block.modelled(taken.moments, values)
                    yield taken.row, values

    def _read(self, row: int, piece: slice) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.run.archive.read(WEIGHTS, [row], (piece.start, piece.stop))
        return values

    def _take(self, block: RunningBlock, weights: NDArray[np.float32], taken: _Taken, piece: slice) -> None:
        """Take an epoch of a piece; raises `InputError` where a weight or a reference is not finite."""
        if block.take(weights, taken.step) and np.isfinite(taken.moments.values).all():
            return
        finite = np.isfinite(weights)
        name = "a reference" if finite.all() else f"'{self.run.layout.weight_at(piece.start + int(finite.argmin()))}'"
        raise InputError(
            f"{self.run.path}: {name} is not finite at epoch {self.run.epochs[taken.row]}, expected finite weights up"
            " to the one that is modelled; take an earlier one"
        )

    def _start(self, piece: slice) -> RunningBlock:
        """What is kept of some weights at the end of the warm-up."""
        return start_of(self, self._moments, piece)

    @cached_property
    def _last_row(self) -> int:
        """Of the warm-up."""
        return self.run.row_of(int(self.epochs[-1]))

    @cached_property
    def _moments(self) -> ReferenceMoments:
        return ReferenceMoments.of(References(self.reference), self.settings.get("decay", 1.0))

    @cached_property
    def _later(self) -> tuple[_Taken, ...]:
        """The epochs after the warm-up, bad ones left out."""
        rows = self.run.rows_of(None)
        rows = rows[rows > self._last_row]
        moments, taken = self._moments, []
        for row, values in zip(rows.tolist(), self.reference_rows(rows), strict=True):
            moments = copy.copy(moments)
            taken.append(_Taken(row, moments.take(values), moments))
        return tuple(taken)


def start_of(fit: Decomposition, moments: ReferenceMoments, piece: slice) -> RunningBlock:
    """What online CMD keeps of some weights when the warm-up ends, from the warm-up's fit.

    Of a fit with several candidates the modes may change.
    """
    read, candidates = fit.stored.read, n_candidates(fit)
    mean = read("mean", piece.start, piece.stop)
    if candidates == 1:
        return RunningBlock.of_fit(
            moments, read("mode", piece.start, piece.stop), read("scale", piece.start, piece.stop), mean
        )
    correlations, variation = (read(name, piece.start, piece.stop) for name in ("correlations", "variation"))
    return RunningBlock.of_correlations(moments, correlations, variation, mean, candidates)


def n_candidates(fit: Decomposition) -> int:
    """Among how many references a weight's mode is chosen after the warm-up."""
    return int(fit.settings.get("reassign", 1))


def _grid(start: int, stop: int, width: int) -> list[slice]:
    """Pieces of ``start : stop`` that end where chunks do."""
    edges = [start, *range((start // width + 1) * width, stop, width), stop]
    return [slice(left, right) for left, right in itertools.pairwise(edges) if right > left]
