"""The plain model's own names, whatever it is wrapped in, and what of a model is recorded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..errors import InputError
from ..layout import ParameterLayout
from ..vector import layout_of, model_tensors

Patterns = str | Sequence[str]


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DataParallel`, `torch.compile` and `AveragedModel`, also nested."""
    while (child := _wrapped(model)) or isinstance(model, AveragedModel):
        model = getattr(model, child or "module")
    return model


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Plain name -> parameter, uncopied; tied ones stand under each of their names."""
    return _plainly_named(model, plain_model(model).named_parameters(remove_duplicate=False))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Plain name -> buffer, uncopied, also of those that are not in the state_dict."""
    return _plainly_named(model, plain_model(model).named_buffers(remove_duplicate=False))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of the plain model whose submodules are not wrapped either; what is tied stays tied."""
    model = plain_model(model)
    memo: dict[int, Any] = {}
    for _, module in reversed(list(model.named_modules())):  # from the inside out
        if child := _wrapped(module):
            memo[id(module)] = copy.deepcopy(getattr(module, child), memo)
    return copy.deepcopy(model, memo)


def is_sharded(model: nn.Module) -> bool:
    """Whether the first FSDP has taken the parameters for its own, so that they have other names and shapes."""
    # Not by isinstance: the class takes long to import.
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


class RecordedModel:
    """The tensors of a model that are recorded, by the names that they have in the plain model.

    include, exclude: patterns of tensor names as in a shell (``"encoder.*"``); what is included and not excluded is
    recorded, everything by default. trainable_only: parameters that need no gradient now, and buffers, are left out.

    Raises `InputError` for a pattern that no tensor has.
    """

    def __init__(
        self, model: nn.Module, include: Patterns = (), exclude: Patterns = (), trainable_only: bool = False
    ) -> None:
        self._model = plain_model(model)
        self._names: tuple[list[str], list[str]] = [], []
        self._layout: tuple[Any, ParameterLayout] | None = None
        self._include, self._exclude = _patterns(include), _patterns(exclude)
        self._left_out: frozenset[str] = frozenset()
        everything = self._plainly_named(model_tensors(self._model))
        for pattern in (*self._include, *self._exclude):
            if not any(fnmatchcase(name, pattern) for name in everything):
                raise InputError(
                    f"no tensor is called {pattern!r}, expected a pattern of names such as"
                    f" {', '.join(list(everything)[:4])}; look at model.state_dict()"
                )
        if trainable_only:  # of today: a layer that is frozen or thawed later does not change what a run holds
            self._left_out = frozenset(name for name, tensor in everything.items() if not tensor.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, uncopied; raises `LayoutError` for state that is no tensor."""
        named = self._plainly_named(model_tensors(self._model))
        if not (self._include or self._exclude or self._left_out):
            return named
        return {name: tensor for name, tensor in named.items() if self._is_chosen(name)}

    def layout(self, tensors: Mapping[str, Tensor]) -> ParameterLayout:
        """The layout of `tensors()`, the same object as long as nothing of it has changed.

        Raises `LayoutError` naming a tensor that cannot be recorded.
        """
        seen = _appearance(tensors)
        if self._layout is None or seen is None or self._layout[0] != seen:
            self._layout = seen, layout_of(tensors, parameters_of(self._model))
        return self._layout[1]

    def _is_chosen(self, name: str) -> bool:
        included = not self._include or any(fnmatchcase(name, pattern) for pattern in self._include)
        excluded = name in self._left_out or any(fnmatchcase(name, pattern) for pattern in self._exclude)
        return included and not excluded

    def _plainly_named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors without what wrappers of submodules add to their names."""
        names = list(tensors)
        if self._names[0] != names:  # looked up once: a model is asked for its names at every epoch
            self._names = names, list(_plain_names(self._model, names).values())
        return dict(zip(self._names[1], tensors.values(), strict=True))


def _wrapped(module: nn.Module) -> str | None:
    """The attribute that holds the module which a wrapper stands for."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    # torch.compile's; the class stands in torch._dynamo, which takes a second to import.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None


def _plainly_named(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    tensors = dict(named)
    return dict(zip(_plain_names(plain_model(model), tensors).values(), tensors.values(), strict=True))


def _plain_names(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Name in `model` -> name in the model whose submodules are not wrapped."""
    wrapped = [(f"{path}.", child) for path, module in model.named_modules() if (child := _wrapped(module))]
    plain = {}
    for name in names:
        found = name
        for path, child in reversed(wrapped):  # from the inside out: a path holds the wrappers above it
            if found.startswith(f"{path}{child}."):
                found = path + found[len(path) + len(child) + 1 :]
        plain[name] = found
    return plain


def _patterns(given: Patterns) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _appearance(tensors: Mapping[str, Tensor]) -> Any:
    """What a layout follows from, cheap to take and to compare: a layout is not made anew for every epoch.

    None where a tensor is not of the plain kind, so that nobody trusts it.
    """
    try:
        return [
            (name, id(tensor), type(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            for name, tensor in tensors.items()
        ]
    except (RuntimeError, ValueError):
        return None
