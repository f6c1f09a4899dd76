"""The recorder: one call an epoch that copies the model and returns; the weights are made safe beside the training."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import nn

from ..errors import InputError, placed
from ..layout import ParameterLayout, require_same_layout
from ..run import NonFinite, PathLike, RunWriter, plain_metrics
from ..store.forecast import Forecast, forecast
from ..vector import is_spread
from .background import Committer, Snapshot
from .launching import RUN_VARIABLE
from .model import Patterns, RecordedModel, warn_of_stubs
from .ranks import Word, refusal, require_granted, this_rank
from .snapshot import gather_for_another, is_pinnable


@dataclass(frozen=True)
class Held:
    """A copy of the model that `Recorder.hold` took; what another process records is no snapshot here."""

    epoch: int
    snapshot: Snapshot | None


class Recorder:
    """Records a model's weights and buffers into a run, epoch by epoch, while the training goes on.

    >>> with trajkit.Recorder(model, "runs/mnist") as recorder:
    ...     for epoch in range(recorder.next_epoch, 30):
    ...         train_one_epoch()
    ...         recorder.record(epoch, metrics={"test_accuracy": 0.91})

    `record` copies the model and returns; a thread commits the copies in their order, at most two at a time: where it
    falls behind, `record` waits. What was recorded when a ``with`` block, or the interpreter, ends is committed first;
    only a process that is killed loses the epochs that are under way, never a part of one.

    Without `path`, the run is the one that ``trajkit record RUN -- command`` names in TRAJKIT_RUN. A path that holds a
    run of the same layout is continued.

    Weights are the model's parameters, under the names that its state dict gives them; wrappers such as
    `DistributedDataParallel`, `torch.compile`, `AveragedModel` and activation checkpointing do not show in names. Extra
    state of modules (`get_extra_state`) is left out. In a distributed training, rank 0 records; other ranks may do the
    same calls, and have to where parameters are spread over them (FSDP): those of FSDP2 are gathered one by one.

    fsync: an epoch that was committed survives a power cut; without, a killed process.
    nonfinite: ``"raise"`` refuses an epoch with NaN or infinite weights, ``"record"`` keeps it.
    include, exclude: patterns of tensor names, as in a shell: only what is included and not excluded is recorded.
    trainable_only: parameters that need no gradient now, and buffers, are not recorded.

    Raises `LayoutError` naming the tensor where the model does not fit the run or cannot be recorded, `RunLockedError`
    while another writer holds the run, `PathExistsError` where `path` holds something else, and `InputError` for a
    pattern that no tensor has, or what is no `torch.nn.Module`.
    """

    def __init__(
        self,
        model: nn.Module,
        path: PathLike | None = None,
        *,
        fsync: bool = True,
        nonfinite: NonFinite = "raise",
        include: Patterns = (),
        exclude: Patterns = (),
        trainable_only: bool = False,
    ) -> None:
        self.path = _path(path)
        self._word = Word(self.path)
        self._committer: Committer | None = None
        self._elsewhere: list[int] = []
        with placed(f"{self.path}: the model"):
            self._model = RecordedModel(model, include, exclude, trainable_only)
            self._model.require_tensors()
            layout = self._model.layout(self._model.tensors())
        warn_of_stubs(layout)
        if this_rank() == 0:
            self._committer = self._opened(layout, fsync, nonfinite)
            self._end = weakref.finalize(self, self._committer.end)
        else:
            self._elsewhere = require_granted(self._word.hear())

    def _opened(self, layout: ParameterLayout, fsync: bool, nonfinite: NonFinite) -> Committer:
        try:
            writer = RunWriter(self.path, fsync=fsync, nonfinite=nonfinite)
            try:
                if writer.layout is not None:
                    require_same_layout(layout, writer.layout, f"{writer.path}: the model")
            except BaseException:
                writer.close()
                raise
        except BaseException as error:
            self._word.say(refusal(error))
            raise
        self._word.say(writer.epochs)
        self.path = writer.path
        return Committer(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self.close()
            return
        try:  # what went wrong in the training is what is raised
            self.close()
        except Exception as error:
            value.add_note(f"while this was raised, {'; '.join([str(error), *getattr(error, '__notes__', [])])}")

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs that are committed, rising; on other ranks than 0, those that they know of."""
        return tuple(self._elsewhere) if self._committer is None else self._committer.epochs

    @property
    def next_epoch(self) -> int:
        """The epoch after the last one recorded, 0 in a new run: where a resumed training goes on."""
        last = max(self._elsewhere, default=None) if self._committer is None else self._committer.last
        return 0 if last is None else last + 1

    def forecast(self, epochs: int) -> Forecast:
        """What a run of so many epochs of this model takes, those that are recorded among them; `print` tells it."""
        layout = self._model.layout(self._model.tensors())
        return (
            forecast(layout, epochs, self.path) if self._committer is None else self._committer.forecast(layout, epochs)
        )

    def record(
        self,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        wait: bool = False,
    ) -> None:
        """Record the model as it is now: copy it, and return; the copy is committed in the background.

        metrics: name -> number, kept with the epoch.
        step: the number of the training step, kept beside the epoch (`Run.steps`) of all epochs or of none; without an
            epoch, the step is its label.
        wait: return when the epoch is committed.

        Raises `InputError` for an epoch or a step that is not later than the last one, `LayoutError` where the model
        has changed its shape. What goes wrong while an epoch is committed (weights that are not finite, a full disk)
        is raised by the next call of `record`, `flush` or `close`, once; that call then records nothing, and neither
        that epoch nor those that came behind it are recorded, as the error's note says. Whoever catches it goes on at
        `next_epoch`.
        """
        plain = plain_metrics(metrics or {})
        self.commit(self.hold(epoch, step=step), plain, wait=wait)

    def hold(self, epoch: int | None = None, *, step: int | None = None) -> Held:
        """As `record`, for metrics that are known later: copies the model; what is returned has to be passed to
        `commit`, or `drop`, before a second one is held.
        """
        if epoch is None and step is None:
            raise InputError(f"{self.path}: neither epoch nor step is given, expected at least one; pass the epoch")
        label: Any = step if epoch is None else epoch
        with placed(f"{self.path}: epoch {label}"):
            tensors = self._model.tensors()
            layout = self._model.layout(tensors)
        spread = any(is_spread(tensor) for tensor in tensors.values())
        if self._committer is None:
            if spread:
                require_granted(self._word.hear())
                gather_for_another(layout, tensors)
            self._elsewhere.append(label)
            return Held(label, None)
        try:
            label, step = self._committer.require_next(label, step, layout)
            memory = self._committer.memory(layout, is_pinnable(tensors))
        except BaseException as error:
            if spread:
                self._word.say(refusal(error))
            raise
        try:
            if spread:
                self._word.say("gather")
                memory.gather(tensors)
            else:
                memory.take(tensors)
        except BaseException:
            self._committer.give_back(memory)
            raise
        return Held(label, Snapshot(label, step, memory))

    def commit(self, held: Held, metrics: Mapping[str, Any] | None = None, *, wait: bool = False) -> None:
        """Commit what was held, with its metrics, as `record` does."""
        if held.snapshot is None or self._committer is None:
            return
        held.snapshot.metrics.update(plain_metrics(metrics or {}))
        self._committer.put(held.snapshot)
        if wait:
            self._committer.wait()

    def drop(self, held: Held) -> None:
        """Do not record what was held."""
        if held.snapshot is not None and self._committer is not None:
            self._committer.give_back(held.snapshot.memory)

    def flush(self) -> None:
        """Return when every epoch that was recorded is committed; raises what went wrong, as `record`."""
        if self._committer is not None:
            self._committer.wait()

    def close(self) -> None:
        """Commit what was recorded and give the run back to other writers; raises what went wrong, as `record`."""
        if self._committer is not None:
            self._end()
            self._committer.join()


def _path(given: PathLike | None) -> PathLike:
    if given is not None:
        return given
    named = os.environ.get(RUN_VARIABLE)
    if not named:
        raise InputError(
            f"the recorder has no path and {RUN_VARIABLE} is not set, expected a run; pass a path, or start the"
            " training by 'trajkit record RUN -- command'"
        )
    return named
