"""Commit records: what makes an epoch recorded. See `trajkit.store.format` for the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from ..digest import ALGORITHM, canonical_json, digest
from ..documents import parse, require_fields, require_kind
from ..errors import DamagedRunError
from .damage import Damage, Mark, require_sound
from .format import COMMITS, ROW_FILE, commit_key, read_labelled, read_metrics, spell_labelled, spell_metrics
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

RECORD = "commit record "
MOST_MISSING = 10_000


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
    """One recorded epoch. `recorded_at` is ISO 8601 in UTC, `seconds` the wall time that writing its objects took,
    without the wait for the disk.

    All records of a run have a `step`, or none has; it is left out where there is none. `weights` is the hash of the
    epoch's weights, whatever objects hold them; None in records of older versions. It stands beside the record and is
    not part of its hash.
    """

    row: int
    epoch: int
    metrics: Mapping[str, float]
    recorded_at: str
    seconds: float
    layout: str
    writer: str
    previous: str | None
    objects: Mapping[str, StoredObject]
    step: int | None = None
    weights: str | None = field(default=None, kw_only=True)

    def _canonical(self) -> bytes:
        objects = {key: [stored.length, stored.hash] for key, stored in self.objects.items()}
        fields = {**vars(self), "metrics": spell_metrics(self.metrics), "objects": objects}
        del fields["weights"]
        return canonical_json(spell_labelled(fields))

    @property
    def hash(self) -> str:
        """The hash by which the next record names this one."""
        return digest(self._canonical())

    def to_bytes(self) -> bytes:
        """The content of the record's object."""
        record = self._canonical()
        own = digest(record)
        beside = b"" if self.weights is None else b',"weights":%s' % canonical_json(_sealed(self.weights, own))
        return b'{"%s":"%s","record":%s%s}' % (ALGORITHM.encode(), own.encode(), record, beside)

    @property
    def size(self) -> int:
        """Bytes of the epoch's objects."""
        return sum(stored.length for stored in self.objects.values())


@dataclass(frozen=True)
class LostRecord(CommitRecord):
    """Stands for a commit record that is lost, see `trajkit.store.damage.Mark`: it names no objects."""

    @classmethod
    def of(cls, mark: Mark) -> LostRecord:
        """What a mark knows of the record."""
        return cls(mark.row, mark.epoch, {}, "", 0.0, str(mark.layout), "", None, {}, mark.step)


def read_records(objects: Objects, marks: Mapping[int, Mark]) -> tuple[CommitRecord, ...]:
    """All commit records, each checked against its hash, its place and its predecessor.

    Raises `DamagedRunError` naming the first record that is damaged, or missing while a later one exists.
    """
    return tuple(require_sound(objects, examine_records(objects, marks)))


def examine_records(objects: Objects, marks: Mapping[int, Mark]) -> Iterator[CommitRecord | Damage]:
    """The commit record of each row, or what is wrong with it; a `LostRecord` where a mark says that it is lost."""
    rows = [int(name[:8]) for name in objects.names(COMMITS) if ROW_FILE.fullmatch(name)]
    rows += [row for row, mark in marks.items() if mark.layout is not None]
    n_rows = max(rows, default=-1) + 1
    if n_rows > MOST_MISSING + len(rows):
        raise DamagedRunError(
            f"{objects.root}: {commit_key(n_rows - 1)} is there, {n_rows - len(set(rows))} records before it are"
            " missing; restore epoch/commits from a copy of the run"
        )
    with ThreadPoolExecutor(objects.at_a_time) as pool:
        previous: CommitRecord | Damage | None = None
        previous_hash: str | None = None
        looks = pool.map(lambda row: _record_of(objects, row, marks.get(row)), range(n_rows))
        for row, (found, own_hash) in enumerate(looks):
            if isinstance(found, CommitRecord) and not _follows(found, row, previous, previous_hash):
                found = Damage(commit_key(row), "does not follow the record before it", RECORD, row=row)
            yield found
            previous, previous_hash = found, own_hash


def _record_of(objects: Objects, row: int, mark: Mark | None) -> tuple[CommitRecord | Damage, str | None]:
    """A row's record and its hash, or what is wrong with it."""
    try:
        return _decode(objects, row)
    except (ValueError, TypeError, DamagedRunError) as error:  # TypeError: a field that is not ours
        if mark is not None and mark.layout is not None:
            return LostRecord.of(mark), None
        missing = not objects.exists(commit_key(row))
        what = "is missing, later ones exist" if missing else f"cannot be read ({error})"
        return Damage(commit_key(row), what, RECORD, row=row), None


def _follows(record: CommitRecord, row: int, before: CommitRecord | Damage | None, before_hash: str | None) -> bool:
    """Whether a record belongs behind the one before it, as far as that is known."""
    if record.row != row or (isinstance(before, CommitRecord) and not _rises(record, before)):
        return False
    known = not isinstance(record, LostRecord) and not isinstance(before, LostRecord | Damage)
    return not known or record.previous == before_hash


def _rises(record: CommitRecord, before: CommitRecord) -> bool:
    """Whether epoch and step come after those of the record before, which has a step, too, or has none either."""
    if record.step is None or before.step is None:
        return record.epoch > before.epoch and record.step is before.step
    return record.epoch > before.epoch and record.step > before.step


def _decode(objects: Objects, row: int) -> tuple[CommitRecord, str]:
    document = require_fields(parse(read_small(objects, commit_key(row))), {"record": dict, ALGORITHM: str})
    if digest(canonical_json(document["record"])) != document[ALGORITHM]:
        raise ValueError("its content does not match its hash")
    fields = read_labelled(document["record"], RECORD_FIELDS)
    fields["metrics"] = read_metrics(fields["metrics"])
    fields["objects"] = {key: StoredObject.from_json(stored) for key, stored in fields["objects"].items()}
    if "weights" in fields:
        raise ValueError("the hash of the weights stands inside the record")
    weights = _weights_of(document, document[ALGORITHM])
    return CommitRecord(**fields, weights=weights), document[ALGORITHM]


def _weights_of(document: Mapping[str, Any], own_hash: str) -> str | None:
    """Return the hash of the weights beside a record, None where it has none.

    Raises `ValueError` where it is damaged.
    """
    if "weights" not in document:
        return None
    hashes = require_kind(document["weights"], list, "'weights'")
    if not hashes or hashes != _sealed(str(hashes[0]), own_hash):
        raise ValueError("the hash of the weights is not the one that was recorded")
    return str(hashes[0])


def _sealed(weights: str, own_hash: str) -> list[str]:
    """Return the hash of the weights, and a hash of it together with that of the record."""
    return [weights, digest(weights.encode(), own_hash.encode())]
