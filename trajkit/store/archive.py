"""Reading an archive: what is committed, as arrays that refuse damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..digest import canonical_json
from ..errors import DamagedRunError, RunNotFoundError
from ..layout import ParameterLayout
from .arrays import Reading, Region, VerifiedReader, all_with_rows, keys_of, reading_of
from .commit import CommitRecord, LostRecord, read_records
from .damage import Mark, read_marks
from .expected import parts_of_row, require_objects
from .format import EPOCH, METADATA, PROBE_INDEX, WEIGHTS, all_arrays, chunk_rule, commit_key
from .objects import DamagedObjectError
from .origin import Lineage
from .place import Objects, PathLike, objects_at
from .probe import draw_probe
from .root import read_document, read_root

Columns = tuple[int, int]


@dataclass(frozen=True)
class Archive:
    """A run's committed state at the moment of opening. Later commits are seen by opening again."""

    objects: Objects
    layout: ParameterLayout
    records: tuple[CommitRecord, ...]
    documents: dict[str, dict[str, Any]]
    """Path -> ``zarr.json`` of every array, with exactly the committed rows."""
    marks: Mapping[int, Mark]
    """Rows that `repair` has found damaged."""
    lineage: Lineage
    """What results are compared with."""

    @classmethod
    def open(cls, place: PathLike) -> Archive:
        """Open the archive in a directory, or at a URL.

        Raises `RunNotFoundError` where there is none or nothing was committed yet, `UnsupportedFormatError` for
        another format, `DamagedRunError` where metadata or commit records are damaged.
        """
        objects = objects_at(place)
        if not objects.exists(METADATA):
            raise RunNotFoundError(f"{place}: no run here, expected a directory with a {METADATA}; check the path")
        root = read_root(objects)
        layout = root.layout
        marks = read_marks(objects)
        records = read_all_records(objects, marks)
        if not records:
            raise RunNotFoundError(f"{place}: the run has no epoch yet; wait for the first one to be recorded")
        documents = committed_documents(objects, layout, records)
        lineage = Lineage(root.identity, layout.digest, records, partial(_has_row, objects, len(records)))
        return cls(objects, layout, records, all_with_rows(documents, len(records)), marks, lineage)

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[Any, ...]:
        """An archive travels as its path; the process where it arrives opens it, once."""
        return _reopened, (str(self.objects.root), len(self), self.records[-1].hash)

    @cached_property
    def _reader(self) -> VerifiedReader:
        committed = {key: stored for record in self.records for key, stored in record.objects.items()}
        return VerifiedReader(self.objects, committed)

    def read(
        self,
        path: str,
        rows: Sequence[int] | NDArray[np.integer[Any]],
        columns: Columns,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Values (len(rows), stop - start) of an array with rows, in the order of `rows`; in `out` where given.

        Raises `DamagedRunError` naming epoch, tensor and object where an object that it needs is damaged.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + wanted.size)):
            together = slice(int(wanted[0]), int(wanted[0]) + wanted.size)  # zarr reads neighbours in one go
            return self._read(path, (together, slice(*columns)), out)
        return self._read(path, (wanted, slice(*columns)), out)

    def check(self, path: str, rows: NDArray[np.int64], columns: Columns) -> None:
        """Hash what `read` would hash first, on all cores; raises `DamagedRunError` as it does."""
        with self._naming_the_place():
            self._reader.require_together(keys_of(path, self.documents[path], (rows, slice(*columns))))

    def read_probe_index(self) -> NDArray[np.int64]:
        """(P,) rising indices of the probe weights; raises `DamagedRunError` where they are none."""
        if isinstance(self.records[0], LostRecord):  # which named their object, too
            return draw_probe(self.layout)
        index = self._read(PROBE_INDEX, (slice(0, self.documents[PROBE_INDEX]["shape"][0]),))
        if index[0] < 0 or index[-1] >= self.layout.n_weights or np.any(np.diff(index) <= 0):
            raise DamagedRunError(
                f"{self.objects.root}: {PROBE_INDEX} holds other numbers than rising indices of weights;"
                " restore it from a copy of the run"
            )
        return index

    @property
    def reading(self) -> Reading:
        """How the weights are read."""
        return reading_of(self.documents[WEIGHTS])

    def _read(self, path: str, region: Region, out: NDArray[Any] | None = None) -> NDArray[Any]:
        with self._naming_the_place():
            return self._reader.read(path, self.documents[path], region, out)

    @contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        try:
            yield
        except DamagedObjectError as damage:
            where = place_of(damage.key, self.layout, lambda row: self.records[row].epoch)
            raise DamagedRunError(
                f"{self.objects.root}: {where}{damage}; restore it from a copy of the run, or trajkit repair"
            ) from None


def _has_row(objects: Objects, row: int) -> bool:
    return objects.exists(commit_key(row))


def place_of(key: str, layout: ParameterLayout, epoch_of: Callable[[int], int]) -> str:
    """Where an object of an array belongs, for a message: epoch and tensors; `epoch_of` knows the label of a row."""
    row = row_of(key)
    place = "" if row is None else f"epoch {epoch_of(row)}: "
    if key.startswith(f"{WEIGHTS}/"):
        columns = chunk_rule(layout.n_weights).objects()[int(key.rpartition("/")[2])]
        first, last = layout.weight_at(columns.start), layout.weight_at(columns.stop - 1)
        place += f"'{first}': " if first == last else f"'{first}' to '{last}': "
    return place


def row_of(key: str) -> int | None:
    """The row that an object of an array belongs to, None for the probe's indices."""
    path, _, position = key.partition("/c/")
    return None if path == PROBE_INDEX else int(position.partition("/")[0])


@lru_cache(maxsize=8)
def _reopened(root: str, n_rows: int, last_hash: str) -> Archive:
    """The archive in a directory as it was with `n_rows` epochs; raises `DamagedRunError` where it has others."""
    archive = Archive.open(root)
    if len(archive) < n_rows or archive.records[n_rows - 1].hash != last_hash:
        raise DamagedRunError(f"{root}: not the run that was opened elsewhere; give every worker the same files")
    return Archive(
        archive.objects,
        archive.layout,
        archive.records[:n_rows],
        all_with_rows(archive.documents, n_rows),
        archive.marks,
        archive.lineage,
    )


def committed_documents(
    objects: Objects, layout: ParameterLayout, records: Sequence[CommitRecord]
) -> dict[str, dict[str, Any]]:
    """`checked_documents` of a run that has `records`, each of which names the objects of its row and no others.

    Raises `DamagedRunError` naming the record that does not, or whose layout is another one.
    """
    if any(record.layout != layout.digest for record in records):
        raise DamagedRunError(
            f"{objects.root}: the layout in {METADATA} is not the one that was recorded; restore {METADATA} from a copy"
        )
    documents = checked_documents(objects, layout, steps=records[0].step is not None)
    for record in records:
        if isinstance(record, LostRecord):
            continue
        try:
            require_objects(record.objects, parts_of_row(documents, record.row))
        except ValueError as error:
            raise DamagedRunError(
                f"{objects.root}: commit record {commit_key(record.row)} is not what the layout asks for ({error});"
                " restore it from a copy"
            ) from error
    return documents


def checked_documents(objects: Objects, layout: ParameterLayout, steps: bool) -> dict[str, dict[str, Any]]:
    """Path -> ``zarr.json`` of every array of a run, as stored, rows included.

    The layout, and whether there are steps, decide all of it but the number of probe weights and the codec, so a
    document that says something else is damaged, and `DamagedRunError` names it.
    """
    stored = {path: read_document(objects, f"{path}/{METADATA}") for path in all_arrays(layout, 1, False, steps)}
    n_probe = first_length(stored[PROBE_INDEX])
    if not 1 <= n_probe <= layout.n_weights:
        raise DamagedRunError(f"{objects.root}: {PROBE_INDEX}/{METADATA} has {n_probe} probe weights; restore it")
    possible = [all_arrays(layout, n_probe, zstd, steps) for zstd in (False, True)]
    for path, document in stored.items():
        if not any(_same_array(document, expected[path]) for expected in possible):
            raise DamagedRunError(
                f"{objects.root}: {path}/{METADATA} does not describe the array that the layout asks for;"
                " restore it from a copy of the run"
            )
    return stored


def read_all_records(objects: Objects, marks: Mapping[int, Mark]) -> tuple[CommitRecord, ...]:
    """All commit records; raises `DamagedRunError` where an array shows more epochs: shapes never run ahead."""
    # The shapes first: a writer may commit between the two reads.
    shown = {
        path: first_length(read_document(objects, f"{path}/{METADATA}"))
        for path in (EPOCH, WEIGHTS)
        if objects.exists(f"{path}/{METADATA}")
    }
    records = read_records(objects, marks)
    for path, rows in shown.items():
        if rows > len(records):
            raise DamagedRunError(
                f"{objects.root}: {path} has {rows} epochs, there are commit records for {len(records)};"
                " restore epoch/commits from a copy of the run"
            )
    return records


def first_length(document: Mapping[str, Any]) -> int:
    """How many rows a ``zarr.json`` says that its array has, -1 where it does not say."""
    shape = document.get("shape")
    return shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else -1


def _same_array(stored: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a stored ``zarr.json`` describes the expected array; its length along the first axis is left open."""
    fixed = {key: value for key, value in expected.items() if key not in ("attributes", "shape")}
    found = {key: stored.get(key) for key in fixed}
    # Spelled, since 1.0 and true equal 1 in Python, and are no lengths.
    return first_length(stored) >= 0 and canonical_json([found, stored["shape"][1:]]) == canonical_json(
        [fixed, expected["shape"][1:]]
    )
