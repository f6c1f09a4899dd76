"""What the callbacks have in common: which epochs or steps are recorded, and when they are given to the recorder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import InputError
from ...run import PathLike, plain_metrics
from ..recorder import Held, Recorder


class TrainerRecording:
    """The recorder of one training by a trainer: at most one copy of the model is held, until its metrics are known.

    What a run holds already is not recorded again: a trainer that is started again repeats what came after its last
    checkpoint.
    """

    def __init__(self, model: nn.Module, path: PathLike | None, options: Mapping[str, Any], fresh: bool) -> None:
        self.recorder = Recorder(model, path, **options)
        self._held: tuple[int, Held] | None = None
        last = self.recorder.next_epoch - 1
        if fresh and self.recorder.epochs:
            warnings.warn(
                f"{self.recorder.path}: the training starts anew, and the run holds epochs up to {last}: they are not"
                " recorded again; choose another path if this is another training",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def path(self) -> PathLike:
        """Of the run."""
        return self.recorder.path

    @property
    def held_step(self) -> int | None:
        """The step at which the copy that is held was taken."""
        return None if self._held is None else self._held[0]

    def hold(self, label: int, step: int) -> None:
        """Copy the model as it is now, unless the label is recorded already."""
        self.drop()
        if label >= self.recorder.next_epoch:
            self._held = step, self.recorder.hold(label, step=step)

    def commit(self, metrics: Mapping[str, Any], *, wait: bool = False) -> None:
        """Record what is held, if anything is, with those metrics that are numbers."""
        if self._held is not None:
            (_, held), self._held = self._held, None
            self.recorder.commit(held, _numbers(metrics), wait=wait)
        elif wait:
            self.recorder.flush()

    def flush(self) -> None:
        """Return when everything that was given to `commit` is committed."""
        self.recorder.flush()

    def drop(self) -> None:
        """Do not record what is held."""
        if self._held is not None:
            self.recorder.drop(self._held[1])
            self._held = None

    def close(self) -> None:
        """Commit everything and give the run back."""
        self.recorder.close()


def require_interval(every_n_steps: int | None) -> int | None:
    """The number of steps between two records, None for every epoch; raises `InputError`."""
    if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
        raise InputError(f"every_n_steps is {every_n_steps!r}, expected a number of steps, at least 1; pass it or None")
    return every_n_steps


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those metrics that are numbers; trainers log texts, tables and pictures, too."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(value, str):
            with contextlib.suppress(InputError):
                found |= plain_metrics({name: value})
    return found
