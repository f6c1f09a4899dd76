"""Recording from Lightning: ``Trainer(…, callbacks=[RecorderCallback("runs/first")])``.

For `lightning.pytorch` as for `pytorch_lightning`, which are two packages with the same content.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

from torch import nn

from ...run import PathLike
from .recording import TrainerRecording, require_interval

HOMES = ("lightning.pytorch", "pytorch_lightning")


class RecorderCallback:
    """Records the weights of each epoch, or of every n-th step, of a Lightning `Trainer.fit` into a run.

    path: the run; without, the one that ``trajkit record RUN -- command`` names.
    every_n_steps: record every n-th optimizer step (`trainer.global_step`), labelled by the step, instead of each
    epoch, labelled by `trainer.current_epoch`. The step is kept beside the epoch.
    options: as for `trajkit.Recorder`.

    The weights are those that are trained: they are copied at the end of the last batch, before a weight-averaging
    callback can put averaged ones in their place, and committed with `trainer.callback_metrics` when the epoch is over
    or a checkpoint is saved, which waits for it; so a fit that is resumed from a checkpoint goes on without a gap, and
    what the run holds already is not recorded again. The last epoch is recorded also where ``max_steps`` ends it early.

    It is a `Callback` of whichever of the two packages is imported when it is made.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Of the class that is a `Callback`, too."""
        made: Self = object.__new__(_callback_class(cls))
        return made

    def __init__(self, path: PathLike | None = None, *, every_n_steps: int | None = None, **options: Any) -> None:
        self._path, self._options = path, options
        self._every = require_interval(every_n_steps)
        self._recording: TrainerRecording | None = None
        self._averaged = False

    def __reduce__(self) -> Any:
        return _made_again, (_own_class(type(self)), {**vars(self), "_recording": None})

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Open the run."""
        self._close()
        self._recording = TrainerRecording(pl_module, self._path, self._options, fresh=trainer.global_step == 0)

    def on_train_epoch_start(self, trainer: Any, _pl_module: nn.Module) -> None:
        """Everything is logged of the epoch before."""
        self._commit(trainer)

    def on_train_batch_end(self, trainer: Any, _pl_module: nn.Module, *_: Any) -> None:
        """Copy the weights where this step or epoch is to be recorded."""
        # StochasticWeightAveraging appends an epoch that trains nothing, for the statistics of averaged weights.
        self._averaged = getattr(trainer.fit_loop, "_skip_backward", False)
        if self._recording is None or self._averaged:
            return
        step = trainer.global_step
        if self._every is None:
            if trainer.is_last_batch:
                self._recording.hold(trainer.current_epoch, step)
        elif step and step % self._every == 0:  # a batch whose gradients are accumulated has the step of the one before
            self._recording.hold(step, step)
            self._commit(trainer)

    def on_train_epoch_end(self, trainer: Any, _pl_module: nn.Module) -> None:
        """Copy the weights where nobody could know that the epoch ends here."""
        if self._recording is None or self._averaged or self._every is not None:
            return
        if self._recording.held_step != trainer.global_step:
            self._recording.hold(trainer.current_epoch, trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        """The run has to hold what a fit that is resumed from the checkpoint does not train again."""
        self._commit(trainer, wait=True)

    def on_train_end(self, trainer: Any, _pl_module: nn.Module) -> None:
        """Commit everything and close the run."""
        self._commit(trainer)
        self._close()

    def on_exception(self, trainer: Any, _pl_module: nn.Module, exception: BaseException) -> None:
        """The same, where the training fails or is interrupted."""
        try:
            self._commit(trainer)
            self._close()
        except Exception as error:
            exception.add_note(f"while this was raised, {error}")

    def _commit(self, trainer: Any, wait: bool = False) -> None:
        if self._recording is not None:
            self._recording.commit(trainer.callback_metrics, wait=wait)

    def _close(self) -> None:
        if self._recording is not None:
            recording, self._recording = self._recording, None
            recording.close()


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
