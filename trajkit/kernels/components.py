"""What principal component analysis would explain, to compare a fit with one that stores as much."""

from __future__ import annotations

import numpy as np

from .lines import Candidates

COMPONENTS = 2
PIECE = 512
"""Weights at a time, that they stay in the cache."""

ENOUGH, MOST_PRODUCTS = 2048, 1 << 29
"""Weights, and products of two values: with more epochs than fit into these, every second weight or fewer do."""


def variance_of_components(candidates: Candidates) -> tuple[float, ...]:
    """Shares of the variance that the first, and the first two, principal components explain, in [0, 1].

    Each weight, less its mean over the epochs, is modelled by the same one or two directions in time, with a number for
    each; a candidate counts as often as it stands for a weight. With the mean that is two numbers a weight for one
    component, as many as a and b. 1 where nothing moves.
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
    values = np.linalg.eigvalsh(gram)[::-1]
    total = float(np.trace(gram))
    return tuple(min(float(values[:rank].sum()) / total, 1.0) if total > 0 else 1.0 for rank in (1, COMPONENTS))
