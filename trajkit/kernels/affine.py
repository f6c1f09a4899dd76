"""Steps 2 and 3 of CMD in one look at each block: mode by largest |correlation|, then the affine fit to its reference.

Source: Brokman et al. 2024, Eq. 3-6. The least squares of Eq. 6 is, per weight, a = cov(w, r) / var(r) and
b = mean(w) - a·mean(r); a constant weight gets mode 0, a = 0 and b = its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from .correlation import standardised

# Columns handled at a time: they stay in the cache between the operations on them. The grid starts at the block's
# first column, and blocks start at multiples of it, so that a weight meets the same arithmetic in every block.
PIECE = 8192

# Two |correlations| closer than this, relative to the larger, are compared again in float64: float32 products are good
# to about 1e-7, and the mode should be the oracle's wherever it is well defined.
DOUBTFUL_MARGIN = 1e-5
# Squares outside this range are computed again in float64: they may have lost digits to underflow, or overflowed.
SAFE_SQUARES = (1e-30, 1e30)


@dataclass(frozen=True)
class References:
    """The M reference trajectories, (E, M)."""

    trajectories: NDArray[np.floating]

    @cached_property
    def unit(self) -> NDArray[np.float64]:
        """(M, E), centred, with norm 1; zeros for a constant reference."""
        return np.ascontiguousarray(standardised(self.trajectories).T)

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(M,) mean over the epochs."""
        origin = self.trajectories[:1].astype(np.float64)
        return np.asarray((self.trajectories - origin).mean(axis=0) + origin[0])

    @cached_property
    def norm(self) -> NDArray[np.float64]:
        """(M,) Euclidean norm of the centred references; 0 for a constant one."""
        return np.asarray(np.linalg.norm(self.trajectories - self.mean, axis=0) * (self.unit != 0).any(axis=1))


@dataclass(frozen=True)
class BlockFit:
    """What CMD keeps of n weights; all arrays are (n,).

    The modelled trajectory is mean + scale · (r - mean(r)) with r the reference of the mode: the centred form, since
    scale · r + offset cancels where a reference's mean is large against its motion.
    """

    mode: NDArray[np.uint16]
    scale: NDArray[np.floating]
    mean: NDArray[np.float64]
    correlation: NDArray[np.floating]
    variation: NDArray[np.float64]
    """Σ(w - mean)² over the epochs."""

    @property
    def explained(self) -> NDArray[np.float64]:
        """The part of `variation` that the model gives back."""
        return self.variation * self.correlation.astype(np.float64) ** 2


def fit_block(block: Any, references: References) -> BlockFit:
    """Fit (E, n) trajectories, n ≥ 1, to (E, M) references of the same epochs.

    `block` is a floating array of any array-API namespace; the result is NumPy's, `scale` and `correlation` in the
    block's dtype. Not finite values give a `variation` that is not finite.
    """
    n = block.shape[1]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # such columns are computed again, or reported
        pieces = [_fit_piece(block[:, start : min(start + PIECE, n)], references) for start in range(0, n, PIECE)]
    if len(pieces) == 1:
        return pieces[0]
    return BlockFit(**{name: np.concatenate([vars(piece)[name] for piece in pieces]) for name in vars(pieces[0])})


def _fit_piece(piece: Any, references: References) -> BlockFit:
    """One (E, n) piece: float32 arithmetic on centred values, then float64 for the columns that need it."""
    xp = array_namespace(piece)
    n_epochs = piece.shape[0]
    origin = piece[0, :]
    moved = piece - origin[None, :]
    shift = xp.mean(moved, axis=0)
    moved = moved - shift[None, :]
    unit = xp.asarray(references.unit, dtype=piece.dtype)
    rows = xp.concat([unit, xp.ones((1, n_epochs), dtype=piece.dtype)])
    products = rows @ moved
    residue = products[-1, :]  # what rounding left of the mean, times E
    products = products[:-1, :]
    square = xp.sum(moved * moved, axis=0)
    magnitude = xp.abs(products)
    mode = xp.argmax(magnitude, axis=0)
    best = xp.max(magnitude, axis=0)
    rivals = xp.sum(xp.astype(magnitude >= best * (1 - DOUBTFUL_MARGIN), xp.uint8), axis=0)

    best_mode = _host(mode)
    product = np.take_along_axis(_host(products), best_mode[None], axis=0)[0].astype(np.float64)
    mean = _host(origin).astype(np.float64) + _host(shift) + _host(residue).astype(np.float64) / n_epochs
    variation = _host(square).astype(np.float64)
    low, high = SAFE_SQUARES
    unsafe = ~((variation > low) & (variation < high))
    if unsafe.any():
        columns = np.flatnonzero(unsafe)
        unsafe[columns] = (_take(xp, piece, columns) != _host(origin)[columns]).any(axis=0)
    columns = np.flatnonzero(unsafe | ((_host(rivals) > 1) & (variation > low)))
    if columns.size and piece.dtype != xp.float64:
        exact = _fit_piece(_take(xp, piece, columns).astype(np.float64), references)
        best_mode[columns], mean[columns] = exact.mode, exact.mean
        variation[columns] = exact.variation
        product[columns] = exact.correlation * np.sqrt(exact.variation)
    return _solve(best_mode, product, mean, variation, references, _host(origin).dtype)


def _solve(
    mode: NDArray[np.integer],
    product: NDArray[np.float64],
    mean: NDArray[np.float64],
    variation: NDArray[np.float64],
    references: References,
    dtype: np.dtype[Any],
) -> BlockFit:
    """From each weight's product with its unit reference and its variation to scale and correlation."""
    norm = references.norm[mode]
    length = np.sqrt(variation)
    scale = np.where(norm > 0, product / norm, 0.0)
    correlation = np.where(length > 0, np.clip(product / length, -1.0, 1.0), 0.0)
    return BlockFit(
        mode=np.where(product == 0, 0, mode).astype(np.uint16),
        scale=scale.astype(dtype),
        mean=mean,
        correlation=correlation.astype(dtype),
        variation=variation,
    )


def _take(xp: Any, piece: Any, columns: NDArray[np.intp]) -> NDArray[Any]:
    return _host(xp.take(piece, xp.asarray(columns), axis=1))


def _host(array: Any) -> NDArray[Any]:
    """`array` as NumPy's, copied off its device where it has one."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
