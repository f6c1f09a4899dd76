"""References made of many weights: a mode's centroid, or its principal trajectory by k-lines.

A single weight's noise goes into every weight of its mode; that of many averages out. Both are found on a few thousand
weights, the candidates, of which those that move are members of the mode whose reference they correlate with most.
With z_i = (w_i - its mean) / σ_i, s_i the sign of its correlation with the single weight, and k_i what it counts for:

    centroid    r = Σ k_i·s_i·z_i / Σ k_i
    principal   r = √E·u, the unit u that maximises Σ k_i·⟨z_i, u⟩²; a few rounds of joining the best line and fitting
                the lines anew, as k-means does with points

With ``"equal"`` weighting all k_i are 1, but for weights that hardly move. With ``"variance"`` k_i = g_i·σ_i², where
g_i is how many weights the candidate stands for: then each round of k-lines lowers the squared error of all weights, as
far as these show it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from ..errors import InputError
from .affine import References
from .correlation import standardised
from .functionals import Functional
from .fused import fit_block_fused
from .sampling import represented

Kind = Literal["weight", "centroid", "principal"]
Weighting = Literal["equal", "variance"]

STILL = 0.1
"""Of the root mean square of σ: with ``"equal"`` weighting, a member that moves less counts for its part squared."""

FIRST_ROUNDS, LAST_ROUNDS = 8, 2
"""Of k-lines, at most. The first ones, which change much, are on some of the candidates, on which they cost little."""

POWER_STEPS = 2
"""Of power iteration in each of these."""

STEP = 8
"""One candidate in so many, for these."""

EXPLAINED = 1e-6
"""Of a candidate's variance: where no more is missing, nothing is."""

ENOUGH = 16
"""Candidates a mode; with fewer, all rounds are on all of them."""


@dataclass(frozen=True)
class Candidates:
    """Weights that may be members of references."""

    index: NDArray[np.int64]
    """(P,) which they are."""
    trajectories: NDArray[np.floating[Any]]
    """(E, P)"""
    represents: NDArray[np.float64]
    """(P,) how many weights each stands for."""

    def some(self, places: NDArray[np.int64], bounds: NDArray[np.int64]) -> Candidates:
        """Those at some places; each stands for more weights then, of layers that have these `bounds`."""
        index = self.index[places]
        return Candidates(index, self.trajectories[:, places], represented(index, bounds))


@dataclass(frozen=True)
class ReferenceChoice:
    """What the references are made of; `weighting` is of the members, by default what suits the kind.

    `members` is how large a share of the weights may be members; by default all candidates may.
    """

    kind: Kind = "weight"
    weighting: Weighting | None = None
    members: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"references is {self.kind!r}, expected one of {', '.join(get_args(Kind))}; choose one")
        if self.weighting is None and self.kind != "weight":
            object.__setattr__(self, "weighting", "variance" if self.kind == "principal" else "equal")
        for name, given in (("weighting", self.weighting), ("members", self.members)):
            if self.kind == "weight" and given is not None:
                raise InputError(
                    f"{name} is {given!r}, but a reference that is a single weight has nothing to weigh;"
                    " leave it out, or choose references 'centroid' or 'principal'"
                )
        if self.weighting not in (None, *get_args(Weighting)):
            raise InputError(f"weighting is {self.weighting!r}, expected 'equal' or 'variance'; choose one")
        if self.members is not None and not (isinstance(self.members, numbers.Real) and 0 < self.members <= 1):
            raise InputError(f"members is {self.members!r}, expected a share of the weights above 0, up to 1; use 0.05")

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit keeps of it: nothing where it is the paper's."""
        if self.kind == "weight":
            return {}
        share = {} if self.members is None else {"members": float(self.members)}
        return {"references": self.kind, "weighting": self.weighting, **share}

    def most_members(self, n_weights: int) -> int:
        """How many of N weights may be members."""
        return n_weights if self.members is None else max(int(self.members * n_weights), 1)

    def among(self, candidates: Candidates, bounds: NDArray[np.int64]) -> Candidates:
        """Those that may be members, of candidates in layers that have these `bounds`."""
        places = at_most(np.arange(candidates.index.size), self.most_members(int(bounds[-1])))
        return candidates if places.size == candidates.index.size else candidates.some(places, bounds)

    def refined(
        self, weights: NDArray[np.int64], trajectories: NDArray[np.floating[Any]], candidates: Candidates
    ) -> Functional:
        """The references made of many for modes that were found with `weights` (M,), whose `trajectories` are (E, M).

        A mode that no candidate that moves is a member of keeps its single weight.
        """
        motions = Motions.of(candidates, self.weighting == "variance")
        if self.kind == "centroid":
            started = fit_block_fused(candidates.trajectories, References(trajectories))
            mode = started.mode.astype(np.int64)
            coefficient = _centroids(motions, mode, np.sign(started.correlation))
        else:
            mode, coefficient = _k_lines(motions, trajectories, candidates.trajectories)
        return _functional(candidates, mode, coefficient, weights, trajectories[0])


@dataclass(frozen=True)
class Motions:
    """Of P candidates: directions and what they count for, each as a row."""

    unit: NDArray[np.float64]
    """(P, E) centred trajectories with Euclidean norm 1; zeros for a constant."""
    norm: NDArray[np.float64]
    """(P,) √E·σ"""
    share: NDArray[np.float64]
    """(P,) √k, to a common factor; 0 for a constant."""

    @cached_property
    def rows(self) -> NDArray[np.float64]:
        """(P, E) directions by their shares."""
        return self.unit * self.share[:, None]

    def every(self, step: int) -> Motions:
        """Those of every so many candidates."""
        return Motions(self.unit[::step], self.norm[::step], self.share[::step])

    @classmethod
    def of(cls, candidates: Candidates, by_variance: bool) -> Motions:
        """Of candidates that count for their part of the variance of all weights, or all for the same.

        But for those that hardly move: divided by its σ, one that only wakes up later would outdo all others then.
        """
        unit, norm = standardised(candidates.trajectories)
        relative = norm / (norm.max(initial=0.0) or 1.0)
        if by_variance:
            share = relative * np.sqrt(candidates.represents)
        else:
            moving = candidates.represents[norm > 0].sum() or 1.0
            usual = np.sqrt((candidates.represents * relative**2).sum() / moving) or 1.0
            share = np.minimum(relative / (STILL * usual), 1.0)
        return cls(np.ascontiguousarray(unit.T), norm, share)


def at_most(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """So many of them, evenly; all where they are no more."""
    return places if places.size <= most else places[np.arange(most) * places.size // most]


def _centroids(motions: Motions, mode: NDArray[np.int64], sign: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(P,) coefficients s·k / (σ·Σk) of members of the modes; 0 for what does not move."""
    counts = motions.share**2
    sigma = motions.norm / np.sqrt(motions.unit.shape[1])
    total = np.bincount(mode, weights=counts)[mode] * sigma
    found: NDArray[np.float64] = np.divide(sign * counts, total, out=np.zeros_like(counts), where=total > 0)
    return found


def _k_lines(
    motions: Motions, trajectories: NDArray[np.floating[Any]], candidates: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(P,) modes, and the coefficients of their principal trajectories, from lines (E, M) to begin with."""
    lines = trajectories.astype(np.float64)
    if len(motions.norm) < STEP * ENOUGH * lines.shape[1]:
        _improve(lines, motions, candidates, FIRST_ROUNDS, _towards_principal)
    else:
        some = np.ascontiguousarray(candidates[:, ::STEP])
        _improve(lines, motions.every(STEP), some, FIRST_ROUNDS, _towards_principal)
    mode = _improve(lines, motions, candidates, LAST_ROUNDS, _principal)
    return mode, _projections(motions, lines, mode)


def _improve(
    lines: NDArray[np.float64],
    motions: Motions,
    candidates: NDArray[np.floating[Any]],
    most: int,
    fitted_line: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.int64]:
    """Change `lines` (E, M) in so many rounds, fewer where nothing changes; (P,) the modes that they were fitted to."""
    mode: NDArray[np.int64] = np.full(len(motions.norm), -1)
    for _ in range(most):
        fitted = fit_block_fused(candidates, References(lines))
        joined = _without_empty(motions, fitted.mode, fitted.correlation, lines.shape[1])
        moved = joined != mode
        if not moved.any():
            break
        order = np.argsort(joined, kind="stable")
        order = order[motions.share[order] > 0]
        members, edges = motions.rows[order], np.searchsorted(joined[order], np.arange(lines.shape[1] + 1))
        for changed in set(joined[moved].tolist()) | set(mode[moved].tolist()) - {-1}:
            if edges[changed] < edges[changed + 1]:
                rows = members[edges[changed] : edges[changed + 1]]
                lines[:, changed] = fitted_line(rows, lines[:, changed])
        mode = joined.astype(np.int64)
    return mode


def _towards_principal(rows: NDArray[np.float64], line: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E,) a few steps of power iteration from a line to `_principal`, of which an early round needs no more."""
    for _ in range(POWER_STEPS):
        found = (rows @ line) @ rows
        norm = np.linalg.norm(found)
        if not norm > 0:  # a constant line, or one across all rows
            return _principal(rows, line)
        line = found / norm
    return line


def _principal(rows: NDArray[np.float64], line: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: ARG001
    """(E,) the unit u that maximises Σ⟨row, u⟩² over (S, E) rows, by the smaller one of the two Gram matrices."""
    if len(rows) >= rows.shape[1]:
        return _leading(rows.T @ rows)
    found = _leading(rows @ rows.T) @ rows
    return np.asarray(found / np.linalg.norm(found))


def _leading(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(k,) the eigenvector of the largest eigenvalue of a symmetric (k, k) matrix."""
    last = len(matrix) - 1
    _, vectors = eigh(matrix, subset_by_index=(last, last), check_finite=False)
    found: NDArray[np.float64] = vectors[:, 0]
    return found


def _projections(motions: Motions, lines: NDArray[np.float64], mode: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) coefficients that make √E·u, with standard deviation 1, of each mode's members.

    As Σ⟨x, u⟩·x = λ·u over the members' rows x, with λ = Σ⟨x, u⟩². The member that makes up most has a positive one.
    """
    along = np.einsum("pe,pe->p", motions.rows, lines.T[mode])
    power = np.bincount(mode, weights=along**2, minlength=lines.shape[1])
    most = np.lexsort((-np.arange(along.size), np.abs(along), mode))
    sign = np.ones(lines.shape[1])
    sign[mode[most]] = np.sign(along[most])  # of each mode's last one in this order
    along *= (sign * np.sqrt(len(lines)))[mode] * motions.share
    scale = power[mode] * motions.norm
    found: NDArray[np.float64] = np.divide(along, scale, out=np.zeros_like(along), where=scale > 0)
    return found


def _without_empty(
    motions: Motions, mode: NDArray[np.uint16], correlation: NDArray[np.floating[Any]], n_modes: int
) -> NDArray[np.uint16]:
    """`mode` (P,), but modes without a member that moves get those that are explained worst, one each.

    No mode gives its last member, and none that is explained to the rounding of a float32 correlation is taken.
    """
    sizes = np.bincount(mode[motions.share > 0], minlength=n_modes)
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
        missing = 1.0 - correlation.astype(np.float64) ** 2
        lacking = np.where(missing > EXPLAINED, motions.share**2 * missing, 0.0)
        order = iter(np.argsort(-lacking, kind="stable")[: np.count_nonzero(lacking)].tolist())
        for free in empty.tolist():
            worst = next((place for place in order if sizes[mode[place]] > 1), None)
            if worst is None:
                break
            sizes[mode[worst]] -= 1
            mode[worst] = free
    return mode


def _functional(
    candidates: Candidates,
    mode: NDArray[np.int64],
    coefficient: NDArray[np.float64],
    weights: NDArray[np.int64],
    origin: NDArray[np.floating[Any]],
) -> Functional:
    """Of those candidates that have a coefficient; of the mode's single weight where none has."""
    members = np.flatnonzero((coefficient != 0) & np.isfinite(coefficient))
    alone = np.setdiff1d(np.arange(weights.size), mode[members])
    return Functional(
        n_modes=weights.size,
        index=np.concatenate([candidates.index[members], weights[alone]]),
        mode=np.concatenate([mode[members], alone]).astype(np.uint16),
        origin=np.concatenate([candidates.trajectories[0, members], origin[alone]]),
        coefficient=np.concatenate([coefficient[members], np.ones(alone.size)]),
    )
