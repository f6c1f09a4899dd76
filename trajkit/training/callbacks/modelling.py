"""What the callbacks of online CMD have in common: its updates in one training, and when the model has its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...run import PathLike
from ..online import OnlineCMD
from ..warmup import LateRecording
from .recording import TrainerRecording


class RecordingCallback(Protocol):
    """A `RecorderCallback`, of whichever trainer."""

    every_n_steps: int | None
    recording: TrainerRecording | None


class TrainerCMD:
    """The online CMD of one training by a trainer, updated at most once a step of the optimizer.

    run: the callback that records this training, if the warm-up is to be read there.
    """

    def __init__(self, model: nn.Module, run: RecordingCallback | None, settings: Mapping[str, Any]) -> None:
        self._model = model
        self._run = None if run is None else _RunOf(run)
        self.cmd = OnlineCMD(model, run=None if self._run is None else LateRecording(self._run), **settings)
        self._step: int | None = None
        self._is_applied = False

    def update(self, step: int) -> None:
        """Take the weights after this step, unless they were taken."""
        if step != self._step:
            if self._run is not None:
                self._run.require()
            self.cmd.update_parameters(self._model)
            self._step = step

    def settle(self, record: Callable[[], None]) -> None:
        """End the warm-up where that waits for its last epoch, which `record` has the run's callback record."""
        if self.cmd.n_updates == self.cmd.warmup and not self.cmd.is_warm:
            record()
            self.cmd.end_warm_up()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the ``with`` block the model has the CMD weights, if there are any; one in another does nothing."""
        if self._is_applied or not self.cmd.is_warm:
            yield
            return
        self._is_applied = True
        try:
            with self.cmd.applied_to(self._model):
                yield
        finally:
            self._is_applied = False

    def modelled(self) -> dict[str, Tensor]:
        """Name -> the CMD weights, for `leave`, if there are any."""
        if not self.cmd.is_warm:
            return {}
        tensors = {name: torch.empty_like(tensor) for name, tensor in self.cmd.tensors_of(self._model).items()}
        self.cmd.write(tensors)
        return tensors

    def leave(self, modelled: Mapping[str, Tensor]) -> None:
        """Leave these weights in the model, wherever it is by now."""
        tensors = self.cmd.tensors_anywhere(self._model) if modelled else {}
        with torch.no_grad():
            for name, tensor in modelled.items():
                tensors[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """What `load` brings back, as plain values and tensors, which are not copied."""
        return {"cmd": self.cmd.state_dict(), "step": self._step}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken."""
        self.cmd.load_state_dict(state["cmd"])
        self._step = state["step"]


def require_same_interval(run: Any, every_n_steps: int | None, kind: type) -> None:
    """Raise `InputError` for a `run` that is no callback of this kind, or records other epochs or steps."""
    if run is None:
        return
    recorded: Any = run
    if not isinstance(run, kind):
        raise InputError(
            f"run is {run!r}, expected the RecorderCallback of the same trainer, which records the warm-up; pass that"
        )
    if recorded.every_n_steps != every_n_steps:
        raise InputError(
            f"run records {_interval(recorded.every_n_steps)}, online CMD is updated {_interval(every_n_steps)},"
            " expected the same; give both the same every_n_steps"
        )


def require_begun(modelling: TrainerCMD | None) -> TrainerCMD:
    """That of the training which is going on, or the last one; raises `InputError` where there is none."""
    if modelling is None:
        raise InputError("there is no online CMD yet, expected a training that has begun; start the trainer")
    return modelling


def warn_of_a_start(where: str) -> None:
    """Say that a training goes on, and its online CMD does not."""
    warnings.warn(
        f"{where} has no state of online CMD, which starts anew here; resume from a checkpoint that was saved with it,"
        " if it is to go on",
        RuntimeWarning,
        stacklevel=2,
    )


class _RunOf:
    """The run of a callback, also when the callback has closed it."""

    def __init__(self, callback: RecordingCallback) -> None:
        self._callback = callback
        self._recording: TrainerRecording | None = None

    @property
    def path(self) -> PathLike:
        return self.require().path

    def flush(self) -> None:
        self.require().flush()

    def require(self) -> TrainerRecording:
        """The recording; raises `InputError` where there is none."""
        self._recording = self._callback.recording or self._recording
        if self._recording is None:
            raise InputError(
                "the RecorderCallback that is online CMD's run records nothing, expected it among the callbacks of the"
                " trainer; add it there"
            )
        return self._recording


def _interval(every_n_steps: int | None) -> str:
    return "each epoch" if every_n_steps is None else f"every {every_n_steps} steps"
