"""Which epoch a checkpoint is: the one rule, for files that are recorded together.

1. The number after a word of time in the file's name, or else in its folder's; ``epoch`` comes before ``step`` and
   its kin (``iter``, ``iteration``, ``global_step``), these before ``checkpoint``, ``ckpt`` and ``revision``. A folder
   whose name is an epoch and nothing else (``epoch_3/step_100.pt``) comes before a step in the file's name. A snapshot
   in the cache of the Hugging Face hub is called by its ref.
2. Else the epoch, or else the step, that the file says of itself.
3. Else the one number that stands by itself in its name, only if the names of all files have the same form.

All labels count one thing: epochs, or steps. Only numbers of the same kind contradict each other, and a file that says
the epoch after the one in its name was saved with the number of the next one: the name holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .naming import Bare, Said, bare_in, counted_in, is_copy, names_a_time_alone, stands_for
from .words import Kind

logger = logging.getLogger("trajkit")

CURE = "say which with --label 'REGEX' or --epoch N, or number the files with --first-epoch N"

SPELLED: Mapping[Kind | Literal["number"], str] = {
    "epoch": "epoch",
    "step": "step",
    "count": "checkpoint",
    "number": "a number that stands by itself",
}
"""Kinds of numbers as messages say them."""

By = Literal["name", "content", "number", "given"]
"""What a label comes from: a word of time in a name, what the file says, a number that stands by itself, the caller."""


@dataclass(frozen=True)
class Label:
    """The epoch that a checkpoint is recorded as."""

    epoch: int
    by: By


@dataclass(frozen=True)
class Evidence:
    """What a checkpoint's names and content say of its epoch.

    named: the absolute path up to the name that tells it from others, with the names of refs for hashes. counted: the
    numbers after words of time. bare: the numbers of its name that stand by themselves. copy: whether the name says
    best or last.
    """

    path: Path
    named: Path
    counted: Mapping[Kind, tuple[int, ...]]
    bare: Bare
    said: Said
    copy: bool

    @classmethod
    def of(cls, path: Path, named: Path, said: Said) -> Evidence:
        """Return the evidence of a checkpoint; `named` is its absolute path, with the names of refs for hashes."""
        apart = stands_for(named)
        copy = is_copy(apart.name)
        return cls(path, apart, _counted(apart, copy), bare_in(apart.name), said, copy)

    def by_folder(self) -> Evidence:
        """Return the same with the numbers of its folder's name that stand by themselves."""
        return replace(self, bare=bare_in(self.named.parent.name))

    @property
    def kind(self) -> Kind | Literal["number"] | None:
        """What the first number that the rule finds counts, None where there is no number."""
        for kind in ("epoch", "step", "count"):
            if kind in self.counted:
                return kind
        if self.said.epoch is not None:
            return "epoch"
        if self.said.step is not None:
            return "step"
        return "number" if self.bare.numbers else None

    def only(self, kind: Kind) -> int | None:
        """Return the number of a kind in the names, None without one; raises `InputError` where there are two."""
        numbers = self.counted.get(kind, ())
        if len(numbers) > 1:
            raise InputError(
                f"{self.path}: its names have {' and '.join(map(str, numbers))} as {SPELLED[kind]}; {CURE}"
            )
        return numbers[0] if numbers else None

    def number_and_said(self) -> tuple[int, int] | None:
        """Return the number in the name that may be an epoch, and the epoch that the file says; None without both."""
        numbers = self.counted.get("epoch") or self.counted.get("count") or ()
        if not self.counted and len(self.bare.numbers) == 1:
            numbers = self.bare.numbers
        return (numbers[0], self.said.epoch) if numbers and self.said.epoch is not None else None

    def says_next(self, number: int) -> bool:
        """Return whether the file says the epoch after a number."""
        return self.said.epoch == number + 1

    def agrees(self, number: int, kind: Literal["epoch", "step"]) -> bool:
        """Return whether the file says this number of a kind, or the next one."""
        return getattr(self.said, kind) in (number, number + 1)


@dataclass(frozen=True)
class Numbering:
    """What the labels of files that are recorded together count.

    form: that of the names, where the labels are numbers that stand by themselves, and `place` which of these they are.
    next_epoch: whether the files say the epoch after the one in their names.
    """

    kind: Kind | Literal["number"]
    form: str = ""
    place: int = 0
    next_epoch: bool = False

    @classmethod
    def of(cls, files: Sequence[Evidence], next_epoch: bool = False) -> Numbering:
        """Return the numbering of files that all have a number; best and last files decide only without others.

        next_epoch: whether those that were recorded before say the next epoch, where none of these shows it.

        Raises `InputError` naming two files that are numbered by different things.
        """
        deciding = [file for file in files if not file.copy] or list(files)
        pairs = [pair for file in deciding if (pair := file.number_and_said()) is not None]
        next_epoch = all(said == number + 1 for number, said in pairs) if pairs else next_epoch
        found = {file.kind: file for file in reversed(deciding)}
        kinds = set(found)
        if kinds == {"number"}:
            return _by_form(deciding)
        if kinds <= {"step", "count"}:
            kind: Kind = "step" if "step" in kinds else _meant(deciding)
            return cls(kind, next_epoch=next_epoch)
        for kind in ("epoch", "step"):
            numbering = cls(kind, next_epoch=next_epoch)
            if len(kinds) == 1 or all(numbering._number(file) is not None for file in deciding):
                return numbering
        if all(file.bare.numbers for file in deciding) and not any(file.counted for file in deciding):
            return _by_form(deciding)
        one, other = list(found.values())[:2]
        raise InputError(
            f"{other.path}: is numbered by {_spelled(other)}, {one.path} by {_spelled(one)}, expected the same for all;"
            f" {CURE}"
        )

    def label(self, file: Evidence) -> Label | None:
        """Return the label of a file, None where it has no number of this kind.

        Raises `InputError` where its name and what it says contradict each other.
        """
        number = self._number(file)
        if number is None:
            return None
        if self.kind == "number":
            return Label(number, "number")
        in_name = self._in_name(file)
        if in_name is not None:
            self._require_agreement(file, in_name)
            return Label(in_name, "name")
        return Label(number, "number" if file.bare.numbers == (number,) else "content")

    def expected(self, file: Evidence) -> int | None:
        """Return the number that a file has by its name alone."""
        if self.kind == "number":
            return self._number(file)
        numbers = file.counted.get(self.kind) or file.counted.get("count") or ()
        return numbers[0] if numbers else None

    def meant_by(self, file: Evidence) -> tuple[int | None, int | None]:
        """Return the epoch and the step that a file means by what it says."""
        epoch = file.said.epoch
        if epoch is not None and self.next_epoch:
            epoch = epoch - 1 if epoch > 0 else None
        return epoch, file.said.step

    def _number(self, file: Evidence) -> int | None:
        if self.kind == "number":
            return file.bare.numbers[self.place] if file.bare.form == self.form and file.bare.numbers else None
        in_name = self._in_name(file)
        if in_name is not None:
            return in_name
        epoch, step = self.meant_by(file)
        return {"epoch": epoch, "step": step}.get(self.kind)

    def _in_name(self, file: Evidence) -> int | None:
        """Return the number of this kind in a name; after ``checkpoint`` it is of the kind that the file says."""
        number = file.only(self.kind) if self.kind != "number" else None
        if number is not None:
            return number
        number = file.only("count")
        if number is None or (self.kind == "epoch" and not file.agrees(number, "epoch")):
            return None
        return number

    def _require_agreement(self, file: Evidence, number: int) -> None:
        says = _contradiction(file, self.kind, number)
        if says is not None:
            spelled = f"{SPELLED[self.kind]} {number}"
            raise InputError(f"{file.path}: is {spelled} by its name, the file says {says}; {CURE}")


@dataclass
class Labelled:
    """The labels of files that are recorded together, rising, and what is wrong with the others.

    copies: a best or last file -> the file of the same epoch beside it.
    """

    labels: dict[Path, Label] = field(default_factory=dict)
    copies: dict[Path, Path] = field(default_factory=dict)
    problems: list[InputError] = field(default_factory=list)


def label_all(files: Sequence[Evidence], next_epoch: bool = False) -> Labelled:
    """Return the labels of files by the rule; next_epoch: whether those that were recorded before say the next one."""
    found = Labelled()
    files = _told_by_folders(files)
    without = [file for file in files if file.kind is None]
    found.problems += [unnumbered(file.path) for file in without]
    numbered = [file for file in files if file.kind is not None]
    if not numbered:
        return found
    try:
        numbering = Numbering.of(numbered, next_epoch)
    except InputError as error:
        found.problems.append(error)
        return found
    taken: dict[int, Evidence] = {}
    for file in sorted(numbered, key=lambda file: file.copy):
        try:
            _place(file, numbering, taken, found)
        except InputError as error:
            found.problems.append(error)
    labelled = ((file, found.labels[file.path]) for file in numbered if file.path in found.labels)
    any(tell_the_next(file, label, numbering) for file, label in labelled)  # once
    found.labels = dict(sorted(found.labels.items(), key=lambda item: item[1].epoch))
    return found


def unnumbered(path: Path) -> InputError:
    """Return the error of a checkpoint that has no number."""
    return InputError(
        f"{path}: expected the epoch's number in the name, or in the file as epoch or step, found none; {CURE}"
    )


def taken_twice(path: Path, epoch: int, other: Path) -> InputError:
    """Return the error of two checkpoints that are the same epoch."""
    return InputError(f"{path}: is epoch {epoch}, and so is {other}; {CURE}")


def tell_the_next(file: Evidence, label: Label, numbering: Numbering) -> bool:
    """Log that a file says the epoch after the one that is its label, where it does; return whether."""
    if numbering.kind not in ("epoch", "count") or file.number_and_said() is None or not file.says_next(label.epoch):
        return False
    logger.info(
        "%s: is epoch %s by its name and says %s, as trainings do that save the number of the next one; the names hold",
        file.path,
        label.epoch,
        label.epoch + 1,
    )
    return True


def _place(file: Evidence, numbering: Numbering, taken: dict[int, Evidence], found: Labelled) -> None:
    """Give a file its label, unless it is a copy of one that has it; raises `InputError`."""
    label = numbering.label(file)
    if label is None and file.copy:
        same = next((number for number in numbering.meant_by(file) if number in taken), None)
        label = None if same is None else Label(same, "content")
    if label is None:
        raise unnumbered(file.path)
    other = taken.setdefault(label.epoch, file)
    if other is file:
        found.labels[file.path] = label
    elif file.copy and not other.copy:
        found.copies[file.path] = other.path
        logger.info("%s: left out, it is epoch %s, as %s is", file.path, label.epoch, other.path)
    else:
        raise taken_twice(file.path, label.epoch, other.path)


def _told_by_folders(files: Sequence[Evidence]) -> list[Evidence]:
    """Return the files; several of one name, without a number, have the numbers of their folders' names."""
    same: dict[str, list[Evidence]] = {}
    for file in files:
        if file.kind is None:
            same.setdefault(file.named.name, []).append(file)
    return [
        file.by_folder() if len(same.get(file.named.name, ())) > 1 and file.kind is None else file for file in files
    ]


def _counted(named: Path, copy: bool) -> dict[Kind, tuple[int, ...]]:
    """Return the numbers after words of time in the name of a file, or else in its folder's."""
    own, above = counted_in(named.name), counted_in(named.parent.name, folder=True)
    if names_a_time_alone(named.parent.name):
        both: dict[Kind, tuple[int, ...]] = {**above, **own}
        for kind in ("epoch", "step"):
            if kind in own and kind in above:
                both[kind] = tuple(dict.fromkeys((*own[kind], *above[kind])))
        return both
    # A folder of many is called after the whole training: bert-epoch100/best.pt
    return own if own or copy else above


def _meant(files: Sequence[Evidence]) -> Kind:
    """Return what numbers after ``checkpoint`` count, by what all files say."""
    for kind in ("epoch", "step"):
        if all((number := file.only("count")) is not None and file.agrees(number, kind) for file in files):
            return kind
    return "count"


def _by_form(files: Sequence[Evidence]) -> Numbering:
    """Return the numbering by numbers that stand by themselves; raises `InputError` unless the names have one form."""
    first = files[0]
    for file in files[1:]:
        if file.bare.form != first.bare.form or len(file.bare.numbers) != len(first.bare.numbers):
            raise InputError(
                f"{file.path}: the number in its name may be anything, since {first.path} has a name of another form;"
                f" {CURE}"
            )
    columns = list(zip(*(file.bare.numbers for file in files), strict=True))
    places = [place for place, column in enumerate(columns) if len(set(column)) > 1] if len(columns) > 1 else [0]
    if len(places) != 1:
        raise InputError(
            f"{first.path}: its name has {len(columns)} numbers, {', '.join(map(str, first.bare.numbers))}; {CURE}"
        )
    return Numbering("number", first.bare.form, places[0])


def _contradiction(file: Evidence, kind: Kind | Literal["number"], number: int) -> str | None:
    """Return what a file says against a number in its name, None where it says nothing of that kind."""
    epoch, step = file.said.epoch, file.said.step
    if kind == "epoch" and epoch is not None and not file.agrees(number, "epoch"):
        return f"epoch {epoch}"
    agrees = file.agrees(number, "step") or (kind == "count" and file.agrees(number, "epoch"))
    return f"step {step}" if kind in ("step", "count") and step is not None and not agrees else None


def _spelled(file: Evidence) -> str:
    """Return what a file is numbered by, for a message."""
    assert file.kind is not None, "it has a number"
    return SPELLED[file.kind] if file.counted or file.kind == "number" else f"the {file.kind} that it says"
