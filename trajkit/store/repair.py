"""Make a damaged run usable again, without ever deleting: what is damaged or left over is moved to ``epoch/aside``.

Metadata is written again from the layout, which is kept twice; objects that follow from others, an epoch's label and
step, its probe row and the probe's indices, are made again and must have the committed hash. An epoch whose weights or
buffers are damaged is marked as bad: what takes all epochs leaves it out, and its checkpoint, recorded again, heals it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from ..digest import canonical_json, digest
from ..errors import DamagedRunError, RunLockedError
from ..layout import ParameterLayout
from .arrays import VerifiedReader, encode
from .commit import CommitRecord, LostRecord
from .damage import Damage, Mark, mark_key, move_aside
from .examination import Examination, Progress
from .examine_run import examine, expected_documents, require_run
from .format import ASIDE, BAD, EPOCH, FITS, LAYOUT_COPIES, LEDGER, METADATA, PROBE, PROBE_INDEX, STEP, WEIGHTS
from .ledger import SUFFIX, ledger_entry
from .lost_labels import with_guesses
from .place import Lock, Objects, PathLike, objects_at
from .probe import draw_probe
from .raw import CHECKSUM_BYTES
from .root import encoded, metadata_key, read_document, read_small
from .writer import WRITER

LABEL_BYTES = 8
"""Bytes of an epoch or a step."""


@dataclass(frozen=True)
class Repair:
    """What `repair` has done. `bad_epochs` of the `epochs` are marked as bad now, and of these the commit records of
    `lost_epochs` are lost; `damages` are those of them, and what has no cure.
    """

    run: Path | str
    actions: tuple[str, ...]
    epochs: int
    bad_epochs: tuple[int, ...]
    lost_epochs: tuple[int, ...]
    damages: tuple[Damage, ...]


def repair(place: PathLike, progress: Progress | None = None) -> Repair:
    """Verify the run at a path or URL in full, and make of it what can be made; nothing is deleted.

    progress: called with the bytes hashed and to hash.

    Raises `RunNotFoundError` where there is no run, `RunLockedError` while one is recorded, `DamagedRunError` where
    the layout is lost: then restore ``zarr.json`` or ``epoch/layout.json`` from a copy.
    """
    objects = objects_at(place, owner=WRITER)
    require_run(objects)
    lock = objects.lock(WRITER, "the run")
    try:
        found = examine(objects, alone=True)
        if found.layout is None:
            raise DamagedRunError(
                f"{objects.root}: {', '.join((METADATA, *LAYOUT_COPIES))} are all damaged, expected the layout in one"
                " of them; restore one from a copy of the run"
            )
        found.hash(found.undamaged(), progress)
        actions = list(_Repairer(objects, lock, found, found.layout).repair())
        after = examine(objects, alone=True)
        known = {damage.key for damage in after.damages}
        left = [damage for damage in found.damages if damage.row in after.marks and damage.key not in known]
        return Repair(
            run=objects.root,
            actions=tuple(actions),
            epochs=len(after.records),
            bad_epochs=after.bad_epochs,
            lost_epochs=tuple(record.epoch for record in after.records if isinstance(record, LostRecord)),
            damages=(*after.damages, *left),
        )
    finally:
        lock.release()


class _Repairer:
    """The steps of a repair, each of which says what it has done."""

    def __init__(self, objects: Objects, lock: Lock, found: Examination, layout: ParameterLayout) -> None:
        self._objects, self._lock, self._found, self._layout = objects, lock, found, layout
        self._folder = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        self._aside = f"{ASIDE}/{self._folder}"
        self._damaged = {damage.key: damage for damage in found.damages}

    def repair(self) -> Iterator[str]:
        """All of it, what others rest on first."""
        for key in sorted(self._damaged):
            if key.startswith(f"{BAD}/"):
                self._move_aside(key)
                yield f"{key} moved to {self._aside}: it marked no epoch"
        yield from self._renew_documents()
        yield from self._renew_objects()
        yield from self._mark_rows()
        yield from self._set_aside()
        yield from self._renew_ledger()
        self._objects.sync_names()

    def _renew_documents(self) -> Iterator[str]:
        """Write damaged metadata again; attributes of others in it are kept where it can be read."""
        for key in LAYOUT_COPIES:
            if key in self._damaged:
                self._renew(key, canonical_json(self._layout.to_json()))
                yield f"{key} written again"
        for path, document in expected_documents(self._found, self._layout).items():
            key = metadata_key(path)
            if key in self._damaged:
                self._renew(key, encoded(self._with_attributes(key, document), path))
                yield f"{key} written again"

    def _with_attributes(self, key: str, document: dict[str, Any]) -> dict[str, Any]:
        try:
            others = read_document(self._objects, key).get("attributes")
        except DamagedRunError:
            others = None
        attributes = others if isinstance(others, dict) else {}
        return {**document, "attributes": attributes | document["attributes"]}

    def _renew_objects(self) -> Iterator[str]:
        """Make again what follows from other objects."""
        for key in [key for key in self._damaged if key in self._found.committed]:
            data = self._made_again(key)
            if data is not None and digest(data) == self._found.committed[key].hash:
                self._renew(key, data)
                del self._damaged[key]
                yield f"{key} made again, as it was committed"

    def _made_again(self, key: str) -> bytes | None:
        """The content that an object should have, None where it follows from no other."""
        path, _, position = key.partition("/c/")
        documents = self._found.documents
        if path == PROBE_INDEX:
            return _encoded(path, documents[path], (slice(None),), draw_probe(self._layout))
        if path not in (EPOCH, STEP, PROBE):
            return None
        row = int(position.partition("/")[0])
        record = self._found.records[row]
        assert record is not None, "an object is committed by a record"
        here = slice(row, row + 1)
        if path != PROBE:
            return _encoded(path, documents[path], (here,), np.array([getattr(record, path)]))
        values = self._probe_row(record)
        return None if values is None else _encoded(path, documents[path], (here, slice(None)), values)

    def _probe_row(self, record: CommitRecord) -> NDArray[Any] | None:
        """The values of the probe weights in a row, where all of its weights are sound."""
        reader = VerifiedReader(self._objects, record.objects)
        row, n = record.row, self._layout.n_weights
        try:
            weights = reader.read(WEIGHTS, self._found.documents[WEIGHTS], (slice(row, row + 1), slice(0, n)))
        except DamagedRunError:
            return None
        return weights[:, draw_probe(self._layout)]

    def _mark_rows(self) -> Iterator[str]:
        """Mark the epochs that are damaged still, and no others."""
        damaged = {damage.row: damage for damage in reversed(self._damaged.values()) if damage.row is not None}
        epochs, steps = self._labels(EPOCH), self._labels(STEP)
        for row, damage in sorted(damaged.items()):
            record = self._found.records[row]
            lost = record is None
            mark = Mark(row, epochs[row], f"{damage.key} {damage.what}")
            if lost:
                has_step = any(known is not None and known.step is not None for known in self._found.records)
                mark = replace(mark, layout=self._layout.digest, step=steps[row] if has_step else None)
            if self._found.marks.get(row) != mark and not (row in self._found.marks and not lost):
                self._require_held()
                self._objects.replace({mark_key(row): mark.to_bytes()})
                yield f"epoch {mark.epoch} marked as bad: {mark.what}"
            if lost:
                self._move_aside(damage.key)
        for row, known in self._found.marks.items():
            if row not in damaged:
                self._move_aside(mark_key(row))
                yield f"epoch {known.epoch} is sound, its mark is removed"

    def _labels(self, kind: str) -> list[int]:
        """Return the epoch or the step of each row, with a guess where its record is lost."""
        known = [None if record is None else getattr(record, kind) for record in self._found.records]
        stored = {row: self._stored_label(kind, row) for row, label in enumerate(known) if label is None}
        return with_guesses(known, stored)

    def _stored_label(self, kind: str, row: int) -> int | None:
        """Return what the object of a label says, None where it is lost."""
        try:
            stored = read_small(self._objects, f"{kind}/c/{row}")
        except (ValueError, DamagedRunError):
            return None
        content = stored[:-CHECKSUM_BYTES]
        if len(content) != LABEL_BYTES or crc32c(content).to_bytes(CHECKSUM_BYTES, "little") != stored[LABEL_BYTES:]:
            return None
        return int.from_bytes(content, "little", signed=True)

    def _set_aside(self) -> Iterator[str]:
        """Move what is of no use: damaged fits and evaluations, and what was never finished."""
        prefixes = {damage.aside for damage in self._damaged.values() if damage.aside is not None}
        for prefix in sorted(prefixes | self._found.abandoned):
            move = self._set_fit_aside if prefix.startswith(f"{FITS}/") else self._move_all_aside
            if move(prefix):
                yield f"{prefix} moved to {self._aside}"
        rows = [key for key in self._found.leftovers if not key.startswith(f"{FITS}/")]
        for key in rows:
            self._move_aside(key)
        if rows:
            yield f"{len(rows)} objects of an interrupted recording moved to {self._aside}"

    def _renew_ledger(self) -> Iterator[str]:
        """Enter again the results that are there and whose entry is damaged."""
        for key in self._damaged:
            kind, _, name = key.removeprefix(f"{LEDGER}/").removesuffix(SUFFIX).partition("/")
            if key.startswith(f"{LEDGER}/") and self._objects.exists(f"{kind}/{name}/{METADATA}"):
                self._renew(*ledger_entry(kind, name))
                yield f"{key} written again"

    def _set_fit_aside(self, prefix: str) -> bool:
        """Move a fit, unless somebody has begun to write it again, or has done so, since it was looked at."""
        name = prefix.removeprefix(f"{FITS}/")
        known = self._found.fits.get(prefix)
        try:
            lock = self._objects.lock(f"fit-{name}", f"fit '{name}'")
        except RunLockedError:
            return False
        try:
            finished = prefix in self._found.abandoned and self._objects.exists(f"{prefix}/{METADATA}")
            updated = known is not None and not known.is_current and self._objects.exists(f"{prefix}/{METADATA}")
            return not finished and not updated and self._move_all_aside(prefix)
        finally:
            lock.release()

    def _move_all_aside(self, prefix: str) -> bool:
        keys = [key for key, _ in self._objects.lengths(prefix)]
        for key in (*keys, ledger_entry(*prefix.split("/"))[0]):
            self._move_aside(key)
        if not keys:
            self._objects.delete_tree(prefix)  # empty folders
        return bool(keys)

    def _renew(self, key: str, data: bytes) -> None:
        self._move_aside(key)
        self._objects.create_atomically(key, data)

    def _require_held(self) -> None:
        """Raise `RunLockedError` where the run was lost to another writer: what is left over may be its by now."""
        if not self._lock.confirmed:
            raise RunLockedError(f"{self._objects.root}: another writer has taken the run over; repair again")

    def _move_aside(self, key: str) -> None:
        self._require_held()
        move_aside(self._objects, key, self._folder)


def _encoded(path: str, document: Mapping[str, Any], region: tuple[slice, ...], values: NDArray[Any]) -> bytes:
    """The one object of `values` in `region` of an array."""
    ((_, parts),) = encode(path, dict(document), region, values)
    return b"".join(parts)
