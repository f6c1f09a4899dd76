"""A callback of `lightning.pytorch` as of `pytorch_lightning`, which are two packages with the same content."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from torch import nn

from .recording import require_interval

HOMES = ("lightning.pytorch", "pytorch_lightning")


class EachEpochOrStep:
    """A `Callback` that does something after each epoch, or every n-th step of the optimizer, before others see it.

    It is one of whichever of the two packages is imported when it is made, and can be copied and pickled, but for what
    belongs to a training that is going on.
    """

    of_a_training: ClassVar[tuple[str, ...]] = ()
    """The attributes that are None between trainings."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Of the class that is a `Callback`, too."""
        made: Self = object.__new__(_callback_class(cls))
        return made

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = require_interval(every_n_steps)
        self._trains = True
        self._last: int | None = None

    def __reduce__(self) -> Any:
        return _made_again, (_own_class(type(self)), {**vars(self), **dict.fromkeys(self.of_a_training)})

    def reached(self, trainer: Any, label: int, step: int) -> None:
        """An epoch, or a step that is asked for, is trained; `label` is its number."""
        raise NotImplementedError

    def on_train_batch_end(self, trainer: Any, _pl_module: nn.Module, *_: Any) -> None:
        """After the last batch of an epoch, or that of the step, before any validation."""
        # StochasticWeightAveraging appends an epoch that trains nothing, for the statistics of averaged weights.
        self._trains = not getattr(trainer.fit_loop, "_skip_backward", False)
        if self.every_n_steps is None:
            if trainer.is_last_batch:
                self._reach(trainer, trainer.current_epoch)
        elif trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._reach(trainer, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, _pl_module: nn.Module) -> None:
        """Where nobody could know that the epoch ends here."""
        if self.every_n_steps is None:
            self._reach(trainer, trainer.current_epoch)

    def _reach(self, trainer: Any, label: int) -> None:
        step = trainer.global_step
        if self._trains and step != self._last:  # a batch whose gradients are accumulated has the step before
            self._last = step
            self.reached(trainer, label, step)


def _callback_class(own: type) -> Any:
    """`own` as a subclass of the `Callback` of every Lightning that is imported, else of one that is installed."""
    homes = [home for home in HOMES if home in sys.modules] or [home for home in HOMES if _is_installed(home)][:1]
    if not homes:
        raise ImportError("Lightning is not installed; pip install 'trajkit[lightning]'")
    return _subclass(own, tuple(homes))


@cache
def _subclass(own: type, homes: tuple[str, ...]) -> type:
    bases = tuple(import_module(home).Callback for home in homes)
    return type(own.__name__, (own, *bases), {"__module__": own.__module__, "__doc__": own.__doc__, "_own_class": own})


def _own_class(made: Any) -> type:
    own: type = made._own_class
    return own


def _made_again(own: Any, state: dict[str, Any]) -> Any:
    made = own.__new__(own)
    vars(made).update(state)
    return made


def _is_installed(home: str) -> bool:
    return find_spec(home.partition(".")[0]) is not None
