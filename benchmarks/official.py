"""Post-hoc CMD as the official research code does it: all in memory, float32, one pass over the weights per mode.

Our own transcription of the steps that https://github.com/rbetser/CMD takes, for comparison of speed; its one-pass
correlation n·Σxy - ΣxΣy is kept, weaknesses included. `W` is (N, E), as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

Array = np.ndarray[Any, Any]


def correlation_with(weights: Array, reference: Array) -> Array:
    """(N,) Pearson correlation of every weight with one trajectory, by the one-pass formula."""
    n = np.float32(weights.shape[1])
    with np.errstate(all="ignore"):
        top = n * (weights * reference).sum(1) - weights.sum(1) * reference.sum()
        bottom = n * (weights**2).sum(1) - weights.sum(1) ** 2
        return top / np.sqrt(bottom * (n * (reference**2).sum() - reference.sum() ** 2))


def fit(weights: Array, n_modes: int, sample: Array) -> tuple[Array, Array, Array]:
    """Mode, a and b of each weight."""
    with np.errstate(all="ignore"):
        c1 = np.nan_to_num(np.abs(np.corrcoef(weights[sample])))
    labels = fcluster(linkage(c1, "complete"), n_modes, "maxclust")
    references = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        references.append(sample[members[c1[np.ix_(members, members)].mean(1).argmax()]])
    correlations = np.stack([np.abs(correlation_with(weights, weights[index])) for index in references])
    mode = np.nan_to_num(correlations).argmax(0)
    a, b = np.zeros(len(weights), np.float32), np.zeros(len(weights), np.float32)
    for number, index in enumerate(references):
        design = np.stack([weights[index], np.ones(weights.shape[1], np.float32)])
        members = mode == number
        solved = weights[members] @ np.linalg.pinv(design)
        a[members], b[members] = solved[:, 0], solved[:, 1]
    return mode, a, b
