"""The probe: the weights of which every epoch keeps the values once more, in a small row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.sampling import balanced_counts, draw
from ..layout import ParameterLayout
from .format import PROBE_SIZE


def draw_probe(layout: ParameterLayout) -> NDArray[np.int64]:
    """(P,) rising indices of a new run's probe: a balanced sample of up to 16384 weights, equal for equal layouts."""
    bounds = layout.weight_bounds
    return draw(balanced_counts(np.diff(bounds), PROBE_SIZE), bounds, np.random.default_rng(0))
