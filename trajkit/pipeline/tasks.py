"""What is done to one block of weights, in this process or on a worker of a cluster.

A task carries paths, rows, a slice and the references. Where it arrives, the archive is opened once for all its blocks.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import BlockPlan
from ..device import open_device
from ..errors import InputError
from ..kernels.affine import BlockFit, References
from ..kernels.fused import N_TOTALS, add_quality
from ..kernels.moments import extend
from ..run import Run
from ..scratch import scratch
from ..store.fit_shape import MOMENTS, RESULTS, FitShape
from ..store.fits import ResultBlocks, Stored, StoredFit
from ..store.format import WEIGHTS
from .sampling import require_finite

ALIGNED = 64
"""Bytes, a line of the cache."""


@dataclass(frozen=True)
class BlockTask:
    """What is done to each block: its pieces are fitted, the results stored, and their quality summed up."""

    run: Run
    rows: NDArray[np.int64]
    """Of the run, that are read."""
    references: References
    """Over all epochs of the fit."""
    results: ResultBlocks
    plan: BlockPlan

    def fits(self, pieces: list[slice], room: Room) -> Generator[tuple[slice, BlockFit]]:
        """The fits of the pieces of a block, in the room for them, which takes their last values too."""
        raise NotImplementedError

    def __call__(self, block: slice) -> BlockSummary:
        """Fit the weights of a block."""
        layout, shape = self.run.layout, self.results.shape
        room = Room.of(block, shape)
        with closing(self.fits(self.plan.pieces(block), room)) as fits:  # a device may be at work for it
            for piece, fitted in fits:
                self._require_fitted(piece, fitted)
        whole = room.whole
        stored = self.results.write(block.start, vars(whole))
        bounds = np.clip(layout.weight_bounds, block.start, block.stop) - block.start
        inside = np.flatnonzero(np.diff(bounds))
        modes, tensors = np.zeros((shape.n_modes, N_TOTALS)), np.zeros((inside.size, N_TOTALS))
        add_quality(
            whole.mode,
            whole.scale,
            whole.mean,
            whole.correlation,
            whole.variation,
            room.last,
            self.references.last,
            np.append(bounds[inside], bounds[-1]),
            modes,
            tensors,
        )
        return BlockSummary(stored, dict(zip(inside.tolist(), tensors, strict=True)), modes)

    def _require_fitted(self, piece: slice, fitted: BlockFit) -> None:
        """Raise `InputError` naming the first weight that is not finite, or whose scale is not."""
        finite = np.isfinite(fitted.variation) & np.isfinite(fitted.scale)
        if finite.all():
            return
        bad = piece.start + int(np.argmin(finite))
        values = self.run.archive.read(WEIGHTS, self.rows, (bad, bad + 1))
        require_finite(self.run, np.array([bad]), np.isfinite(values))
        raise InputError(
            f"{self.run.path}: '{self.run.layout.weight_at(bad)}' moves so far beyond its reference that float32"
            " cannot hold its scale; name other weights with sample_index="
        )


@dataclass(frozen=True)
class FitBlock(BlockTask):
    """Fits a block to the references, over the rows that are read."""

    device: str

    def fits(self, pieces: list[slice], room: Room) -> Generator[tuple[slice, BlockFit]]:
        """See `BlockTask`."""
        every = self.results.shape.updatable

        def read(piece: slice, out: NDArray[np.float32]) -> None:
            self.read(piece, out)
            room.take_last(piece, out[-1])

        return open_device(self.device).fit_pieces(read, pieces, self.references, every, room)

    def read(self, piece: slice, out: NDArray[np.float32]) -> None:
        """Read the trajectories of some weights into `out` (E, n)."""
        self.run.archive.read(WEIGHTS, self.rows, (piece.start, piece.stop), out)


@dataclass(frozen=True)
class ExtendBlock(BlockTask):
    """Takes further rows, which alone are read, into a block of a fit; the results are the fit's next version."""

    fit: StoredFit
    before: References
    """Over the epochs of the fit."""

    def fits(self, pieces: list[slice], room: Room) -> Generator[tuple[slice, BlockFit]]:
        """See `BlockTask`."""
        for piece in pieces:
            old = BlockFit(**{name: self.fit.read(name, piece.start, piece.stop) for name in self.fit.shape.results})
            further = self.run.archive.read(WEIGHTS, self.rows, (piece.start, piece.stop))
            room.take_last(piece, further[-1])
            fitted = room(piece)
            fitted.take(extend(old, self.before, further, self.references))
            yield piece, fitted


@dataclass(frozen=True)
class BlockSummary:
    """What comes back from a block: the objects it stored and, per tensor and per mode, size and variations."""

    stored: Stored
    tensors: Mapping[int, NDArray[np.float64]]
    modes: NDArray[np.float64]


@dataclass(frozen=True)
class Room:
    """Takes the fit of a block, and its weights at the last epoch, piece by piece."""

    start: int
    whole: BlockFit
    last: NDArray[np.float32]

    @classmethod
    def of(cls, block: slice, shape: FitShape) -> Room:
        """In memory of the thread."""
        n = block.stop - block.start
        return cls(block.start, _room_for(n, shape), scratch("last", n, np.float32))

    def __call__(self, piece: slice) -> BlockFit:
        """Arrays that take the fit of a piece."""
        return self.whole.part(self._inside(piece))

    def take_last(self, piece: slice, values: NDArray[np.float32]) -> None:
        """Keep the last values of a piece, in memory that will be used again."""
        self.last[self._inside(piece)] = values

    def _inside(self, piece: slice) -> slice:
        return slice(piece.start - self.start, piece.stop - self.start)


def _room_for(n: int, shape: FitShape) -> BlockFit:
    """Room for a block's fit, all in one piece of the thread's memory."""
    rows = dict.fromkeys((*RESULTS, "variation"), 1) | ({"correlations": shape.n_modes} if shape.updatable else {})
    dtypes = {name: np.dtype((RESULTS | MOMENTS)[name]) for name in rows}
    ends = np.cumsum([-(-count * n * dtypes[name].itemsize // ALIGNED) * ALIGNED for name, count in rows.items()])
    memory = np.split(scratch("fit", int(ends[-1]), np.uint8), ends[:-1])
    arrays: dict[str, Any] = {
        name: piece.view(dtypes[name])[: rows[name] * n] for name, piece in zip(rows, memory, strict=True)
    }
    if shape.updatable:
        arrays["correlations"] = arrays["correlations"].reshape(shape.n_modes, n)
    return BlockFit(**arrays)
