"""What there is in a run, what should be, and where the two differ: what `verify` reports and `repair` works on.

Unlike a reader it does not stop at the first damage, and does without whatever is damaged as far as it can.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..digest import canonical_json
from ..errors import (
    DamagedRunError,
    InputError,
    RunNotFoundError,
    StorageError,
    TrajkitError,
    UnsupportedFormatError,
)
from ..layout import ParameterLayout
from .archive import first_length, place_of, row_of
from .arrays import all_with_rows
from .commit import MOST_MISSING, RECORD, CommitRecord, LostRecord, StoredObject, examine_records
from .damage import Damage, Mark, examine_marks
from .evaluations import read_evaluation
from .expected import parts_of_row, require_objects
from .fits import StoredFit, open_fit
from .format import (
    BUFFERS,
    COMMITS,
    EPOCH,
    EVALUATIONS,
    FITS,
    LAYOUT_COPY,
    METADATA,
    PROBE,
    PROBE_INDEX,
    WEIGHTS,
    all_arrays,
    commit_key,
    group_document,
)
from .objects import DAMAGED_DISK, DamagedObjectError, require_content, require_length
from .place import Objects
from .raw import CHECKSUM_BYTES
from .root import layout_copy, layout_of_root, metadata_key, read_document, root_document, with_arrays
from .writer import WRITER

Progress = Callable[[int, int], None]

THREADS_A_CORE = 2
"""One hashes while another waits for the disk."""
PROBE_BYTES = 4
"""A value of the probe."""


@dataclass
class Examination:
    """What there is in a run, what should be, and what is damaged as far as it was looked at."""

    objects: Objects
    marks: Mapping[int, Mark] = field(default_factory=dict)
    records: list[CommitRecord | None] = field(default_factory=list)
    """Of each row, None where it is damaged."""
    layout: ParameterLayout | None = None
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> ``zarr.json`` of every array as it should be."""
    committed: dict[str, StoredObject] = field(default_factory=dict)
    fits: dict[str, StoredFit] = field(default_factory=dict)
    """Folder -> the fit in it, in the version that was looked at."""
    abandoned: set[str] = field(default_factory=set)
    """Folders of fits that were never finished."""
    damages: list[Damage] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def bad_epochs(self) -> tuple[int, ...]:
        """The epochs that are marked, rising."""
        return tuple(mark.epoch for _, mark in sorted(self.marks.items()))

    def undamaged(self) -> list[str]:
        """The committed objects that are not known to be damaged."""
        known = {damage.key for damage in self.damages}
        return [key for key in self.committed if key not in known]

    def hash(self, keys: Iterable[str], progress: Progress | None) -> None:
        """Hash objects, on all cores."""
        keys = sorted(keys)
        total = sum(self.committed[key].length for key in keys)
        done = 0
        lock = threading.Lock()

        def check(key: str) -> Damage | None:
            nonlocal done
            damage = self.look(key, lambda: require_content(key, self.objects.digest(key), self.committed[key].hash))
            with lock:
                done += self.committed[key].length
                if progress is not None:
                    progress(done, total)
            return damage

        with ThreadPoolExecutor(max(THREADS_A_CORE * (os.cpu_count() or 1), self.objects.at_a_time)) as pool:
            self.damages += [damage for damage in pool.map(check, keys) if damage is not None]
        self.forget_outdated()

    def forget_outdated(self) -> None:
        """Drop what was found of fits that were updated or removed meanwhile."""
        concerned = {damage.aside for damage in self.damages}
        outdated = {aside for aside, fit in self.fits.items() if aside in concerned and not fit.is_current}
        self.damages = [damage for damage in self.damages if damage.aside not in outdated]

    def look(self, key: str, look: Callable[[], None]) -> Damage | None:
        """What is wrong with a committed object, by a look at it that raises."""
        try:
            look()
        except DamagedObjectError as damage:
            what = damage.what
        except DamagedRunError as error:  # a link or a device in its place
            what = f"is {_reason(self.objects, key, error)}"
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            if error.errno not in DAMAGED_DISK:  # a store that does not answer, too few open files, no permission
                raise
            what = f"cannot be read ({error.strerror})"
        else:
            return None
        if key.startswith(f"{FITS}/"):
            return _fit_damage(key, what)
        assert self.layout is not None, "it says what is committed"
        place = place_of(key, self.layout, self._epoch_of)
        return Damage(key, what, f"{place}object ", row=row_of(key))

    def _epoch_of(self, row: int) -> int:
        record = self.records[row]
        assert record is not None, "an object is committed by a record"
        return record.epoch


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
        _expect_fits(found, found.layout)
    _read_evaluations(found)
    stored = dict(objects.lengths(""))  # after all that names objects: they are there
    _compare_lengths(found, stored)
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


def _reason(objects: Objects, key: str, error: Exception) -> str:
    """What a reader says of an object, without the place and the cure."""
    said = str(error).removeprefix(f"{objects.root}: ").removeprefix(key).strip()
    return said.partition("; ")[0]


def _rows_shown(objects: Objects) -> int:
    """How many epochs plain Zarr sees; where the two arrays differ, one of them is damaged, or behind by a crash."""
    rows: list[int] = []
    for path in (EPOCH, WEIGHTS):
        try:
            rows.append(first_length(read_document(objects, f"{path}/{METADATA}")))
        except DamagedRunError:
            return 0
    return min(rows)


def _read_layout(found: Examination) -> None:
    """The layout that was recorded, from the group or else from its copy."""
    recorded = next(record.layout for record in found.records if record is not None)
    layouts: list[ParameterLayout] = []
    for key, read in ((METADATA, layout_of_root), (LAYOUT_COPY, layout_copy)):
        try:
            layout = read(found.objects)
            if layout.digest != recorded:
                raise InputError("has another layout than the one that was recorded")
            layouts.append(layout)
        except (UnsupportedFormatError, StorageError):
            raise
        except TrajkitError as error:
            found.damages.append(Damage(key, _reason(found.objects, key, error)))
    found.layout = layouts[0] if layouts else None


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
    stored = {path: _read(found.objects, path) for path in expected}
    most_rows = len(found.objects.names(COMMITS)) if recording else None  # asked after: shapes do not run ahead
    for path, document in expected.items():
        found.damages += _document_damage(found.objects, path, stored[path], document, most_rows)


def expected_documents(found: Examination, layout: ParameterLayout) -> dict[str, dict[str, Any]]:
    """Path -> ``zarr.json`` of the run's own nodes as they should be, "" for the run itself."""
    expected = dict(found.documents)
    if layout.buffer_sizes:
        expected[BUFFERS] = group_document()
    if expected:
        expected[""] = with_arrays(root_document(layout), found.documents)
    for folder in (FITS, EVALUATIONS):
        if found.objects.names(folder):
            expected[folder] = group_document()
    return expected


def _read(objects: Objects, path: str) -> dict[str, Any] | DamagedRunError:
    """The ``zarr.json`` of a node, or what is wrong with it."""
    try:
        return read_document(objects, metadata_key(path))
    except DamagedRunError as error:
        return error


def _document_damage(
    objects: Objects,
    path: str,
    stored: dict[str, Any] | DamagedRunError,
    expected: dict[str, Any],
    most_rows: int | None,
    aside: str | None = None,
) -> list[Damage]:
    """What is wrong with the ``zarr.json`` of a node. Attributes of the user's own are left alone."""
    key = metadata_key(path)
    if isinstance(stored, DamagedRunError):
        return [Damage(key, _reason(objects, key, stored), aside=aside)]
    if _as_compared(stored, expected, most_rows) == _as_compared(expected, expected, most_rows):
        return []
    if _as_compared(stored, expected, 2**63) == _as_compared(expected, expected, 2**63):
        return [Damage(key, "shows another number of epochs than are recorded: an interrupted recording, or damage")]
    return [Damage(key, "does not say what it should", aside=aside)]


def _as_compared(document: dict[str, Any], expected: dict[str, Any], most_rows: int | None) -> bytes:
    """A ``zarr.json`` spelled, without what may differ: attributes of others, and rows up to `most_rows`."""
    compared = {key: value for key, value in document.items() if not (key == "storage_transformers" and value == [])}
    attributes = compared.get("attributes")
    if isinstance(attributes, dict):
        compared["attributes"] = {name: attributes.get(name) for name in expected.get("attributes", {})}
    if most_rows is not None and 0 <= first_length(document) <= most_rows:
        compared["shape"] = [None, *document["shape"][1:]]
    inline = compared.get("consolidated_metadata")
    if isinstance(inline, dict) and isinstance(inline.get("metadata"), dict):
        of_nodes = expected.get("consolidated_metadata", {}).get("metadata", {})
        nodes = {
            path: _as_compared(node, of_nodes.get(path, {}), most_rows).decode() if isinstance(node, dict) else None
            for path, node in inline["metadata"].items()
        }
        compared["consolidated_metadata"] = {**inline, "metadata": nodes}
    return canonical_json(compared)


def _expect_fits(found: Examination, layout: ParameterLayout) -> None:
    """The objects of each fit, and which were abandoned: those that neither exist nor are being written."""
    for name in found.objects.names(FITS):
        if name == METADATA:
            continue
        aside = f"{FITS}/{name}"
        key = f"{aside}/{METADATA}"
        busy = found.objects.is_locked(f"fit-{name}")  # asked first: it may be finished between the two looks
        if not found.objects.exists(key):
            if busy:
                continue
            found.abandoned.add(aside)
            tables = [f"{aside}/{version}/mode/objects.json" for version in found.objects.names(aside)]
            if any(found.objects.exists(table) for table in tables):
                what = "is missing: the fit was interrupted at its very end, or it is lost"
                found.damages.append(_fit_damage(key, what))
            continue
        try:
            fit = open_fit(found.objects, name, layout)
            table = fit.committed()
        except StorageError:
            raise
        except TrajkitError as error:
            found.damages.append(_fit_damage(key, _reason(found.objects, key, error)))
            continue
        found.fits[aside] = fit
        found.committed |= table
        documents = {fit.group: group_document(), aside: fit.group_document()}
        documents |= {f"{fit.group}/{array}": document for array, document in fit.documents.items()}
        for path, document in documents.items():
            stored = _read(found.objects, path)
            found.damages += _document_damage(found.objects, path, stored, document, None, aside)


def _fit_damage(key: str, what: str) -> Damage:
    name = key.split("/")[1]
    cure = "fit again by another name, or trajkit repair"
    return Damage(key, what, f"fit '{name}': object ", cure, aside=f"{FITS}/{name}")


def _read_evaluations(found: Examination) -> None:
    for number in found.objects.names(EVALUATIONS):
        if number == METADATA:
            continue
        key = f"{EVALUATIONS}/{number}/{METADATA}"
        try:
            read_evaluation(found.objects, number)
        except DamagedRunError as error:
            cure = "evaluate again, or trajkit repair"
            found.damages.append(
                Damage(key, _reason(found.objects, key, error), "", cure, aside=f"{EVALUATIONS}/{number}")
            )


def _compare_lengths(found: Examination, stored: Mapping[str, int]) -> None:
    for key, committed in found.committed.items():
        damage = found.look(key, partial(require_length, key, stored.get(key), committed.length))
        if damage is not None:
            found.damages.append(damage)


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
