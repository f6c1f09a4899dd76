"""Zarr arrays as this archive uses them: encoded in memory, written by us, and never read unchecked.

Zarr writes only into memory here; the bytes then go to disk in the order that the commit protocol asks for. Raw chunks
are read by `raw`, coded ones through the Rust pipeline `zarrs`, 3 to 9 times as fast as the default one; it writes in
place, so it never writes. Neither checks a checksum, so whatever they read has been checked against its hash before.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.buffer import cpu
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore, StorePath

from ..errors import DamagedRunError
from ..forks import in_forked_child
from .coded import CodedArray, CodedDataError
from .commit import StoredObject
from .disk import SoundFile, identity_of
from .format import PROBE_INDEX
from .objects import DamagedObjectError
from .place import Objects
from .raw import ChangedFileError, RawArray, RawDataError

PYTHON_PIPELINE = "zarr.core.codec_pipeline.BatchedCodecPipeline"
RUST_PIPELINE = "zarrs.ZarrsCodecPipeline"

Parts = list[memoryview | bytes]
Region = tuple[slice | NDArray[np.int64], ...]
"""What to read: a slice of each axis, or an array of rows first."""
Reading = Literal["raw", "zarrs", "zarr"]

# zarr chooses an array's pipeline when it is made, from a configuration that is shared by all threads.
_pipeline_choice = threading.Lock()


def encode(
    path: str, document: dict[str, Any], region: tuple[slice, ...], values: NDArray[Any]
) -> Iterator[tuple[str, Parts]]:
    """The stored objects of `values` in `region` of the array at `path`: each its key and its bytes, in parts.

    `document` is the array's ``zarr.json`` with a shape that contains the region; the region covers whole objects.
    """
    raw = RawArray.of(document)
    if raw is not None:
        keys = keys_of(path, document, _bounded(region, document))
        yield from zip(keys, raw.encode(values, document["fill_value"]), strict=True)
        return
    stored: dict[str, Buffer] = {}
    array = _array(MemoryStore(stored), path, document, PYTHON_PIPELINE)
    array[region] = values
    for key, buffer in stored.items():
        yield key, [np.ascontiguousarray(buffer.as_numpy_array()).data.cast("B")]


def store(
    write: Callable[..., None], path: str, document: dict[str, Any], region: tuple[slice, ...], values: NDArray[Any]
) -> dict[str, StoredObject]:
    """Store the objects of `values` in `region` of the array at `path`; what they are, by key. See `encode`.

    `write` takes a key and parts of bytes: `Objects.create` or `Objects.put`.
    """
    stored: dict[str, StoredObject] = {}
    for key, parts in encode(path, document, region, values):
        write(key, *parts)
        stored[key] = StoredObject.of(*parts)
    return stored


def reading_of(document: Mapping[str, Any]) -> Reading:
    """How the chunks of an array are read: straight off the files, by the Rust pipeline, or by zarr's own."""
    if RawArray.of(document) is not None:
        return "raw"
    return "zarrs" if _zarrs_is_there() and not in_forked_child() else "zarr"


@cache
def _zarrs_is_there() -> bool:
    return importlib.util.find_spec("zarrs") is not None


class VerifiedReader:
    """Reads arrays whose every object was committed with a length and a hash.

    An object is hashed when it is first touched, and remembered as sound as long as its file does not change; a read
    that meets one that is missing, truncated, flipped or swapped raises `DamagedObjectError` before a value of it is
    returned. Zarr alone would read fill values for a missing object without a word. Threads may share a reader.
    """

    def __init__(self, objects: Objects, committed: Mapping[str, StoredObject]) -> None:
        self._objects = objects
        self._committed = committed
        self._files: dict[str, Future[SoundFile]] = {}
        self._raw: dict[str, RawArray | None] = {}
        self._decodable: set[SoundFile] = set()
        self._arrays: dict[tuple[Reading, str], zarr.Array[Any]] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(
        self, path: str, document: dict[str, Any], region: Region, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Values of a region of the array at `path`, whose ``zarr.json`` is taken to be `document`.

        The first axis of the region may be an array of rows. `out` takes the values, where given; it is C-contiguous.
        """
        keys = keys_of(path, document, region)
        if out is None:  # memory of our own: left to itself, zarr first fills it, which takes longer than reading
            shape = [axis.stop - axis.start if isinstance(axis, slice) else axis.size for axis in region]
            out = np.empty(shape, dtype=document["data_type"])
        for last_try in (False, True):
            files = self.require(keys)
            try:
                self._read(path, document, region, files, out)
                break
            except ChangedFileError as error:  # hashed again: what was put there may be sound
                key = self._forget(error.args[0])
                if last_try:
                    raise DamagedObjectError(key, "changes while it is read") from error
            except FileNotFoundError as error:
                raise DamagedObjectError(self._forget(error.filename), "is missing") from error
            except (RawDataError, CodedDataError) as error:
                raise DamagedRunError(f"{self._objects.root}: {path}: {error}") from error
            except (ValueError, RuntimeError, OSError) as error:
                raise DamagedRunError(f"{self._objects.root}: {path} cannot be decoded ({error})") from error
        return out

    def _read(
        self, path: str, document: dict[str, Any], region: Region, files: list[SoundFile], out: NDArray[Any]
    ) -> None:
        raw = self._raw_array(path, document)
        if raw is not None:
            columns: Any = region[-1]
            raw.read(files, columns, out)
            return
        for file in files:  # zarr opens them itself
            if identity_of(os.stat(file.path)) != file.identity:
                raise ChangedFileError(file.path)
        self._require_decodable(document, files)
        self._read_coded(path, document, region, out)

    def _forget(self, path: str) -> str:
        """Forget that a file was sound; return the key of its object."""
        key = os.path.relpath(path, self._objects.files)
        self._files.pop(key, None)
        return key

    def require(self, keys: list[str]) -> list[SoundFile]:
        """The files of these objects; raises `DamagedObjectError` naming one that is not what was committed."""
        if os.getpid() != self._process:  # forked: another thread may have held the lock, or be at a file
            self._files, self._lock, self._process = {}, threading.Lock(), os.getpid()
        if self._objects.at_a_time > 1:
            self._look_at(keys, self._objects.at_a_time)
        # Each thread checks what no other one has begun, and waits for the rest at the end.
        return [found.result() for found in [self._file_of(key) for key in keys]]

    def require_together(self, keys: list[str]) -> None:
        """As `require`, by as many threads as there are cores."""
        self._look_at(keys, os.cpu_count() or 1)
        self.require(keys)

    def _look_at(self, keys: list[str], threads: int) -> None:
        """Check those objects that nobody has begun to check, by several threads."""
        unknown = [key for key in keys if key not in self._files]
        threads = min(threads, len(unknown))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda key: self._file_of(key).exception(), unknown))

    def _file_of(self, key: str) -> Future[SoundFile]:
        """The file of an object, checked here and now if no other thread has begun to; it may still be at it."""
        found = self._files.get(key)
        if found is None:
            with self._lock:
                found = self._files.get(key)
                mine = self._files.setdefault(key, Future[SoundFile]())
            if found is None:
                self._check(key, mine)
        return found or mine

    def _check(self, key: str, file: Future[SoundFile]) -> None:
        try:
            file.set_result(self._checked(key))
        except BaseException as error:
            self._files.pop(key, None)  # to be checked again when asked for again: it may be restored
            file.set_exception(error)  # for all who wait for it
            if not isinstance(error, OSError):  # Ctrl-C stops the others' work too, not only this object's
                raise

    def _checked(self, key: str) -> SoundFile:
        expected = self._committed.get(key)
        if expected is None:
            raise DamagedObjectError(key, "was never committed")
        return self._objects.sound_file(key, expected.length, expected.hash)

    def _raw_array(self, path: str, document: dict[str, Any]) -> RawArray | None:
        if path not in self._raw:
            self._raw[path] = RawArray.of(document)
        return self._raw[path]

    def _require_decodable(self, document: dict[str, Any], files: list[SoundFile]) -> None:
        coded = CodedArray.of(document)
        if coded is not None:
            for file in set(files) - self._decodable:
                coded.require_decodable(file.path)
                self._decodable.add(file)

    def _read_coded(self, path: str, document: dict[str, Any], region: Region, out: NDArray[Any]) -> None:
        array = self._opened(path, document)
        rows = region[0]
        if isinstance(rows, slice):
            array.get_basic_selection(region, out=cpu.NDBuffer.from_ndarray_like(out))  # type: ignore[arg-type]
            return
        for position, row in enumerate(rows.tolist()):
            here = (slice(row, row + 1), *region[1:])
            array.get_basic_selection(here, out=cpu.NDBuffer.from_ndarray_like(out[position : position + 1]))  # type: ignore[arg-type]

    def _opened(self, path: str, document: dict[str, Any]) -> zarr.Array[Any]:
        reading = reading_of(document)
        if (reading, path) not in self._arrays:
            store = LocalStore(self._objects.files, read_only=True)
            pipeline = RUST_PIPELINE if reading == "zarrs" else PYTHON_PIPELINE
            self._arrays[reading, path] = _array(store, path, document, pipeline)
        return self._arrays[reading, path]


def keys_of(path: str, document: Mapping[str, Any], region: Region) -> list[str]:
    """The stored objects that hold a region of an array; rows first."""
    stored = document["chunk_grid"]["configuration"]["chunk_shape"]
    keys = [f"{path}/c"]
    for axis, width in zip(region, stored, strict=True):
        if isinstance(axis, slice):
            places = range(axis.start // width, -(-axis.stop // width))
        else:
            places = np.unique(axis // width).tolist() if width > 1 else axis.tolist()
        keys = [f"{key}/{place}" for key in keys for place in places]
    return keys


def with_rows(document: dict[str, Any], rows: int) -> dict[str, Any]:
    """The array's document with `rows` epochs."""
    return {**document, "shape": [rows, *document["shape"][1:]]}


def all_with_rows(documents: Mapping[str, dict[str, Any]], rows: int) -> dict[str, dict[str, Any]]:
    """The documents of a run's arrays with `rows` epochs: all but the probe's indices have them."""
    return {
        path: document if path == PROBE_INDEX else with_rows(document, rows) for path, document in documents.items()
    }


def _bounded(region: tuple[slice, ...], document: Mapping[str, Any]) -> Region:
    """The region with a start and a stop on each axis."""
    return tuple(slice(*axis.indices(length)[:2]) for axis, length in zip(region, document["shape"], strict=True))


def _array(store: Store, path: str, document: dict[str, Any], pipeline: str) -> zarr.Array[Any]:
    with _pipeline_choice, zarr.config.set({"codec_pipeline.path": pipeline}):
        config: Any = {"write_empty_chunks": True, "order": "C"}
        metadata: Any = document
        return zarr.Array(zarr.AsyncArray(metadata, StorePath(store, path), config))
