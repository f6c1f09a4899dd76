"""How far a training moves from one recorded epoch to the next, and which steps are far beyond the usual.

A random walk goes as far as the root of its number of steps, so the distance between two recorded positions is divided
by the root of the gap between their labels: epochs 3 and 7 are four steps apart.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FAR = 20.0
"""Factor of the usual step beyond which a step is far: other weights, or another training."""

FEWEST_STEPS = 5
"""Number of steps from which on their median says what is usual."""


def scaled_steps(positions: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the lengths (E - 1,) of the steps between positions (E, P), each over the root of its gap in labels (E,).

    Labels rise. The differences are taken in float64, where none of float32 overflows.
    """
    known = labels.tolist()
    gaps = np.sqrt([float(after - before) for before, after in pairwise(known)])  # int64 may overflow
    lengths = np.empty(max(len(positions) - 1, 0))
    for row in range(lengths.size):
        difference = np.subtract(positions[row + 1], positions[row], dtype=np.float64)
        lengths[row] = np.sqrt(difference @ difference)
    return lengths / gaps


def usual_step(steps: NDArray[np.float64]) -> float | None:
    """Return the median of scaled steps (n,); None for fewer than `FEWEST_STEPS`, or where most of them are 0.

    Steps from or to a position with NaN or infinite values are left out.
    """
    known = steps[np.isfinite(steps)]
    median = float(np.median(known)) if known.size >= FEWEST_STEPS else 0.0
    return median if median > 0 else None


def far_steps(steps: NDArray[np.float64], usual: float | None) -> NDArray[np.int64]:
    """Return the places (k,) of the scaled steps (n,) that are longer than `FAR` times the usual one.

    None are where nothing says what is usual.
    """
    return np.flatnonzero(steps > FAR * usual) if usual is not None else np.empty(0, np.int64)
