"""What principal component analysis would explain, to compare a fit with one that stores as much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lines import Candidates
from .running import mode_dtype

PIECE = 512
"""Weights at a time, that they stay in the cache."""

ENOUGH, MOST_PRODUCTS = 2048, 1 << 29
"""Weights, and products of two values: with more epochs than fit into these, every second weight or fewer do."""


def storage_bytes(n_weights: int, n_epochs: int, n_modes: int) -> int:
    """Return the bytes of a fit: scale and mean of each weight and M trajectories in float32, and modes.

    A mode takes one byte, two with more than 256 of them.
    """
    return n_weights * (8 + np.dtype(mode_dtype(n_modes)).itemsize) + 4 * n_modes * n_epochs


def components_of_equal_storage(n_weights: int, n_epochs: int, n_modes: int) -> int:
    """Return d ≥ 1, the most principal components that take no more storage than a fit.

    They take d numbers for each weight and each epoch, and the mean of each weight, in float32.
    """
    components = storage_bytes(n_weights, n_epochs, n_modes) - 4 * n_weights
    return components // (4 * (n_weights + n_epochs))


@dataclass(frozen=True)
class ComponentShares:
    """What principal component analysis explains of the variance, in [0, 1]."""

    components: int
    """d"""
    explained: tuple[float, float]
    """By d components, and by d + 1."""


def variance_of_components(candidates: Candidates, components: int) -> ComponentShares | None:
    """Return the shares of the variance that the first d, and d + 1, principal components explain.

    Each weight, less its mean over the epochs, is modelled by the same directions in time, with a number for each; a
    candidate counts as often as it stands for a weight. None where nothing moves.
    """
    trajectories, represents = candidates.trajectories, candidates.represents
    n_epochs, n = trajectories.shape
    step = max(-(-n * n_epochs**2 // MOST_PRODUCTS), 1)
    step = min(step, max(n // ENOUGH, 1))
    gram = np.zeros((n_epochs, n_epochs))
    for start in range(0, n, step * PIECE):
        some = slice(start, start + step * PIECE, step)
        moved = trajectories[:, some].astype(np.float64) - trajectories[:1, some].astype(np.float64)
        moved -= moved.mean(axis=0)
        moved *= np.sqrt(represents[some])
        gram += moved @ moved.T
    total = float(np.trace(gram))
    if total == 0:
        return None
    reached = np.linalg.eigvalsh(gram)[::-1].cumsum() / total
    shares = [1.0 if rank >= n_epochs else min(float(reached[rank - 1]), 1.0) for rank in (components, components + 1)]
    return ComponentShares(components, (shares[0], shares[1]))
