"""Step 1 of CMD: clusters of sampled trajectories, and one reference for each.

Source: Brokman et al. 2024, section 3.1: complete linkage on the Euclidean distances between the rows of |corr|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from ..errors import InputError


@dataclass(frozen=True)
class DistanceCut:
    """Cut the tree of clusters at its largest distance divided by `divisor`, instead of at a number of modes."""

    divisor: float


Cut = int | DistanceCut

MAX_MODES = 65535


def checked_cut(cut: Cut, what: str) -> Cut:
    """`cut` as a plain integer or a `DistanceCut` of a float; raises `InputError` naming `what` it was given as."""
    if isinstance(cut, DistanceCut):
        divisor = float(cut.divisor)
        if not 0 < divisor < np.inf:
            raise InputError(f"the divisor of the distance cut is {divisor:g}, expected more than 0; use 2 to 10")
        return DistanceCut(divisor)
    if isinstance(cut, bool) or not hasattr(cut, "__index__") or not 1 <= int(cut) <= MAX_MODES:
        raise InputError(f"{what} is {cut!r}, expected an integer from 1 to {MAX_MODES}; use 10")
    return int(cut)


def row_distances(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances between the rows of a symmetric (K, K) matrix, condensed to (K·(K-1)/2,).

    By the Gram matrix: K = 3000 takes well under a second, where scipy's pair loop takes 12. Squares within rounding of
    zero are zero, or equal rows would seem apart.
    """
    squared = matrix @ matrix.T
    norms = np.diagonal(squared).copy()
    rounding = 4 * len(matrix) * np.finfo(np.float64).eps * norms.max()
    squared *= -2.0
    squared += norms[:, None]
    squared += norms[None, :]
    squared[squared < rounding] = 0.0
    np.sqrt(squared, out=squared)
    np.fill_diagonal(squared, 0.0)
    return squareform(squared, checks=False)


def cluster(magnitude: NDArray[np.float64], cut: Cut) -> NDArray[np.int64]:
    """Cluster label of each sample, (K,), from their (K, K) matrix of |correlations|.

    `cut` is the largest number of clusters, or a `DistanceCut`. Labels rise from 0 by falling size of the cluster, and
    by its first member where sizes are equal. There may be fewer clusters than asked for.
    """
    if len(magnitude) == 1:
        return np.zeros(1, dtype=np.int64)
    tree = linkage(row_distances(magnitude), method="complete")
    if isinstance(cut, DistanceCut):
        found = fcluster(tree, t=tree[-1, 2] / cut.divisor, criterion="distance")
    else:
        found = fcluster(tree, t=cut, criterion="maxclust")
    _, first, labels, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[labels].astype(np.int64)


def choose_references(magnitude: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each cluster's reference, (M,): the member with the largest mean |corr| to the cluster's members."""
    references = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        references.append(members[magnitude[np.ix_(members, members)].mean(axis=1).argmax()])
    return np.array(references, dtype=np.int64)
