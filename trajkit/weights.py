"""Which weights are asked for: those of an epoch as recorded, as modelled by a fit, or an average of epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .advice import warn
from .averages import Average, Averaging
from .decomposition import Decomposition
from .errors import InputError, named_type
from .run import PathLike, Run, as_run
from .store.format import WEIGHTS
from .tensors import TensorValues


def load_weights(
    run: Run | PathLike,
    epoch: int | None = None,
    fit: str | Decomposition | None = None,
    *,
    average: str | Iterable[int] | None = None,
    ema: float | None = None,
    ema_half_life: float | None = None,
) -> dict[str, Any]:
    """Name -> `torch.Tensor` of an epoch for `Module.load_state_dict`: as recorded, as modelled by a saved `fit`, or
    averaged up to it.

    epoch: by default the last one that is not marked as bad. fit: its name, or itself. average: ``"last:10"``, or the
    epochs, which weigh the same. ema, ema_half_life: the decay per recorded epoch, or the half-life in recorded epochs,
    of an exponential moving average over all epochs up to `epoch`. See `Run.average`; buffers are those recorded at the
    epoch.

    Raises `UnknownNameError` for an epoch or fit that does not exist, `InputError` for more than one of fit, average,
    ema and ema_half_life, and for a fit of another run. Gives a `trajkit.TrajkitWarning` for an epoch that the
    fit was not made for.
    """
    return source_of(run, epoch, fit, Averaging(average, ema, ema_half_life)).state_dict()


@dataclass(frozen=True)
class Source:
    """The weights of an epoch as recorded, or by a fit or an average; buffers as recorded then."""

    run: Run
    epoch: int
    by: Decomposition | Average | None = None

    @property
    def origin(self) -> dict[str, str]:
        """Where they come from, for the head of a file."""
        if isinstance(self.by, Average):
            return {"epoch": str(self.epoch), "average": str(self.by)}
        return {"epoch": str(self.epoch)} | ({} if self.by is None else {"fit": self.by.name})

    @property
    def values(self) -> TensorValues:
        """All tensors, piece by piece."""
        if isinstance(self.by, Average):
            return self.by.values
        weights = self._recorded if self.by is None else self._modelled
        return TensorValues(self.run.layout, weights, self.run.stored_buffers(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """Name -> `torch.Tensor`."""
        if isinstance(self.by, Average):
            return self.by.state_dict()
        return (self.run if self.by is None else self.by).state_dict(self.epoch)

    def _recorded(self, start: int, stop: int) -> NDArray[Any]:
        return np.asarray(self.run.archive.read(WEIGHTS, [self.run.row_of(self.epoch)], (start, stop))[0])

    def _modelled(self, start: int, stop: int) -> NDArray[Any]:
        assert isinstance(self.by, Decomposition)
        return np.asarray(self.by.modelled([self.epoch], start, stop)[0])


def source_of(run: Run | PathLike, epoch: int | None, fit: str | Decomposition | None, averaging: Averaging) -> Source:
    """Return what `load_weights` and `write_checkpoint` are asked for; they say how, and what is raised."""
    given = [*([] if fit is None else ["fit"]), *averaging.given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other, expected one of them at most; give one")
    run = as_run(run)
    if averaging.given:
        averaged = averaging.of(run, epoch)
        return Source(run, averaged.epochs[-1], averaged)
    epoch = run.last_epoch if epoch is None else epoch
    run.row_of(epoch)
    if fit is None:
        return Source(run, epoch)
    decomposition = fit_of(run, fit)
    warn_of_uncovered(decomposition, [epoch])
    return Source(run, epoch, decomposition)


def fit_of(run: Run, fit: str | Decomposition) -> Decomposition:
    """Return the fit of a run that is given by its name or itself; raise `InputError` for another run's."""
    if isinstance(fit, str):
        return run.fit(fit)
    if not isinstance(fit, Decomposition):
        raise InputError(
            f"fit is {named_type(fit)}, expected the name of a saved fit or a Decomposition; pass its name"
        )
    if fit.run is run:
        return fit
    if not _is_same_place(fit.run.path, run.path):
        raise InputError(
            f"{run.path}: fit '{fit.name}' is of the run {fit.run.path}, expected one of this run; fit this run"
        )
    return replace(fit, run=run)


def _is_same_place(one: Path | str, other: Path | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):  # a URL
        return one == other
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def warn_of_uncovered(fit: Decomposition, epochs: Sequence[int]) -> None:
    """Warn once where a fit was not made for some of the epochs that it is to model."""
    uncovered = [epoch for epoch in epochs if not fit.covers(epoch)]
    if not uncovered:
        return
    one = len(uncovered) == 1
    which = f"epoch {uncovered[0]} is" if one else f"{len(uncovered)} epochs, {uncovered[0]} to {uncovered[-1]}, are"
    warn(
        f"{fit.run.path}: {which} not among the {len(fit.epochs)} epochs, {fit.epochs[0]} to {fit.epochs[-1]}, that fit"
        f" '{fit.name}' was made of; the weights there are modelled by their references' values alone"
    )
