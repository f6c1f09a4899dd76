"""Saved decompositions, ``fits/<name>``: as blocks are fitted, their results are written; the group comes last.

What arrays there are says `fit_shape`. They stand in a group of their own, ``fits/<name>/<version>``; version 0 is the
first, and every update writes the next. ``mode/objects.json`` there holds length and hash of every object of these
arrays. The ``zarr.json`` of ``fits/<name>`` is written last and makes the fit, or its new version, exist; its attribute
``trajkit_fit`` is ``{"fit": {…}, "blake3": hash of it}`` and holds the version, the settings, the epochs, the layout's
hash, the hash of ``objects.json``, and the quality of the fit: five numbers for each mode and each tensor (three in
older fits), see `trajkit.decomposition.Quality`; where a weight moves, ``pca``, what ``pca_components`` principal
components (1 where it is missing) and one more explain; and, where the number of modes was chosen by it, ``curve``.
``name`` and ``of``, the name and the origin of the fit (see `trajkit.store.origin`), are missing in older fits.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..digest import canonical_json, digest
from ..documents import parse, require_fields, require_kind
from ..errors import DamagedRunError, PathExistsError, RunLockedError
from ..kernels.functionals import Functional
from ..kernels.running import checked_candidates, checked_decay
from ..layout import ParameterLayout
from .arrays import VerifiedReader, store
from .commit import StoredObject
from .expected import part, require_objects
from .fit_shape import FitShape
from .format import FITS, METADATA, group_document, is_name, require_name
from .ledger import ledger_entry
from .objects import DamagedObjectError
from .origin import Lineage, Origin
from .place import Objects
from .root import encoded, read_document, read_small, require_readable, sealed_group, unsealed, write_documents

FIT_ATTRIBUTE = "trajkit_fit"
MOST_MODES = 1 << 16
MOST_TRIED = 256
"""Numbers of modes on a curve, at most."""
INDICES = ("mode", "reference_index", "sample_index", "members")
FIT_FIELDS: Mapping[str, type | UnionType] = {
    "version": int,
    "layout": str,
    "objects": str,
    "epochs": list,
    "modes": list,
    "tensors": dict,
    "settings": dict,
    "n_samples": int,
    "updatable": bool,
}
Stored = dict[str, StoredObject]


@dataclass(frozen=True)
class StoredFit:
    """A saved fit: its attributes, and its arrays read piece by piece."""

    objects: Objects
    name: str
    attributes: Mapping[str, Any]
    shape: FitShape

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredFit, (self.objects, self.name, self.attributes, self.shape)

    @cached_property
    def documents(self) -> Mapping[str, dict[str, Any]]:
        """Array -> ``zarr.json``, as the shape decides it."""
        return self.shape.documents()

    @property
    def saved_as(self) -> str:
        """The name that it was saved by; another one where its folder was renamed or exchanged."""
        saved_as: str = self.attributes.get("name", self.name)
        return saved_as

    @property
    def origin(self) -> Origin | None:
        """What it was made of; None in fits of older versions."""
        return _origin_of(self.attributes)

    @property
    def version(self) -> int:
        """How often it was updated."""
        version: int = self.attributes["version"]
        return version

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, metadata included."""
        return sum(length for _, length in self.objects.lengths(f"{FITS}/{self.name}"))

    def committed(self) -> Stored:
        """What is known of every object of the fit's arrays; raises `DamagedRunError` where that is damaged."""
        if self.saved_as != self.name:
            raise DamagedRunError(
                f"{self.objects.root}: {FITS}/{self.name} holds fit '{self.saved_as:.100}', expected '{self.name}': its"
                f" folder was renamed or exchanged; name it {FITS}/{self.saved_as:.100} again"
            )
        key = _objects_key(self.group)
        try:
            table = read_small(self.objects, key)
            if digest(table) != self.attributes["objects"]:
                raise ValueError("another content")
            stored = {
                name: StoredObject.from_json(values)
                for name, values in require_kind(parse(table), dict, "the table").items()
            }
            parts = [part(f"{self.group}/{array}", document) for array, document in self.documents.items()]
            require_objects(stored, parts)
        except ValueError as error:
            raise self._damaged(f"object {key} is not what was saved ({error})") from error
        return stored

    @cached_property
    def _reader(self) -> VerifiedReader:
        return VerifiedReader(self.objects, self.committed())

    def read(self, array: str, start: int | None = None, stop: int | None = None) -> NDArray[Any]:
        """Entries ``start : stop`` of an array along its last axis; raises `DamagedRunError` where it is damaged."""
        document = self.documents[array]
        *rows, length = document["shape"]
        first, last, _ = slice(start, stop).indices(length)
        region = (*(slice(0, count) for count in rows), slice(first, max(first, last)))
        if not self.is_current:  # a fit may be removed and made again by the same name
            raise self._damaged("")
        try:
            values = self._reader.read(f"{self.group}/{array}", document, region)
        except DamagedObjectError as damage:
            raise self._damaged(str(damage)) from None
        n, m = self.shape.n_weights, self.shape.n_modes
        limits = {"mode": (m,), "members": (n, m)}.get(array, (n,))
        for row, limit in zip(np.atleast_2d(values) if array in INDICES else (), limits, strict=False):
            if row.size and not 0 <= row.min() <= row.max() < limit:
                raise self._damaged(f"'{array}' has {row.min()} to {row.max()}, expected 0 to {limit - 1}")
        return values

    def group_document(self) -> dict[str, Any]:
        """The ``zarr.json`` that makes this version exist."""
        return sealed_group(FIT_ATTRIBUTE, "fit", self.attributes)

    @property
    def group(self) -> str:
        """Where its arrays are."""
        return f"{FITS}/{self.name}/{self.version}"

    @property
    def is_current(self) -> bool:
        """Whether the run still has this fit, in this version."""
        try:
            return bool(_saved(self.objects, self.name)["objects"] == self.attributes["objects"])
        except (OSError, ValueError):
            return False

    def _damaged(self, what: str) -> DamagedRunError:
        where = f"{self.objects.root}: fit '{self.name}'"
        if not self.is_current:
            return DamagedRunError(f"{where}: was updated or replaced since it was opened; open it again")
        return DamagedRunError(f"{where}: {what}; fit again by another name")


@dataclass(frozen=True)
class ResultBlocks:
    """Where the results of a fit's blocks are put, by threads and processes that may be asked for a block twice."""

    objects: Objects
    group: str
    shape: FitShape

    def write(self, start: int, results: Mapping[str, NDArray[Any]]) -> Stored:
        """Store the results (n,) or (M, n) of the weights from `start` on; n is a whole chunk, but for the last."""
        documents = self.shape.documents()
        stored: Stored = {}
        for array in self.shape.results:
            values = results[array]
            region = (*(slice(0, count) for count in values.shape[:-1]), slice(start, start + values.shape[-1]))
            stored |= store(self.objects.put, f"{self.group}/{array}", documents[array], region, values)
        return stored


class FitWriter:
    """Writes one fit; a context manager that leaves the run as it was unless `commit` was reached.

    With `previous`, it writes that fit's next version. Raises `PathExistsError` where a fit of the name, or a later
    version, exists, `RunLockedError` while another process writes it.
    """

    def __init__(self, root: Objects, name: str, shape: FitShape, previous: StoredFit | None = None) -> None:
        self.name = require_name(name, "fit")
        self._shape = shape
        self._previous = previous
        self._version = 0 if previous is None else previous.version + 1
        self._group = f"{FITS}/{name}/{self._version}"
        self._helpers = root.owned_by(f"fit-{name}")
        self._objects = root.owned_by(f"fit-{name}/{uuid.uuid4().hex}")
        self._lock = root.lock(f"fit-{name}", f"fit '{name}'")
        try:
            self._require_current()
            self._clear()
            self._clear_abandoned()
            self._prepare()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._clear()
        finally:
            self._lock.release()

    @property
    def blocks(self) -> ResultBlocks:
        """Takes the results of the blocks, in this process or another."""
        return ResultBlocks(self._objects, self._group, self._shape)

    def commit(
        self,
        stored: Stored,
        reference: NDArray[np.float32],
        functional: Functional,
        sample_index: NDArray[np.int64],
        attributes: Mapping[str, Any],
    ) -> None:
        """Write what is small, then the group: from here on the fit, or its new version, exists."""
        small: dict[str, NDArray[Any]] = {
            "reference": reference,
            "sample_index": sample_index,
        }
        if self._shape.n_members:
            small["members"] = np.stack([functional.index, functional.mode.astype(np.int64)])
            small["terms"] = np.stack([functional.origin.astype(np.float64), functional.coefficient])
        else:
            small["reference_index"] = functional.index
        fit = {
            **attributes,
            "name": self.name,
            "version": self._version,
            "n_samples": self._shape.n_samples,
            "updatable": self._shape.updatable,
            **({"n_members": self._shape.n_members} if self._shape.n_members else {}),
            "objects": self._complete(stored, small),
        }
        group = sealed_group(FIT_ATTRIBUTE, "fit", fit)
        key = f"{FITS}/{self.name}/{METADATA}"
        if self._previous is None:
            self._objects.create_atomically(key, encoded(group, key))
        else:
            self._objects.replace({key: encoded(group, key)})
            self._objects.sync_names()

    def _complete(self, stored: Stored, small: Mapping[str, NDArray[Any]]) -> str:
        """Bring all that the group will stand for to the disk; the hash of the table of its objects."""
        documents = self._shape.documents()

        def put(key: str, *parts: bytes | memoryview) -> None:
            self._objects.make_room(key.rpartition("/")[0])
            self._objects.put(key, *parts)

        for array, values in small.items():
            region = (slice(None),) * values.ndim
            stored = stored | store(put, f"{self._group}/{array}", documents[array], region, values)
        table = canonical_json({key: [item.length, item.hash] for key, item in stored.items()})
        require_readable(table, f"fit '{self.name}'")
        written = {_objects_key(self._group): table}
        groups = {f"{self._group}/{array}": document for array, document in documents.items()}
        for path, document in groups.items():
            written[f"{path}/{METADATA}"] = encoded(document, path)
        written |= [ledger_entry(FITS, self.name)]
        for key, data in written.items():
            put(key, data)
        self._objects.sync(written.keys() | stored.keys())
        if not self._objects.exists(f"{FITS}/{METADATA}"):
            write_documents(self._objects, {FITS: group_document()})
        # Helpers elsewhere have put objects there, and one who was killed may have made the folder of all fits.
        self._objects.sync_names("", FITS, *self._folders())
        # Now plain Zarr may find the version, beside an older one; and it does before the fit exists.
        write_documents(self._objects, {self._group: group_document()})
        self._objects.sync_names()
        return digest(table)

    def _require_current(self) -> None:
        """Raise `PathExistsError` unless the fit is still what the caller knows of it."""
        if self._previous is None:
            if self._objects.exists(f"{FITS}/{self.name}/{METADATA}"):
                raise PathExistsError(f"{self._objects.root}: fit '{self.name}' exists; choose another name")
        elif _saved(self._objects, self.name)["version"] != self._previous.version:
            raise PathExistsError(f"{self._objects.root}: fit '{self.name}' was updated meanwhile; open the run again")

    def _folders(self) -> list[str]:
        """Where the objects of the blocks go."""
        rows = [f"correlations/c/{mode}" for mode in range(self._shape.n_modes)]
        plain = [f"{array}/c" for array in self._shape.results if array != "correlations"]
        return [f"{self._group}/{folder}" for folder in plain + (rows if self._shape.updatable else [])]

    def _prepare(self) -> None:
        self._objects.ready_temporary()
        for folder in self._folders():
            self._objects.make_room(folder)

    def _clear(self) -> None:
        """Remove all but the version that exists; helpers that are still at a block cannot write it any more.

        The group says which one that is: a commit that raised may have come to its end all the same.
        """
        self._helpers.clear_temporary()
        folder = f"{FITS}/{self.name}"
        if not self._objects.exists(f"{folder}/{METADATA}"):
            self._objects.delete_tree(folder)
            self._objects.delete(ledger_entry(FITS, self.name)[0])
            return
        exists = str(_saved(self._objects, self.name)["version"])
        for name in self._objects.names(folder):
            if name not in (METADATA, exists):
                # First that plain Zarr does not find it any more, or it would read fill values for what is gone.
                self._objects.delete(f"{folder}/{name}/{METADATA}")
                self._objects.sync_names(f"{folder}/{name}")
                self._objects.delete_tree(f"{folder}/{name}")

    def _clear_abandoned(self) -> None:
        """Remove what killed processes left of other fits."""
        for name in self._objects.names(FITS):
            if name == METADATA or self._objects.exists(f"{FITS}/{name}/{METADATA}"):
                continue
            with contextlib.suppress(RunLockedError):
                lock = self._objects.lock(f"fit-{name}", f"fit '{name}'")
                try:
                    if not self._objects.exists(f"{FITS}/{name}/{METADATA}"):
                        self._objects.owned_by(f"fit-{name}").clear_temporary()
                        self._objects.delete_tree(f"{FITS}/{name}")
                        self._objects.delete(ledger_entry(FITS, name)[0])
                finally:
                    lock.release()


def fit_names(objects: Objects) -> tuple[str, ...]:
    """The fits that exist, by name."""
    return tuple(name for name in objects.names(FITS) if fit_exists(objects, name))


def fit_exists(objects: Objects, name: str) -> bool:
    """Return whether there is a fit of this name."""
    return is_name(name) and objects.exists(f"{FITS}/{name}/{METADATA}")


def open_fit(objects: Objects, name: str, layout: ParameterLayout, lineage: Lineage) -> StoredFit:
    """Open a fit that exists; raise `DamagedRunError` where it is damaged, or was not made of this run."""
    try:
        attributes = _saved(objects, name)
        if attributes["layout"] != layout.digest:
            raise ValueError("it belongs to a run of another layout")
        _require_values(attributes)
        origin = _origin_of(attributes)
        if origin is not None:
            lineage.require(origin, attributes["epochs"])
        shape = FitShape(
            n_weights=layout.n_weights,
            n_epochs=len(attributes["epochs"]),
            n_modes=len(attributes["modes"]),
            n_samples=attributes["n_samples"],
            updatable=attributes["updatable"],
            n_members=attributes.get("n_members", 0),
        )
        return StoredFit(objects, name, attributes, shape)
    except ValueError as error:
        key = f"{FITS}/{name}/{METADATA}"
        raise DamagedRunError(f"{objects.root}: {key} describes no fit ({error}); fit again by another name") from error


def _saved(objects: Objects, name: str) -> dict[str, Any]:
    """The attributes of a fit as they are stored now; raises `ValueError` where they are none."""
    document = read_document(objects, f"{FITS}/{name}/{METADATA}")
    return require_fields(unsealed(document, FIT_ATTRIBUTE, "fit"), FIT_FIELDS)


def _origin_of(attributes: Mapping[str, Any]) -> Origin | None:
    return Origin.from_json(attributes["of"]) if "of" in attributes else None


def _require_values(attributes: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the lists in a fit's attributes hold other things than they should."""
    epochs = [require_kind(epoch, int, "an epoch") for epoch in attributes["epochs"]]
    if not epochs or epochs != sorted(set(epochs)) or not -(2**63) <= epochs[0] <= epochs[-1] < 2**63:
        raise ValueError("its epochs are not rising integers of 64 bits")
    if not 1 <= len(attributes["modes"]) <= MOST_MODES or attributes["n_samples"] < 1 or attributes["version"] < 0:
        raise ValueError("its modes, samples or version are no such numbers")
    if "n_members" in attributes and require_kind(attributes["n_members"], int, "'n_members'") < 1:
        raise ValueError("its references have no members")
    qualities = [_numbers(found, "a quality") for found in (*attributes["modes"], *attributes["tensors"].values())]
    n_numbers = {len(quality) for quality in qualities}
    if n_numbers != {5} and (n_numbers != {3} or "pca" in attributes):
        raise ValueError("a quality is not so many numbers as it has to be")
    if min(map(min, qualities)) < 0:
        raise ValueError("a quality has a number below 0")
    if "pca" in attributes and len(_numbers(attributes["pca"], "'pca'")) != 2:
        raise ValueError("'pca' is not two numbers")
    if require_kind(attributes.get("pca_components", 1), int, "'pca_components'") < 1:
        raise ValueError("'pca_components' is below 1")
    curve = require_kind(attributes.get("curve", []), list, "'curve'")
    if len(curve) > MOST_TRIED or any(len(_numbers(point, "a point of the curve")) != 2 for point in curve):
        raise ValueError(f"'curve' is not up to {MOST_TRIED} pairs")
    for n_modes, _ in curve:
        require_kind(n_modes, int, "a number of modes")
    require_kind(attributes.get("name", ""), str, "'name'")
    _require_readable_settings(attributes["settings"], attributes["updatable"])


def _require_readable_settings(settings: Mapping[str, Any], updatable: bool) -> None:
    """Raise `ValueError` where those settings are others than a fit can have by which it is read."""
    if not require_kind(settings.get("references", "weight"), str, "'references'").isidentifier():
        raise ValueError("'references' is no word")
    checked_decay(settings.get("decay", 1.0))
    if checked_candidates(settings.get("reassign", 1)) > 1 and not updatable:
        raise ValueError("its modes may change, but it has not kept the correlations for that")


def _numbers(values: Any, what: str) -> list[Any]:
    return [require_kind(number, int | float, f"a part of {what}") for number in require_kind(values, list, what)]


def _objects_key(group: str) -> str:
    """Under an array, where Zarr lists nothing."""
    return f"{group}/mode/objects.json"
