"""Commit records: what makes an epoch recorded. See `trajkit.store.format` for the protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..digest import ALGORITHM, canonical_json, digest
from ..errors import DamagedRunError
from .format import COMMITS, METADATA_LIMIT, commit_key, read_metrics, spell_metrics
from .place import Objects


@dataclass(frozen=True)
class StoredObject:
    """What is known of an object: its length in bytes and the hash of its content."""

    length: int
    hash: str

    @classmethod
    def of(cls, *parts: bytes | memoryview) -> StoredObject:
        """What is known of an object with this content."""
        return cls(sum(map(len, parts)), digest(*parts))


@dataclass(frozen=True)
class CommitRecord:
    """One recorded epoch. `seconds` is the wall time that writing it took, `recorded_at` is ISO 8601 in UTC."""

    row: int
    epoch: int
    metrics: Mapping[str, float]
    recorded_at: str
    seconds: float
    layout: str
    writer: str
    previous: str | None
    objects: Mapping[str, StoredObject]

    def _canonical(self) -> bytes:
        objects = {key: [stored.length, stored.hash] for key, stored in self.objects.items()}
        return canonical_json({**vars(self), "metrics": spell_metrics(self.metrics), "objects": objects})

    @property
    def hash(self) -> str:
        """The hash by which the next record names this one."""
        return digest(self._canonical())

    def to_bytes(self) -> bytes:
        """The content of the record's object."""
        record = self._canonical()
        return b'{"%s":"%s","record":%s}' % (ALGORITHM.encode(), digest(record).encode(), record)

    @property
    def size(self) -> int:
        """Bytes of the epoch's objects."""
        return sum(stored.length for stored in self.objects.values())


def read_records(objects: Objects) -> tuple[CommitRecord, ...]:
    """All commit records, each checked against its hash, its place and its predecessor.

    Raises `DamagedRunError` naming the first record that is damaged, or missing while a later one exists.
    """
    names = [name for name in objects.names(COMMITS) if name.endswith(".json")]
    expected = [commit_key(row).rpartition("/")[2] for row in range(len(names))]
    if names != expected:
        missing = next(name for name in expected if name not in names)
        raise DamagedRunError(
            f"{objects.root}: commit record {COMMITS}/{missing} is missing, later ones exist; restore it from a copy"
        )
    records: list[CommitRecord] = []
    previous: str | None = None
    for row in range(len(names)):
        record, own_hash = _decode(objects, row)
        if record.row != row or record.previous != previous or (records and record.epoch <= records[-1].epoch):
            raise _damaged(objects, row, "does not follow the record before it")
        records.append(record)
        previous = own_hash
    return tuple(records)


def _decode(objects: Objects, row: int) -> tuple[CommitRecord, str]:
    length = objects.size(commit_key(row))
    if length is None or length > METADATA_LIMIT:
        raise _damaged(objects, row, f"has {length} bytes, at most {METADATA_LIMIT} are read")
    try:
        document = json.loads(objects.read(commit_key(row)))
        fields: dict[str, Any] = document["record"]
        own_hash = document[ALGORITHM]
        if digest(canonical_json(fields)) != own_hash:
            raise ValueError("its content does not match its hash")
        if not isinstance(fields["epoch"], int) or not -(2**63) <= fields["epoch"] < 2**63:
            raise ValueError(f"epoch {fields['epoch']!r} is no 64-bit integer")
        fields["metrics"] = read_metrics(fields["metrics"])
        fields["objects"] = {key: StoredObject(*stored) for key, stored in fields["objects"].items()}
        return CommitRecord(**fields), own_hash
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(objects, row, f"cannot be read ({error})") from error


def _damaged(objects: Objects, row: int, what: str) -> DamagedRunError:
    return DamagedRunError(f"{objects.root}: commit record {commit_key(row)} {what}; restore it from a copy")
