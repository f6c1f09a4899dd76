"""Commit records: what makes an epoch recorded. See `trajkit.store.format` for the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from ..digest import ALGORITHM, canonical_json, digest
from ..documents import parse, require_fields, require_kind
from ..errors import DamagedRunError
from .format import COMMITS, commit_key, read_metrics, spell_metrics
from .place import Objects
from .root import read_small

RECORD_FIELDS: Mapping[str, type | UnionType] = {
    "row": int,
    "epoch": int,
    "metrics": dict,
    "recorded_at": str,
    "seconds": int | float,
    "layout": str,
    "writer": str,
    "previous": str | None,
    "objects": dict,
}


@dataclass(frozen=True)
class StoredObject:
    """What is known of an object: its length in bytes and the hash of its content."""

    length: int
    hash: str

    @classmethod
    def of(cls, *parts: bytes | memoryview) -> StoredObject:
        """What is known of an object with this content."""
        return cls(sum(map(len, parts)), digest(*parts))

    @classmethod
    def from_json(cls, stored: Any) -> StoredObject:
        """What is known of an object from `[length, hash]`; raises `ValueError` for anything else."""
        if not isinstance(stored, list) or len(stored) != 2:
            raise ValueError("an object is not [length, hash]")
        return cls(require_kind(stored[0], int, "a length"), require_kind(stored[1], str, "a hash"))


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
    try:
        document = require_fields(parse(read_small(objects, commit_key(row))), {"record": dict, ALGORITHM: str})
        own_hash = document[ALGORITHM]
        if digest(canonical_json(document["record"])) != own_hash:
            raise ValueError("its content does not match its hash")
        fields = require_fields(document["record"], RECORD_FIELDS)
        if not -(2**63) <= fields["epoch"] < 2**63:
            raise ValueError(f"epoch {fields['epoch']} is no 64-bit integer")
        fields["metrics"] = read_metrics(fields["metrics"])
        fields["objects"] = {key: StoredObject.from_json(stored) for key, stored in fields["objects"].items()}
        return CommitRecord(**fields), own_hash
    except (ValueError, TypeError) as error:  # TypeError: a field that is not ours
        raise _damaged(objects, row, f"cannot be read ({error})") from error


def _damaged(objects: Objects, row: int, what: str) -> DamagedRunError:
    return DamagedRunError(f"{objects.root}: commit record {commit_key(row)} {what}; restore it from a copy")
