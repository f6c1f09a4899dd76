"""What is damaged, and the marks of epochs that are: ``epoch/bad/<row, 8 digits>.json``, written by `repair`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TypeVar

from ..documents import parse
from ..errors import DamagedRunError
from .format import ASIDE, BAD, ROW_FILE, read_labelled, spell_labelled
from .place import Objects
from .root import read_small

Sound = TypeVar("Sound")
MARK_FIELDS: Mapping[str, type | UnionType] = {"row": int, "epoch": int, "what": str, "layout": str | None}


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be, where it belongs, and what helps."""

    key: str
    what: str
    place: str = ""
    cure: str = "restore it from a copy of the run, or trajkit repair"
    row: int | None = None
    """Of the epoch that cannot be read for it."""
    aside: str | None = None
    """What cannot be used for it and can be moved aside: the prefix of a fit or an evaluation."""

    def __str__(self) -> str:
        return f"{self.place}{self.key} {self.what}; {self.cure}"


def require_sound(objects: Objects, found: Iterable[Sound | Damage]) -> Iterator[Sound]:
    """What was found; raises `DamagedRunError` at the first damage among it."""
    for item in found:
        if isinstance(item, Damage):
            raise DamagedRunError(f"{objects.root}: {item}")
        yield item


def move_aside(objects: Objects, key: str, folder: str) -> None:
    """Move what is in the place of an object, if anything is, to ``epoch/aside/<folder>``."""
    objects.move(key, f"{ASIDE}/{folder}/{key}")


@dataclass(frozen=True)
class Mark:
    """Says that an epoch is damaged. Where its commit record is lost, `layout` is the run's and `step` the epoch's."""

    row: int
    epoch: int
    what: str
    layout: str | None = None
    step: int | None = None

    def to_bytes(self) -> bytes:
        """The content of the mark's object."""
        return json.dumps(spell_labelled(vars(self))).encode()


def mark_key(row: int) -> str:
    """The object that marks a row."""
    return f"{BAD}/{row:08d}.json"


def read_marks(objects: Objects) -> dict[int, Mark]:
    """Row -> mark; raises `DamagedRunError` for one that cannot be read."""
    return {mark.row: mark for mark in require_sound(objects, examine_marks(objects))}


def examine_marks(objects: Objects) -> Iterator[Mark | Damage]:
    """The marks, or what is wrong with one. Other files beside them are left alone."""
    for name in objects.names(BAD):
        if not ROW_FILE.fullmatch(name):
            continue
        key = f"{BAD}/{name}"
        try:
            mark = Mark(**read_labelled(parse(read_small(objects, key)), MARK_FIELDS))
            if key != mark_key(mark.row):
                raise ValueError("it belongs to no row")
            yield mark
        except (ValueError, TypeError) as error:  # TypeError: a field that is not ours
            yield Damage(key, f"marks no epoch ({error})")
