"""`fit_block` for host memory, compiled: each value is read once from memory and used while it is in the cache.

The array-namespace version in `affine` is its oracle and serves other devices.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .affine import BlockFit, References, empty_fit

# Columns handled at a time: their differences, for four epochs, and their M sums stay in the first-level cache.
TILE = 256


def fit_block_fused(
    block: NDArray[np.floating[Any]], references: References, every: bool = False, out: BlockFit | None = None
) -> BlockFit:
    """As `affine.fit_block`, for a NumPy block (E, n) of float32 or float64. It releases the GIL.

    `out` takes the fit, where given, with its correlations if there is room for them.
    """
    block = np.ascontiguousarray(block)
    if out is None:
        out = empty_fit(len(references.unit) if every else None, block.shape[1], block.dtype)
    correlations = np.empty((0, 0), dtype=block.dtype) if out.correlations is None else out.correlations
    _fit(
        block,
        references.unit,
        references.norm,
        out.mode,
        out.scale,
        out.mean,
        out.correlation,
        out.variation,
        correlations,
    )
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _fit(
    block: NDArray[np.floating[Any]],
    unit: NDArray[np.float64],
    norm: NDArray[np.float64],
    mode: NDArray[np.uint16],
    scale: NDArray[np.floating[Any]],
    mean: NDArray[np.float64],
    correlation: NDArray[np.floating[Any]],
    variation: NDArray[np.float64],
    correlations: NDArray[np.floating[Any]],
) -> None:
    """Fill the fit of an (E, n) block to the unit references (M, E); (M, n) `correlations` where they have rows.

    One look at each value: sums of the motion since the first epoch, w - w₀, in float64. The unit references sum to
    zero, so the products need no mean; and Σ(w - w₀)² is at most E + 1 times Σ(w - mean)², w₀ being one of the values,
    so that their difference is exact to 1e-16·E. Two modes and four epochs at a time, or loads and stores would take
    longer than the sums.
    """
    n_epochs, n = block.shape
    n_modes = unit.shape[0]
    padded = np.zeros((n_modes + 1, n_epochs + 3))  # modes go by two and epochs by four: the last ones meet zeros
    padded[:n_modes, :n_epochs] = unit
    moved = np.zeros((4, TILE))
    sums = np.empty((n_modes + 1, TILE))
    shift = np.empty(TILE)
    for start in range(0, n, TILE):
        width = min(TILE, n - start)
        origin = block[0, start : start + width]
        squares = variation[start : start + width]
        shift[:] = 0.0
        sums[:] = 0.0
        squares[:] = 0.0
        for first in range(0, n_epochs, 4):
            for j in range(4):
                if first + j < n_epochs:
                    row = block[first + j, start : start + width]
                    for t in range(width):
                        moved[j, t] = np.float64(row[t]) - np.float64(origin[t])
                else:
                    moved[j, :] = 0.0
            m0, m1, m2, m3 = moved[0], moved[1], moved[2], moved[3]
            for t in range(width):
                x0, x1, x2, x3 = m0[t], m1[t], m2[t], m3[t]
                shift[t] += (x0 + x1) + (x2 + x3)
                squares[t] += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
            for m in range(0, n_modes, 2):
                one, two = sums[m], sums[m + 1]
                u0, u1, u2, u3 = padded[m, first], padded[m, first + 1], padded[m, first + 2], padded[m, first + 3]
                v0, v1 = padded[m + 1, first], padded[m + 1, first + 1]
                v2, v3 = padded[m + 1, first + 2], padded[m + 1, first + 3]
                for t in range(width):
                    x0, x1, x2, x3 = m0[t], m1[t], m2[t], m3[t]
                    one[t] += u0 * x0 + u1 * x1 + u2 * x2 + u3 * x3
                    two[t] += v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3
        for t in range(width):
            shift[t] /= n_epochs
            mean[start + t] = np.float64(origin[t]) + shift[t]
            squares[t] -= n_epochs * shift[t] * shift[t]
        for t in range(width):
            best, chosen = 0.0, 0
            for m in range(n_modes):
                if abs(sums[m, t]) > best:
                    best, chosen = abs(sums[m, t]), m
            mode[start + t] = chosen
            product, length = sums[chosen, t], np.sqrt(squares[t])
            scale[start + t] = product / norm[chosen] if norm[chosen] > 0 else 0.0
            correlation[start + t] = min(max(product / length, -1.0), 1.0) if length > 0 else 0.0
        for m in range(correlations.shape[0]):
            for t in range(width):
                length = np.sqrt(squares[t])
                correlations[m, start + t] = min(max(sums[m, t] / length, -1.0), 1.0) if length > 0 else 0.0


N_TOTALS = 5
"""How many, the variation, what of it is explained; Σ(w - mean)² at the last epoch, and of what is missing there."""


@numba.njit(nogil=True, cache=True)
def add_quality(
    mode: NDArray[np.uint16],
    scale: NDArray[np.floating[Any]],
    mean: NDArray[np.float64],
    correlation: NDArray[np.floating[Any]],
    variation: NDArray[np.float64],
    last: NDArray[np.floating[Any]],
    reference: NDArray[np.float64],
    bounds: NDArray[np.int64],
    modes: NDArray[np.float64],
    tensors: NDArray[np.float64],
) -> None:
    """Add what is known of n weights, arrays (n,), to the totals of their modes (M, 5), and of their tensors (L, 5).

    last: their values at the last epoch; reference (M,): that of the references, less their means. Tensor l has the
    weights ``bounds[l] : bounds[l + 1]``.
    """
    for tensor in range(bounds.size - 1):
        for i in range(bounds[tensor], bounds[tensor + 1]):
            explained = variation[i] * np.float64(correlation[i]) ** 2
            moved = np.float64(last[i]) - mean[i]
            missing = moved - np.float64(scale[i]) * reference[mode[i]]
            for totals in (modes[mode[i]], tensors[tensor]):
                totals[0] += 1.0
                totals[1] += variation[i]
                totals[2] += explained
                totals[3] += moved * moved
                totals[4] += missing * missing
