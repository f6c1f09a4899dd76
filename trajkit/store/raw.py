"""Values that are stored as they are: read straight off the files into the caller's memory, and encoded in one copy.

Most trainings are stored so, see the chunk rule. Measured on two threads, from the page cache, this is 5 to 7 times as
fast as the Rust pipeline, which first reads into memory of its own; see benchmarks/RESULTS.md. Coded chunks are left to
it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from .disk import SoundFile, identity_of

CHECKSUM_BYTES = 4
INDEX = np.dtype([("offset", "<u8"), ("length", "<u8")])
"""The index at the end of a shard: where each of its chunks is; a checksum follows."""
NOT_THERE = np.iinfo(np.uint64).max
"""In the index, for a chunk that lies beyond the array's edge."""


class RawDataError(ValueError):
    """A file does not hold the values that its metadata promises."""


class ChangedFileError(Exception):
    """A file was written to, or replaced, since it was found to be sound."""


@dataclass(frozen=True)
class RawArray:
    """An array of raw chunks of `chunk` values of a row, `stored` values an object. Remembers where chunks are."""

    dtype: np.dtype[Any]
    chunk: int
    stored: int
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> RawArray | None:
        """The array that a ``zarr.json`` describes, None where its chunks are coded or hold several rows."""
        *rows, stored = document["chunk_grid"]["configuration"]["chunk_shape"]
        codecs, chunk = document["codecs"], stored
        if codecs[0]["name"] == "sharding_indexed":
            sharding = codecs[0]["configuration"]
            codecs, chunk = sharding["codecs"], sharding["chunk_shape"][-1]
        raw = [codec["name"] for codec in codecs] == ["bytes", "crc32c"] and sys.byteorder == "little"
        return cls(np.dtype(document["data_type"]), chunk, stored) if raw and rows in ([], [1]) else None

    def read(self, files: list[SoundFile], columns: slice, out: NDArray[Any]) -> None:
        """Fill `out`, (rows, n) or (n,), with the columns of each row; `files` are the objects, row by row.

        Raises `RawDataError` naming a file that is too short, or whose index points elsewhere, and `ChangedFileError`.
        """
        if out.size == 0:
            return
        n_bytes, width = out.nbytes // out.size, out.shape[-1]
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        pieces = list(self._pieces(columns))
        for number, file in enumerate(files):
            row, piece = divmod(number, len(pieces))
            start, place = pieces[piece]
            begin = (row * width + place.start) * n_bytes
            self._read_object(file, start, view[begin : begin + (place.stop - place.start) * n_bytes])

    def encode(self, values: NDArray[Any], fill: Any) -> Iterator[list[memoryview | bytes]]:
        """The objects of `values`, (rows, n) or (n,); n covers whole objects or the array's edge.

        Each comes in parts, so that the values need not be copied, and has the bytes that zarr gives it.
        """
        for row in np.asarray(values, dtype=self.dtype).reshape(-1, values.shape[-1]):
            for start in range(0, row.size, self.stored):
                stored = row[start : start + self.stored]
                firsts = range(0, stored.size, self.chunk)
                chunks = [self._encoded(stored[first : first + self.chunk], fill) for first in firsts]
                yield [part for chunk in chunks for part in chunk] + self._index(len(chunks))

    def _encoded(self, chunk: NDArray[Any], fill: Any) -> list[memoryview | bytes]:
        if chunk.size < self.chunk:
            chunk = np.concatenate([chunk, np.full(self.chunk - chunk.size, fill, self.dtype)])
        data = np.ascontiguousarray(chunk).view(np.uint8)
        return [data.data, crc32c(data).to_bytes(CHECKSUM_BYTES, "little")]

    def _index(self, n_chunks: int) -> list[memoryview | bytes]:
        """What ends a shard with so many chunks; nothing where objects are no shards."""
        if self.stored == self.chunk:
            return []
        table = np.full(self.stored // self.chunk, NOT_THERE, dtype=INDEX)
        length = self.chunk * self.dtype.itemsize + CHECKSUM_BYTES
        table["offset"][:n_chunks] = length * np.arange(n_chunks, dtype=np.uint64)
        table["length"][:n_chunks] = length
        content = table.tobytes()
        return [content, crc32c(content).to_bytes(CHECKSUM_BYTES, "little")]

    def _pieces(self, columns: slice) -> Iterator[tuple[int, slice]]:
        """For each object of a row: where in it the columns begin, and their place in the row that is read."""
        start = columns.start
        while start < columns.stop:
            inside = start % self.stored
            stop = min(start - inside + self.stored, columns.stop)
            yield inside, slice(start - columns.start, stop - columns.start)
            start = stop

    def _read_object(self, file: SoundFile, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the values from position `start` of an object on."""
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if identity_of(os.fstat(descriptor)) != file.identity:
                raise ChangedFileError(file.path)
            offsets = self._known.get(file.path)
            if offsets is None:
                offsets = self._known[file.path] = self._offsets(descriptor)
            size = self.dtype.itemsize
            number, inside = divmod(start, self.chunk)
            while out:
                n = min((self.chunk - inside) * size, len(out))
                _read_exactly(descriptor, offsets[number] + inside * size, out[:n])
                out, number, inside = out[n:], number + 1, 0
        except RawDataError as error:
            raise RawDataError(f"{file.path} {error}") from None
        finally:
            os.close(descriptor)

    def _offsets(self, descriptor: int) -> list[int]:
        """Where each chunk of an object begins; beyond the file where it does not hold one."""
        if self.stored == self.chunk:
            return [0]
        size = os.fstat(descriptor).st_size
        index = np.empty(self.stored // self.chunk, dtype=INDEX)
        _read_exactly(descriptor, size - CHECKSUM_BYTES - index.nbytes, index.view(np.uint8).data)
        length = self.chunk * self.dtype.itemsize + CHECKSUM_BYTES
        held = (index["length"] == length) & (index["offset"] <= max(size - length, 0))
        offsets: list[int] = np.where(held, index["offset"], size).tolist()
        return offsets


def _read_exactly(descriptor: int, offset: int, out: memoryview) -> None:
    while out:
        n = os.preadv(descriptor, [out], offset) if offset >= 0 else 0
        if n == 0:
            raise RawDataError("does not hold the values that its metadata promises")
        out, offset = out[n:], offset + n
