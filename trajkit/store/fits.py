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

The group's ``zarr.json`` is written last and makes the fit exist; its attribute ``trajkit_fit`` holds the settings, the
epochs, the quality of the fit, and the length and hash of every object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..digest import digest
from ..errors import DamagedRunError, PathExistsError, UnknownNameError
from .arrays import encode, open_array, whole_chunks
from .commit import StoredObject
from .format import FITS, LOCKS, METADATA, array_document, group_document, require_name, result_rule
from .lock import WriterLock
from .objects import LocalObjects
from .root import read_document, refresh_root, write_document

FIT_ATTRIBUTE = "trajkit_fit"
RESULTS = {"mode": "uint16", "scale": "float32", "mean": "float64", "correlation": "float32"}
Stored = dict[str, StoredObject]


@dataclass(frozen=True)
class StoredFit:
    """A saved fit: its attributes, and its arrays read piece by piece."""

    objects: LocalObjects
    name: str
    attributes: Mapping[str, Any]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return {}

    @property
    def path(self) -> str:
        """The group of the fit."""
        return f"{FITS}/{self.name}"

    def read(self, array: str, start: int | None = None, stop: int | None = None) -> NDArray[Any]:
        """Entries ``start : stop`` of an array along its first axis; raises `DamagedRunError` where it is damaged."""
        if array not in self._arrays:
            document = read_document(self.objects, f"{self.path}/{array}/{METADATA}")
            self._arrays[array] = open_array(self.objects, f"{self.path}/{array}", document)
        opened = self._arrays[array]
        first, last, _ = slice(start, stop).indices(opened.shape[0])
        width, tail = opened.chunks[0], "/0" * (opened.ndim - 1)
        keys = [f"{self.path}/{array}/c/{chunk}{tail}" for chunk in range(first // width, -(-last // width))]
        committed = self.attributes["objects"]
        for key in keys:
            if self.objects.size(key) != committed[key][0]:
                raise self._damaged(key, f"is {self.objects.size(key)} bytes long, {committed[key][0]} were saved")
        try:
            whole = whole_chunks(opened, first, last, axis=0)
            return np.asarray(opened[whole])[first - whole.start : last - whole.start]
        except (ValueError, RuntimeError, OSError) as error:
            for key in keys:
                if digest(self.objects.read(key)) != committed[key][1]:
                    raise self._damaged(key, "does not have the content that was saved") from error
            raise self._damaged(self.path, f"cannot be read ({error})") from error

    def _damaged(self, key: str, what: str) -> DamagedRunError:
        return DamagedRunError(
            f"{self.objects.root}: fit '{self.name}': object {key} {what}; fit again by another name"
        )


class FitWriter:
    """Writes one fit; a context manager that leaves the run as it was unless `commit` was reached.

    Raises `PathExistsError` where a fit of the name exists, `RunLockedError` while another process writes it.
    """

    def __init__(self, objects: LocalObjects, name: str, n_weights: int) -> None:
        self._objects = objects
        self.name = require_name(name, "fit")
        self._chunking = result_rule(n_weights)
        if objects.exists(f"{FITS}/{name}/{METADATA}"):
            raise PathExistsError(f"{objects.root}: fit '{name}' exists; choose another name")
        self._lock = WriterLock(objects.path(f"{LOCKS}/fit-{name}"), f"{objects.root}: fit '{name}'")
        objects.delete_tree(f"{FITS}/{name}")
        self._committed = False
        self._documents = {
            array: array_document(dtype, (n_weights,), (self._chunking.chunk,), ("weight",))
            for array, dtype in RESULTS.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._objects.delete_tree(f"{FITS}/{self.name}")
        self._lock.release()

    def write_block(self, start: int, results: Mapping[str, NDArray[Any]]) -> Stored:
        """Store the results (n,) of the weights from `start` on; `start` and n are whole chunks, but for the last."""
        stored: Stored = {}
        for array, document in self._documents.items():
            stop = start + results[array].size
            stored |= self._put(array, document, (slice(start, stop),), results[array])
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
        small: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = {
            "reference": (reference, ("epoch", "m")),
            "reference_index": (reference_index, ("m",)),
            "sample_index": (sample_index, ("sample",)),
        }
        documents = dict(self._documents)
        for array, (values, dimensions) in small.items():
            documents[array] = array_document(str(values.dtype), values.shape, values.shape, dimensions)
            stored = stored | self._put(array, documents[array], (slice(None),) * values.ndim, values)
        for array, document in documents.items():
            write_document(self._objects, f"{FITS}/{self.name}/{array}", document)
        if not self._objects.exists(f"{FITS}/{METADATA}"):
            write_document(self._objects, FITS, group_document())
        self._objects.sync_names()
        objects = {key: [item.length, item.hash] for key, item in sorted(stored.items())}
        group = group_document({FIT_ATTRIBUTE: {**attributes, "objects": objects}})
        self._objects.create_atomically(f"{FITS}/{self.name}/{METADATA}", json.dumps(group, indent=2).encode())
        self._committed = True
        refresh_root(self._objects)

    def _put(self, array: str, document: dict[str, Any], region: tuple[slice, ...], values: NDArray[Any]) -> Stored:
        stored: Stored = {}
        for key, data in encode(f"{FITS}/{self.name}/{array}", document, region, values).items():
            self._objects.create(key, data)
            stored[key] = StoredObject.of(data)
        return stored


def fit_names(objects: LocalObjects) -> tuple[str, ...]:
    """The fits that exist, by name."""
    return tuple(name for name in objects.names(FITS) if objects.exists(f"{FITS}/{name}/{METADATA}"))


def open_fit(objects: LocalObjects, name: str) -> StoredFit:
    """A saved fit; raises `UnknownNameError` naming those that exist."""
    if name not in fit_names(objects):
        known = ", ".join(fit_names(objects)) or "none"
        raise UnknownNameError(f"{objects.root}: no fit '{name}'; the run has {known}")
    key = f"{FITS}/{name}/{METADATA}"
    attributes = read_document(objects, key).get("attributes", {}).get(FIT_ATTRIBUTE)
    if not isinstance(attributes, dict):
        raise DamagedRunError(f"{objects.root}: {key} describes no fit; fit again by another name")
    return StoredFit(objects, name, attributes)
