"""Which tensors of a checkpoint are recorded, and as which tensors of the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import InputError, LayoutError, listed
from ..layout import FLOATING, ParameterLayout, TensorEntry, differing_names, require_floating
from ..vector import BUFFER_NAMES, EXTRA_STATE
from .matching import (
    Match,
    Prefix,
    counters,
    is_whole,
    match_names,
    nearest_prefix,
    plain_names,
    prefixes_to_choose,
)
from .stored import Checkpoint, StoredTensor

PIECE = 4 << 20
"""Values of two copies that are compared at a time."""


@dataclass(frozen=True)
class Selection:
    """Which tensors of a checkpoint are recorded; by default all.

    key: where the weights are in the file, or which model of a folder, see `open_checkpoint`.
    include, exclude: patterns of names, as a shell has them; a tensor is recorded if any of `include` matches, where
    there are some, and none of `exclude` does.
    trainable_only: leave out buffers, and what the file or the run knows to be frozen; most files do not say what is.
    """

    key: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    trainable_only: bool = False


EVERYTHING = Selection()


@dataclass(frozen=True)
class Arranged:
    """What is recorded of a checkpoint: a layout, and the stored tensor of each of its entries, by the entry's name.

    tells_trainable: whether the file, or the run, knows which weights are trained.
    remarks: What was done to names, or left out, that nobody asked for.
    """

    layout: ParameterLayout
    tensors: Mapping[str, StoredTensor]
    tells_trainable: bool = False
    remarks: tuple[str, ...] = ()


def arrange(checkpoint: Checkpoint, selection: Selection, known: ParameterLayout | None) -> Arranged:
    """Return the selected tensors, in the order and with the names and ties of the run's layout where there is one.

    Raises `LayoutError` naming a tensor that cannot be recorded, copies that differ where the run has them tied, or a
    prefix by which the names differ from the run's, and `InputError` where nothing is selected.
    """
    tensors, remarks = _selected(checkpoint.tensors, selection, known)
    for name, tensor in tensors.items():
        if tensor.refused is not None:
            raise LayoutError(f"'{name}' {tensor.refused}")
    groups = _tied(tensors) if known is None else _tied_as(known, tensors)
    knows_frozen = any(tensor.trainable for tensor in tensors.values())
    entries = [
        TensorEntry(
            name=names[0],
            shape=tensor.shape,
            dtype=tensor.dtype,
            kind="weight" if _is_weight(names[0], tensor, known) else "buffer",
            trainable=bool(tensor.trainable) or not knows_frozen,
            aliases=names[1:],
        )
        for names, tensor in groups
    ]
    if known is None:
        require_floating(entries)
    stored = {names[0]: tensor for names, tensor in groups}
    return Arranged(ParameterLayout.of(entries), stored, known is not None or knows_frozen, remarks)


def _selected(
    tensors: Mapping[str, StoredTensor], selection: Selection, known: ParameterLayout | None
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the selected tensors by their names in the run, and what is to be said of it."""
    extra = {name for name in tensors if _is_extra(name) and not (known is not None and name in known)}
    averaged = _averaged(tensors, known)
    candidates = [name for name in tensors if name not in extra | averaged]
    plain = plain_names(candidates, averaged)
    match = Match(plain, frozenset()) if known is None else match_names(candidates, known, averaged)
    chosen = [name for name in candidates if _is_chosen(selection, plain[name], match.names[name])]
    if known is not None and not is_whole(match, known):  # a prefix may be that of those alone that are selected
        match = match_names(chosen, known, averaged)
        _require_no_prefix(match, chosen, known)
    says = any(tensor.trainable for tensor in tensors.values())
    found = {match.names[name]: tensors[name] for name in chosen}
    if selection.trainable_only:
        found = {name: tensor for name, tensor in found.items() if _is_trainable(name, tensor, known, says)}
    if not found:
        raise InputError(
            f"none of the {len(plain)} tensors is selected, expected one at least; there are"
            f" {', '.join(list(plain.values())[:4])}, …; see --include, --exclude and --trainable-only"
        )
    return found, _remarks(match.prefix, [name for name in extra if _is_chosen(selection, name)])


def _is_chosen(selection: Selection, *names: str) -> bool:
    """Return whether a tensor is selected that has these names, with a prefix that its checkpoint has, and without."""

    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

    return (not selection.include or matches(selection.include)) and not matches(selection.exclude)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA_STATE


def _averaged(tensors: Mapping[str, StoredTensor], known: ParameterLayout | None) -> set[str]:
    """Return the counters of averaged models, which are none of the plain model's tensors."""
    found = {name for name in counters(tensors) if tensors[name].shape == () and "int" in tensors[name].dtype}
    return {name for name in found if known is None or name not in known}


def _require_no_prefix(match: Match, names: Collection[str], known: ParameterLayout) -> None:
    """Raise `LayoutError` where no name is the run's as it is, and some would be without a prefix, or with one."""
    if match.found:
        return
    nearest = nearest_prefix(names, known)
    if nearest is not None:
        differ = differing_names([*nearest.found, *nearest.names.values()], known)
        side = "with" if nearest.prefix is not None and nearest.prefix.is_missing else "without"
        raise LayoutError(f"{nearest.prefix}; {side} it, {differ}; record into a new run")
    prefixes = prefixes_to_choose(names, known)
    if prefixes:
        raise LayoutError(
            f"without this prefix, the names that begin with {' or '.join(map(repr, prefixes))} are the run's;"
            f" choose some, such as by include=('{prefixes[0]}*',) (--include '{prefixes[0]}*')"
        )


def _remarks(prefix: Prefix | None, extra: Collection[str]) -> tuple[str, ...]:
    said = []
    if prefix is not None:
        said.append(f"{prefix}: it is {'put on' if prefix.is_missing else 'taken off'}")
    if extra:
        said.append(f"{listed(sorted(extra))} left out, extra state of modules is not recorded")
    return tuple(said)


def _is_trainable(name: str, tensor: StoredTensor, known: ParameterLayout | None, says: bool) -> bool:
    """As far as the run knows, or the file where it says that any is, or else the name."""
    if known is not None and name in known:
        return known[name].kind == "weight" and known[name].trainable
    return bool(tensor.trainable) if says else _is_weight(name, tensor, None)


def _is_weight(name: str, tensor: StoredTensor, known: ParameterLayout | None) -> bool:
    """Return what the run says of a tensor or, where it does not have it, what its name does."""
    if known is not None and name in known:
        return known[name].kind == "weight" and tensor.dtype in FLOATING
    return name.rpartition(".")[2] not in BUFFER_NAMES and tensor.dtype in FLOATING


def _tied(tensors: Mapping[str, StoredTensor]) -> list[tuple[tuple[str, ...], StoredTensor]]:
    """Names that share a tensor, and that tensor, as the file has them."""
    names: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.tie, []).append(name)
    return [(tuple(tied), tensors[tied[0]]) for tied in names.values()]


def _tied_as(known: ParameterLayout, tensors: Mapping[str, StoredTensor]) -> list[tuple[tuple[str, ...], StoredTensor]]:
    """As the run has them: files sort their tensors, and keep one of a tied pair, or copies."""
    found: list[tuple[tuple[str, ...], StoredTensor]] = []
    for entry in known.tensors:
        present = [tensors[name] for name in entry.names if name in tensors]
        if any(not _same_bits(present[0], copy) for copy in present[1:]):
            raise LayoutError(f"{' and '.join(entry.names)} differ, the run has them tied; record into a new run")
        if present:
            found.append((entry.names, present[0]))
    return found + [((name,), tensor) for name, tensor in tensors.items() if name not in known]


def _same_bits(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same values, NaN included; a few of them are read at a time."""
    if one.tie == other.tie:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = [(start, min(start + PIECE, one.size)) for start in range(0, one.size, PIECE)]
    return all(torch.equal(_bits(one.values(*piece)), _bits(other.values(*piece))) for piece in pieces)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
