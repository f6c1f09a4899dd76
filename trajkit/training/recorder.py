"""The recorder: one call an epoch, and the weights are safe."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import nn

from ..errors import placed
from ..layout import require_same_layout
from ..run import NonFinite, PathLike, RunWriter
from ..vector import flatten, layout_of, model_tensors


class Recorder:
    """Records a model's weights and buffers into a run, epoch by epoch.

    >>> with trajkit.Recorder(model, "runs/mnist") as recorder:
    ...     for epoch in range(recorder.next_epoch, 30):
    ...         train_one_epoch()
    ...         recorder.record(epoch, metrics={"test_accuracy": 0.91})

    A path that holds a run of the same layout is continued. Raises `LayoutError` naming the tensor where the model
    does not fit the run or cannot be recorded, `RunLockedError` while another writer holds the run, and
    `PathExistsError` where `path` holds something else.

    fsync: an epoch that was recorded survives a power cut; without, a killed process.
    nonfinite: ``"raise"`` refuses an epoch with NaN or infinite weights, ``"record"`` keeps it.
    """

    def __init__(self, model: nn.Module, path: PathLike, *, fsync: bool = True, nonfinite: NonFinite = "raise") -> None:
        self._model = model
        with placed(f"{path}: the model"):
            layout = layout_of(model_tensors(model), dict(model.named_parameters(remove_duplicate=False)))
        self._writer = RunWriter(path, fsync=fsync, nonfinite=nonfinite)
        try:
            known = self._writer.layout
            if known is not None:
                require_same_layout(layout, known, f"{self._writer.path}: the model")
        except BaseException:
            self._writer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs that are recorded, rising."""
        return self._writer.epochs

    @property
    def next_epoch(self) -> int:
        """The epoch after the last one recorded, 0 in a new run: where a resumed training goes on."""
        return self.epochs[-1] + 1 if self.epochs else 0

    def record(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Record the model as it is now; the epoch is safe when this returns.

        metrics: name -> number, kept with the epoch. Raises `InputError` for an epoch that is not later than the last
        one or for weights that are not finite, `LayoutError` where the model has changed its shape.
        """
        self._writer.require_next(epoch)
        with placed(f"{self._writer.path}: epoch {epoch}"):
            tensors = model_tensors(self._model)
            layout = layout_of(tensors, dict(self._model.named_parameters(remove_duplicate=False)))
            weights, buffers = flatten(layout, tensors)
        self._writer.append(layout, epoch, weights, buffers, metrics)

    def close(self) -> None:
        """Give the run back to other writers."""
        self._writer.close()
