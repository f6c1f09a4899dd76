"""What zstd has packed, looked at before it is decoded.

A decoder allocates what a chunk says it becomes. Seen: 64 kB that become 2 GB in the Rust pipeline, and 60 bytes that
claim 2**50 and end the process. So a chunk must be one frame that declares exactly the bytes of its values; decoders
then write no further. Source: RFC 8878, 3.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .raw import CHECKSUM_BYTES, INDEX

MAGIC = b"\x28\xb5\x2f\xfd"
SIZE_BYTES = {0: 1, 1: 2, 2: 4, 3: 8}
DICTIONARY_BYTES = {0: 0, 1: 1, 2: 2, 3: 4}
RLE_BLOCK = 1


class CodedDataError(ValueError):
    """A file holds chunks that would not become the values that its metadata promises."""


@dataclass(frozen=True)
class CodedArray:
    """An array of zstd chunks that become `chunk_bytes` each, `n_chunks` an object; more than one have an index."""

    chunk_bytes: int
    n_chunks: int
    sharded: bool

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> CodedArray | None:
        """The array that a ``zarr.json`` describes, None where its chunks are not packed."""
        stored = chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = document["codecs"]
        sharded = codecs[0]["name"] == "sharding_indexed"
        if sharded:
            codecs, chunk = codecs[0]["configuration"]["codecs"], codecs[0]["configuration"]["chunk_shape"]
        if not any(codec["name"] == "zstd" for codec in codecs):
            return None
        chunk_bytes = math.prod(chunk) * np.dtype(document["data_type"]).itemsize
        return cls(chunk_bytes, math.prod(stored) // math.prod(chunk), sharded)

    def require_decodable(self, file: str) -> None:
        """Raise `CodedDataError` unless every chunk of an object can only become its values."""
        data = memoryview(Path(file).read_bytes())
        try:
            for start, stop in self._chunks(data):
                _require_one_frame(data[start : stop - CHECKSUM_BYTES], self.chunk_bytes)
        except (IndexError, ValueError) as error:
            raise CodedDataError(f"{file} does not hold the values that its metadata promises ({error})") from error

    def _chunks(self, data: memoryview) -> list[tuple[int, int]]:
        """Where the chunks begin and end."""
        if not self.sharded:
            return [(0, len(data))]
        end = len(data) - CHECKSUM_BYTES - self.n_chunks * INDEX.itemsize
        index = np.frombuffer(data, INDEX, self.n_chunks, end)
        absent = (index["offset"] == 2**64 - 1) & (index["length"] == 2**64 - 1)  # beyond the array's edge
        chunks = index[~absent]
        if np.any(chunks["offset"] > end) or np.any(chunks["length"] > end - chunks["offset"]):
            raise ValueError("its index points elsewhere")
        return [(int(offset), int(offset + length)) for offset, length in chunks]


def _require_one_frame(data: memoryview, n_bytes: int) -> None:
    descriptor = data[4]
    has_window, has_checksum = not descriptor & 0x20, bool(descriptor & 0x04)
    size_bytes = SIZE_BYTES[descriptor >> 6] if descriptor >> 6 or not has_window else 0
    begin = 5 + has_window + DICTIONARY_BYTES[descriptor & 3]
    declared = int.from_bytes(data[begin : begin + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    if data[:4] != MAGIC or declared != n_bytes:
        raise ValueError(f"a chunk declares {declared} bytes, {n_bytes} expected")
    position, last = begin + size_bytes, False
    while not last:
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == RLE_BLOCK else length)
        if position > len(data):
            raise ValueError("a chunk is cut short")
    if position + 4 * has_checksum != len(data):
        raise ValueError("a chunk goes on after its values")
