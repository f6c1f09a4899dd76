"""What is wrong with single tensors, by what they hold at each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..layout import TensorEntry
from .reading import TensorContents
from .report import Finding, Kind, name_epochs, name_tensors

FEWEST_MOVED = 8
"""Values that change on either side of where a tensor is the same again: fewer may be so by chance, or at a clamp."""

EXPLODES = 100.0
"""Times its first largest magnitude, or what is typical of the run's tensors at first where that is more."""


@dataclass(frozen=True)
class _Seen:
    """Something about one tensor; the same about several is one finding."""

    kind: Kind
    places: tuple[int, ...]
    """Of the epochs, among those checked."""
    what: str
    suspicious: bool


def judge_tensors(tensors: TensorContents, labels: NDArray[np.int64], distinct: NDArray[np.int64]) -> Iterator[Finding]:
    """Findings about tensors over epochs with the given labels (E,).

    `distinct` are the places of the epochs, rising, among which no two have the same weights.
    """
    grouped: dict[_Seen, list[str]] = {}
    exploding = _exploding(tensors)
    for number, entry in enumerate(tensors.entries):
        fingerprint = tensors.contents.fingerprint[number]
        constant = distinct.size > 1 and bool((fingerprint == fingerprint[0]).all())
        seen = [*_nonfinite(entry, tensors.contents.nonfinite[number], constant), *_explosion(exploding[number])]
        if constant:
            seen.append(_constant(entry))
        else:
            seen += _repeated(fingerprint[distinct], tensors.contents.changed[number][distinct], distinct)
        for item in seen:
            grouped.setdefault(item, []).append(entry.name)
    for item, names in grouped.items():
        epochs = tuple(labels[list(item.places)].tolist())
        where = f" {name_epochs(epochs)}" if epochs else ""
        text = f"{name_tensors(names)}: {item.what.format(where=where)}"
        yield Finding(item.kind, epochs, tuple(names), text, item.suspicious)


def _nonfinite(entry: TensorEntry, nonfinite: NDArray[np.int64], constant: bool) -> Iterator[_Seen]:
    places = tuple(np.flatnonzero(nonfinite).tolist())
    if places and constant and entry.kind == "buffer":
        yield _Seen("nonfinite", (), "holds NaN or infinite values and never changes, as masks do", False)
    elif places:
        what = "NaN or infinite values at{where}; leave these epochs out (--epochs), or go back to one before them"
        yield _Seen("nonfinite", places, what, True)


def _exploding(tensors: TensorContents) -> NDArray[np.bool_]:
    """(S, E) where weight tensors are beyond all measure of what they were at first."""
    weights = np.array([entry.kind == "weight" for entry in tensors.entries])
    largest = tensors.contents.largest
    at_first = np.take_along_axis(largest, np.argmax(largest > 0, axis=1)[:, None], axis=1)
    usual = np.maximum(at_first, np.median(at_first[weights]))
    exploding: NDArray[np.bool_] = weights[:, None] & (usual > 0) & (largest > EXPLODES * usual)
    return exploding


def _explosion(exploding: NDArray[np.bool_]) -> Iterator[_Seen]:
    places = tuple(np.flatnonzero(exploding).tolist())
    if places:
        what = f"more than {EXPLODES:.0f} times as large as at first at{{where}}; lower the learning rate or clip"
        yield _Seen("exploding", places, what, True)


def _constant(entry: TensorEntry) -> _Seen:
    if entry.kind == "weight" and entry.trainable:
        what = "never changes, though it is trainable; see that it has a gradient and is given to the optimizer"
        return _Seen("constant", (), what, True)
    return _Seen("constant", (), f"never changes, a {'buffer' if entry.kind == 'buffer' else 'frozen tensor'}", False)


def _repeated(
    fingerprint: NDArray[np.uint64], changed: NDArray[np.int64], places: NDArray[np.int64]
) -> Iterator[_Seen]:
    """Where a tensor that moves holds again what it held at another epoch.

    Frozen for more than a step from the first epoch on, or to the last one, it stands still, as in a training that
    thaws or freezes its layers. Few values are the same by chance, as in bfloat16, or at a clamp: it has to change in
    many where it departs from what it repeats, and where it arrives there.
    """
    held = np.unique(fingerprint, return_inverse=True)[1]
    order = np.argsort(held, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(held[order])) + 1):
        if group.size == 1:
            continue
        stretches = np.split(group, np.flatnonzero(np.diff(group) > 1) + 1)
        at_an_end = group[0] == 0 or group[-1] == held.size - 1
        where = tuple(places[group].tolist())
        if len(stretches) == 1 and group.size > 2 and at_an_end:
            yield _Seen("still", where, "stands still at{where}, and moves otherwise", False)
        elif min(_moved_around(changed, stretch) for stretch in stretches) >= FEWEST_MOVED:
            what = "bit-identical at{where}, and moves otherwise; compare these checkpoints with their source"
            yield _Seen("duplicate", where, what, True)


def _moved_around(changed: NDArray[np.int64], stretch: NDArray[np.int64]) -> int:
    """The values that change when it arrives at a stretch of rows, or when it departs, the fewer."""
    arrives, departs = changed[stretch[:1]], changed[stretch[-1] + 1 : stretch[-1] + 2]
    return int(min([*(arrives if stretch[0] > 0 else ()), *departs]))
