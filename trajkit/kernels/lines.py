"""References made of many weights: a mode's centroid, or its principal trajectory by k-lines.

A single weight's noise goes into every weight of its mode; that of many averages out. Both are found on a few thousand
weights, the candidates, of which those that move are members of the mode whose reference they correlate with most.
With z_i = (w_i - its mean) / σ_i, s_i the sign of its correlation with the single weight, and k_i what it counts for:

    centroid    r = Σ k_i·s_i·z_i / Σ k_i
    principal   r = √E·u, the unit u that maximises Σ k_i·⟨z_i, u⟩²; a few rounds of joining the best line and fitting
                the lines anew, as k-means does with points

With ``"equal"`` weighting all k_i are 1. With ``"variance"`` k_i = g_i·σ_i², where g_i is how many weights the
candidate stands for: then each round of k-lines lowers the squared error of all weights, as far as these show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .affine import References
from .correlation import standardised
from .functionals import Functional
from .fused import fit_block_fused

Kind = Literal["weight", "centroid", "principal"]
Weighting = Literal["equal", "variance"]

ROUNDS = 5
"""Of k-lines, at most: what the later ones bring is a tenth of a percent, and each costs as much."""


@dataclass(frozen=True)
class Candidates:
    """Weights that may be members of references."""

    index: NDArray[np.int64]
    """(P,) which they are."""
    trajectories: NDArray[np.floating[Any]]
    """(E, P)"""
    represents: NDArray[np.float64]
    """(P,) how many weights each stands for."""


@dataclass(frozen=True)
class ReferenceChoice:
    """What the references are made of; `weighting` is of the members, by default what suits the kind."""

    kind: Kind = "weight"
    weighting: Weighting | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"references is {self.kind!r}, expected one of {', '.join(get_args(Kind))}; choose one")
        if self.weighting is None and self.kind != "weight":
            object.__setattr__(self, "weighting", "variance" if self.kind == "principal" else "equal")
        if self.kind == "weight" and self.weighting is not None:
            raise InputError(
                f"weighting is {self.weighting!r}, but a reference that is a single weight has nothing to weigh;"
                " leave it out, or choose references 'centroid' or 'principal'"
            )
        if self.weighting not in (None, *get_args(Weighting)):
            raise InputError(f"weighting is {self.weighting!r}, expected 'equal' or 'variance'; choose one")

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit keeps of it: nothing where it is the paper's."""
        return {} if self.kind == "weight" else {"references": self.kind, "weighting": self.weighting}

    def refined(
        self, weights: NDArray[np.int64], trajectories: NDArray[np.floating[Any]], candidates: Candidates
    ) -> Functional:
        """The references for modes that were found with single `weights` (M,), whose `trajectories` are (E, M).

        A mode that no candidate that moves is a member of keeps its single weight.
        """
        if self.kind == "weight":
            return Functional.of_weights(weights)
        motions = _Motions.of(candidates, self.weighting == "variance")
        started = fit_block_fused(candidates.trajectories, References(trajectories))
        if self.kind == "centroid":
            mode = started.mode.astype(np.int64)
            coefficient = _centroids(motions, mode, np.sign(started.correlation))
        else:
            mode, coefficient = _k_lines(motions, trajectories, candidates)
        return _functional(candidates, mode, coefficient, weights, trajectories[0])


@dataclass(frozen=True)
class _Motions:
    """Of P candidates: directions and what they count for, each as a row."""

    unit: NDArray[np.float64]
    """(P, E) centred trajectories with Euclidean norm 1; zeros for a constant."""
    norm: NDArray[np.float64]
    """(P,) √E·σ"""
    share: NDArray[np.float64]
    """(P,) √k, to a common factor; 0 for a constant."""

    @classmethod
    def of(cls, candidates: Candidates, by_variance: bool) -> _Motions:
        """Of candidates that count for their part of the variance of all weights, or all for the same."""
        unit, norm = standardised(candidates.trajectories)
        largest = norm.max(initial=0.0)
        by_norm = norm / (largest if largest > 0 else 1.0) * np.sqrt(candidates.represents)
        return cls(np.ascontiguousarray(unit.T), norm, by_norm if by_variance else (norm > 0).astype(np.float64))


def _centroids(motions: _Motions, mode: NDArray[np.int64], sign: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(P,) coefficients s·k / (σ·Σk) of members of the modes; 0 for what does not move."""
    counts = motions.share**2
    sigma = motions.norm / np.sqrt(motions.unit.shape[1])
    total = np.bincount(mode, weights=counts)[mode] * sigma
    found: NDArray[np.float64] = np.divide(sign * counts, total, out=np.zeros_like(counts), where=total > 0)
    return found


def _k_lines(
    motions: _Motions, trajectories: NDArray[np.floating[Any]], candidates: Candidates
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(P,) modes, and the coefficients of their principal trajectories, from lines (E, M) to begin with."""
    lines = trajectories.astype(np.float64)
    coefficient = np.zeros(motions.norm.size)
    mode: NDArray[np.int64] = np.full(motions.norm.size, -1)
    for _ in range(ROUNDS):
        fitted = fit_block_fused(candidates.trajectories, References(lines))
        joined = _without_empty(motions, fitted.mode.astype(np.int64), fitted.correlation, lines.shape[1])
        moved = joined != mode
        for changed in np.union1d(joined[moved], mode[moved]):
            members = np.flatnonzero((joined == changed) & (motions.share > 0))
            if changed >= 0 and members.size:
                lines[:, changed], coefficient[members] = _principal(motions, members)
        mode = joined
        if not moved.any():
            break
    return mode, coefficient


def _principal(motions: _Motions, members: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """√E·u, the first principal trajectory of some members with standard deviation 1, and their coefficients in it.

    By the smaller one of the two Gram matrices. The member that makes up most of it has a positive coefficient.
    """
    n_epochs = motions.unit.shape[1]
    share = motions.share[members] / motions.share[members].max()  # of a mode, or the squares could underflow
    rows = motions.unit[members] * share[:, None]
    if members.size < n_epochs:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        along = vectors[:, -1] * np.sqrt(values[-1])
    else:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        along = rows @ vectors[:, -1]
    along *= np.sign(along[np.abs(along).argmax()]) * np.sqrt(n_epochs) / values[-1]
    return rows.T @ along, along * share / motions.norm[members]


def _without_empty(
    motions: _Motions, mode: NDArray[np.int64], correlation: NDArray[np.floating[Any]], n_modes: int
) -> NDArray[np.int64]:
    """`mode` (P,), but modes without a member that moves get those that are explained worst, one each."""
    empty = np.flatnonzero(np.bincount(mode[motions.share > 0], minlength=n_modes) == 0)
    missing = motions.share**2 * (1.0 - correlation.astype(np.float64) ** 2)
    worst = np.argsort(-missing, kind="stable")[: empty.size]
    worst = worst[missing[worst] > 0]
    mode[worst] = empty[: worst.size]
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
