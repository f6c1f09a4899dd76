"""What there is in a run, what should be, and where the two differ: what `verify` reports and `repair` works on.

`examine_run` and `examine_results` fill an `Examination`. Unlike a reader they do not stop at the first damage, and do
without whatever is damaged as far as they can.
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
from ..errors import DamagedRunError
from ..layout import ParameterLayout
from .archive import first_length, place_of, row_of
from .commit import CommitRecord, StoredObject
from .damage import Damage, Mark
from .fits import StoredFit
from .format import FITS
from .objects import DAMAGED_DISK, DamagedObjectError, require_content, require_length
from .origin import Lineage
from .place import Objects
from .root import metadata_key, read_document

Progress = Callable[[int, int], None]

THREADS_A_CORE = 2
"""Threads a core: one hashes while another waits for the disk."""


@dataclass
class Examination:
    """What there is in a run, what should be, and what is damaged as far as it was looked at."""

    objects: Objects
    marks: Mapping[int, Mark] = field(default_factory=dict)
    records: list[CommitRecord | None] = field(default_factory=list)
    """Of each row, None where it is damaged."""
    layout: ParameterLayout | None = None
    lineage: Lineage | None = None
    """What results are compared with; None as long as the layout is."""
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> ``zarr.json`` of every array as it should be."""
    committed: dict[str, StoredObject] = field(default_factory=dict)
    fits: dict[str, StoredFit] = field(default_factory=dict)
    """Folder -> the fit in it, in the version that was looked at."""
    abandoned: set[str] = field(default_factory=set)
    """Folders of fits that were never finished."""
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing, and is no damage."""
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

    def compare_lengths(self, stored: Mapping[str, int]) -> None:
        """Compare the lengths of all objects, key -> bytes, with those that were committed."""
        for key, committed in self.committed.items():
            damage = self.look(key, partial(require_length, key, stored.get(key), committed.length))
            if damage is not None:
                self.damages.append(damage)

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
            what = f"is {reason_of(self.objects, key, error)}"
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            if error.errno not in DAMAGED_DISK:  # a store that does not answer, too few open files, no permission
                raise
            what = f"cannot be read ({error.strerror})"
        else:
            return None
        if key.startswith(f"{FITS}/"):
            return fit_damage(key, what)
        assert self.layout is not None, "it says what is committed"
        place = place_of(key, self.layout, self._epoch_of)
        return Damage(key, what, f"{place}object ", row=row_of(key))

    def _epoch_of(self, row: int) -> int:
        record = self.records[row]
        assert record is not None, "an object is committed by a record"
        return record.epoch


def fit_damage(key: str, what: str) -> Damage:
    """Return the damage of an object of a fit."""
    cure = "fit again by another name, or trajkit repair"
    name = key.split("/")[1]
    return Damage(key, what, f"fit '{name}': object ", cure, aside=f"{FITS}/{name}")


def reason_of(objects: Objects, key: str, error: Exception) -> str:
    """What a reader says of an object, without the place and the cure."""
    said = str(error).removeprefix(f"{objects.root}: ").removeprefix(key).strip()
    return said.partition("; ")[0]


def read_node(objects: Objects, path: str) -> dict[str, Any] | DamagedRunError:
    """The ``zarr.json`` of a node, or what is wrong with it."""
    try:
        return read_document(objects, metadata_key(path))
    except DamagedRunError as error:
        return error


def document_damage(
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
        return [Damage(key, reason_of(objects, key, stored), aside=aside)]
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
