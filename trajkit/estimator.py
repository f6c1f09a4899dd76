"""CMD as a scikit-learn estimator, for trajectories that fit in memory."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .errors import InputError
from .kernels.affine import References
from .kernels.choosing import choose_functional
from .kernels.clustering import Cut, checked_cut
from .kernels.curve import Sample
from .kernels.fused import fit_block_fused
from .kernels.lines import Candidates, ReferenceChoice
from .kernels.sampling import checked_sample, draw_by_variance

MOST_CANDIDATES = 16384
"""As many as the probe of a run has, at most."""


class CMD(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Correlation Mode Decomposition of a matrix of trajectories (Brokman et al. 2024, section 3.1).

    The same kernels as `trajkit.fit`, which works on recorded runs of any size; the same `sample_index` gives the same
    decomposition.

    Parameters
    ----------
    n_modes : int, DistanceCut, "auto" or a share such as "95%", default 10
        M, the largest number of modes, or a cut of the cluster tree; "auto" or a share chooses M by what it explains of
        weights that are held out. See `trajkit.fit`.
    n_samples : int, default 1000
        K, how many weights the clusters are found on; all if there are fewer.
    sampling : {"uniform", "variance"}, default "uniform"
        "variance" draws with probability ∝ exp(standard deviation over time).
    sample_index : array of int, optional
        The weights to find the clusters on; `n_samples`, `sampling` and `random_state` do not apply then.
    references : {"weight", "centroid", "principal"}, default "weight"
        What the trajectory is that a mode's weights are fitted to: one weight, or what many have in common, of up to
        16384 weights that are drawn evenly, all if there are no more. See `trajkit.fit`.
    weighting : {"equal", "variance"}, optional
        What each of these counts for; by default "equal" for centroids, "variance" for principal trajectories.
    members : float, optional
        Of at most which share of the weights they are made.
    random_state : int, RandomState or None, default None
        Of the sampling.

    Attributes
    ----------
    labels_ : (N,) mode of each weight
    scale_, offset_ : (N,) with w(t) ≈ scale · reference(t) + offset
    correlation_ : (N,) signed, with the mode's reference
    references_ : (E, M) reference trajectories
    reference_indices_ : (M,) which rows of X they are, where each is a single weight
    functional_ : how their values follow from those of single weights, by index, mode, coefficient and origin
    curve_ : pairs of M and the variance explained of held-out weights, by which M was chosen; empty where it was given
        or nothing moves
    sample_indices_ : (K,) rows of X that the clusters were found on
    """

    def __init__(
        self,
        n_modes: Cut = 10,
        n_samples: int = 1000,
        *,
        sampling: str = "uniform",
        sample_index: ArrayLike | None = None,
        references: str = "weight",
        weighting: str | None = None,
        members: float | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_modes = n_modes
        self.n_samples = n_samples
        self.sampling = sampling
        self.sample_index = sample_index
        self.references = references
        self.weighting = weighting
        self.members = members
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: None = None) -> Self:  # noqa: ARG002 (scikit-learn passes it)
        """Fit to trajectories X (N weights, E epochs); N ≥ 1, E ≥ 2, all finite."""
        values = self._trajectories(X, reset=True)
        cut, bounds = checked_cut(self.n_modes, "n_modes"), np.array([0, len(values)])
        choice = ReferenceChoice(self.references, self.weighting, self.members)  # type: ignore[arg-type]
        self.sample_indices_ = self._sample(values)
        sampled, candidates = Sample(self.sample_indices_, values[self.sample_indices_].T), _candidates(values)
        self.functional_, self.curve_ = choose_functional(sampled, candidates, bounds, cut, choice)
        self.__dict__.pop("reference_indices_", None)
        if choice.kind == "weight":
            self.reference_indices_ = self.functional_.index
        self.references_ = self.functional_.values(values[self.functional_.index].T)
        fitted = fit_block_fused(values.T, References(self.references_))
        self.labels_ = fitted.mode.astype(np.int64)
        self.scale_ = fitted.scale
        self.mean_ = fitted.mean
        self.correlation_ = fitted.correlation
        return self

    @property
    def offset_(self) -> NDArray[np.float64]:
        """(N,) b = mean - a · mean(r), in float64."""
        check_is_fitted(self)
        return References(self.references_).offset(self.labels_, self.scale_, self.mean_)

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """(n, 3) mode, scale and offset of trajectories X (n, E) over the fitted epochs."""
        check_is_fitted(self)
        references = References(self.references_)
        fitted = fit_block_fused(self._trajectories(X, reset=False).T, references)
        offset = references.offset(fitted.mode, fitted.scale, fitted.mean)
        return np.column_stack([fitted.mode, fitted.scale, offset])

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """(n, E) modelled trajectories from `transform`'s (n, 3) mode, scale and offset."""
        check_is_fitted(self)
        fitted = np.asarray(X, dtype=np.float64)
        if fitted.ndim != 2 or fitted.shape[1] != 3:
            raise InputError(f"X has shape {fitted.shape}, expected (n, 3) of mode, scale, offset; pass transform(X)")
        mode, n_modes = fitted[:, 0].astype(np.int64), self.references_.shape[1]
        if mode.size and not 0 <= mode.min() <= mode.max() < n_modes:
            raise InputError(f"X names modes {mode.min()} to {mode.max()}, there are {n_modes}; pass transform(X)")
        return self.references_.T[mode] * fitted[:, 1:2] + fitted[:, 2:3]

    def reconstruct(self) -> NDArray[np.float64]:
        """(N, E) modelled trajectories of the weights that were fitted."""
        check_is_fitted(self)
        references = References(self.references_)
        centred = (self.references_ - references.mean).T
        return centred[self.labels_] * self.scale_[:, None] + self.mean_[:, None]

    def _trajectories(self, X: ArrayLike, reset: bool) -> NDArray[np.floating]:
        values: NDArray[np.floating] = validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_features=2 if reset else 1
        )
        return values

    def _sample(self, values: NDArray[np.floating]) -> NDArray[np.int64]:
        n = len(values)
        if self.sample_index is not None:
            return checked_sample(self.sample_index, n)
        if self.n_samples < 1:
            raise InputError(f"n_samples is {self.n_samples}, expected at least 1; use 1000")
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        if self.sampling == "variance":
            return draw_by_variance(values.std(axis=1, dtype=np.float64), self.n_samples, np.arange(n), rng)
        if self.sampling == "uniform":
            return np.sort(rng.choice(n, size=min(self.n_samples, n), replace=False)).astype(np.int64)
        raise InputError(f"sampling is {self.sampling!r}, expected 'uniform' or 'variance'; choose one")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags


def _candidates(values: NDArray[np.floating]) -> Candidates:
    """Rows of (N, E) trajectories that may be members of references, the same ones for the same N."""
    n = len(values)
    index = np.sort(np.random.default_rng(0).choice(n, MOST_CANDIDATES, False)) if n > MOST_CANDIDATES else np.arange(n)
    return Candidates(index, np.ascontiguousarray(values[index].T), np.full(index.size, n / index.size))
