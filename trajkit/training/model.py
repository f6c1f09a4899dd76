"""What of a model is recorded: its tensors by their names, and their layout."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, LayoutError, listed
from ..layout import ParameterLayout, stub_warning
from ..vector import layout_of
from .ranks import this_rank
from .state_dict import ModelState, state_of
from .wrapping import plain_model

logger = logging.getLogger("trajkit")

Patterns = str | Sequence[str]


class RecordedModel:
    """The tensors of a model that are recorded, by the names that they have in the plain model's state dict.

    include, exclude: patterns of tensor names as in a shell (``"encoder.*"``); what is included and not excluded is
    recorded, everything by default. trainable_only: parameters that need no gradient now, and buffers, are left out.

    Raises `InputError` for a pattern that no tensor has, and for what is no `torch.nn.Module`. Warns of trained
    parameters that the state dict does not give.
    """

    def __init__(
        self, model: nn.Module, include: Patterns = (), exclude: Patterns = (), trainable_only: bool = False
    ) -> None:
        self._model = plain_model(model)
        self._layout: tuple[Any, ParameterLayout] | None = None
        self._include, self._exclude = _patterns(include), _patterns(exclude)
        self._left_out: frozenset[str] = frozenset()
        state = state_of(self._model)
        names = state.names
        for pattern in (*self._include, *self._exclude) if names else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"no tensor is called {pattern!r}, expected a pattern of names such as"
                    f" {', '.join(names[:4])}; look at model.state_dict()"
                )
        self._require_own_names(state)
        if trainable_only:  # of today: a layer that is frozen or thawed later does not change what a run holds
            self._left_out = frozenset(name for name in names if not state.parameters.get(name))
        # Of a state no tensor is kept: they may be copies that were made for it.
        self._parameters, self._own = state.parameters, state.own
        self._others = {name: type(state.others[name]).__name__ for name in self._chosen(state.others)}
        self._extra = self._chosen(state.extra)
        self._added = self._chosen(state.added)
        if self._added and this_rank() == 0:
            warnings.warn(_added(self._added, state.replaced), RuntimeWarning, stacklevel=3)

    def require_tensors(self) -> None:
        """Raise `LayoutError` where a value is to be recorded that is no tensor; say which extra state is left out."""
        if self._others:
            raise LayoutError(
                f"{listed(self._others)} in the model's state_dict: expected tensors, found"
                f" {', '.join(sorted(set(self._others.values())))}; leave them out with exclude=, patterns of names"
            )
        if self._extra:
            logger.info("the model: %s left out, extra state of modules is not recorded", listed(self._extra))

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor, uncopied, of what is to be recorded and is a tensor."""
        state = state_of(self._model, self._added)
        self._require_own_names(state)
        self._parameters = state.parameters
        return {name: state.tensors[name] for name in self._chosen(state.tensors)}

    def own_names(self, layout: ParameterLayout) -> dict[str, str]:
        """Return the name of an entry -> the name of its parameter or buffer in the plain model.

        Those that a hook of the state dict makes have none.
        """
        found = {}
        for entry in layout.tensors:
            names = [name for name in entry.names if name in self._own]
            if names:  # a buffer that is tied to a parameter is that parameter
                found[entry.name] = self._own[next((name for name in names if name in self._parameters), names[0])]
        return found

    def layout(self, tensors: Mapping[str, Tensor]) -> ParameterLayout:
        """Return the layout of what `tensors` gave last, the same object as long as nothing of it has changed.

        Raises `LayoutError` naming a tensor that cannot be recorded.
        """
        if not tensors and this_rank() != 0:  # the first FSDP may give the state dict to rank 0 alone
            return ParameterLayout(())
        seen = _appearance(tensors)
        if self._layout is None or seen is None or self._layout[0] != seen:
            self._layout = seen, layout_of(tensors, self._parameters)
        return self._layout[1]

    def _require_own_names(self, state: ModelState) -> None:
        """Raise `LayoutError` for a trained parameter whose name stands for another tensor."""
        if clashing := self._chosen(state.clashing):
            raise LayoutError(
                f"the model's state_dict does not give {listed(clashing)}, trained parameters, and gives other tensors"
                " under their names; rename these, or leave them out with exclude=, patterns of names"
            )

    def _chosen(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._is_chosen(name)]

    def _is_chosen(self, name: str) -> bool:
        included = not self._include or any(fnmatchcase(name, pattern) for pattern in self._include)
        excluded = name in self._left_out or any(fnmatchcase(name, pattern) for pattern in self._exclude)
        return included and not excluded


def warn_of_stubs(layout: ParameterLayout) -> None:
    """Warn of weights that have no values here, see `ParameterLayout.stubs`."""
    if (warning := stub_warning(layout)) is not None and this_rank() == 0:
        warnings.warn(warning, RuntimeWarning, stacklevel=3)


def _added(names: Sequence[str], replaced: Sequence[str]) -> str:
    line = f"the model's state_dict does not give {listed(names)}, trained parameters, which are recorded as weights"
    if replaced:
        return f"{line}; {listed(replaced)}, which a hook of the state_dict makes, {_is(replaced)} left out"
    return line


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _patterns(given: Patterns) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _appearance(tensors: Mapping[str, Tensor]) -> Any:
    """Return what a layout follows from, cheap to take and to compare: a layout is not made anew for every epoch.

    None where a tensor is not of the plain kind, so that nobody trusts it.
    """
    try:
        return [
            (name, id(tensor), type(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            for name, tensor in tensors.items()
        ]
    except (RuntimeError, ValueError):
        return None
