"""Which epochs are missing, by the labels of those that were recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

MOST_MISSING = 1000
"""Of one gap; beyond it the labels begin to count something else."""


def missing_labels(labels: Sequence[int]) -> Iterator[range]:
    """The labels that are missing in each gap of rising labels, given the usual step between them.

    The usual step is that of more than half of the labels; without one, as in 1, 2, 4, 8, …, nothing is missing. A gap
    is a multiple of it. Several larger steps at either end of the labels, or three or more equal ones between usual
    ones, are another schedule and no gaps.
    """
    steps = [after - before for before, after in pairwise(labels)]
    if not steps:
        return
    usual, count = Counter(steps).most_common(1)[0]
    if 2 * count <= len(steps):
        return
    place = 0
    for is_usual, group in groupby(steps, key=lambda step: step == usual):
        stretch = list(group)
        at_an_end = place == 0 or place + len(stretch) == len(steps)
        if not is_usual and not _is_schedule(stretch, at_an_end):
            for label, step in zip(labels[place:], stretch, strict=False):
                if step % usual == 0 and usual < step <= usual * (MOST_MISSING + 1):
                    yield range(label + usual, label + step, usual)
        place += len(stretch)


def _is_schedule(steps: list[int], at_an_end: bool) -> bool:
    """Whether unusual steps between usual ones, or at an end, are meant so."""
    return len(steps) > 1 if at_an_end else len(steps) > 2 and len(set(steps)) == 1
