"""Averages of recorded epochs, computed from the archive piece by piece; nobody has to average during a training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .advice import warn
from .errors import InputError
from .kernels.averaging import averaged, equal_steps, exponential_steps
from .store.format import WEIGHTS
from .tensors import TensorValues

if TYPE_CHECKING:
    from .run import Run

BATCH_STATISTICS = ("running_mean", "running_var")

MOST_OF_FIRST = 0.05
"""Share of its first epoch in an EMA, above which a warning names it."""

SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 1e-3, 1e12
"""Epochs. With the shorter one an average is the last epoch, to float64; the longer one's decay is still below 1."""


@dataclass(frozen=True)
class Average:
    """The average of the weights of e recorded epochs of a run: equal weights, as in SWA, or an EMA with a `decay`.

    The decay is per averaged epoch, where that of a training is per step: 0.999 is usual there, and here it leaves 96 %
    of the first of 40 epochs. The recursion and its start, at the first of the epochs, are those of
    `torch.optim.swa_utils.AveragedModel`, in float64; the result is rounded once, to the original dtype. Buffers are
    not averaged: they are those of the last of the epochs. BatchNorm's statistics do not fit averaged weights;
    `torch.optim.swa_utils.update_bn` estimates them again.
    """

    run: Run
    rows: tuple[int, ...]
    """Positions of the epochs, rising."""
    decay: float | None = None
    left_out: tuple[int, ...] = ()
    """Epochs that would belong to it, and that `repair` has found damaged."""
    half_life: float | None = None
    """Epochs after which an epoch counts for half, where the decay was given by it."""

    def __str__(self) -> str:
        kind = "average" if self.decay is None else f"EMA {self.decay:g}"
        kind += "" if self.half_life is None else f" (half-life {self.half_life:g})"
        first, last = self.epochs[0], self.epochs[-1]
        return f"{kind} of {len(self.rows)} epochs, {first} to {last}" if first != last else f"{kind} of epoch {last}"

    @property
    def epochs(self) -> tuple[int, ...]:
        """(e,) labels of the averaged epochs, rising."""
        return tuple(self.run.epochs[list(self.rows)].tolist())

    @property
    def share_of_first(self) -> float:
        """Weight of the first of the epochs in the average, in (0, 1]."""
        n_epochs = len(self.rows)
        return 1 / n_epochs if self.decay is None else self.decay ** (n_epochs - 1)

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


@dataclass(frozen=True)
class Averaging:
    """Which average of recorded epochs is asked for, under the names of the arguments; see `Run.average`."""

    average: str | Iterable[int] | None = None
    ema: float | None = None
    ema_half_life: float | None = None

    @property
    def given(self) -> list[str]:
        """Names of the arguments that are given."""
        return [name for name, value in vars(self).items() if value is not None]

    def of(self, run: Run, up_to: int | None) -> Average:
        """Return the average of the epochs of a run up to one; warn where an EMA is mostly its first epoch."""
        if len(self.given) != 1:
            found = "neither" if not self.given else " and ".join(self.given)
            raise InputError(
                f"an average takes epochs, the decay of an EMA (ema) or its half-life (ema_half_life), found {found};"
                " give one of them"
            )
        decay = self._decay()
        rows, left_out = _rows_of(run, self.average, up_to)
        averaged = Average(run, rows, decay, left_out, self.ema_half_life)
        if averaged.decay is not None and len(rows) > 1 and averaged.share_of_first > MOST_OF_FIRST:
            most = math.floor(10 * (len(rows) - 1) * math.log(2) / -math.log(MOST_OF_FIRST)) / 10
            warn(
                f"{run.path}: {averaged}: {100 * averaged.share_of_first:.3g} % of it is the first epoch, as the decay"
                f" is per recorded epoch; a half-life of {most:g} or less (ema_half_life=, --ema-half-life) leaves at"
                f" most {100 * MOST_OF_FIRST:g} %"
            )
        return averaged

    def _decay(self) -> float | None:
        """Return the decay per epoch, None for an average of equal weights."""
        if self.ema is not None:
            if not _is_number(self.ema) or not 0 <= self.ema < 1:
                raise InputError(
                    f"ema is {self.ema!r}, expected a decay from 0 up to, not including, 1; it is per recorded epoch:"
                    " take 0.9, or ema_half_life=5"
                )
            return float(self.ema)
        if self.ema_half_life is None:
            return None
        half_life = self.ema_half_life
        if not _is_number(half_life) or not 0 < half_life < LONGEST_HALF_LIFE:
            raise InputError(f"ema_half_life is {half_life!r}, expected a number of recorded epochs above 0; take 5")
        return float(2 ** -(1 / max(half_life, SHORTEST_HALF_LIFE)))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _rows_of(
    run: Run, epochs: str | Iterable[int] | None, up_to: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of the epochs to average, and the labels of those that are left out as bad."""
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
    return tuple(row for row in rows if row not in bad), left_out


def _number_of_last(text: str) -> int:
    """Return N of ``last:N``."""
    found = re.fullmatch(r"last:(\d{1,9})", text, re.ASCII)
    if found is None or int(found[1]) == 0:
        cure = range_of(text) or "last:10"
        raise InputError(
            f"average is {text!r}, expected last:N of at least one epoch, or a list of epochs; write {cure}"
        )
    return int(found[1])


def range_of(text: str) -> str | None:
    """Return how Python spells the epochs of a text such as ``10:40``, None for another text."""
    found = re.fullmatch(r"\s*(-?\d{1,18})\s*:\s*(-?\d{1,18})\s*", text, re.ASCII)
    return None if found is None else "range({}, {})".format(*sorted(map(int, found.groups())))
