"""`fit_block` for host memory, compiled: each value is read once from memory and used while it is in the cache.

The array-namespace version in `affine` is its oracle and serves other devices.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .affine import BlockFit, BlockSums, References, solve

# Columns handled at a time: their differences, for four epochs, and their M sums stay in the first-level cache.
TILE = 256


def fit_block_fused(block: NDArray[np.floating[Any]], references: References, every: bool = False) -> BlockFit:
    """As `affine.fit_block`, for a NumPy block (E, n) of float32 or float64. It releases the GIL."""
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the variation
        return solve(references, block_sums_fused(block, references.unit, every), block.dtype, every)


def block_sums_fused(block: NDArray[np.floating[Any]], unit: NDArray[np.float64], every: bool) -> BlockSums:
    """As `affine.block_sums`, for a NumPy block (E, n); the products with all M references only where asked for."""
    block = np.ascontiguousarray(block)
    n = block.shape[1]
    mode = np.empty(n, dtype=np.uint16)
    mean, variation, products = np.empty(n), np.empty(n), np.empty((len(unit) if every else 1, n))
    _fused_sums(block, unit, mode, products, mean, variation)
    return BlockSums(mean, variation, mode, products)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _fused_sums(
    block: NDArray[np.floating[Any]],
    unit: NDArray[np.float64],
    mode: NDArray[np.uint16],
    products: NDArray[np.float64],
    mean: NDArray[np.float64],
    variation: NDArray[np.float64],
) -> None:
    """Fill mode, mean and Σ(w - mean)², (n,) each, and the (M, n) or (1, n) products of an (E, n) block.

    `unit` (M, E) are the centred references of norm 1. Four epochs are added at a time, so that a sum is loaded and
    stored a quarter as often.
    """
    n_epochs, n = block.shape
    n_modes = unit.shape[0]
    moved = np.zeros((4, TILE))
    sums = np.empty((n_modes, TILE))
    shift = np.empty(TILE)
    for start in range(0, n, TILE):
        width = min(TILE, n - start)
        origin = block[0, start : start + width]
        squares = variation[start : start + width]
        shift[:] = 0.0
        sums[:] = 0.0
        squares[:] = 0.0
        for epoch in range(n_epochs):
            row = block[epoch, start : start + width]
            for t in range(width):
                shift[t] += np.float64(row[t]) - np.float64(origin[t])
        for t in range(width):
            shift[t] /= n_epochs
            mean[start + t] = np.float64(origin[t]) + shift[t]
        for first in range(0, n_epochs, 4):
            n_rows = min(4, n_epochs - first)
            for j in range(4):
                if j < n_rows:
                    row = block[first + j, start : start + width]
                    for t in range(width):
                        moved[j, t] = (np.float64(row[t]) - np.float64(origin[t])) - shift[t]
                else:
                    moved[j, :] = 0.0
            m0, m1, m2, m3 = moved[0], moved[1], moved[2], moved[3]
            for t in range(width):
                squares[t] += m0[t] * m0[t] + m1[t] * m1[t] + m2[t] * m2[t] + m3[t] * m3[t]
            for m in range(n_modes):
                u0 = unit[m, first]
                u1 = unit[m, first + 1] if n_rows > 1 else 0.0
                u2 = unit[m, first + 2] if n_rows > 2 else 0.0
                u3 = unit[m, first + 3] if n_rows > 3 else 0.0
                total = sums[m]
                for t in range(width):
                    total[t] += u0 * m0[t] + u1 * m1[t] + u2 * m2[t] + u3 * m3[t]
        for t in range(width):
            best, chosen = 0.0, 0
            for m in range(n_modes):
                if abs(sums[m, t]) > best:
                    best, chosen = abs(sums[m, t]), m
            mode[start + t] = chosen
            if products.shape[0] == 1:
                products[0, start + t] = sums[chosen, t]
        if products.shape[0] > 1:
            products[:, start : start + width] = sums[:, :width]
