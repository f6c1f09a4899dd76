"""Which objects arrays have, and how long these may be: metadata decides it, before anything is read or allocated.

So a commit record can name no file but those of its row, and no array is larger than the files that hold it. Only what
zstd has packed may be: by 15,000 at most, and what a chunk becomes is known before it is decoded, see `coded`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .arrays import Region, keys_of
from .commit import StoredObject
from .format import PROBE_INDEX
from .raw import CHECKSUM_BYTES, INDEX

Part = tuple[str, dict[str, Any], Region]
"""An array's path, its ``zarr.json``, and a region of it in slices."""


def part(path: str, document: dict[str, Any], row: int | None = None) -> Part:
    """All of an array, or one row of it."""
    first, *others = document["shape"]
    rows = slice(0, first) if row is None else slice(row, row + 1)
    return path, document, (rows, *(slice(0, length) for length in others))


def parts_of_row(documents: Mapping[str, dict[str, Any]], row: int) -> list[Part]:
    """What a row of a run has: its part of every array, and the first row the probe's indices too."""
    parts = [part(path, document, row) for path, document in documents.items() if path != PROBE_INDEX]
    return [*parts, part(PROBE_INDEX, documents[PROBE_INDEX])] if row == 0 else parts


def require_objects(found: Mapping[str, StoredObject], parts: Iterable[Part]) -> None:
    """Raise `ValueError` unless `found` are exactly the objects of these parts, each in a possible length."""
    parts = list(parts)
    n_expected = sum(_count(document, region) for _, document, region in parts)
    if len(found) != n_expected:  # before any key is spelled: a layout may ask for more of them than fit in memory
        raise ValueError(f"it names {len(found)} objects, the layout asks for {n_expected}")
    for path, document, region in parts:
        last = _objects_along(document, region)[-1] - 1
        whole, cut = _lengths(document)
        for key in keys_of(path, document, region):
            lengths = cut if key.endswith(f"/{last}") else whole
            if key not in found:
                raise ValueError(f"it does not name {key}")
            if found[key].length not in lengths:
                expected = lengths.start if len(lengths) == 1 else f"{lengths.start} to {lengths.stop - 1}"
                raise ValueError(f"it says that {key} has {found[key].length} bytes, expected {expected}")


def row_bytes(parts: Iterable[Part]) -> int:
    """Bytes of the objects of a row of raw arrays; of packed ones, the fewest that they can have."""
    total = 0
    for _, document, region in parts:
        whole, cut = _lengths(document)
        total += (_count(document, region) - 1) * whole.start + cut.start
    return total


def _count(document: Mapping[str, Any], region: Region) -> int:
    return math.prod(_objects_along(document, region))


def _objects_along(document: Mapping[str, Any], region: Region) -> list[int]:
    """How many objects the region, which begins with an object, has along each axis."""
    widths = document["chunk_grid"]["configuration"]["chunk_shape"]
    slices = [axis for axis in region if isinstance(axis, slice)]
    return [-(-axis.stop // width) - axis.start // width for axis, width in zip(slices, widths, strict=True)]


def _lengths(document: Mapping[str, Any]) -> tuple[range, range]:
    """Possible lengths in bytes of an object, and of the last one along the last axis."""
    stored = document["chunk_grid"]["configuration"]["chunk_shape"]
    codecs, chunk, index_bytes = document["codecs"], stored, 0
    if codecs[0]["name"] == "sharding_indexed":
        codecs, chunk = codecs[0]["configuration"]["codecs"], codecs[0]["configuration"]["chunk_shape"]
        index_bytes = stored[-1] // chunk[-1] * INDEX.itemsize + CHECKSUM_BYTES
    chunk_bytes = math.prod(chunk) * np.dtype(document["data_type"]).itemsize
    least = most = chunk_bytes
    if any(codec["name"] == "zstd" for codec in codecs):
        least, most = 1, chunk_bytes + chunk_bytes // 128 + 1024  # zstd's own bound for what it cannot pack is lower

    def holding(n_chunks: int) -> range:
        least_bytes, most_bytes = (n_chunks * (packed + CHECKSUM_BYTES) + index_bytes for packed in (least, most))
        return range(least_bytes, most_bytes + 1)

    in_last = (document["shape"][-1] - 1) % stored[-1] + 1
    return holding(stored[-1] // chunk[-1]), holding(-(-in_last // chunk[-1]))
