"""Recording and online CMD in the Hugging Face Trainer: ``Trainer(…, callbacks=[RecorderCallback("runs/first")])``."""

from __future__ import annotations

import functools
import inspect
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import InputError
from ...run import PathLike
from ..online import OnlineCMD
from .modelling import TrainerCMD, require_begun, require_same_interval, warn_of_a_start
from .recording import TrainerRecording, require_interval

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("transformers is not installed; pip install 'trajkit[transformers]'") from error

STATE_FILE = "trajkit_online_cmd.pt"


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
        self.every_n_steps = require_interval(every_n_steps)
        self.recording: TrainerRecording | None = None

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Open the run; record what a training that was killed had saved as a checkpoint, and not yet recorded."""
        self._close()
        self.recording = TrainerRecording(model, self._path, self._options, fresh=state.global_step == 0)
        if state.global_step and (
            state.global_step % self.every_n_steps == 0 if self.every_n_steps else _is_whole(state)
        ):
            self.recording.hold(self._label(state), state.global_step)
            self._commit(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **known: Any
    ) -> None:
        """Copy the weights where this step, which the state does not count yet, is to be recorded."""
        if self.recording is None:
            return
        label = _label_of_step(self.every_n_steps, args, state, known.get("train_dataloader"))
        if label is not None:
            self.recording.hold(label, state.global_step + 1)

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where steps are recorded: commit this one, or wait for what is logged of it."""
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._finish(state, control)

    def on_epoch_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where epochs are recorded: commit this one, or wait for what is logged of it."""
        if self.every_n_steps is None:
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

    def settle(self, state: TrainerState) -> None:
        """Record what is held with what is logged of it; nothing more will be."""
        self._commit(state)

    def _label(self, state: TrainerState) -> int:
        return state.global_step if self.every_n_steps is not None else math.ceil(state.epoch or 0)

    def _finish(self, state: TrainerState, control: TrainerControl) -> None:
        """The step is done and its copy is held; commit it unless something is going to be logged of it."""
        if self.recording is None:
            return
        if self.recording.held_step != state.global_step:  # nobody could know that the epoch ends here
            self.recording.hold(self._label(state), state.global_step)
        logged = control.should_log or control.should_evaluate
        if not logged or (control.should_save and self.every_n_steps is None and not _is_whole(state)):
            self._commit(state, wait=control.should_save)
        else:  # a checkpoint may be saved next: only the copy that is held can be recorded again from it
            self.recording.flush()

    def _commit(self, state: TrainerState, wait: bool = False) -> None:
        if self.recording is not None:
            self.recording.commit(_logged(state, self.recording.held_step), wait=wait)

    def _close(self) -> None:
        if self.recording is not None:
            recording, self.recording = self.recording, None
            recording.close()


class OnlineCMDCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the CMD weights of a `transformers.Trainer`, as Lightning's `WeightAveraging` keeps an average.

    warmup, modes, use_buffers, options: as for `trajkit.OnlineCMD`. Buffers are modelled by default: nobody estimates
    BatchNorm's statistics before an evaluation.
    run: the `RecorderCallback` of the same trainer, if the warm-up is to be read from its run; else it is kept in a
    temporary folder, and in checkpoints. The modes are chosen when the last epoch of the warm-up is recorded, after its
    evaluation.
    every_n_steps: update every n-th optimizer step instead of each epoch.
    evaluate: `trainer.evaluate` has the CMD weights during the training, once the warm-up is over.
    apply_at_end: the training leaves the CMD weights in the model; with `load_best_model_at_end`, those of that
    checkpoint.

    An update takes the weights that are trained, right after the optimizer's step and before an evaluation, after which
    they are back to the bit, also where it fails. A checkpoint has the trained weights as the model's, and in a file
    beside them, ``trajkit_online_cmd.pt``, what CMD keeps: a training that is resumed from it goes on to the same bits.
    After the training, `cmd` is the `OnlineCMD`.

    In a distributed training each process keeps its own, all of them the same; `run` is for a single process, and FSDP
    is refused.
    """

    def __init__(
        self,
        warmup: int = 20,
        modes: Any = 10,
        *,
        run: RecorderCallback | None = None,
        every_n_steps: int | None = None,
        evaluate: bool = True,
        apply_at_end: bool = True,
        use_buffers: bool = True,
        **options: Any,
    ) -> None:
        self.every_n_steps = require_interval(every_n_steps)
        self._run = run
        require_same_interval(run, self.every_n_steps, RecorderCallback)
        self._settings = {"warmup": warmup, "modes": modes, "use_buffers": use_buffers, **options}
        self._evaluate, self._apply_at_end = evaluate, apply_at_end
        self._modelling: TrainerCMD | None = None
        self._evaluation: Any = None

    @property
    def cmd(self) -> OnlineCMD:
        """Of the training that is going on, or of the last one; raises `InputError` before."""
        return require_begun(self._modelling).cmd

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Make the online CMD, and go on where the checkpoint was saved."""
        modelling = self._modelling = TrainerCMD(model, self._run, self._settings)
        trainer, checkpoint = _training_of(self)
        if state.global_step:
            folder = Path(checkpoint or _folder(trainer.args, state))
            if not _load(modelling, folder):
                warn_of_a_start(str(folder))
        if self._evaluate and trainer.evaluate is not self._evaluation:  # it is, after a training that failed
            self._evaluation = trainer.evaluate = self._modelled(trainer.evaluate)

    def on_step_begin(self, _args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """What the warm-up may have waited for can be recorded."""
        self._settle(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **known: Any
    ) -> None:
        """Update the online CMD after this step, which the state does not count yet."""
        if _label_of_step(self.every_n_steps, args, state, known.get("train_dataloader")) is not None:
            require_begun(self._modelling).update(state.global_step + 1)

    def on_epoch_end(self, _args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """The same where nobody could know that the epoch ends here."""
        if self.every_n_steps is None:
            require_begun(self._modelling).update(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """Save what CMD keeps in the checkpoint."""
        if args.should_save and not args.save_only_model and not state.is_hyper_param_search:
            file = _folder(args, state) / STATE_FILE
            torch.save(require_begun(self._modelling).state(), part := file.with_suffix(".part"))
            os.replace(part, file)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: TrainerControl, **__: Any) -> None:
        """Leave the CMD weights in the model."""
        self._settle(state)
        modelling = require_begun(self._modelling)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if self._apply_at_end and (best is None or _load(modelling, Path(best))):
            modelling.leave(modelling.modelled())
        trainer, _checkpoint = _training_of(self)
        if self._evaluation is not None and trainer.evaluate is self._evaluation:
            trainer.evaluate = self._evaluation.__wrapped__

    def _modelled(self, evaluate: Any) -> Any:
        """The trainer's `evaluate`, with the CMD weights; callbacks are not told that it begins, nor that it fails."""

        @functools.wraps(evaluate)
        def modelled(*args: Any, **known: Any) -> Any:
            with require_begun(self._modelling).applied():
                return evaluate(*args, **known)

        return modelled

    def _settle(self, state: TrainerState) -> None:
        require_begun(self._modelling).settle(lambda: self._run.settle(state) if self._run is not None else None)


def _load(modelling: TrainerCMD, checkpoint: Path) -> bool:
    """Whether a checkpoint has a state of online CMD, which is loaded then."""
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return False
    modelling.load(state)
    return True


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer saves its checkpoint of now."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _training_of(callback: TrainerCallback) -> tuple[Any, str | None]:
    """The trainer that calls this callback now, and the checkpoint that it resumes from.

    It tells its callbacks neither, but it is on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if callback in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise InputError(
        "the callback is called by no transformers.Trainer, expected one that has it; pass it to a Trainer"
    )


def _label_of_step(every: int | None, args: TrainingArguments, state: TrainerState, loader: Any) -> int | None:
    """The number of the epoch that the step ends, or of the step if it is one of those; the state does not count it."""
    step = state.global_step + 1
    if every is not None:
        return step if step % every == 0 else None
    return math.floor(state.epoch or 0) + 1 if step % _steps_in_epoch(args, loader) == 0 else None


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
