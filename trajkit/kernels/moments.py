"""A fit that takes further epochs without the old ones: moments over two groups of epochs merge exactly.

Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for covariances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .affine import BlockFit, BlockSums, References, block_sums, solve


@dataclass(frozen=True)
class Moments:
    """Of n weights over `count` epochs, against M references."""

    count: int
    mean: NDArray[np.float64]
    """(n,)"""
    variation: NDArray[np.float64]
    """(n,) Σ(w - mean)²"""
    products: NDArray[np.float64]
    """(M, n) Σ(w - mean)·(r - mean of r)"""
    reference_mean: NDArray[np.float64]
    """(M,)"""

    @classmethod
    def of_block(cls, block: NDArray[np.floating[Any]], references: References) -> Moments:
        """Of (E, n) trajectories, E ≥ 1, against references over the same epochs."""
        mean, variation, _, products = block_sums(block, references.unit)
        return cls(len(block), mean, variation, products * references.norm[:, None], references.mean)

    @classmethod
    def of_fit(cls, fit: BlockFit, references: References) -> Moments:
        """Those from which a fit with all its correlations was solved, to its rounding."""
        if fit.correlations is None:
            raise ValueError("the fit has not kept its correlations with every reference")
        products = fit.correlations * np.sqrt(fit.variation) * references.norm[:, None]
        return cls(len(references.trajectories), fit.mean, fit.variation, products, references.mean)

    def merge(self, later: Moments) -> Moments:
        """Of both groups of epochs together."""
        count = self.count + later.count
        moved = later.mean - self.mean
        reference_moved = later.reference_mean - self.reference_mean
        weight = self.count * later.count / count
        share = later.count / count
        return Moments(
            count=count,
            mean=self.mean + share * moved,
            variation=self.variation + later.variation + weight * moved**2,
            products=self.products + later.products + weight * reference_moved[:, None] * moved,
            reference_mean=self.reference_mean + share * reference_moved,
        )

    def solve(self, references: References, dtype: np.dtype[Any]) -> BlockFit:
        """The fit to the references over all the epochs, with all correlations."""
        norm = references.norm[:, None]
        products = np.divide(self.products, norm, out=np.zeros_like(self.products), where=norm > 0)
        mode = np.abs(products).argmax(axis=0)
        return solve(references, BlockSums(self.mean, self.variation, mode, products), dtype, every=True)


def extend(fit: BlockFit, before: References, block: NDArray[np.floating[Any]], references: References) -> BlockFit:
    """A fit over further epochs: `block` (E', n) holds them alone, `references` all epochs, the old ones first."""
    moments = Moments.of_fit(fit, before)
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the variation
        later = Moments.of_block(block, References(references.trajectories[moments.count :]))
        return moments.merge(later).solve(references, np.dtype(fit.scale.dtype))
