"""What the epochs were recorded from: ``epoch/sources/<row, 8 digits>.json``, an advisory part of the format.

A checkpoint that still looks as it did when its epoch was recorded need not be read again to know that it is the same.
Whoever finds no such document, or one that cannot be read, compares the values instead: nothing rests on these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Any

from ..digest import canonical_json
from ..documents import parse, require_fields
from .format import SOURCES
from .place import Objects

SOURCE_FIELDS: Mapping[str, type | UnionType] = {
    "epoch": int,
    "path": str,
    "size": int,
    "modified_ns": int,
    "inode": int,
    "files": str | None,
    "selection": str,
    "said_epoch": int | None,
    "said_step": int | None,
}
MOST_BYTES = 1 << 16
"""Bytes of a document; one that is longer is none of ours."""


@dataclass(frozen=True)
class Look:
    """What a checkpoint looks like from outside: size in bytes, time of the last change, inode.

    files: of a folder, or of an index with its shards, the hash of the names, sizes, times and inodes of its files; the
    size is their sum and the time the latest of theirs. None for a single file.
    """

    size: int
    modified_ns: int
    inode: int
    files: str | None = None


@dataclass(frozen=True)
class Source:
    """The checkpoint that an epoch was recorded from: its path, its look, what it said, and what was selected of it.

    selection: hash of what was asked for of the checkpoint. said_epoch, said_step: its own, None where it says none.
    """

    epoch: int
    path: str
    look: Look
    selection: str
    said_epoch: int | None = None
    said_step: int | None = None

    def to_bytes(self) -> bytes:
        """Return the content of the source's object."""
        fields = asdict(self)
        look = fields.pop("look")
        return canonical_json(fields | look)

    @classmethod
    def from_json(cls, document: Any) -> Source:
        """Return the inverse of `to_bytes`; raises `ValueError` for anything else."""
        fields = {name: require_fields(document, SOURCE_FIELDS)[name] for name in SOURCE_FIELDS}
        look = Look(*(fields.pop(name) for name in ("size", "modified_ns", "inode", "files")))
        return cls(look=look, **fields)


def source_key(row: int) -> str:
    """Return the key of the object that says what a row was recorded from."""
    return f"{SOURCES}/{row:08d}.json"


def read_sources(objects: Objects, epochs: Sequence[int]) -> dict[int, Source]:
    """Return epoch -> what it was recorded from, of the rows of these epochs as far as that is known."""

    def read(row: int) -> Source | None:
        with contextlib.suppress(OSError, ValueError):
            data = objects.read(source_key(row)) if (objects.size(source_key(row)) or 0) <= MOST_BYTES else b""
            source = Source.from_json(parse(data))
            return source if source.epoch == epochs[row] else None
        return None

    try:
        names = set(objects.names(SOURCES))
    except OSError:  # something else stands there
        return {}
    rows = [row for row in range(len(epochs)) if source_key(row).rpartition("/")[2] in names]
    with ThreadPoolExecutor(objects.at_a_time) as pool:
        return {source.epoch: source for source in pool.map(read, rows) if source is not None}
