"""Steps 2 and 3 of CMD in one look at each block: mode by largest |correlation|, then the affine fit to its reference.

`fit_block` works on arrays of any namespace; `trajkit.kernels.fused` has the compiled one for host memory.

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

# Columns handled at a time: few enough to stay in the cache between the operations on them. Blocks start at multiples
# of it, so that a weight meets the same arithmetic in every block.
PIECE = 8192


@dataclass(frozen=True)
class References:
    """The M reference trajectories, (E, M)."""

    trajectories: NDArray[np.floating]

    @cached_property
    def _standardised(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return standardised(self.trajectories)

    @cached_property
    def unit(self) -> NDArray[np.float64]:
        """(M, E), centred, with norm 1; zeros for a constant reference."""
        return np.ascontiguousarray(self._standardised[0].T)

    @property
    def norm(self) -> NDArray[np.float64]:
        """(M,) Euclidean norm of the centred references; 0 for a constant one."""
        return self._standardised[1]

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(M,) mean over the epochs."""
        origin = self.trajectories[:1].astype(np.float64)
        return np.asarray((self.trajectories - origin).mean(axis=0) + origin[0])

    def offset(
        self, mode: NDArray[np.integer], scale: NDArray[np.floating], mean: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(n,) b = mean - a · mean(r) of weights with these modes, scales and means, in float64."""
        return np.asarray(mean - scale.astype(np.float64) * self.mean[mode])


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
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the variation
        pieces = [_fit_piece(block[:, start : min(start + PIECE, n)], references) for start in range(0, n, PIECE)]
    if len(pieces) == 1:
        return pieces[0]
    return BlockFit(**{name: np.concatenate([vars(piece)[name] for piece in pieces]) for name in vars(pieces[0])})


def _fit_piece(piece: Any, references: References) -> BlockFit:
    """One (E, n) piece, in float64 while it is in the cache.

    In float32 the sums alone would lose what the bars ask for: 2e-6 of a correlation over 40 epochs, everything for
    weights near 1 that move by 1e-4, and all of those whose squares under- or overflow.
    """
    xp = array_namespace(piece)
    origin = xp.astype(piece[0, :], xp.float64)
    moved = xp.astype(piece, xp.float64) - origin[None, :]  # a constant becomes exactly zero
    shift = xp.mean(moved, axis=0)
    moved = moved - shift[None, :]
    products = xp.asarray(references.unit) @ moved
    variation = _host(xp.sum(moved * moved, axis=0))
    mode = _host(xp.argmax(xp.abs(products), axis=0))
    product = np.take_along_axis(_host(products), mode[None], axis=0)[0]
    dtype = np.dtype(str(piece.dtype).rpartition(".")[2])
    return solve(references, mode, product, _host(origin + shift), variation, dtype)


def solve(
    references: References,
    mode: NDArray[np.integer],
    product: NDArray[np.float64],
    mean: NDArray[np.float64],
    variation: NDArray[np.float64],
    dtype: np.dtype[Any],
) -> BlockFit:
    """From each weight's mode and its product with the mode's unit reference, (n,), to scale and correlation."""
    norm, length = references.norm[mode], np.sqrt(variation)
    scale = np.divide(product, norm, out=np.zeros_like(product), where=norm > 0)
    correlation = np.divide(product, length, out=np.zeros_like(product), where=length > 0)
    return BlockFit(
        mode=np.where(product == 0, 0, mode).astype(np.uint16),
        scale=scale.astype(dtype),
        mean=mean,
        correlation=np.clip(correlation, -1.0, 1.0).astype(dtype),
        variation=variation,
    )


def _host(array: Any) -> NDArray[Any]:
    """`array` as NumPy's, copied off its device where it has one."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
