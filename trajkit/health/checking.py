"""The health check: what the labels, the commit records, the probe and one pass over the archive say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedRunError, InputError
from ..kernels.steps import FAR
from ..layout import stub_warning
from ..run import PathLike, Run, as_run
from ..store.format import PROBE, WEIGHTS, buffer_path
from .labels import missing_labels
from .order import home_of, jumps, outliers, swaps
from .reading import Progress, TensorContents, read_contents
from .report import Finding, HealthReport, name_epochs
from .tensors import judge_tensors

FEWEST_WEIGHTS = 100
"""Of the probe: the path of a few weights crosses itself by chance."""

MOST_JUMPS = 3
"""Jumps of a run that are suspicious: more of them are what this training does, as one that resets its weights."""


def check(
    run: Run | PathLike, epochs: Iterable[int] | None = None, progress: Progress | None = None, *, fast: bool = False
) -> HealthReport:
    """Look for faults in the content of a run: epochs and tensors that are not what a training leaves behind.

    Reported are duplicate, missing, out-of-order and outlying epochs, two trainings one after the other, and tensors
    that repeat themselves, never change, explode, hold NaN or infinite values, or have none where ZeRO-3 kept them
    elsewhere; the rules stand beside `order.outliers`, `order.swaps`, `order.jumps`, `labels.missing_labels`,
    `ParameterLayout.stubs` and in `tensors`. What happens in healthy trainings too is a note, not a finding.

    run: a `Run`, or the path of one.
    epochs: labels of the recorded epochs to check, all by default; neighbours are then those among them.
    progress: called with the number of values done, of one epoch, and all.
    fast: judge by the labels, the commit records and the probe alone, without reading the weights.

    A run of one epoch has only its NaN and infinite values to show. Raises `UnknownNameError` for an epoch that does
    not exist, `InputError` for one named twice, `DamagedRunError` where an object that it needs is damaged.
    """
    path = run.path if isinstance(run, Run) else run
    with _pointing_to_verify(path):
        run = as_run(run)
        rows = run.rows_of(epochs)
        if rows.size == 0:
            raise InputError(f"{run.path}: no epoch to check, expected at least one that is not bad; name some")
        labels = run.epochs[rows]
        copies = _same_weights(run, rows)
        found = [*_duplicates(run, rows, copies), *_missing(run, labels), *_out_of_place(run, rows), *_stubs(run)]
        unchanged = None
        if not fast:
            tensors = read_contents(run, rows, progress)
            distinct = np.delete(np.arange(rows.size), [place for group in copies for place in group[1:]])
            found += judge_tensors(tensors, labels, distinct)
            unchanged = _unchanged(tensors, run.layout.n_weights)
    findings = tuple(finding for finding in found if finding.suspicious)
    notes = tuple(finding for finding in found if not finding.suspicious)
    return HealthReport(run.path, tuple(labels.tolist()), findings, notes, unchanged)


@contextmanager
def _pointing_to_verify(path: PathLike) -> Iterator[None]:
    try:
        yield
    except DamagedRunError as damage:
        raise DamagedRunError(f"{damage}; see all that is damaged with: trajkit verify {path}") from None


def _same_weights(run: Run, rows: NDArray[np.int64]) -> list[list[int]]:
    """Places among the rows of epochs with the same weights, by the hashes that they were committed with."""
    groups: dict[frozenset[tuple[str, str]], list[int]] = {}
    for place, row in enumerate(rows.tolist()):
        groups.setdefault(_hashes(run, row, [WEIGHTS]), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _hashes(run: Run, row: int, paths: Iterable[str]) -> frozenset[tuple[str, str]]:
    """The objects of a row in some arrays: which columns, and their hash."""
    beginnings = tuple(f"{path}/c/{row}/" for path in paths)
    objects = run.archive.records[row].objects
    place = f"/c/{row}/"
    return frozenset(
        (key.replace(place, "/"), held.hash) for key, held in objects.items() if key.startswith(beginnings)
    )


def _duplicates(run: Run, rows: NDArray[np.int64], copies: list[list[int]]) -> Iterator[Finding]:
    buffers = [buffer_path(dtype) for dtype in run.layout.buffer_sizes]
    for group in copies:
        whole = len({_hashes(run, int(rows[place]), buffers) for place in group}) == 1
        labels = tuple(run.epochs[rows[group]].tolist())
        what = "bit-identical" if whole else "the weights are bit-identical, the buffers differ"
        text = f"{name_epochs(labels)}: {what}; compare these checkpoints with their source"
        yield Finding("duplicate", labels, (), text)


def _missing(run: Run, labels: NDArray[np.int64]) -> Iterator[Finding]:
    recorded = set(run.epochs.tolist())
    for gap in missing_labels(labels.tolist()):
        if missing := tuple(label for label in gap if label not in recorded):
            between = f"{gap.start - gap.step} and {gap.stop}"
            text = f"{name_epochs(missing)}: missing between {between}; see whether something was lost"
            yield Finding("missing", missing, (), text)


def _out_of_place(run: Run, rows: NDArray[np.int64]) -> Iterator[Finding]:
    """Outliers, and epochs in the wrong order, by the probe; epochs with NaN in it are left out."""
    probe = run.archive.read(PROBE, rows, (0, run.probe_index.size))
    finite = np.isfinite(probe).all(axis=1)
    probe, labels = probe[finite], run.epochs[rows[finite]].tolist()
    if probe.shape[1] < FEWEST_WEIGHTS:
        text = f"the order of the epochs is not judged by {probe.shape[1]} weights, {FEWEST_WEIGHTS} are needed"
        yield Finding("unjudged", (), (), text, suspicious=False)
        return
    swapped = [row for pair in swaps(probe, longest=1) for row in pair]  # may look like outliers too
    far = np.setdiff1d(outliers(probe), swapped)
    for row in far.tolist():
        yield _outlier(labels, row, home_of(row, probe))
    rest = np.delete(np.arange(len(probe)), far)
    for first, last in swaps(probe[rest]):
        pair = (labels[rest[first]], labels[rest[last]])
        what = f"seem swapped{', or what lies between them reversed' if last - first > 1 else ''}"
        yield Finding("order", pair, (), f"{name_epochs(pair)}: {what}; compare these checkpoints with their source")
    yield from _jumps(probe[rest], [labels[row] for row in rest])


def _jumps(probe: NDArray[np.float32], labels: list[int]) -> Iterator[Finding]:
    """Where two trainings may meet; a training that jumps again and again may be meant to."""
    found = jumps(probe, np.array(labels, np.int64)).tolist()
    for row in found:
        pair = (labels[row], labels[row + 1])
        text = (
            f"{name_epochs(pair)}: more than {FAR:g} times as far apart as is usual, with usual steps before and after"
        )
        cure = "two trainings may meet here, compare both with their source"
        yield Finding("jump", pair, (), f"{text}; {cure}", suspicious=len(found) <= MOST_JUMPS)


def _stubs(run: Run) -> Iterator[Finding]:
    """Tensors whose values were elsewhere when they were recorded."""
    text = stub_warning(run.layout)
    if text is not None:
        yield Finding("empty", (), run.layout.stubs, text)


def _outlier(labels: list[int], row: int, home: int | None) -> Finding:
    epoch = labels[row]
    if home is None:
        text = f"epoch {epoch}: far from {labels[row - 1]} and {labels[row + 1]}, which are near each other"
        return Finding("outlier", (epoch,), (), f"{text}; look at its loss, and compare it with its source")
    text = f"epoch {epoch}: lies beside epoch {labels[home]}, not between {labels[row - 1]} and {labels[row + 1]}"
    return Finding("order", (epoch,), (), f"{text}; it may hold another step, compare it with its source")


def _unchanged(tensors: TensorContents, n_weights: int) -> tuple[float, ...]:
    weights = [entry.kind == "weight" for entry in tensors.entries]
    changed = tensors.contents.changed[weights].sum(axis=0)[1:]
    return tuple((1 - changed / n_weights).tolist())
