"""Models inside wrappers: the plain model, and the names that its tensors have there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, LayoutError
from ..vector import is_spread

# By name, also of a base class: some of the classes take long to import, others are of packages that may not be there.
WRAPPED_AS: Mapping[str, str] = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile's
    "ActivationWrapper": "_checkpoint_wrapped_module",  # activation checkpointing and offloading
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "AbstractGradSampleModule": "_module",  # Opacus
    "DifferentiallyPrivateDistributedDataParallel": "module",  # Opacus
    "DeepSpeedEngine": "module",
    "ModelEmaV2": "module",  # timm
    "ModelEmaV3": "module",
    "_FabricModule": "_original_module",  # Lightning
}
"""Class of a wrapper -> its attribute that is the wrapped module."""

SHARDED = "FullyShardedDataParallel"


def require_module(model: Any) -> nn.Module:
    """Return the model; raise `InputError` for what is no `torch.nn.Module`."""
    if isinstance(model, nn.Module):
        return model
    parts = model.values() if isinstance(model, Mapping) else model if isinstance(model, list | tuple) else ()
    found = type(model).__name__
    if isinstance(model, type):
        found, cure = f"the class {model.__name__}", "pass an instance of it"
    elif model is None:
        found, cure = "None", "pass the model that is trained"
    elif any(isinstance(part, nn.Module) for part in parts):
        cure = "pass one of the models, or all in a torch.nn.ModuleDict"
    elif isinstance(model, Mapping):
        cure = "pass the model itself; state dicts in files are recorded by import_checkpoints"
    else:
        cure = "pass the model itself, not its parameters or what trains it"
    raise InputError(f"expected a torch.nn.Module, found {found}; {cure}")


def plain_model(model: Any) -> nn.Module:
    """Return the model inside all wrappers around it, also nested ones, but for the first FSDP.

    That one gathers the parameters for its own state dict. Raises `InputError` for what is no module.
    """
    plain = require_module(model)
    while (child := _wrapped(plain)) and not _is_fsdp(plain):
        plain = getattr(plain, child)
    return plain


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the plain model whose submodules are not wrapped either; what is tied stays tied."""
    model = plain_model(model)
    memo: dict[int, Any] = {}
    for _, module in reversed(list(model.named_modules())):  # from the inside out
        for value in vars(module).values():  # such as the weight that torch.nn.utils.weight_norm computes
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        if child := _wrapped(module):
            memo[id(module)] = copy.deepcopy(getattr(module, child), memo)
    return copy.deepcopy(model, memo)


def require_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `LayoutError` for a model, with these tensors, of which each process has but a part."""
    spread = next((name for name, tensor in tensors.items() if is_spread(tensor)), None)
    if spread is not None or PlainNames(model).is_sharded:
        raise LayoutError(
            f"{repr(spread) if spread else 'each tensor'} is spread over processes, by FSDP or the like, expected all"
            " weights in each of them; record the training, and run 'trajkit online' on its run"
        )


class PlainNames:
    """The tensors of a model by the names that they have in the plain model whose submodules are not wrapped.

    Raises `InputError` for what is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = plain_model(model)
        self._modules = list(self.model.named_modules(remove_duplicate=False))
        self._wrappers: dict[str, list[str]] = {}
        """Plain path -> what wrappers that stand there add to names, from the outermost to the innermost."""
        self._of_wrappers: set[int] = set()
        """Ids of buffers that wrappers have of their own, such as the counter of `AveragedModel`."""
        self._paths: dict[str, str] = {}
        for path, module in self._modules:
            if child := _wrapped(module):
                self._wrappers.setdefault(_plain_path(self._wrappers, path), []).append(child)
                self._of_wrappers |= {id(buffer) for buffer in module._buffers.values() if buffer is not None}

    @cached_property
    def is_sharded(self) -> bool:
        """Whether the first FSDP has taken parameters for its own: they have other names and shapes then."""
        return bool(self._wrappers) and any(_is_fsdp(module) for _, module in self._modules)

    def parameters(self) -> dict[str, Tensor]:
        """Return plain name -> parameter, uncopied; tied ones stand under each of their names."""
        return self._tensors("_parameters")

    def buffers(self) -> dict[str, Tensor]:
        """Return plain name -> buffer, uncopied, also of those that are not in the state dict."""
        return self._tensors("_buffers")

    def plain(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain name -> value, from name in the model -> value, without what wrappers keep for themselves.

        A name may lack what a wrapper adds, since some wrappers take it out of the state dict. Names that would be the
        same afterwards keep what they have.
        """
        if not self._wrappers:
            return dict(named)
        named = {name: value for name, value in named.items() if id(value) not in self._of_wrappers}
        plain = {name: self._without_wrappers(name) for name in named}
        times = Counter(plain.values())
        unique = {name: found if times[found] == 1 else name for name, found in plain.items()}
        if len(set(unique.values())) < len(unique):
            return dict(named)
        return {unique[name]: value for name, value in named.items()}

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        # Not by named_parameters(): wrappers and models have methods of this name that leave out some, or rename them.
        return self.plain(
            {
                f"{path}.{name}" if path else name: tensor
                for path, module in self._modules
                for name, tensor in getattr(module, kind).items()
                if tensor is not None
            }
        )

    def _without_wrappers(self, name: str) -> str:
        """Return a name without what wrappers add to it; the last part of a name is the tensor's own."""
        path, _, own = name.rpartition(".")
        if path not in self._paths:
            self._paths[path] = _plain_path(self._wrappers, path)
        plain = self._paths[path]
        return f"{plain}.{own}" if plain else own


def _plain_path(wrappers: Mapping[str, list[str]], path: str) -> str:
    kept: list[str] = []
    expected = wrappers.get("", [])
    for part in path.split("."):
        if part in expected:
            expected = expected[expected.index(part) + 1 :]
        else:
            kept.append(part)
            expected = wrappers.get(".".join(kept), [])
    return ".".join(kept)


def _wrapped(module: nn.Module) -> str | None:
    """Return the attribute that holds the module which a wrapper stands for; None for what is no wrapper."""
    kind: Any = type(module)
    child = _attribute(kind)
    return child if child is not None and isinstance(getattr(module, child, None), nn.Module) else None


@lru_cache(maxsize=1024)
def _attribute(kind: type) -> str | None:
    return next((WRAPPED_AS[base.__name__] for base in kind.__mro__ if base.__name__ in WRAPPED_AS), None)


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == SHARDED for base in type(module).__mro__)
