"""Which weights are asked for: those of an epoch as recorded, as modelled by a fit, or an average of epochs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .averages import Average, Averaging
from .decomposition import Decomposition
from .errors import InputError
from .run import PathLike, Run, open_run
from .store.format import WEIGHTS
from .tensors import TensorValues


def load_weights(
    run: Run | PathLike,
    epoch: int | None = None,
    fit: str | None = None,
    *,
    average: str | Iterable[int] | None = None,
    ema: float | None = None,
    ema_half_life: float | None = None,
) -> dict[str, Any]:
    """Name -> `torch.Tensor` of an epoch for `Module.load_state_dict`: as recorded, as modelled by a saved `fit`, or
    averaged up to it.

    epoch: by default the last one that is not marked as bad. average: ``"last:10"``, or the epochs, which weigh the
    same. ema, ema_half_life: the decay per recorded epoch, or the half-life in recorded epochs, of an exponential
    moving average over all epochs up to `epoch`. See `Run.average`; buffers are those recorded at the epoch.

    Raises `UnknownNameError` for an epoch or fit that does not exist, `InputError` for more than one of fit, average,
    ema and ema_half_life.
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


def source_of(run: Run | PathLike, epoch: int | None, fit: str | None, averaging: Averaging) -> Source:
    """Return what `load_weights` and `write_checkpoint` are asked for; they say how, and what is raised."""
    given = [*([] if fit is None else ["fit"]), *averaging.given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other, expected one of them at most; give one")
    run = run if isinstance(run, Run) else open_run(run)
    if averaging.given:
        averaged = averaging.of(run, epoch)
        return Source(run, averaged.epochs[-1], averaged)
    epoch = run.last_epoch if epoch is None else epoch
    run.row_of(epoch)
    return Source(run, epoch, None if fit is None else run.fit(fit))
