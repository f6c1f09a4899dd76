"""Which tensors of a checkpoint are recorded, and as which tensors of the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import InputError, LayoutError
from ..layout import FLOATING, ParameterLayout, TensorEntry
from ..vector import BUFFER_NAMES
from .stored import Checkpoint, StoredTensor

# What DistributedDataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")

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
    """

    layout: ParameterLayout
    tensors: Mapping[str, StoredTensor]
    tells_trainable: bool = False


def arrange(checkpoint: Checkpoint, selection: Selection, known: ParameterLayout | None) -> Arranged:
    """The selected tensors, in the order and with the ties of the run's layout where there is one.

    Raises `LayoutError` naming a tensor that cannot be recorded, or copies that differ where the run has them tied, and
    `InputError` where nothing is selected.
    """
    tensors = _selected(_unwrapped(checkpoint.tensors, known), selection, known)
    for name, tensor in tensors.items():
        if tensor.refused is not None:
            raise LayoutError(f"'{name}' {tensor.refused}")
    groups = _tied(tensors) if known is None else _tied_as(known, tensors)
    parameters = None if known is None else {name for entry in known.weights for name in entry.names}
    knows_frozen = any(tensor.trainable for tensor in tensors.values())
    entries = [
        TensorEntry(
            name=names[0],
            shape=tensor.shape,
            dtype=tensor.dtype,
            kind="weight" if _is_weight(names[0], tensor, parameters) else "buffer",
            trainable=bool(tensor.trainable) or not knows_frozen,
            aliases=names[1:],
        )
        for names, tensor in groups
    ]
    stored = {names[0]: tensor for names, tensor in groups}
    return Arranged(ParameterLayout.of(entries), stored, known is not None or knows_frozen)


def _unwrapped(tensors: Mapping[str, StoredTensor], known: ParameterLayout | None) -> dict[str, StoredTensor]:
    """The tensors by the names that they have in the model itself, unless the run knows them by the longer ones."""
    found = dict(tensors)
    while prefix := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in found)), None):
        if not found or (known is not None and any(name in known for name in found)):
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _selected(
    tensors: Mapping[str, StoredTensor], selection: Selection, known: ParameterLayout | None
) -> dict[str, StoredTensor]:
    def is_selected(name: str, tensor: StoredTensor) -> bool:
        matches = not selection.include or any(fnmatchcase(name, pattern) for pattern in selection.include)
        if not matches or any(fnmatchcase(name, pattern) for pattern in selection.exclude):
            return False
        return not selection.trainable_only or _is_trainable(name, tensor, known, says)

    says = any(tensor.trainable for tensor in tensors.values())
    found = {name: tensor for name, tensor in tensors.items() if is_selected(name, tensor)}
    if not found:
        raise InputError(
            f"none of the {len(tensors)} tensors is selected, expected one at least; there are"
            f" {', '.join(list(tensors)[:4])}, …; see --include, --exclude and --trainable-only"
        )
    return found


def _is_trainable(name: str, tensor: StoredTensor, known: ParameterLayout | None, says: bool) -> bool:
    """As far as the run knows, or the file where it says that any is, or else the name."""
    if known is not None and name in known:
        return known[name].kind == "weight" and known[name].trainable
    return bool(tensor.trainable) if says else _is_weight(name, tensor, None)


def _is_weight(name: str, tensor: StoredTensor, parameters: Collection[str] | None) -> bool:
    listed = name in parameters if parameters is not None else name.rpartition(".")[2] not in BUFFER_NAMES
    return listed and tensor.dtype in FLOATING


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
