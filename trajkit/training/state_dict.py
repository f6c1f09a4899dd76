"""What a model's state dict gives, matched with the parameters and buffers that the model has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LayoutError
from ..vector import EXTRA_STATE, identity
from .wrapping import PlainNames


@dataclass
class ModelState:
    """The tensors of a model by the names that its state dict gives them, without what wrappers add to names.

    Each parameter and buffer stands there itself, also where a hook has put a copy of it into the state dict, such as a
    detached or a converted one. A trained parameter that the state dict does not give has its own name.

    tensors: Name -> tensor, uncopied.
    parameters: Name -> whether it is trained, of those that are parameters.
    own: Name -> name in the plain model, of parameters and buffers; others are made by hooks of the state dict.
    added: Names of the trained parameters that the state dict does not give.
    replaced: Names of floating tensors that hooks made in place of those; they are not among the tensors.
    clashing: Names of those whose own name the state dict gives to another tensor; they are not among the added ones.
    extra: Names of what `torch.nn.Module.get_extra_state` gives, whatever it is; not among the tensors either.
    others: Name -> value, of all else that is no tensor.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, bool] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    clashing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names, also of what is no tensor."""
        return [*self.tensors, *self.replaced, *self.extra, *self.others]


def state_of(model: nn.Module, added: Collection[str] = ()) -> ModelState:
    """Return what there is to record of a model.

    added: Names of parameters that are recorded though the state dict does not give them, trained or not.

    Raises `LayoutError` for a state dict of parts, which the first FSDP can give.
    """
    names = PlainNames(model)
    given = names.plain(_given(names.model))
    parameters, buffers = names.parameters(), names.buffers()
    if names.is_sharded:
        return _gathered(given, parameters, buffers)
    owners = _owners(given, parameters, buffers)
    held = {id(parameters[owner]) for owner in owners.values() if owner in parameters}
    # A hook may put a copy in a tensor's place: then its name says whose it is.
    unheld = buffers.keys() | {name for name, tensor in parameters.items() if id(tensor) not in held}
    owners |= {name: name for name in unheld & (given.keys() - owners)}
    state = ModelState()
    for name, value in given.items():
        owner = owners.get(name)
        if owner is None:
            _put(state, name, value)
            continue
        state.tensors[name], state.own[name] = parameters[owner] if owner in parameters else buffers[owner], owner
        if owner in parameters:
            state.parameters[name] = parameters[owner].requires_grad
            held.add(id(parameters[owner]))
    _add(state, {name: tensor for name, tensor in parameters.items() if id(tensor) not in held}, added)
    return state


def _given(model: nn.Module) -> Mapping[str, Any]:
    """Return what the state dict holds, not detached as far as the model allows it."""
    try:
        given: Mapping[str, Any] = model.state_dict(keep_vars=True)
    except TypeError:  # a method of the model's own, without options
        given = model.state_dict()
    return given


def _owners(
    given: Mapping[str, Any], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return name in the state dict -> name of the parameter or buffer that stands there, or of its memory's owner."""
    by_object: dict[int, str] = {}
    for name, tensor in _each(parameters, buffers):
        by_object.setdefault(id(tensor), name)
    owners = {name: by_object[id(value)] for name, value in given.items() if id(value) in by_object}
    unknown = {name: value for name, value in given.items() if name not in owners and _has_values(value)}
    if unknown:
        by_memory: dict[Any, str] = {}
        for name, tensor in _each(parameters, buffers):
            if _has_values(tensor):
                by_memory.setdefault(identity(name, tensor), name)
        owners |= {name: owner for name, value in unknown.items() if (owner := by_memory.get(identity(name, value)))}
    return owners


def _each(*named: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return (item for tensors in named for item in tensors.items())


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value) and value.numel() > 0


def _put(state: ModelState, name: str, value: Any) -> None:
    """Put a value that is no parameter or buffer where it belongs."""
    if name.rpartition(".")[2] == EXTRA_STATE:
        state.extra += (name,)
    elif isinstance(value, Tensor):
        state.tensors[name] = value
    else:
        state.others[name] = value


def _add(state: ModelState, missing: Mapping[str, Tensor], added: Collection[str]) -> None:
    """Add the parameters that the state dict does not give and that are trained, by their own names."""
    missing = {name: tensor for name, tensor in missing.items() if tensor.requires_grad or name in added}
    if not missing:
        return
    made = [name for name, tensor in state.tensors.items() if name not in state.own and tensor.is_floating_point()]
    for name in made:
        del state.tensors[name]
    state.clashing = tuple(name for name in missing if name in state.tensors)
    state.added, state.replaced = tuple(name for name in missing if name not in state.clashing), tuple(made)
    for name in state.added:
        state.tensors[name], state.parameters[name], state.own[name] = missing[name], missing[name].requires_grad, name


def _gathered(given: Mapping[str, Any], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> ModelState:
    """Return the state of a model that the first FSDP has taken apart: its state dict holds gathered copies.

    The parameters themselves are parts, or flat ones under a name of FSDP's, so what is no buffer is a parameter. Tied
    ones are told where FSDP leaves them their names (``use_orig_params=True``). Raises `LayoutError` for a state dict
    of parts.
    """
    state = ModelState()
    for name, value in given.items():
        if type(value).__name__ == "ShardedTensor":
            raise LayoutError(
                f"'{name}' is a ShardedTensor, spread over processes, expected the whole of it; call"
                " FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT) before"
            )
        _put(state, name, value)
    first: dict[int, str] = {}
    for name in state.tensors.keys() - buffers:
        state.parameters[name] = name not in parameters or parameters[name].requires_grad
    for name in [name for name in state.tensors if name in parameters]:
        state.tensors[name] = state.tensors[first.setdefault(id(parameters[name]), name)]
    return state
