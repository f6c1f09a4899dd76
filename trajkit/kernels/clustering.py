"""Step 1 of CMD: clusters of sampled trajectories, and one reference for each.

Source: Brokman et al. 2024, section 3.1: complete linkage on the Euclidean distances between the rows of |corr|.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from ..errors import InputError
from .affine import MAX_MODES


@dataclass(frozen=True)
class DistanceCut:
    """Cut the tree of clusters at its largest distance divided by `divisor`, instead of at a number of modes."""

    divisor: float


Cut = int | DistanceCut | str
"""M; a distance; or, see `curve`, ``"auto"``, or a share of the variance that is to be explained, such as ``"95%"``."""

BLOCK_ROWS = 256
SPARE_BYTES = 16 << 20


def checked_cut(cut: Cut, what: str) -> Cut:
    """`cut` as a plain integer, a `DistanceCut` of a float, or ``"auto"`` or the like in its shortest spelling.

    Raises `InputError` naming `what` it was given as.
    """
    if isinstance(cut, DistanceCut):
        divisor = float(cut.divisor)
        if not 0 < divisor < np.inf:
            raise InputError(f"the divisor of the distance cut is {divisor:g}, expected more than 0; use 2 to 10")
        return DistanceCut(divisor)
    if cut == "auto":
        return "auto"
    if isinstance(cut, str) and (share := re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,6})?) ?%", cut)) and float(share[1]):
        return f"{float(share[1]):.8g}%"
    if isinstance(cut, bool) or not hasattr(cut, "__index__") or not 1 <= int(cut) <= MAX_MODES:
        raise InputError(
            f"{what} is {cut!r}, expected an integer from 1 to {MAX_MODES}, 'auto', or a share of the variance below"
            " 100 % such as '95%'; use 10"
        )
    return int(cut)


def setting_of(cut: Cut) -> Any:
    """A checked cut as a fit keeps it."""
    return vars(cut) if isinstance(cut, DistanceCut) else cut


def row_distances(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances between the rows of a (K, K) matrix, condensed to (K·(K-1)/2,).

    By matrix products: K = 3000 takes well under a second, where scipy's pair loop takes 12. A block of rows meets only
    the columns from its own start on, which halves the work and leaves no second (K, K) array in memory. Squares within
    rounding of zero are zero, or equal rows would seem apart.
    """
    k = len(matrix)
    norms = np.einsum("ij,ij->i", matrix, matrix)
    rounding = 4 * k * np.finfo(np.float64).eps * norms.max()
    condensed = np.empty(k * (k - 1) // 2)
    filled = 0
    for start in range(0, k - 1, BLOCK_ROWS):
        squared = matrix[start : start + BLOCK_ROWS] @ matrix[start:].T
        squared *= -2.0
        squared += norms[start : start + BLOCK_ROWS, None]
        squared += norms[start:]
        squared[squared < rounding] = 0.0
        np.sqrt(squared, out=squared)
        for row, distances in enumerate(squared):
            later = distances[row + 1 :]
            condensed[filled : filled + later.size] = later
            filled += later.size
    return condensed


def cluster_tree(magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K - 1, 4) the merges of complete linkage of K samples, from their (K, K) matrix of |correlations|."""
    if len(magnitude) == 1:
        return np.empty((0, 4))
    tree: NDArray[np.float64] = linkage(row_distances(magnitude), method="complete")
    return tree


def cluster(tree: NDArray[np.float64], cut: int | DistanceCut) -> NDArray[np.int64]:
    """Cluster label of each sample, (K,), from their tree.

    `cut` is the largest number of clusters, or a `DistanceCut`. Labels rise from 0 by falling size of the cluster, and
    by its first member where sizes are equal. There may be fewer clusters than asked for.
    """
    if not len(tree):
        return np.zeros(1, dtype=np.int64)
    if isinstance(cut, DistanceCut):
        found = fcluster(tree, t=tree[-1, 2] / cut.divisor, criterion="distance")
    else:
        found = fcluster(tree, t=cut, criterion="maxclust")
    _, first, labels, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[labels].astype(np.int64)


def clustering_bytes(k: int) -> int:
    """Upper estimate of the peak bytes of Step 1 on K samples, beyond their (E, K) trajectories, for E ≤ K.

    Step 1 is `correlation_magnitude`, `cluster_tree`, `cluster` and `choose_references`. It peaks in scipy's linkage,
    which copies the condensed distances: about 16·K² bytes, 1.65 GB for K = 10,000.
    """
    magnitude = 8 * k * k
    condensed = 4 * k * (k - 1)
    block = 8 * min(k, BLOCK_ROWS) * k
    # two blocks and a mask are freed before linkage, but malloc may keep them; BLAS's buffers come from the spare bytes
    return magnitude + 2 * condensed + 2 * block + block // 8 + SPARE_BYTES


def choose_references(magnitude: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each cluster's reference, (M,): the member with the largest mean |corr| to the cluster's members."""
    references = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        blocks = np.split(members, range(BLOCK_ROWS, members.size, BLOCK_ROWS))
        # each mean is over a whole row, so that the blocks change no rounding: equal members stay equal, the first wins
        means = [magnitude[np.ix_(rows, members)].mean(axis=1) for rows in blocks]
        references.append(members[np.concatenate(means).argmax()])
    return np.array(references, dtype=np.int64)
