"""The examination of a run: its marks, commit records, layout, arrays and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ..errors import DamagedRunError, InputError, RunNotFoundError, StorageError, TrajkitError, UnsupportedFormatError
from ..layout import ParameterLayout
from .archive import first_length
from .arrays import all_with_rows
from .commit import MOST_MISSING, RECORD, CommitRecord, LostRecord, examine_records
from .damage import Damage, Mark, examine_marks
from .examination import Examination, document_damage, read_node, reason_of
from .examine_results import examine_results
from .expected import parts_of_row, require_objects
from .format import (
    BUFFERS,
    COMMITS,
    EPOCH,
    EVALUATIONS,
    FITS,
    IDENTITY,
    LAYOUT_COPIES,
    METADATA,
    PROBE,
    PROBE_INDEX,
    WEIGHTS,
    all_arrays,
    commit_key,
    group_document,
)
from .origin import Lineage, identity_of
from .place import Objects
from .raw import CHECKSUM_BYTES
from .root import CONSOLIDATED, layout_copy, read_document, read_root, root_document, with_arrays
from .writer import WRITER

PROBE_BYTES = 4
"""Bytes of a value of the probe."""


def require_run(objects: Objects) -> None:
    """Raise `RunNotFoundError` unless there is a run, damaged or not."""
    if not objects.exists(METADATA) and not objects.names(COMMITS):
        raise RunNotFoundError(f"{objects.root}: no run here, expected a directory with a {METADATA}; check the path")


def examine(objects: Objects, alone: bool) -> Examination:
    """Everything but the content of the arrays; raises `RunNotFoundError` where there is no run.

    alone: whether nobody else may write. Otherwise, where a training is at it, shapes may differ from the records that
    were read before, and what nothing names yet is no leftover.
    """
    require_run(objects)
    found = Examination(objects)
    recording = not alone and objects.is_locked(WRITER)
    _read_marks(found)
    _read_records(found)
    _read_layout(found)
    if found.layout is not None:
        _expect_rows(found, found.layout)
        recording = recording or (not alone and objects.is_locked(WRITER))  # it may have begun just now
        _compare_documents(found, found.layout, recording)
        examine_results(found)
    stored = dict(objects.lengths(""))  # after all that names objects: they are there
    found.compare_lengths(stored)
    found.forget_outdated()
    if alone or not (recording or objects.is_locked(WRITER)):
        found.leftovers = _leftovers(found, stored)
    return found


def _read_marks(found: Examination) -> None:
    marks: dict[int, Mark] = {}
    for mark in examine_marks(found.objects):
        if isinstance(mark, Damage):
            found.damages.append(mark)
        else:
            marks[mark.row] = mark
    found.marks = marks


def _read_records(found: Examination) -> None:
    shown = _rows_shown(found.objects)  # first: a writer may commit between the two looks
    for record in examine_records(found.objects, found.marks):
        if isinstance(record, Damage):
            found.damages.append(record)
            found.records.append(None)
        else:
            found.records.append(record)
    for row in range(len(found.records), min(shown, len(found.records) + MOST_MISSING)):
        found.damages.append(Damage(commit_key(row), "is missing, the arrays show its epoch", RECORD, row=row))
        found.records.append(None)
    if not any(found.records):
        raise RunNotFoundError(f"{found.objects.root}: the run has no epoch yet; wait for the first one to be recorded")


def _rows_shown(objects: Objects) -> int:
    """Return how many epochs plain Zarr sees, by at least two of the places that say so.

    Where they differ, one of them is damaged, or behind by a crash.
    """
    rows = sorted(map(first_length, _shown_arrays(objects)), reverse=True)
    return rows[1] if len(rows) > 1 else 0


def _shown_arrays(objects: Objects) -> Iterator[Mapping[str, Any]]:
    """Yield those documents of arrays with a row an epoch that can be read, one of them from the root."""
    for path in (EPOCH, WEIGHTS, PROBE):
        document = read_node(objects, path)
        if not isinstance(document, DamagedRunError):
            yield document
    try:
        yield read_document(objects, METADATA)[CONSOLIDATED]["metadata"][EPOCH]
    except (DamagedRunError, KeyError, TypeError):
        return


def _read_layout(found: Examination) -> None:
    """Read the layout that was recorded, from the group or else from a copy, and what results are compared with."""
    recorded = next(record for record in found.records if record is not None)
    identity: str | None = None
    layouts: list[ParameterLayout] = []

    def of_root(objects: Objects) -> ParameterLayout:
        nonlocal identity
        root = read_root(objects)
        identity = root.identity
        return root.layout

    readers: dict[str, Callable[[Objects], ParameterLayout]] = {METADATA: of_root}
    readers |= {key: partial(layout_copy, key=key) for key in _expected_copies(found)}
    for key, read in readers.items():
        try:
            layout = read(found.objects)
            if layout.digest != recorded.layout:
                raise InputError("has another layout than the one that was recorded")
            layouts.append(layout)
        except (UnsupportedFormatError, StorageError):
            raise
        except TrajkitError as error:
            found.damages.append(Damage(key, reason_of(found.objects, key, error)))
    if layouts:
        found.layout = layouts[0]
        next_record = commit_key(len(found.records))
        found.lineage = Lineage(
            identity_of(found.records) or identity,
            recorded.layout,
            found.records,
            has_grown=lambda: found.objects.exists(next_record),
        )


def _expected_copies(found: Examination) -> tuple[str, ...]:
    """Return the copies of the layout that the run should have: those of older versions have one."""
    return LAYOUT_COPIES if _has_new_parts(found) else LAYOUT_COPIES[:1]


def _has_new_parts(found: Examination) -> bool:
    """Return whether the run was begun by a version that writes an identity and two copies of the layout."""
    first = next((record for record in found.records if record and not isinstance(record, LostRecord)), None)
    return first is not None and first.weights is not None


def _expect_rows(found: Examination, layout: ParameterLayout) -> None:
    """The documents of the arrays, and the objects of each row."""
    for row, record in enumerate(found.records):
        if record is None:
            continue
        if isinstance(record, LostRecord):
            found.damages.append(Damage(commit_key(row), "is lost", f"epoch {record.epoch}: {RECORD}", row=row))
            continue
        try:
            documents = _documents_for(record, layout)
        except ValueError as error:
            what = f"is not what the layout asks for ({error})"
            found.damages.append(Damage(commit_key(row), what, RECORD, row=row))
            continue
        found.documents = all_with_rows(documents, len(found.records))
        found.committed |= record.objects


def _documents_for(record: CommitRecord, layout: ParameterLayout) -> dict[str, dict[str, Any]]:
    """Array -> ``zarr.json`` with the rows up to this one; raises `ValueError` where it has other objects.

    What the layout leaves open, the number of probe weights and the codec, shows in the objects.
    """
    if record.layout != layout.digest:
        raise ValueError("it has another layout")
    probe = record.objects.get(f"{PROBE}/c/{record.row}/0")
    n_probe = (probe.length - CHECKSUM_BYTES) // PROBE_BYTES if probe is not None else 0
    if not 1 <= n_probe <= layout.n_weights:
        raise ValueError(f"it has {n_probe} probe weights")
    for zstd in (False, True):
        documents = all_with_rows(all_arrays(layout, n_probe, zstd, record.step is not None), record.row + 1)
        try:
            require_objects(record.objects, parts_of_row(documents, record.row))
            return documents
        except ValueError:
            if zstd:
                raise
    raise AssertionError("the second try returns or raises")


def _compare_documents(found: Examination, layout: ParameterLayout, recording: bool) -> None:
    """Every ``zarr.json`` of the run's own nodes with what it should say; while a training records, rows may differ."""
    expected = expected_documents(found, layout)
    stored = {path: read_node(found.objects, path) for path in expected}
    most_rows = len(found.objects.names(COMMITS)) if recording else None  # asked after: shapes do not run ahead
    for path, document in expected.items():
        found.damages += document_damage(found.objects, path, stored[path], document, most_rows)


def expected_documents(found: Examination, layout: ParameterLayout) -> dict[str, dict[str, Any]]:
    """Path -> ``zarr.json`` of the run's own nodes as they should be, "" for the run itself."""
    expected = dict(found.documents)
    if layout.buffer_sizes:
        expected[BUFFERS] = group_document()
    if expected:
        identity = found.lineage.identity if found.lineage is not None and _identity_is_expected(found) else None
        expected[""] = with_arrays(root_document(layout, identity), found.documents)
    for folder in (FITS, EVALUATIONS):
        if found.objects.names(folder):
            expected[folder] = group_document()
    return expected


def _identity_is_expected(found: Examination) -> bool:
    """Return whether the root should name the run: where it does, and in runs that were begun so."""
    root = read_node(found.objects, "")
    named = not isinstance(root, DamagedRunError) and IDENTITY in (root.get("attributes") or {})
    return named or _has_new_parts(found)


def _leftovers(found: Examination, stored: Mapping[str, int]) -> list[str]:
    """Objects that nothing names, of a recording or a fit that was interrupted."""
    arrays = found.documents.keys() - {PROBE_INDEX}

    def left(key: str) -> bool:
        path, _, position = key.partition("/c/")
        row = position.partition("/")[0]
        if path in arrays and row.isdecimal():
            return int(row) >= len(found.records)
        return "/".join(key.split("/")[:2]) in found.abandoned

    return sorted(key for key in stored if key not in found.committed and left(key))
