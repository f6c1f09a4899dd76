"""What a result was made of: which run, and which content of which of its epochs.

A run is known by the hash of its first commit record, its *identity*, which a copy of the run keeps; the root keeps it,
too. The content of epochs is a hash over the label of each, the hash of the layout and the hash of its weights, so that
it changes neither with the objects that hold the weights nor with anything else that was recorded. An epoch of an older
version of trajkit has no hash of its weights; there the hashes of the objects that hold them take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..digest import canonical_json, digest
from ..documents import require_fields
from .commit import CommitRecord, LostRecord
from .format import WEIGHTS

By = Literal["weights", "objects"]
SHOWN = 8
"""Hexadecimal digits of an identity in a message."""


@dataclass(frozen=True)
class Origin:
    """The run and the content of the epochs that a result was made of."""

    run: str
    """Identity of the run."""
    content: str
    """Hash of the epochs' content."""
    by: By
    """What the content is a hash of: the weights, or the objects that held them."""

    def to_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> Origin:
        """Read `to_json`'s form; raise `ValueError` for anything else."""
        fields = require_fields(document, {"run": str, "content": str, "by": str})
        if fields["by"] not in get_args(By):
            raise ValueError(f"its content is told by {fields['by']:.20}")
        return cls(fields["run"], fields["content"], fields["by"])


class Lineage:
    """What results are compared with: the identity of a run, and what is committed of its epochs.

    `layout` is the hash of the layout. `records` has None for a row whose record is damaged. `has_grown` tells whether
    more epochs were committed since they were read.
    """

    def __init__(
        self,
        identity: str | None,
        layout: str,
        records: Sequence[CommitRecord | None],
        has_grown: Callable[[], bool],
    ) -> None:
        self.identity = identity or identity_of(records)
        self._has_grown = has_grown
        self._layout = layout
        self._records = records
        self._contents: dict[tuple[By, tuple[int, ...]], str | None] = {}

    def origin_of(self, epochs: Iterable[int]) -> Origin | None:
        """Return the origin of a result of these recorded epochs, None where it cannot be known.

        It cannot where the commit record of one of them is lost.
        """
        labels = tuple(epochs)
        by: By = "objects" if any(self._has_no_hash(label) for label in labels) else "weights"
        content = self._content_of(labels, by)
        return None if self.identity is None or content is None else Origin(self.identity, content, by)

    def require(self, origin: Origin, epochs: Iterable[int]) -> None:
        """Raise `ValueError` unless a result of these epochs was made of this run, and of what it holds now.

        What is not known because a commit record is lost, or was read before later ones came, is not held against it.
        """
        labels = tuple(epochs)
        if self.identity is not None and origin.run != self.identity:
            raise ValueError(f"it was made of another run, {origin.run:.{SHOWN}}, this one is {self.identity:.{SHOWN}}")
        missing = [label for label in labels if label not in self._by_label]
        if missing and not self._has_unknown_rows and not self._has_grown():
            raise ValueError(f"it was made of epoch {missing[0]}, which this run does not have")
        content = None if missing else self._content_of(labels, origin.by)
        if content is not None and content != origin.content:
            raise ValueError("it was made of epochs whose weights were others than they are now")

    @cached_property
    def _by_label(self) -> Mapping[int, CommitRecord]:
        return {record.epoch: record for record in self._records if record is not None}

    @property
    def _has_unknown_rows(self) -> bool:
        """Whether a row has lost its record, and perhaps its label with it."""
        return any(record is None or isinstance(record, LostRecord) for record in self._records)

    def _has_no_hash(self, label: int) -> bool:
        record = self._by_label.get(label)
        return record is not None and not isinstance(record, LostRecord) and record.weights is None

    def _content_of(self, labels: tuple[int, ...], by: By) -> str | None:
        """Return the hash of the content of epochs, None where one of them has none of this kind."""
        if (by, labels) not in self._contents:  # most results of a run are of the same epochs
            parts = [_hash_of(self._by_label[label], by) for label in labels]
            known = None not in parts
            rows = [[label, self._layout, part] for label, part in zip(labels, parts, strict=True)]
            self._contents[by, labels] = digest(canonical_json(rows)) if known else None
        return self._contents[by, labels]


def identity_of(records: Sequence[CommitRecord | None]) -> str | None:
    """Return the hash of the first commit record, or what the second one says that it was; None where both are lost."""
    first, second = [*records, None, None][:2]
    if first is not None and not isinstance(first, LostRecord):
        return first.hash
    return None if second is None or isinstance(second, LostRecord) else second.previous


def _hash_of(record: CommitRecord, by: By) -> str | None:
    if isinstance(record, LostRecord):
        return None
    if by == "weights":
        return record.weights
    beginning = f"{WEIGHTS}/c/{record.row}/"
    objects = {key.removeprefix(beginning): held for key, held in record.objects.items() if key.startswith(beginning)}
    return digest(canonical_json({place: [held.length, held.hash] for place, held in objects.items()}))
