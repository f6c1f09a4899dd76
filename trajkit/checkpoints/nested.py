"""Where in a checkpoint the weights are, among all the other things that trainers keep there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .naming import EPOCH, GLOBAL_STEP, number_in, said_in
from .stored import Checkpoint, StoredTensor

# Where trainers keep the weights. Lightning's weight averaging puts the average under state_dict while it fits, and the
# weights as they are trained under current_model_state.
NESTED_UNDER = ("current_model_state", "state_dict", "model_state_dict", "model", "module", "weights")

# How many tensors may share a byte of a file without being tied: views of each other, such as transposed ones.
OVERLAP_LIMIT = 8

AsTensor = Callable[[Any], StoredTensor | None]


def checkpoint_in(path: Path, tree: Any, as_tensor: AsTensor, key: str | None = None) -> Checkpoint:
    """The checkpoint that was saved as nested dicts; `as_tensor` says what is a tensor in them, and which.

    key: where the weights are, such as ``model`` or ``nets.generator``; None looks in the usual places.

    Raises `InputError` where there is no dict of named tensors.
    """
    begin = tree if key is None else _descend(tree, key)
    tensors = _state_dict_in(begin, as_tensor)
    if tensors is None:
        where = f"under {', '.join(NESTED_UNDER)}" if key is None else f"under '{key}' (--key)"
        raise InputError(
            f"{path}: expected a state dict of named tensors, alone or {where}, found {_shown(begin, tree, as_tensor)};"
            " save model.state_dict(), or say where it is (--key)"
        )
    return Checkpoint(path, tensors, number_in(tree, *EPOCH), number_in(tree, GLOBAL_STEP), said_in(tree))


def require_held(path: Path, places: Iterable[tuple[str, StoredTensor, int, Hashable, int]]) -> None:
    """Raise `InputError` where tensors, or all together, claim more bytes than the file holds.

    places: name, tensor and its bytes; its storage, and the bytes of that.
    """
    held: dict[Hashable, int] = {}
    asked: dict[Hashable, int] = {}
    for name, tensor, n_bytes, storage, n_held in places:
        if n_bytes > n_held:
            raise InputError(
                f"{path}: '{name}' has shape {tensor.shape}, the file holds {n_held} bytes of it;"
                " save a contiguous copy"
            )
        held[storage] = n_held
        asked[tensor.tie] = n_bytes
    if sum(asked.values()) > OVERLAP_LIMIT * sum(held.values()):
        raise InputError(
            f"{path}: the tensors have {sum(asked.values())} bytes, the file holds {sum(held.values())} that they"
            " share; save contiguous copies"
        )


def _descend(tree: Any, key: str) -> Any:
    """What stands under a key such as ``a.b``, where a key may have dots itself; None where nothing does."""
    if not isinstance(tree, Mapping) or key in tree:
        return tree.get(key) if isinstance(tree, Mapping) else None
    for position, letter in enumerate(key):
        if letter == "." and key[:position] in tree:
            found = _descend(tree[key[:position]], key[position + 1 :])
            if found is not None:
                return found
    return None


def _state_dict_in(tree: Any, as_tensor: AsTensor, depth: int = 3) -> dict[str, StoredTensor] | None:
    if not isinstance(tree, Mapping) or depth == 0:
        return None
    tensors: dict[str, StoredTensor] = {}
    for name, value in tree.items():
        tensor = as_tensor(value) if isinstance(name, str) else None
        if tensor is None:
            break
        tensors[name] = tensor
    if tensors and len(tensors) == len(tree):
        return tensors
    for key in NESTED_UNDER:
        nested = _state_dict_in(tree.get(key), as_tensor, depth - 1)
        if nested is not None:
            return nested
    return None


def _shown(found: Any, tree: Any, as_tensor: AsTensor) -> str:
    """What is there instead of a state dict, as a message can say it."""
    if found is None and isinstance(tree, Mapping):
        return f"no such key among {', '.join(map(_key, tree))}"[:200]
    if isinstance(found, Mapping):
        return f"a dict with {', '.join(map(_key, found))}"[:200]
    return "Tensor" if as_tensor(found) is not None else type(found).__name__


def _key(key: Any) -> str:
    return f"{key:.80}" if isinstance(key, str) else f"a {type(key).__name__}"
