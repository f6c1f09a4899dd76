"""Averages of recorded epochs, computed from the archive piece by piece; nobody has to average during a training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .kernels.averaging import averaged, equal_steps, exponential_steps
from .store.format import WEIGHTS
from .tensors import TensorValues

if TYPE_CHECKING:
    from .run import Run

BATCH_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Average:
    """The average of the weights of e recorded epochs of a run: equal weights, as in SWA, or an EMA with a `decay`.

    The recursion and its start, at the first of the epochs, are those of `torch.optim.swa_utils.AveragedModel`, in
    float64; the result is rounded once, to the original dtype. Buffers are not averaged: they are those of the last of
    the epochs. BatchNorm's statistics do not fit averaged weights; `torch.optim.swa_utils.update_bn` estimates them
    again.
    """

    run: Run
    rows: tuple[int, ...]
    """Positions of the epochs, rising."""
    decay: float | None = None
    left_out: tuple[int, ...] = ()
    """Epochs that would belong to it, and that `repair` has found damaged."""

    def __str__(self) -> str:
        kind = "average" if self.decay is None else f"EMA {self.decay:g}"
        first, last = self.epochs[0], self.epochs[-1]
        return f"{kind} of {len(self.rows)} epochs, {first} to {last}" if first != last else f"{kind} of epoch {last}"

    @property
    def epochs(self) -> tuple[int, ...]:
        """(e,) labels of the averaged epochs, rising."""
        return tuple(self.run.epochs[list(self.rows)].tolist())

    @property
    def has_batch_statistics(self) -> bool:
        """Whether there are statistics of BatchNorm, which would have to be estimated again."""
        buffers = self.run.layout.buffers
        return any(name.endswith(BATCH_STATISTICS) for entry in buffers for name in entry.names)

    def weights(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """(n,) averages of the weights ``start : stop``, not rounded; one epoch of them is held at a time."""
        columns = (start, self.run.layout.n_weights if stop is None else stop)
        archive, n_epochs = self.run.archive, len(self.rows)
        steps = equal_steps(n_epochs) if self.decay is None else exponential_steps(n_epochs, self.decay)
        archive.check(WEIGHTS, np.array(self.rows), columns)
        epoch = np.empty((1, columns[1] - columns[0]), np.float32)
        return averaged((archive.read(WEIGHTS, [row], columns, epoch)[0] for row in self.rows), steps)

    @property
    def values(self) -> TensorValues:
        """The averaged weights and the buffers of the last epoch, piece by piece."""
        return TensorValues(self.run.layout, self.weights, self.run.stored_buffers(self.epochs[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Name -> `torch.Tensor` of the averaged weights and of the buffers at the last epoch."""
        return self.values.to_tensors()


def average_of(run: Run, epochs: str | Iterable[int] | None, ema: float | None, up_to: int | None) -> Average:
    """See `Run.average`."""
    if (epochs is None) == (ema is None):
        found = "neither" if ema is None else "both"
        raise InputError(f"an average takes epochs or the decay of an EMA, found {found}; give one of them")
    if ema is not None and not (isinstance(ema, int | float) and 0 <= ema < 1):
        raise InputError(f"ema is {ema!r}, expected a decay from 0 up to, not including, 1; 0.999 is usual")
    end = len(run.epochs) if up_to is None else run.row_of(up_to) + 1
    n_last = _number_of_last(epochs) if isinstance(epochs, str) else 0
    rows = list(range(end)) if epochs is None or isinstance(epochs, str) else run.rows_of(epochs).tolist()
    if rows and rows[-1] >= end:
        later = run.epochs[rows[-1]]
        raise InputError(f"{run.path}: epoch {later} is to be averaged, expected epochs up to {up_to}; leave it out")
    bad = run.archive.marks
    sound = [row for row in rows if row not in bad]
    if len(sound) < max(1, n_last):
        asked = f"the last {n_last} epochs are" if n_last else "epochs are"
        marked = f", and {len(rows) - len(sound)} marked as bad" if len(sound) < len(rows) else ""
        raise InputError(
            f"{run.path}: {asked} to be averaged, there are {len(sound)}{marked}; ask for no more than there are"
        )
    rows = [row for row in rows if row >= sound[-n_last]] if n_last else rows
    left_out = tuple(int(run.epochs[row]) for row in rows if row in bad)
    return Average(run, tuple(row for row in rows if row not in bad), ema, left_out)


def _number_of_last(text: str) -> int:
    """N of ``last:N``."""
    found = re.fullmatch(r"last:(\d{1,9})", text, re.ASCII)
    if found is None or int(found[1]) == 0:
        raise InputError(
            f"average is {text!r}, expected last:N of at least one epoch, or a list of epochs; write last:10"
        )
    return int(found[1])
