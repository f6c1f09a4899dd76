"""Step 1 of a fit: which weights to look at, and the references that their clusters give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..blas import one_blas_thread
from ..errors import InputError, placed
from ..kernels.choosing import choose_functional
from ..kernels.clustering import Cut
from ..kernels.components import ComponentShares, components_of_equal_storage, variance_of_components
from ..kernels.curve import Curve, Sample
from ..kernels.functionals import Functional
from ..kernels.lines import Candidates, ReferenceChoice
from ..kernels.sampling import (
    SAMPLINGS,
    Sampling,
    balanced_counts,
    candidates_suffice,
    checked_sample,
    draw,
    draw_by_variance,
    represented,
    uniform_counts,
)
from ..run import Run
from ..store.format import PROBE


@dataclass(frozen=True)
class SampleChoice:
    """How the K weights are chosen that the clusters are found on; where `index` names them, nothing else applies."""

    samples: int
    sampling: Sampling
    seed: int
    index: ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise InputError(f"sampling is {self.sampling!r}, expected one of {', '.join(SAMPLINGS)}; choose one")
        for what, value, least in (("samples", self.samples, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value < 1 << 63:
                raise InputError(f"{what} is {value!r}, expected an integer of at least {least}; choose one")

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit keeps of it."""
        if self.index is not None:
            return {}
        return {"samples": int(self.samples), "sampling": self.sampling, "seed": int(self.seed)}

    def count(self, run: Run) -> int:
        """K."""
        return int(np.size(self.index)) if self.index is not None else min(int(self.samples), run.layout.n_weights)

    def draw(self, run: Run, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(K,) rising indices, from the probe where it suffices."""
        if self.index is not None:
            return checked_sample(self.index, run.layout.n_weights)
        rng = np.random.default_rng(self.seed)
        if self.sampling == "variance":
            return self._draw_by_variance(run, rows, rng)
        bounds, probe = run.layout.weight_bounds, run.probe_index
        sizes = np.diff(bounds)
        counts = (
            balanced_counts(sizes, self.samples)
            if self.sampling == "balanced"
            else uniform_counts(sizes, self.samples, rng)
        )
        return draw(counts, bounds, rng, probe if candidates_suffice(counts, bounds, probe) else None)

    def _draw_by_variance(self, run: Run, rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        bounds, probe = run.layout.weight_bounds, run.probe_index
        if self.samples > probe.size and probe.size < run.layout.n_weights:
            raise InputError(
                f"samples is {self.samples}, variance sampling chooses among the run's {probe.size} probe weights;"
                " ask for fewer or use balanced sampling"
            )
        values = run.archive.read(PROBE, rows, (0, probe.size))
        require_finite(run, probe, np.isfinite(values))
        spread = values.std(axis=0, dtype=np.float64)
        return draw_by_variance(spread, self.samples, probe, rng, represented(probe, bounds))


@dataclass(frozen=True)
class Chosen:
    """The M references of a fit, and what they were chosen by."""

    functional: Functional
    trajectories: NDArray[np.floating]
    """(E, M)"""
    curve: Curve = ()
    """Where M was chosen by it."""
    pca: ComponentShares | None = None
    """What principal components that take as much storage explain over the same epochs; None where nothing moves."""


def choose(
    run: Run, rows: NDArray[np.int64], sample: NDArray[np.int64], cut: Cut, references: ReferenceChoice
) -> Chosen:
    """The M references of the clusters of a sample (K,).

    References of many weights are made of the probe's, so that they cost no pass over the archive, now or later.
    """
    sampled = Sample(sample, run.columns(sample, rows))
    require_finite(run, sample, np.isfinite(sampled.trajectories))
    candidates, bounds = candidates_of(run, rows), run.layout.weight_bounds
    with placed(str(run.path)):
        functional, curve = choose_functional(sampled, candidates, bounds, cut, references)
    pca = pca_of(run, candidates, functional.n_modes)
    if references.kind == "weight":
        found = sampled.trajectories[:, np.searchsorted(sample, functional.index)]
        return Chosen(functional, found, curve, pca)
    probe = candidates.index
    places = np.minimum(np.searchsorted(probe, functional.index), probe.size - 1)
    inside = np.array_equal(probe[places], functional.index)
    members = candidates.trajectories[:, places] if inside else run.columns(functional.index, rows)
    return Chosen(functional, functional.values(members), curve, pca)


def pca_of(run: Run, candidates: Candidates, n_modes: int) -> ComponentShares | None:
    """Return what PCA of the storage of M modes explains over the epochs of the probe's weights."""
    components = components_of_equal_storage(run.layout.n_weights, len(candidates.trajectories), n_modes)
    with one_blas_thread():
        return variance_of_components(candidates, components)


def candidates_of(run: Run, rows: NDArray[np.int64]) -> Candidates:
    """The probe's weights; raises `InputError` where one is not finite."""
    probe = run.probe_index
    candidates = Candidates(
        probe, run.archive.read(PROBE, rows, (0, probe.size)), represented(probe, run.layout.weight_bounds)
    )
    require_finite(run, probe, np.isfinite(candidates.trajectories))
    return candidates


def require_finite(run: Run, index: NDArray[np.int64], finite: NDArray[np.bool_]) -> None:
    """Raise `InputError` naming the first weight of `index` (k,) that is not finite in `finite` (e, k)."""
    if finite.all():
        return
    name = run.layout.weight_at(int(index[np.argmin(finite.all(axis=0))]))
    raise InputError(
        f"{run.path}: '{name}' is not finite at some of the epochs to fit, expected finite weights;"
        " fit the other epochs alone, with epochs="
    )
