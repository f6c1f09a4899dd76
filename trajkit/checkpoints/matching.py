"""Which tensor of a run a name in a checkpoint stands for: what wrappers add to names is taken out, or put back.

What is a wrapper's is told by the names of the run, where there is one, else by what all names of the checkpoint have
in common. Two names never become one: where several could be meant, they keep what they have.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ..layout import ParameterLayout
from ..vector import WRAPPERS

COUNTER = "n_averaged"
"""Own name of the counter that `torch.optim.swa_utils.AveragedModel` has beside the ``module`` that it averages."""

MOST_PARTS = 8
"""Parts of a name that are looked at as wrappers around a whole model, or as a prefix."""

MOST_CHOICES = 4
"""Prefixes that a message proposes to choose from."""


def _parts(names: Collection[str]) -> re.Pattern[str]:
    """Return the pattern of these parts of a name, each with its dot; the last part, the tensor's own, is never one."""
    return re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(names)})\.")


_WRAPPER = _parts(WRAPPERS)
_MODULE = _parts(["module"])
_UNMISTAKABLE = _parts([name for name in WRAPPERS if name not in ("module", "_module")])
"""Parts that no module of anybody's own is called: they are a wrapper's wherever they stand."""

Key = tuple[str, int]
"""A name without any part that may be a wrapper's, and the number of such parts."""


@dataclass(frozen=True)
class Prefix:
    """What all names of a checkpoint begin with and those of the run do not or, where `is_missing`, the reverse."""

    text: str
    is_missing: bool = False

    def __str__(self) -> str:
        if self.is_missing:
            return f"all names of the run begin with '{self.text}', which those of the checkpoint lack"
        return f"all names of the checkpoint begin with '{self.text}', which those of the run lack"


@dataclass(frozen=True)
class Match:
    """The names of a checkpoint beside the run's.

    names: Name in the checkpoint -> name in the run, or in the plain model where the run has none that fits.
    found: Names of the run that are there; of tied ones all where one is.
    prefix: What is taken off names, or put on, so that they fit.
    """

    names: Mapping[str, str]
    found: frozenset[str]
    prefix: Prefix | None = None


def counters(names: Collection[str]) -> set[str]:
    """Return those of the names that are counters of `AveragedModel`: nothing but ``module`` is beside each."""
    ordered = sorted(names)

    def count(prefix: str) -> int:
        if not prefix:
            return len(ordered)
        return bisect_left(ordered, f"{prefix[:-1]}/") - bisect_left(ordered, prefix)  # "/" comes after "."

    places = {name: name.removesuffix(COUNTER) for name in names if name.rpartition(".")[2] == COUNTER}
    return {name for name, place in places.items() if count(place) == count(f"{place}module.") + 1 > 1}


def plain_names(names: Collection[str], averaged: Collection[str] = ()) -> dict[str, str]:
    """Return name in a checkpoint -> name in the plain model, as far as the names alone say what a wrapper adds.

    That is what all of them begin with and, inside names, what no module of anybody's own is called.

    averaged: Counters that stand beside these names, see `counters`.
    """
    root = len(_wrappers_around(names))
    places = {name.removesuffix(COUNTER) for name in averaged}
    plain = {name: _UNMISTAKABLE.sub("", _without_averaging(name, places, root)) for name in names}
    return _unique({name: name[root:] for name in names}, plain, {})


def match_names(names: Collection[str], known: ParameterLayout, averaged: Collection[str] = ()) -> Match:
    """Return the names of a checkpoint beside the run's: without what wrappers add, or with it, as the run has them.

    A prefix is taken off, or put on, where all of the run's tensors are found with it and not without.
    """
    matches = _matches(names, known, averaged)
    first = next(matches)
    if is_whole(first, known):
        return first
    return next((match for match in matches if is_whole(match, known)), first)


def is_whole(match: Match, known: ParameterLayout) -> bool:
    """Return whether all of the run's tensors are found."""
    return all(name in match.found for name in known.names())


def nearest_prefix(names: Collection[str], known: ParameterLayout) -> Match | None:
    """Return the match with a prefix that finds most of the run's tensors; None where none finds any."""
    _, *others = _matches(names, known, ())
    best = max(others, key=lambda match: len(match.found), default=None)
    return best if best is not None and best.found else None


def prefixes_to_choose(names: Collection[str], known: ParameterLayout) -> list[str]:
    """Return prefixes of some of the names, which without it are all that the run has."""
    keys = {_WRAPPER.sub("", name) for name in names}
    wanted = [{_WRAPPER.sub("", name) for name in entry.names} for entry in known.tensors]
    ends = tuple(f".{name}" for name in wanted[0])
    candidates = dict.fromkeys(key[: 1 - len(end)] for key in keys for end in ends if key.endswith(end))
    fitting = [
        prefix
        for prefix in sorted(candidates)[: 4 * MOST_CHOICES]
        if all(any(f"{prefix}{name}" in keys for name in entry) for entry in wanted)
    ]
    return fitting[:MOST_CHOICES]


def _matches(names: Collection[str], known: ParameterLayout, averaged: Collection[str]) -> Iterator[Match]:
    """Yield the match without a prefix, and those with each that all names of one side begin with."""
    root = len(_root(names, known))
    exact = {name: name[root:] for name in names}
    mine = {name: _WRAPPER.subn("", text) for name, text in exact.items()}
    its = {name: _WRAPPER.subn("", name) for name in known.names()}
    plain = plain_names(names, averaged)

    def match(keys: Mapping[str, Key], wanted: Mapping[str, str], prefix: Prefix | None = None) -> Match:
        paired = _paired(keys, its, exact)
        here = set(paired.values())
        found = {name for entry in known.tensors if not here.isdisjoint(entry.names) for name in entry.names}
        others = {name: name if new in known else new for name, new in wanted.items()}
        return Match(_unique({name: name for name in names}, others, paired), frozenset(found), prefix)

    yield match(mine, plain)
    for text in _beginnings([key for key, _ in mine.values()]):
        yield match(
            {name: (key.removeprefix(text), number) for name, (key, number) in mine.items()},
            {name: new.removeprefix(text) for name, new in plain.items()},
            Prefix(text),
        )
    for text in _beginnings([key for key, _ in its.values()]):
        yield match(
            {name: (text + key, number) for name, (key, number) in mine.items()},
            {name: text + new for name, new in plain.items()},
            Prefix(text, is_missing=True),
        )


def _paired(mine: Mapping[str, Key], its: Mapping[str, Key], exact: Mapping[str, str]) -> dict[str, str]:
    """Return name in the checkpoint -> name in the run, of those that differ in the parts of wrappers alone.

    Where several have the same key, as with a module that is really called ``module``, the one with more such parts is
    the one with more in the run; where they are not as many, only those are paired that are the same.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for side, keys in enumerate((mine, its)):
        for name, (key, _) in keys.items():
            groups.setdefault(key, ([], []))[side].append(name)
    paired: dict[str, str] = {}
    for ours, theirs in groups.values():
        ours.sort(key=lambda name: mine[name][1])
        theirs.sort(key=lambda name: its[name][1])
        if len(ours) == len(theirs) == len({mine[name][1] for name in ours}) == len({its[name][1] for name in theirs}):
            paired |= zip(ours, theirs, strict=True)
        else:
            paired |= {name: exact[name] for name in ours if exact[name] in theirs}
    return paired


def _unique(names: Mapping[str, str], wanted: Mapping[str, str], fixed: Mapping[str, str]) -> dict[str, str]:
    """Return the wanted names, but `names` where two would be the same; `fixed` ones are as they are."""
    found = {name: fixed.get(name, wanted[name]) for name in names}
    times = Counter(found.values())
    found = {name: new if name in fixed or times[new] == 1 else names[name] for name, new in found.items()}
    return found if len(set(found.values())) == len(found) else dict(names)


def _root(names: Collection[str], known: ParameterLayout) -> str:
    """Return what wrappers around the whole model add to all names: that part of it with which most are the run's."""
    root = _wrappers_around(names)
    starts = [0, *(match.end() for match in re.finditer(r"\.", root))]
    counts = [sum(name[start:] in known for name in names) for start in starts]
    return root[: starts[counts.index(max(counts))]] if any(counts) else root


def _wrappers_around(names: Collection[str]) -> str:
    """Return what all names begin with that is made of the parts of wrappers."""
    return max((text for text in _beginnings(names) if not _WRAPPER.sub("", text)), key=len, default="")


def _beginnings(names: Collection[str]) -> list[str]:
    """Return what all names begin with, up to each of the first dots."""
    first, last = min(names, default=""), max(names, default="")
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return [first[: dot.end()] for dot in islice(re.finditer(r"\.", first[:same]), MOST_PARTS)]


def _without_averaging(name: str, places: Collection[str], start: int) -> str:
    """Return a name from `start` on, without the ``module`` of averaged models that stand at these places."""
    kept, at = [], start
    for module in islice(_MODULE.finditer(name, start), MOST_PARTS if places else 0):
        if name[: module.start()] in places:
            kept.append(name[at : module.start()])
            at = module.end()
    return "".join([*kept, name[at:]])
