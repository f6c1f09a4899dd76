"""Step 1 as a whole: from a sample's clusters to the references, and how many of them there are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..blas import one_blas_thread
from .clustering import Cut
from .curve import Curve, Sample, Trial
from .functionals import Functional
from .lines import Candidates, ReferenceChoice

SMALL_SAMPLE = 1500
"""One thread clusters so many in well under 0.1 s; threads of BLAS spin on for a while, beside those that fit then."""


def choose_functional(
    sample: Sample, candidates: Candidates, bounds: NDArray[np.int64], cut: Cut, choice: ReferenceChoice
) -> tuple[Functional, Curve]:
    """The references of a sample's clusters, made of candidates in layers that have these `bounds` (L + 1,).

    The curve is empty where the cut does not ask for one. The rounding of sums depends on the number of threads, which
    is one but for the clusters of many. Raises `InputError` where no number of modes explains the share asked for.
    """
    if sample.index.size > SMALL_SAMPLE:
        _ = sample.tree  # which is kept
    with one_blas_thread():
        curve: Curve = ()
        if isinstance(cut, str):
            cut, curve = Trial.of(sample, candidates, bounds, choice).choose(cut)
        chosen = sample.references(cut)
        weights = sample.index[chosen]
        if choice.kind == "weight":
            return Functional.of_weights(weights), curve
        made_of = choice.among(candidates, bounds)
        return choice.refined(weights, sample.trajectories[:, chosen], made_of), curve
