"""Labels for epochs whose commit records are lost: rising between those that are known, as a run asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median_low

Anchor = tuple[int, int]
"""A row and its label."""

LAST_LABEL = 2**63 - 1


def with_guesses(known: Sequence[int | None], stored: Mapping[int, int | None]) -> list[int]:
    """Return the label of each row: the known one, or else one that keeps all labels strictly rising.

    `stored` has, for rows without a known label, what the object of the label says. It is kept where it fits between
    the labels around it; the others are spread evenly there, and beyond the first and last label by the usual step.
    """
    anchors = list(_anchors(known, stored))
    if not anchors:
        return list(range(len(known)))
    steps = [(after[1] - before[1]) // (after[0] - before[0]) for before, after in pairwise(anchors)]
    step = median_low(steps) if steps else 1
    (first_row, first), (last_row, last) = anchors[0], anchors[-1]
    behind = len(known) - 1 - last_row
    step_behind = min(step, (LAST_LABEL - last) // behind) if behind else 0
    labels = [first - step * (first_row - row) for row in range(first_row)]
    for (row, label), (next_row, next_label) in pairwise(anchors):
        count = next_row - row
        labels += [label + (next_label - label) * place // count for place in range(count)]
    return [*labels, last, *(last + step_behind * place for place in range(1, behind + 1))]


def _anchors(known: Sequence[int | None], stored: Mapping[int, int | None]) -> Iterator[Anchor]:
    """Yield the known labels, and the stored ones that leave room for a label of each row before and after them."""
    after = (len(known), LAST_LABEL + 1)
    following: list[Anchor] = []
    for row, label in reversed(list(enumerate(known))):
        following.append(after)
        after = after if label is None else (row, label)
    before: Anchor | None = None
    for row, label in enumerate(known):
        found, after = stored.get(row) if label is None else label, following.pop()
        if found is not None and (label is not None or _fits(before, (row, found), after)):
            before = row, found
            yield before


def _fits(before: Anchor | None, anchor: Anchor, after: Anchor) -> bool:
    return _has_room(before, anchor) and _has_room(anchor, after)


def _has_room(before: Anchor | None, after: Anchor) -> bool:
    return before is None or after[1] - before[1] >= after[0] - before[0]
