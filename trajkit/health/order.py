"""Whether the epochs lie along the trajectory in the order of their labels.

All of it is judged by squared distances between epochs that are few steps apart. Along a healthy trajectory they grow
with the number of steps: as its square where the training drifts, in proportion where it walks at random, not at all
where it is independent noise. An epoch that breaks with this breaks with what its own training does everywhere else, so
each rule has two thresholds: a margin, and how far the epoch stands out among the others of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..kernels.steps import far_steps, scaled_steps, usual_step

OUTLIER_MARGIN = 1.5
"""Distance to the neighbours over their distance: 0.5 along a line, 0.71 in a random walk, 1 in independent noise."""

SWAP_MARGIN = 1.2
"""The distances before over those after the swap: at most 1 in noise; of two swapped epochs of a random walk, 1.41."""

STANDS_OUT = 5.0
"""Standard deviations above the median, both estimated robustly."""

LEAST_DEVIATION = 0.1
"""Of the logarithm: among many weights hardly anything deviates."""

AROUND = 10
"""Rows on either side among which it stands out: a training drifts at first, and is noise in the end."""

FEWEST = 5
"""Rows around it that tell what is usual."""

LONGEST_SWAP = 8
"""Steps between epochs that are swapped; those farther apart are outliers."""

BESIDE_JUMP = 0.25
"""Most of a jump's length that the steps before and after it have: one that fades is a training that was disturbed."""

LONGEST_GAP = 100
"""Gap in labels over the usual one, beyond which a training may have gone anywhere."""


def squared_distances(positions: NDArray[np.float32], reach: int) -> NDArray[np.float64]:
    """(E, reach): from each of E positions (E, P) to the next one, the one after it, …; NaN beyond the last."""
    distances = np.full((len(positions), reach), np.nan)
    for row, position in enumerate(positions):
        ahead = _squared_to(position, positions[row + 1 : row + 1 + reach])
        distances[row, : ahead.size] = ahead
    return distances


def outliers(positions: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows that are farther from both neighbours than these are from each other, by the margin, and stand out.

    The first and the last row have one neighbour and are never named. At least 7 rows are needed to stand out among.
    """
    distances = squared_distances(positions, 2)
    near = np.minimum(distances[:-2, 0], distances[1:-1, 0])
    return 1 + np.flatnonzero(_stand_out(_log_ratio(near, distances[:-2, 1]), OUTLIER_MARGIN))


def home_of(row: int, positions: NDArray[np.float32]) -> int | None:
    """The row beside which an outlier belongs: far from it, and no farther from its position than its own neighbours.

    None where there is none, and the position is one that the trajectory does not come near.
    """
    distances = _squared_to(positions[row], positions)
    near = min(distances[row - 1], distances[row + 1])
    distances[row - 1 : row + 2] = np.inf
    home = int(np.argmin(distances))
    beside = [other for other in (home - 1, home + 1) if 0 <= other < len(positions) and other != row]
    step = _squared_to(positions[home], positions[beside]).max()
    return home if distances[home] <= step and distances[home] * OUTLIER_MARGIN**2 < near else None


def swaps(positions: NDArray[np.float32], longest: int = LONGEST_SWAP) -> list[tuple[int, int]]:
    """Pairs of rows (i, j) that seem swapped, or what lies between them reversed, rising and apart from each other.

    They are up to `longest` steps apart. Row i - 1 is nearer to j than to i, and row j + 1 nearer to i than to j, by
    the margin, and the pair stands out among pairs as far apart. The first and the last row are never named: an average
    of weights at the end of a training looks the same. At least 8 rows are needed.
    """
    distances = squared_distances(positions, longest + 1)
    scores = {steps: _swap_scores(distances, steps) for steps in range(1, longest + 1)}
    found = [
        (score[first], 1 + int(first), 1 + int(first) + steps)
        for steps, score in scores.items()
        for first in np.flatnonzero(_stand_out(score, SWAP_MARGIN))
    ]
    return sorted(_best_apart(found))


def jumps(positions: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows (k,) of positions (E, P) from which the next one is a jump away: where two trainings may meet.

    That is one step which is far by `kernels.steps`, with usual ones on both sides, and which more than half of the
    weights take that move at all: of weights at rest in bfloat16 a single large one may go farther than all small ones.
    """
    steps = scaled_steps(positions, labels)
    found = []
    for row in far_steps(steps, usual_step(steps)).tolist():
        beside = steps[[row - 1, row + 1]] if 0 < row < steps.size - 1 else np.array([np.inf])
        if beside.max() <= BESIDE_JUMP * steps[row] and _is_near(labels, row) and _is_taken_by_most(positions, row):
            found.append(row)
    return np.array(found, np.int64)


def _is_near(labels: NDArray[np.int64], row: int) -> bool:
    """Return whether the gap after a row is not far beyond the usual gap of the labels."""
    gaps = [float(after - before) for before, after in pairwise(labels.tolist())]
    return bool(gaps[row] <= LONGEST_GAP * np.median(gaps))


def _is_taken_by_most(positions: NDArray[np.float32], row: int) -> bool:
    """Return whether most of the weights that move at all move in the step after a row."""
    moving = np.count_nonzero((positions != positions[0]).any(axis=0))
    return bool(2 * np.count_nonzero(positions[row + 1] != positions[row]) > moving)


def _swap_scores(distances: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """For each pair of rows `steps` apart, from row 1 on: by how much the worse of the two ends would gain."""
    pairs = max(len(distances) - 2 - steps, 0)
    before = _log_ratio(distances[:pairs, 0], distances[:pairs, steps])
    after = _log_ratio(distances[1 + steps : 1 + steps + pairs, 0], distances[1 : 1 + pairs, steps])
    return np.minimum(before, after)


def _best_apart(found: list[tuple[float, int, int]]) -> Iterator[tuple[int, int]]:
    """The pairs of the highest scores whose spans do not touch."""
    taken: list[tuple[int, int]] = []
    for _, first, last in sorted(found, reverse=True):
        if all(last < start - 1 or first > stop + 1 for start, stop in taken):
            taken.append((first, last))
            yield first, last


def _stand_out(scores: NDArray[np.float64], margin: float) -> NDArray[np.bool_]:
    """Which logarithms of squared ratios are above the margin, and far above the median of those around them."""
    found = np.zeros(scores.shape, dtype=bool)
    if scores.size == 0:
        return found
    padded = np.pad(np.where(np.isfinite(scores), scores, np.nan), AROUND, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1)
    enough = np.count_nonzero(np.isfinite(around), axis=1) >= FEWEST
    if enough.any():
        median = np.nanmedian(around[enough], axis=1)
        deviation = 1.4826 * np.nanmedian(np.abs(around[enough] - median[:, None]), axis=1)
        found[enough] = scores[enough] > np.maximum(
            2 * np.log(margin), median + STANDS_OUT * np.maximum(deviation, LEAST_DEVIATION)
        )
    return found


def _log_ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(above / below), -∞ where either is zero: epochs without a distance are duplicates, and told as such."""
    there = (above > 0) & (below > 0)
    return np.where(there, np.log(np.where(there, above, 1.0)) - np.log(np.where(there, below, 1.0)), -np.inf)


def _squared_to(position: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """(k,) from a position (P,) to others (k, P); in float64, where no difference of float32 overflows."""
    distances = np.empty(len(others))
    for number, other in enumerate(others):
        difference = np.subtract(other, position, dtype=np.float64)
        distances[number] = difference @ difference
    return distances
