"""Zarr arrays as this archive uses them: encoded in memory, written by us, read through the Rust pipeline.

Zarr writes only into memory here; the bytes then go to disk in the order that the commit protocol asks for. The Rust
pipeline `zarrs` reads 3 to 9 times faster than the default one, but writes in place, so it never writes.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore, StorePath

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


def open_array(objects: LocalObjects, path: str, document: dict[str, Any]) -> zarr.Array[Any]:
    """The stored array at `path`, read-only, with the shape that `document` says whatever the disk says."""
    return _array(LocalStore(objects.root, read_only=True), path, document, RUST_PIPELINE)


def whole_chunks(array: zarr.Array[Any], start: int, stop: int, axis: int) -> slice:
    """The chunks around entries ``start : stop`` of an axis. The Rust pipeline checks no checksum of a part of one."""
    width = array.chunks[axis]
    return slice(start // width * width, min(-(-stop // width) * width, array.shape[axis]))


def with_rows(document: dict[str, Any], rows: int) -> dict[str, Any]:
    """The array's document with `rows` epochs."""
    return {**document, "shape": [rows, *document["shape"][1:]]}


def _array(store: Store, path: str, document: dict[str, Any], pipeline: str) -> zarr.Array[Any]:
    with _pipeline_choice, zarr.config.set({"codec_pipeline.path": pipeline}):
        config: Any = {"write_empty_chunks": True, "order": "C"}
        metadata: Any = document
        return zarr.Array(zarr.AsyncArray(metadata, StorePath(store, path), config))
