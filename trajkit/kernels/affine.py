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

MAX_MODES = 65535
"""The number of a mode takes two bytes."""


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

    @cached_property
    def last(self) -> NDArray[np.float64]:
        """(M,) value at the last epoch, less the mean."""
        return np.asarray(self.trajectories[-1] - self.mean)

    def offset(
        self, mode: NDArray[np.integer], scale: NDArray[np.floating], mean: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(n,) b = mean - a · mean(r) of weights with these modes, scales and means, in float64."""
        return np.asarray(mean - scale.astype(np.float64) * self.mean[mode])


@dataclass(frozen=True)
class BlockFit:
    """What CMD keeps of n weights; arrays are (n,).

    The modelled trajectory is mean + scale · (r - mean(r)) with r the reference of the mode: the centred form, since
    scale · r + offset cancels where a reference's mean is large against its motion.
    """

    mode: NDArray[np.uint16]
    scale: NDArray[np.floating]
    mean: NDArray[np.float64]
    correlation: NDArray[np.floating]
    variation: NDArray[np.float64]
    """Σ(w - mean)² over the epochs."""
    correlations: NDArray[np.floating] | None = None
    """(M, n), with every reference, if asked for: with them the fit can take further epochs, see `moments`."""

    def part(self, columns: slice) -> BlockFit:
        """The fit of some of the weights, in the same memory."""
        parts: dict[str, Any] = {
            name: None if array is None else array[..., columns] for name, array in vars(self).items()
        }
        return BlockFit(**parts)

    def take(self, fit: BlockFit) -> None:
        """Copy another fit of as many weights into this one's memory."""
        for name, array in vars(self).items():
            if array is not None:
                array[...] = vars(fit)[name]


def fit_block(block: Any, references: References, every: bool = False) -> BlockFit:
    """Fit (E, n) trajectories, n ≥ 1, to (E, M) references of the same epochs; with `every`, keep all correlations.

    `block` is a floating array of any array-API namespace; the result is NumPy's, `scale` and `correlation` in the
    block's dtype. Not finite values give a `variation` that is not finite.
    """
    n = block.shape[1]
    xp = array_namespace(block)
    unit = xp.asarray(references.unit)
    dtype = np.dtype(str(block.dtype).rpartition(".")[2])
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the variation
        pieces = []
        for start in range(0, n, PIECE):
            sums = [_host(part) for part in block_sums(block[:, start : min(start + PIECE, n)], unit)]
            pieces.append(solve(references, BlockSums(*sums), dtype, every))
    return joined(pieces)


@dataclass(frozen=True)
class BlockSums:
    """The sums over the epochs that decide the fit of n weights; (n,), and (M, n) `products`."""

    mean: NDArray[np.float64]
    variation: NDArray[np.float64]
    """Σ(w - mean)²"""
    mode: NDArray[np.integer]
    """The first reference with the largest |product|."""
    products: NDArray[np.float64]
    """Σ(w - mean)·unit with the unit references; (1, n), with the mode's alone, where no others are asked for."""


def block_sums(piece: Any, unit: Any) -> tuple[Any, Any, Any, Any]:
    """`BlockSums` of an (E, n) piece with (M, E) unit references, in their namespace and in float64.

    In float32 the sums alone would lose what the bars ask for: 2e-6 of a correlation over 40 epochs, everything for
    weights near 1 that move by 1e-4, and all of those whose squares under- or overflow.
    """
    xp = array_namespace(piece)
    origin = xp.astype(piece[0, :], xp.float64)
    moved = xp.astype(piece, xp.float64) - origin[None, :]  # a constant becomes exactly zero
    shift = xp.mean(moved, axis=0)
    moved = moved - shift[None, :]
    products = unit @ moved
    return origin + shift, xp.sum(moved * moved, axis=0), xp.argmax(xp.abs(products), axis=0), products


def solve(references: References, sums: BlockSums, dtype: np.dtype[Any], every: bool) -> BlockFit:
    """From the sums over the epochs to mode, scale and correlation; `every` keeps all correlations."""
    mode, products = sums.mode, sums.products
    product = products[0] if len(products) == 1 else np.take_along_axis(products, mode[None], axis=0)[0]
    norm, length = references.norm[mode], np.sqrt(sums.variation)
    scale = np.divide(product, norm, out=np.zeros_like(product), where=norm > 0)
    return BlockFit(
        mode=np.where(product == 0, 0, mode).astype(np.uint16),
        scale=scale.astype(dtype),
        mean=sums.mean,
        correlation=_correlation(product, length).astype(dtype),
        variation=sums.variation,
        correlations=_correlation(products, length).astype(dtype) if every else None,
    )


def empty_fit(n_correlations: int | None, n: int, dtype: np.dtype[Any]) -> BlockFit:
    """Room for the fit of n weights, with so many rows of correlations, or None."""
    return BlockFit(
        mode=np.empty(n, np.uint16),
        scale=np.empty(n, dtype),
        mean=np.empty(n),
        correlation=np.empty(n, dtype),
        variation=np.empty(n),
        correlations=None if n_correlations is None else np.empty((n_correlations, n), dtype),
    )


def joined(pieces: list[BlockFit]) -> BlockFit:
    """The fit of neighbouring pieces, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    fields: dict[str, Any] = {
        name: None if value is None else np.concatenate([vars(piece)[name] for piece in pieces], axis=-1)
        for name, value in vars(pieces[0]).items()
    }
    return BlockFit(**fields)


def _correlation(product: NDArray[np.float64], length: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.broadcast_to(length, product.shape)
    return np.clip(np.divide(product, length, out=np.zeros_like(product), where=length > 0), -1.0, 1.0)


def _host(array: Any) -> NDArray[Any]:
    """`array` as NumPy's, copied off its device where it has one."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
