"""Zarr arrays as this archive uses them: encoded in memory, written by us, read through the Rust pipeline.

Zarr writes only into memory here; the bytes then go to disk in the order that the commit protocol asks for. The Rust
pipeline `zarrs` reads 3 to 9 times faster than the default one, but writes in place, so it never writes. It checks no
checksum inside a shard or of a part of a chunk, so whatever it reads has been checked against its hash before.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.buffer import cpu
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore, StorePath

from ..errors import DamagedRunError
from ..forks import in_forked_child
from .commit import StoredObject
from .objects import LocalObjects

PYTHON_PIPELINE = "zarr.core.codec_pipeline.BatchedCodecPipeline"
RUST_PIPELINE = "zarrs.ZarrsCodecPipeline"

# zarr chooses an array's pipeline when it is made, from a configuration that is shared by all threads.
_pipeline_choice = threading.Lock()


def encode(
    path: str, document: dict[str, Any], region: tuple[slice | int, ...], values: NDArray[Any]
) -> dict[str, memoryview]:
    """The stored objects of `values` in `region` of the array at `path`: key -> bytes.

    `document` is the array's ``zarr.json`` with a shape that contains the region; the region covers whole objects.
    """
    stored: dict[str, Buffer] = {}
    array = _array(MemoryStore(stored), path, document, PYTHON_PIPELINE)
    array[region] = values
    return {key: np.ascontiguousarray(buffer.as_numpy_array()).data.cast("B") for key, buffer in stored.items()}


def store(
    objects: LocalObjects, path: str, document: dict[str, Any], region: tuple[slice, ...], values: NDArray[Any]
) -> dict[str, StoredObject]:
    """Create the objects of `values` in `region` of the array at `path`; what they are, by key. See `encode`."""
    stored: dict[str, StoredObject] = {}
    for key, data in encode(path, document, region, values).items():
        objects.create(key, data)
        stored[key] = StoredObject.of(data)
    return stored


class VerifiedReader:
    """Reads arrays whose every object was committed with a length and a hash.

    An object is hashed when it is first touched, and remembered as sound; a read that meets one that is missing,
    truncated, flipped or swapped raises `DamagedObjectError` before a value of it is returned. Zarr alone would read
    fill values for a missing object without a word. Threads may share a reader.
    """

    def __init__(self, objects: LocalObjects, committed: Mapping[str, StoredObject]) -> None:
        self._objects = objects
        self._committed = committed
        self._sound: set[str] = set()
        self._arrays: dict[tuple[bool, str], zarr.Array[Any]] = {}
        self._lock = threading.Lock()

    def read(self, path: str, document: dict[str, Any], region: tuple[slice, ...]) -> NDArray[Any]:
        """Values of a region of the array at `path`, whose ``zarr.json`` is taken to be `document`."""
        self.require(keys_of(path, document, region))
        # Into memory of our own: left to itself, zarr first fills it with fill values, which takes longer than reading.
        out: Any = np.empty([axis.stop - axis.start for axis in region], dtype=document["data_type"])
        try:
            self._opened(path, document).get_basic_selection(region, out=cpu.NDBuffer.from_ndarray_like(out))
        except (ValueError, RuntimeError, OSError) as error:
            raise DamagedRunError(f"{self._objects.root}: {path} cannot be decoded ({error})") from error
        return np.asarray(out)

    def require(self, keys: list[str]) -> None:
        """Raise `DamagedRunError` naming the first of these objects that is not what was committed."""
        with self._lock:
            for key in keys:
                if key not in self._sound:
                    self._check(key)
                    self._sound.add(key)

    def _check(self, key: str) -> None:
        expected = self._committed.get(key)
        if expected is None:
            raise DamagedObjectError(key, "was never committed")
        length = self._objects.size(key)
        if length != expected.length:
            state = "missing" if length is None else f"{length} bytes long"
            raise DamagedObjectError(key, f"is {state}, {expected.length} bytes were committed")
        if self._objects.digest(key) != expected.hash:
            raise DamagedObjectError(key, "does not have the content that was committed")

    def _opened(self, path: str, document: dict[str, Any]) -> zarr.Array[Any]:
        forked = in_forked_child()
        if (forked, path) not in self._arrays:
            store = LocalStore(self._objects.root, read_only=True)
            pipeline = PYTHON_PIPELINE if forked else RUST_PIPELINE
            self._arrays[forked, path] = _array(store, path, document, pipeline)
        return self._arrays[forked, path]


class DamagedObjectError(DamagedRunError):
    """An object is not what was committed; who knows what it holds says so in its own words."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"object {key} {what}")
        self.key = key


def keys_of(path: str, document: Mapping[str, Any], region: tuple[slice, ...]) -> list[str]:
    """The stored objects that hold a region of an array."""
    stored = document["chunk_grid"]["configuration"]["chunk_shape"]
    keys = [f"{path}/c"]
    for axis, width in zip(region, stored, strict=True):
        keys = [f"{key}/{place}" for key in keys for place in range(axis.start // width, -(-axis.stop // width))]
    return keys


def with_rows(document: dict[str, Any], rows: int) -> dict[str, Any]:
    """The array's document with `rows` epochs."""
    return {**document, "shape": [rows, *document["shape"][1:]]}


def _array(store: Store, path: str, document: dict[str, Any], pipeline: str) -> zarr.Array[Any]:
    with _pipeline_choice, zarr.config.set({"codec_pipeline.path": pipeline}):
        config: Any = {"write_empty_chunks": True, "order": "C"}
        metadata: Any = document
        return zarr.Array(zarr.AsyncArray(metadata, StorePath(store, path), config))
