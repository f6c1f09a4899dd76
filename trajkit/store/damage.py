"""What is damaged, and the marks of epochs that are: ``epoch/bad/<row, 8 digits>.json``, written by repair."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DamagedRunError
from .format import BAD, METADATA_LIMIT
from .place import Objects


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be, where it belongs, and what helps."""

    key: str
    what: str
    place: str = ""
    cure: str = "trajkit repair, or restore it from a copy of the run"
    row: int | None = None
    """Of the epoch that cannot be read for it."""
    fit: str | None = None
    """That cannot be read for it."""

    def __str__(self) -> str:
        return f"{self.place}{self.key} {self.what}; {self.cure}"


@dataclass(frozen=True)
class Mark:
    """Says that an epoch is damaged. `layout` is set where its commit record is lost."""

    row: int
    epoch: int
    what: str
    layout: str | None = None

    def to_bytes(self) -> bytes:
        """The content of the mark's object."""
        return json.dumps(vars(self)).encode()


def mark_key(row: int) -> str:
    """The object that marks a row."""
    return f"{BAD}/{row:08d}.json"


def read_marks(objects: Objects) -> Mapping[int, Mark]:
    """Row -> mark; raises `DamagedRunError` for one that cannot be read."""
    marks: dict[int, Mark] = {}
    for name in objects.names(BAD):
        key = f"{BAD}/{name}"
        try:
            if (objects.size(key) or 0) > METADATA_LIMIT:
                raise ValueError("it is too long")
            mark = Mark(**json.loads(objects.read(key)))
            if key != mark_key(mark.row) or not -(2**63) <= mark.epoch < 2**63:
                raise ValueError("it belongs to no row")
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedRunError(
                f"{objects.root}: {key} marks no epoch ({error}); remove it and repair again"
            ) from error
        marks[mark.row] = mark
    return marks
