"""Recording and online CMD in Lightning: ``Trainer(…, callbacks=[RecorderCallback("runs/first")])``.

For `lightning.pytorch` as for `pytorch_lightning`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ...run import PathLike
from ..online import OnlineCMD
from .lightning_base import EachEpochOrStep
from .modelling import TrainerCMD, require_begun, require_same_interval, warn_of_a_start
from .recording import TrainerRecording


class RecorderCallback(EachEpochOrStep):
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

    of_a_training = ("recording",)

    def __init__(self, path: PathLike | None = None, *, every_n_steps: int | None = None, **options: Any) -> None:
        super().__init__(every_n_steps)
        self._path, self._options = path, options
        self.recording: TrainerRecording | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Open the run."""
        self._close()
        self._last = None
        self.recording = TrainerRecording(pl_module, self._path, self._options, fresh=trainer.global_step == 0)

    def on_train_epoch_start(self, trainer: Any, _pl_module: nn.Module) -> None:
        """Everything is logged of the epoch before."""
        self._commit(trainer)

    def reached(self, trainer: Any, label: int, step: int) -> None:
        """Copy the weights."""
        if self.recording is not None:
            self.recording.hold(label, step)
            if self.every_n_steps is not None:
                self._commit(trainer)

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

    def settle(self, trainer: Any) -> None:
        """Record what is held with what is known of it; nothing more will be logged."""
        self._commit(trainer)

    def _commit(self, trainer: Any, wait: bool = False) -> None:
        if self.recording is not None:
            self.recording.commit(trainer.callback_metrics, wait=wait)

    def _close(self) -> None:
        if self.recording is not None:
            recording, self.recording = self.recording, None
            recording.close()


class OnlineCMDCallback(EachEpochOrStep):
    """Keeps the CMD weights of a Lightning `Trainer.fit`, as `WeightAveraging` keeps an average.

    warmup, modes, use_buffers, options: as for `trajkit.OnlineCMD`. Buffers are modelled by default, as
    `WeightAveraging` averages them: nobody estimates BatchNorm's statistics before a validation.
    run: the `RecorderCallback` of the same trainer, if the warm-up is to be read from its run; else it is kept in a
    temporary folder, and in checkpoints. The modes are chosen when the last epoch of the warm-up is recorded, after its
    validation.
    every_n_steps: update every n-th optimizer step instead of each epoch.
    evaluate: a validation within the fit sees the CMD weights, once the warm-up is over.
    apply_at_end: the fit leaves the CMD weights in the model, as `WeightAveraging` leaves the average.

    An update takes the weights that are trained, at the end of the last batch and before a validation, after which they
    are back to the bit, also where it fails. A checkpoint has the trained weights as the model's, and what CMD keeps
    beside them: a fit that is resumed from it goes on to the same bits. After the fit, `cmd` is the `OnlineCMD`.

    Under DDP each process keeps its own, all of them the same; `run` is for a single process, and FSDP is refused.
    """

    of_a_training = ("_modelling",)

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
        super().__init__(every_n_steps)
        self._run = run
        require_same_interval(run, self.every_n_steps, RecorderCallback)
        self._settings = {"warmup": warmup, "modes": modes, "use_buffers": use_buffers, **options}
        self._evaluate, self._apply_at_end = evaluate, apply_at_end
        self._modelling: TrainerCMD | None = None
        self._loaded: dict[str, Any] = {}
        self._final: dict[str, Tensor] = {}
        self._validation = ExitStack()

    @property
    def cmd(self) -> OnlineCMD:
        """Of the fit that is going on, or of the last one; raises `InputError` before."""
        return require_begun(self._modelling).cmd

    def setup(self, _trainer: Any, _pl_module: nn.Module, stage: str) -> None:
        """Forget what was loaded for another fit."""
        if stage == "fit":
            self._modelling, self._loaded = None, {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of online CMD."""
        return self._loaded if self._modelling is None else self._modelling.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the model is where it is trained."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the online CMD, and go on where the checkpoint was saved."""
        self._last = None
        self._modelling = TrainerCMD(pl_module, self._run, self._settings)
        if self._loaded:
            self._modelling.load(self._loaded)
            self._loaded = {}
        elif trainer.global_step:
            warn_of_a_start("the checkpoint")

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """What the warm-up may have waited for can be recorded."""
        self._settle(trainer)

    def reached(self, _trainer: Any, _label: int, step: int) -> None:
        """Update the online CMD."""
        if self._modelling is not None:
            self._modelling.update(step)

    def on_validation_epoch_start(self, trainer: Any, *_: Any) -> None:
        """Put the CMD weights into the model."""
        if self._modelling is not None and self._evaluate and trainer.state.fn == "fit":
            self._validation.enter_context(self._modelling.applied())

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Put the trained weights back."""
        self._validation.close()

    on_exception = on_validation_epoch_end

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Copy the CMD weights; checkpoints may still be saved, of the trained ones."""
        self._settle(trainer)
        if self._modelling is not None and self._apply_at_end:
            self._final = self._modelling.modelled()

    def on_fit_end(self, *_: Any) -> None:
        """Leave them in the model."""
        if self._modelling is not None:
            self._modelling.leave(self._final)
        self._final = {}

    def _settle(self, trainer: Any) -> None:
        if self._modelling is not None:
            self._modelling.settle(lambda: self._run.settle(trainer) if self._run is not None else None)
