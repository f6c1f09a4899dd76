"""Which weights Step 1 looks at: K of N, drawn from all weights or from candidates that were themselves drawn fairly.

A layer is one tensor. Source: Brokman et al. 2024, section 3.1, and the official code's three samplings; its balanced
one hands the whole remainder to a single layer, here it goes to every layer that has room.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

Sampling = Literal["balanced", "uniform", "variance"]
SAMPLINGS: tuple[Sampling, ...] = ("balanced", "uniform", "variance")


def balanced_counts(sizes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """How many of `k` samples each layer gives, (L,): half spread equally, half by size.

    `sizes` (L,) are the layers' numbers of weights. The counts sum to min(k, N) and exceed no layer's size.
    """
    k = min(k, int(sizes.sum()))
    counts: NDArray[np.int64] = np.minimum(k // (2 * sizes.size), sizes)
    by_size = (k // 2) * sizes.astype(object) // int(sizes.sum())  # Python integers: K·n_l may exceed int64
    counts = np.minimum(counts + by_size.astype(np.int64), sizes)
    remainder = k - int(counts.sum())
    while remainder > 0:
        with_room = np.flatnonzero(counts < sizes)[:remainder]
        share = max(remainder // with_room.size, 1)
        counts[with_room] += np.minimum(sizes[with_room] - counts[with_room], share)
        remainder = k - int(counts.sum())
    return counts


def uniform_counts(sizes: NDArray[np.int64], k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many of `k` samples drawn uniformly without replacement from all N weights fall in each layer, (L,)."""
    total = int(sizes.sum())
    drawn = rng.choice(total, size=min(k, total), replace=False)
    layers = np.searchsorted(np.cumsum(sizes), drawn, side="right")
    return np.bincount(layers, minlength=sizes.size).astype(np.int64)


def draw(
    counts: NDArray[np.int64],
    bounds: NDArray[np.int64],
    rng: np.random.Generator,
    candidates: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """`counts` (L,) indices of each layer, uniformly without replacement; rising, (K,).

    Layer l holds the indices ``bounds[l] : bounds[l + 1]``. They are drawn from the rising `candidates` (P,), from all
    weights when None. Raises `ValueError` where a layer has fewer candidates than its count.
    """
    edges = bounds if candidates is None else np.searchsorted(candidates, bounds)
    places = [
        start + rng.choice(stop - start, size=count, replace=False)
        for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    chosen = np.sort(np.concatenate(places)).astype(np.int64) if places else np.empty(0, dtype=np.int64)
    return chosen if candidates is None else candidates[chosen]


def candidates_suffice(counts: NDArray[np.int64], bounds: NDArray[np.int64], candidates: NDArray[np.int64]) -> bool:
    """Whether every layer has at least as many candidates as `counts` asks of it."""
    return bool(np.all(np.diff(np.searchsorted(candidates, bounds)) >= counts))


def represented(candidates: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) how many weights each of the rising `candidates` stands for, itself included, in its layer."""
    edges = np.searchsorted(candidates, bounds)
    return np.repeat(np.diff(bounds) / np.maximum(np.diff(edges), 1), np.diff(edges))


def draw_by_variance(
    spread: NDArray[np.floating],
    k: int,
    candidates: NDArray[np.int64],
    rng: np.random.Generator,
    represents: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """`k` candidates without replacement with probability ∝ exp(spread) · represents; rising, (min(k, P),).

    `spread` (P,) is each candidate's standard deviation over time; `represents` (P,) how many weights it stands for,
    one each by default.
    """
    log_weight = spread.astype(np.float64)
    if represents is not None:
        log_weight = log_weight + np.log(represents)
    # The k largest of these keys are such a draw (Gumbel top-k), and no weight underflows to a probability of zero.
    keys = log_weight + rng.gumbel(size=log_weight.size)
    return np.sort(candidates[np.argsort(-keys, kind="stable")[:k]])


def checked_sample(sample_index: ArrayLike, n_weights: int) -> NDArray[np.int64]:
    """(K,) rising indices from what a user gives; raises `InputError` unless distinct integers from 0 to N - 1."""
    index = np.unique(np.asarray(sample_index))
    if index.size == 0 or index.dtype.kind not in "iu" or index[0] < 0 or index[-1] >= n_weights:
        raise InputError(f"sample_index has to hold integers from 0 to {n_weights - 1}; correct it")
    if index.size != np.size(sample_index):
        raise InputError("sample_index names a weight twice, expected each once; pass distinct indices")
    return index.astype(np.int64)
