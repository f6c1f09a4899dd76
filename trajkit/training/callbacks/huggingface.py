"""Recording from the Hugging Face Trainer: ``Trainer(…, callbacks=[RecorderCallback("runs/first")])``."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ...run import PathLike
from .recording import TrainerRecording, require_interval

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("transformers is not installed; pip install 'trajkit[transformers]'") from error


class RecorderCallback(TrainerCallback):  # type: ignore[misc]
    """Records the weights of each epoch, or of every n-th step, of a `transformers.Trainer` into a run.

    path: the run; without, the one that ``trajkit record RUN -- command`` names.
    every_n_steps: record every n-th optimizer step, labelled by the step, instead of each epoch, which has the number
    that the trainer's logs give it: 1 after the first one. The step is kept beside the epoch.
    options: as for `trajkit.Recorder`.

    The weights are copied right after the optimizer's step, before another callback can put averaged ones in their
    place for an evaluation, and committed with what the trainer logs at this step, an evaluation included. A training
    that is resumed from a checkpoint records what the run does not hold yet. The last epoch is recorded also where
    ``max_steps`` ends it early.
    """

    def __init__(self, path: PathLike | None = None, *, every_n_steps: int | None = None, **options: Any) -> None:
        self._path, self._options = path, options
        self._every = require_interval(every_n_steps)
        self._recording: TrainerRecording | None = None

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Open the run; record what a training that was killed had saved as a checkpoint, and not yet recorded."""
        self._close()
        self._recording = TrainerRecording(model, self._path, self._options, fresh=state.global_step == 0)
        if state.global_step and (state.global_step % self._every == 0 if self._every else _is_whole(state)):
            self._recording.hold(self._label(state), state.global_step)
            self._commit(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **known: Any
    ) -> None:
        """Copy the weights where this step, which the state does not count yet, is to be recorded."""
        if self._recording is None:
            return
        step = state.global_step + 1
        if self._every is not None:
            if step % self._every == 0:
                self._recording.hold(step, step)
        elif step % _steps_in_epoch(args, known.get("train_dataloader")) == 0:
            self._recording.hold(math.floor(state.epoch or 0) + 1, step)

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where steps are recorded: commit this one, or wait for what is logged of it."""
        if self._every is not None and state.global_step % self._every == 0:
            self._finish(state, control)

    def on_epoch_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where epochs are recorded: commit this one, or wait for what is logged of it."""
        if self._every is None:
            self._finish(state, control)

    def on_step_begin(self, _args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """Everything is logged of the step before."""
        self._commit(state)

    on_epoch_begin = on_step_begin
    on_save = on_step_begin

    def on_train_end(self, _args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """Commit everything and close the run."""
        self._commit(state)
        self._close()

    def _label(self, state: TrainerState) -> int:
        return state.global_step if self._every is not None else math.ceil(state.epoch or 0)

    def _finish(self, state: TrainerState, control: TrainerControl) -> None:
        """The step is done and its copy is held; commit it unless something is going to be logged of it."""
        if self._recording is None:
            return
        if self._recording.held_step != state.global_step:  # nobody could know that the epoch ends here
            self._recording.hold(self._label(state), state.global_step)
        logged = control.should_log or control.should_evaluate
        if not logged or (control.should_save and self._every is None and not _is_whole(state)):
            self._commit(state, wait=control.should_save)
        else:  # a checkpoint may be saved next: only the copy that is held can be recorded again from it
            self._recording.recorder.flush()

    def _commit(self, state: TrainerState, wait: bool = False) -> None:
        if self._recording is not None:
            self._recording.commit(_logged(state, self._recording.held_step), wait=wait)

    def _close(self) -> None:
        if self._recording is not None:
            recording, self._recording = self._recording, None
            recording.close()


def _is_whole(state: TrainerState) -> bool:
    """Whether the state is that of the end of an epoch; never so where the data set has no length."""
    return float(state.epoch or 0).is_integer()


def _steps_in_epoch(args: TrainingArguments, loader: Any) -> float:
    """Optimizer steps of an epoch, infinite where the data set has no length."""
    try:
        return max(math.ceil(len(loader) / int(args.gradient_accumulation_steps)), 1)
    except TypeError:
        return math.inf


def _logged(state: TrainerState, step: int | None) -> dict[str, Any]:
    """What the trainer has logged of a step, without the summary of the whole training."""
    found: dict[str, Any] = {}
    for entry in state.log_history:
        if entry.get("step") == step and "train_runtime" not in entry:
            found |= {name: value for name, value in entry.items() if name not in ("step", "epoch")}
    return found
