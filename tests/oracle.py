"""CMD as the paper writes it, in float64 and all in memory: what every result is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Oracle:
    reference_index: Array
    mode: Array
    scale: Array
    offset: Array
    correlation: Array
    margin: Array
    modelled: Array


def correlate(left: Array, right: Array) -> Array:
    """(L, R) Pearson correlations of the columns of (E, L) and (E, R); 0 where one is constant."""
    left, right = left - left[0], right - right[0]  # a constant becomes exactly zero
    left, right = left - left.mean(0), right - right.mean(0)
    norms = np.outer(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=0))
    return np.divide(left.T @ right, norms, out=np.zeros_like(norms), where=norms > 0)


def step1(trajectories: Array, sample: Array, cut: int | float) -> Array:
    """Indices of the references; `cut` is M, or as a float the divisor of the largest distance."""
    w = trajectories[:, sample].astype(np.float64)
    c1 = np.abs(correlate(w, w))
    np.fill_diagonal(c1, np.diagonal(c1) > 0.5)
    tree = linkage(pdist(c1), "complete")
    is_count = isinstance(cut, int)
    found = fcluster(tree, cut if is_count else tree[-1, 2] / cut, "maxclust" if is_count else "distance")
    clusters = [np.flatnonzero(found == label) for label in set(found)]
    clusters.sort(key=lambda members: (-len(members), members[0]))
    best = [members[c1[np.ix_(members, members)].mean(1).argmax()] for members in clusters]
    return sample[best]


def fit(trajectories: Array, reference_index: Array) -> Oracle:
    """Steps 2 and 3 for (E, N) trajectories."""
    w = trajectories.astype(np.float64)
    w = w - w[0]  # exact in float64, and a constant becomes exactly zero
    r = w[:, reference_index]
    corr = correlate(w, r)
    size = np.sort(np.abs(corr), axis=1)
    mode = np.abs(corr).argmax(1)
    chosen = r[:, mode] - r[:, mode].mean(0)
    power = (chosen**2).sum(0)
    scale = np.divide((chosen * (w - w.mean(0))).sum(0), power, out=np.zeros(w.shape[1]), where=power > 0)
    origin = trajectories[0].astype(np.float64)
    mean = w.mean(0) + origin
    return Oracle(
        reference_index=reference_index,
        mode=mode,
        scale=scale,
        offset=mean - scale * (r.mean(0) + origin[reference_index])[mode],
        correlation=corr[np.arange(len(mode)), mode],
        margin=size[:, -1] - size[:, -2] if corr.shape[1] > 1 else np.ones(len(mode)),
        modelled=mean + scale * chosen,
    )
