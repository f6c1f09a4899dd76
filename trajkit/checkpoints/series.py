"""The labels of checkpoints that come one after the other, while a training writes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .asked import number_by
from .labels import SPELLED, Evidence, Label, Numbering, tell_the_next
from .naming import NOTHING_SAID
from .refs import Refs


class Series:
    """Labels by the rule of `trajkit.checkpoints.labels`; the first checkpoint with a number decides what all count.

    A number that stands by itself follows the form of the first name. Best and last files decide nothing. With a
    `pattern`, its group 1 is the number. next_epoch: whether those that were recorded before say the next epoch.
    """

    def __init__(self, pattern: re.Pattern[str] | None = None, next_epoch: bool = False) -> None:
        self._pattern, self._next_epoch = pattern, next_epoch
        self._numbering: Numbering | None = None
        self._first: Path | None = None
        self._knows_next = self._told_next = False

    def label(self, file: Evidence) -> Label | None:
        """Return the label of a checkpoint that was opened, None where it has none that counts as the first one's does.

        Raises `InputError` where it contradicts itself.
        """
        if self._pattern is not None:
            return self._by_pattern(file.path)
        if file.kind is None:
            return None
        numbering = self._numbering_with(file)
        label = numbering.label(file)
        if label is not None and not self._told_next:
            self._told_next = tell_the_next(file, label, numbering)
        return label

    def expected(self, path: Path) -> int | None:
        """Return the label that a checkpoint has by its name, before it can be opened; None where it has none yet."""
        if self._pattern is not None:
            label = self._by_pattern(path)
            return None if label is None else label.epoch
        file = Evidence.of(path, Refs().named(path), NOTHING_SAID)
        if self._numbering is not None:
            return self._numbering.expected(file)
        return next(iter(file.counted.values()))[0] if file.counted else None

    def why_not(self, file: Evidence) -> str | None:
        """Return what a checkpoint without a label is numbered by instead, None where it has no number after a word."""
        if not file.counted or self._numbering is None:
            return None
        kind, of_all = next(iter(file.counted)), self._numbering.kind
        return f"is numbered by {SPELLED[kind]}, {self._first} by {SPELLED[of_all]}, and is left out"

    def _by_pattern(self, path: Path) -> Label | None:
        assert self._pattern is not None
        number = number_by(self._pattern, path, Refs().named(path))
        return None if number is None else Label(number, "given")

    def _numbering_with(self, file: Evidence) -> Numbering:
        """Return the numbering of all, which this checkpoint decides if none has before."""
        if self._numbering is None:
            numbering = Numbering.of([file], self._next_epoch)
            if file.copy:
                return numbering
            self._numbering, self._first = numbering, file.path
        if not self._knows_next and not file.copy and (pair := file.number_and_said()) is not None:
            self._knows_next = True
            self._numbering = replace(self._numbering, next_epoch=pair[1] == pair[0] + 1)
        return self._numbering
