"""Saved decompositions, ``fits/<name>``: as blocks are fitted, their results are written; the group comes last.

====================  =========  ===============  =================================================================
array                 dtype      dimensions       content
====================  =========  ===============  =================================================================
``mode``              uint16     (weight)         mode of each weight
``scale``             float32    (weight)         a
``mean``              float64    (weight)         mean over the fitted epochs; b = mean - a · mean of the reference
``correlation``       float32    (weight)         signed, with the reference of the mode
``reference``         float32    (epoch, m)       the reference trajectories over the fitted epochs
``reference_index``   int64      (m)              which weights they are
``sample_index``      int64      (sample)         the weights that Step 1 looked at
====================  =========  ===============  =================================================================

``mode/objects.json`` holds length and hash of every object of these arrays. The group's ``zarr.json`` is written last
and makes the fit exist; its attribute ``trajkit_fit`` is ``{"fit": {…}, "blake3": hash of it}`` and holds the settings,
the epochs, the quality of the fit, the layout's hash, and the hash of ``objects.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..digest import ALGORITHM, canonical_json, digest
from ..errors import DamagedRunError, PathExistsError, UnknownNameError
from ..layout import ParameterLayout
from .arrays import DamagedObjectError, VerifiedReader, store
from .commit import StoredObject
from .format import FITS, LOCKS, METADATA, array_document, group_document, require_name, result_rule
from .lock import WriterLock
from .objects import LocalObjects
from .root import encoded, read_document, write_document

FIT_ATTRIBUTE = "trajkit_fit"
RESULTS = {"mode": "uint16", "scale": "float32", "mean": "float64", "correlation": "float32"}
Stored = dict[str, StoredObject]


@dataclass(frozen=True)
class StoredFit:
    """A saved fit: its attributes, and its arrays read piece by piece."""

    objects: LocalObjects
    name: str
    attributes: Mapping[str, Any]
    documents: Mapping[str, dict[str, Any]]
    """Array -> ``zarr.json``, as the attributes decide it."""

    @property
    def path(self) -> str:
        """The group of the fit."""
        return f"{FITS}/{self.name}"

    @cached_property
    def _reader(self) -> VerifiedReader:
        key = _objects_key(self.name)
        table = self.objects.read(key) if self.objects.exists(key) else b""
        if digest(table) != self.attributes["objects"]:
            raise self._damaged(f"object {key} is not what was saved")
        stored = {name: StoredObject(*values) for name, values in json.loads(table).items()}
        return VerifiedReader(self.objects, stored)

    def read(self, array: str, start: int | None = None, stop: int | None = None) -> NDArray[Any]:
        """Entries ``start : stop`` of an array along its first axis; raises `DamagedRunError` where it is damaged."""
        document = self.documents[array]
        first, last, _ = slice(start, stop).indices(document["shape"][0])
        region = (slice(first, max(first, last)), *(slice(0, length) for length in document["shape"][1:]))
        try:
            return self._reader.read(f"{self.path}/{array}", document, region)
        except DamagedObjectError as damage:
            raise self._damaged(str(damage)) from None

    def _damaged(self, what: str) -> DamagedRunError:
        return DamagedRunError(f"{self.objects.root}: fit '{self.name}': {what}; fit again by another name")


class FitWriter:
    """Writes one fit; a context manager that leaves the run as it was unless `commit` was reached.

    Raises `PathExistsError` where a fit of the name exists, `RunLockedError` while another process writes it.
    """

    def __init__(self, root: LocalObjects, name: str, n_weights: int) -> None:
        self.name = require_name(name, "fit")
        self._n_weights = n_weights
        self._objects = LocalObjects(root.root, fsync=root.fsync, owner=f"fit-{name}")
        self._lock = WriterLock(self._objects.ready(f"{LOCKS}/fit-{name}"), f"{root.root}: fit '{name}'")
        if self._objects.exists(f"{FITS}/{name}/{METADATA}"):
            self._lock.release()
            raise PathExistsError(f"{root.root}: fit '{name}' exists; choose another name")
        self._clear()
        self._committed = False
        self._documents = _documents(n_weights, 0, 0, 0)  # the results do not depend on the other numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._clear()
        self._lock.release()

    def write_block(self, start: int, results: Mapping[str, NDArray[Any]]) -> Stored:
        """Store the results (n,) of the weights from `start` on; `start` and n are whole chunks, but for the last."""
        stored: Stored = {}
        for array in RESULTS:
            stop = start + results[array].size
            stored |= store(
                self._objects, self._array(array), self._documents[array], (slice(start, stop),), results[array]
            )
        return stored

    def commit(
        self,
        stored: Stored,
        reference: NDArray[np.float32],
        reference_index: NDArray[np.int64],
        sample_index: NDArray[np.int64],
        attributes: Mapping[str, Any],
    ) -> None:
        """Write what is small, then the group: from here on the fit exists."""
        n_epochs, n_modes = reference.shape
        documents = _documents(self._n_weights, n_epochs, n_modes, sample_index.size)
        small: dict[str, NDArray[Any]] = {
            "reference": reference,
            "reference_index": reference_index,
            "sample_index": sample_index,
        }
        for array, values in small.items():
            stored = stored | store(
                self._objects, self._array(array), documents[array], (slice(None),) * values.ndim, values
            )
        table = canonical_json({key: [item.length, item.hash] for key, item in stored.items()})
        self._objects.create(_objects_key(self.name), table)
        for array, document in documents.items():
            write_document(self._objects, self._array(array), document)
        if not self._objects.exists(f"{FITS}/{METADATA}"):
            write_document(self._objects, FITS, group_document())
        self._objects.sync_names()
        fit = {**attributes, "n_samples": int(sample_index.size), "objects": digest(table)}
        group = group_document({FIT_ATTRIBUTE: {"fit": fit, ALGORITHM: digest(canonical_json(fit))}})
        key = f"{FITS}/{self.name}/{METADATA}"
        self._objects.create_atomically(key, encoded(group, key))
        self._committed = True

    def _array(self, array: str) -> str:
        return f"{FITS}/{self.name}/{array}"

    def _clear(self) -> None:
        self._objects.delete_tree(f"{FITS}/{self.name}")
        self._objects.clear_temporary()


def fit_names(objects: LocalObjects) -> tuple[str, ...]:
    """The fits that exist, by name."""
    return tuple(name for name in objects.names(FITS) if objects.exists(f"{FITS}/{name}/{METADATA}"))


def open_fit(objects: LocalObjects, name: str, layout: ParameterLayout) -> StoredFit:
    """A saved fit; raises `UnknownNameError` naming those that exist, `DamagedRunError` for another run's."""
    if name not in fit_names(objects):
        known = ", ".join(fit_names(objects)) or "none"
        raise UnknownNameError(f"{objects.root}: no fit '{name}'; the run has {known}")
    key = f"{FITS}/{name}/{METADATA}"
    try:
        saved = read_document(objects, key)["attributes"][FIT_ATTRIBUTE]
        attributes: dict[str, Any] = saved["fit"]
        if digest(canonical_json(attributes)) != saved[ALGORITHM]:
            raise ValueError("its content does not match its hash")
        if attributes["layout"] != layout.digest:
            raise ValueError("it belongs to a run of another layout")
        shapes = (len(attributes["epochs"]), len(attributes["modes"]), attributes["n_samples"])
        documents = _documents(layout.n_weights, *shapes)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedRunError(f"{objects.root}: {key} describes no fit ({error}); fit again by another name") from error
    return StoredFit(objects, name, attributes, documents)


def _documents(n_weights: int, n_epochs: int, n_modes: int, n_samples: int) -> dict[str, dict[str, Any]]:
    """Array -> ``zarr.json``. The numbers decide all of it, so what is read does not depend on what is stored."""
    chunk = result_rule(n_weights).chunk
    documents = {array: array_document(dtype, (n_weights,), (chunk,), ("weight",)) for array, dtype in RESULTS.items()}
    for array, dtype, shape, dimensions in (
        ("reference", "float32", (n_epochs, n_modes), ("epoch", "m")),
        ("reference_index", "int64", (n_modes,), ("m",)),
        ("sample_index", "int64", (n_samples,), ("sample",)),
    ):
        documents[array] = array_document(dtype, shape, shape, dimensions)
    return documents


def _objects_key(name: str) -> str:
    """Under an array, where Zarr lists nothing."""
    return f"{FITS}/{name}/mode/objects.json"
