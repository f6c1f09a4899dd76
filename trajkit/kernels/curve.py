"""How many modes: what references that some weights give explain of other weights, against a cost per mode.

The candidates, weights that references may be made of, are split. References of M = 1, 2, … modes are found on one part
as a fit finds them, but for principal trajectories, towards which a mode takes one step of the power method in each of
`ROUNDS` rounds. Their score is the share of the variance that they explain of the other part, of which each weight
counts for those that it stands for, and chooses its mode. More modes explain more, even of noise: the cost ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .clustering import DistanceCut, choose_references, cluster, cluster_tree
from .correlation import correlation_magnitude, standardised
from .lines import Candidates, Kind, Motions, ReferenceChoice, at_most

Curve = tuple[tuple[int, float], ...]
"""Numbers of modes, rising, and the share of the variance of held-out weights that each explains, in [0, 1]."""

MOST = 30
"""Modes that ``"auto"`` chooses, at most."""

COST = 1 / 4000
"""Of the variance, per mode: so ``"auto"`` explains at most 0.73 % less of held-out weights than the best M up to 30,
which leaves room below 1 % for what they do not show of the others."""

STEPS = (*range(1, 11), 12, 14, 17, 20, 25, MOST)
LATER_STEPS = (36, 43, 52, 62, 75, 90, 108, 130, 155, 186, 223, 268, 300)
"""Numbers of modes that are tried; the later ones only until the share is explained that was asked for."""

MOST_MEMBERS, MOST_HELD_OUT = 2048, 4096
"""Weights; they show the curve to a few thousandths, and the next number of modes sees the same ones."""

ROUNDS = 6


@dataclass(frozen=True)
class Sample:
    """The K weights that clusters are found on."""

    index: NDArray[np.int64]
    """(K,) rising"""
    trajectories: NDArray[np.floating]
    """(E, K)"""

    @cached_property
    def magnitude(self) -> NDArray[np.float64]:
        """(K, K) |correlations|."""
        return correlation_magnitude(self.trajectories)

    @cached_property
    def tree(self) -> NDArray[np.float64]:
        """Of their clusters."""
        return cluster_tree(self.magnitude)

    def references(self, cut: int | DistanceCut) -> NDArray[np.int64]:
        """(M,) positions of the clusters' references."""
        return choose_references(self.magnitude, cluster(self.tree, cut))

    def outside(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in `index` of the weights that are not in the sample."""
        return np.flatnonzero(~np.isin(index, self.index))


@dataclass(frozen=True)
class Trial:
    """What references are made of, and the weights that they are tried on."""

    kind: Kind
    sample: Sample
    members: NDArray[np.float64]
    """(T, E) directions of the weights that references are made of, unless these are single weights"""
    counts: NDArray[np.float64]
    """(T,) what each of them counts for"""
    held_out: NDArray[np.float64]
    """(H, E) motions of the others, times the root of how many weights each stands for"""

    @classmethod
    def of(cls, sample: Sample, candidates: Candidates, bounds: NDArray[np.int64], choice: ReferenceChoice) -> Trial:
        """With candidates in layers that have these `bounds`, of which every second one outside of the sample is held
        out. Where these are few, the clusters are those of every second weight of the sample.

        A single weight is tried on itself.
        """
        places = np.arange(candidates.index.size)
        outside = sample.outside(candidates.index)
        if 4 * outside.size < places.size:
            sample = Sample(sample.index[::2], sample.trajectories[:, ::2])
            outside = sample.outside(candidates.index)
        held_out = at_most(outside[::2] if outside.size else places, MOST_HELD_OUT)
        most = min(choice.most_members(int(bounds[-1])), MOST_MEMBERS)
        made_of = at_most(np.setdiff1d(places, outside[::2]), most)
        members = Motions.of(candidates.some(made_of, bounds), choice.weighting == "variance")
        return cls(
            kind=choice.kind,
            sample=sample,
            members=members.unit,
            counts=members.share**2,
            held_out=Motions.of(candidates.some(held_out, bounds), by_variance=True).rows,
        )

    def choose(self, cut: str) -> tuple[int, Curve]:
        """Return M for ``"auto"``, or the smallest one that explains a share such as ``"95%"``, and the M tried.

        Return 1 and an empty curve where no held-out weight moves. Raises `InputError` where none of up to 300 explains
        the share.
        """
        if self._total == 0:
            return 1, ()
        if cut == "auto":
            curve = tuple(self._scores(STEPS))
            return max(curve, key=lambda point: point[1] - COST * point[0])[0], curve
        share = float(cut.removesuffix("%")) / 100
        tried: list[tuple[int, float]] = []
        for point in self._scores(STEPS + LATER_STEPS):
            if point[1] >= share:
                before = tried[-1][0] if tried else 0
                tried += [*self._scores(range(before + 1, point[0]), before), point]
                return next(n_modes for n_modes, score in tried if score >= share), tuple(tried)
            tried.append(point)
        most, best = max(tried, key=lambda point: point[1])
        raise InputError(
            f"{most} modes explain {100 * best:.4g} % of the variance of held-out weights, the most that up to"
            f" {tried[-1][0]} modes do, expected {cut}; ask for less, for other references, or for a number of modes"
        )

    @cached_property
    def _total(self) -> float:
        """Sum of the squares of what is held out."""
        return float(np.square(self.held_out).sum())

    def _scores(self, numbers: Iterable[int], above: int = 0) -> Iterator[tuple[int, float]]:
        """How many modes there are, where at most so many are asked for, and their score; each once."""
        for number in numbers:
            lines = self._lines(self.sample.references(number))
            if lines.shape[1] > above:
                above = lines.shape[1]
                explained = np.square(self.held_out @ lines).max(axis=1).sum()
                yield above, min(float(explained / self._total), 1.0)

    def _lines(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """(E, M) directions of the references that begin with single weights of the sample."""
        lines, _ = standardised(self.sample.trajectories[:, chosen])
        for _ in range({"weight": 0, "centroid": 1, "principal": ROUNDS}[self.kind]):
            along = self.members @ lines
            mode = np.abs(along).argmax(axis=1)[:, None]
            its_own = np.take_along_axis(along, mode, axis=1)
            share = np.zeros_like(along)
            its_share = np.sign(its_own) if self.kind == "centroid" else its_own
            np.put_along_axis(share, mode, its_share * self.counts[:, None], axis=1)
            found = self.members.T @ share
            length = np.sqrt(np.square(found).sum(axis=0))
            lines = np.where(length > 0, found / np.where(length > 0, length, 1.0), lines)
        return lines
