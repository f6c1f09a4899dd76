"""A run: the recorded trajectory of one training. `Run` reads it, `RunWriter` appends epochs to it."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from .averages import Average, Averaging, range_of
from .decomposition import Decomposition
from .errors import InputError, UnknownNameError
from .layout import ParameterLayout, TensorEntry
from .replay import OnlineDecomposition
from .store.archive import Archive
from .store.evaluations import Evaluation
from .store.forecast import Forecast, forecast
from .store.format import PROBE, WEIGHTS, buffer_path
from .store.pieces import WeightSource as WeightSource
from .store.place import PathLike as PathLike
from .store.probe import draw_probe
from .store.results import Results, results_beside
from .store.sources import Source
from .store.writer import EpochValues, open_writer
from .tensors import to_tensors
from .trajectories import Trajectories

NonFinite = Literal["raise", "record"]

RESULTS_VARIABLE = "TRAJKIT_RESULTS"
"""Name of the environment variable with the folder in which the results of runs are kept."""


def open_run(path: PathLike, results: PathLike | None = None) -> Run:
    """Open the run in a directory, or at a URL such as ``s3://bucket/run``, for reading.

    Epochs that are recorded later are seen by opening it again.

    results: a folder, or a URL, in which fits and evaluations of the run are kept instead of in the run itself, which
        may be one that can only be read; by default the folder that TRAJKIT_RESULTS names, if any. Several runs can
        share it. Results that are saved in the run are read all the same.

    Raises `RunNotFoundError` where there is no run or no epoch yet, `UnsupportedFormatError` for another format,
    `DamagedRunError` where its metadata is damaged.
    """
    return Run(Archive.open(path), results or os.environ.get(RESULTS_VARIABLE) or None)


def as_run(run: Run | PathLike, results: PathLike | None = None) -> Run:
    """Return the run, opened where it is a path; `results` as for `open_run`."""
    if not isinstance(run, Run):
        return open_run(run, results)
    return run if results is None else Run(run.archive, results)


@dataclass(frozen=True)
class Run:
    """The recorded trajectory of one training: E epochs of N weights, and the buffers beside them."""

    archive: Archive
    results_folder: PathLike | None = None
    """Folder or URL beside the run in which its results are kept; None where they are kept in the run."""

    def __repr__(self) -> str:
        return f"Run('{self.path}', {len(self.epochs)} epochs, {self.layout.n_weights} weights)"

    @property
    def path(self) -> Path | str:
        """The run's directory, or its URL."""
        return self.archive.objects.root

    @property
    def layout(self) -> ParameterLayout:
        """Names, shapes, dtypes and places of the recorded tensors."""
        return self.archive.layout

    @cached_property
    def epochs(self) -> NDArray[np.int64]:
        """(E,) recorded labels, rising."""
        return np.array([record.epoch for record in self.archive.records], dtype=np.int64)

    @cached_property
    def steps(self) -> NDArray[np.int64] | None:
        """(E,) the training's step at each epoch, rising; None where the run was recorded without steps."""
        steps = [record.step for record in self.archive.records if record.step is not None]
        return np.array(steps, dtype=np.int64) if steps else None

    @property
    def bad_epochs(self) -> tuple[int, ...]:
        """Epochs that `repair` has found damaged, rising; what takes all epochs leaves them out."""
        return tuple(self.epochs[sorted(self.archive.marks)].tolist())

    @property
    def last_epoch(self) -> int:
        """The last recorded epoch that is not a bad one; raises `InputError` where all are."""
        sound = self.rows_of(None)
        if sound.size == 0:
            raise InputError(f"{self.path}: all epochs are marked as bad, expected one that is not; heal one")
        return int(self.epochs[sound[-1]])

    @cached_property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Epoch -> the metrics recorded with it."""
        return {record.epoch: dict(record.metrics) for record in self.archive.records}

    @cached_property
    def weights(self) -> Trajectories:
        """The (E, N) float32 trajectory matrix, read where it is indexed; NumPy and dask take it as it is."""
        return Trajectories(self.archive)

    @cached_property
    def probe_index(self) -> NDArray[np.int64]:
        """(P,) rising indices of the weights whose values are kept once more in a small row each epoch."""
        return self.archive.read_probe_index()

    def row_of(self, epoch: int) -> int:
        """Position of a recorded epoch; raises `UnknownNameError` naming the nearest ones."""
        epoch = _label(epoch, "epoch")
        row = int(np.searchsorted(self.epochs, epoch))
        if row == len(self.epochs) or self.epochs[row] != epoch:
            near = ", ".join(str(label) for label in self.epochs[max(row - 2, 0) : row + 2])
            raise UnknownNameError(f"{self.path}: no epoch {epoch}; the run has {len(self.epochs)}, nearest: {near}")
        return row

    def rows_of(self, epochs: Iterable[int] | None) -> NDArray[np.int64]:
        """(e,) rising positions of the given epochs, of all but the bad ones when None.

        Raises `InputError` for an epoch named twice.
        """
        if epochs is None:
            return np.array([row for row in range(len(self.epochs)) if row not in self.archive.marks], dtype=np.int64)
        if isinstance(epochs, str | bytes) or not isinstance(epochs, Iterable):
            cure = (isinstance(epochs, str) and range_of(epochs)) or "a list or a range"
            raise InputError(f"epochs is {epochs!r}, expected several integers; pass {cure}")
        rows = np.array(sorted(self.row_of(epoch) for epoch in epochs), dtype=np.int64)
        if np.any(np.diff(rows) == 0):
            twice = self.epochs[rows[:-1][np.diff(rows) == 0][0]]
            raise InputError(f"epoch {twice} is named twice, expected each once; name it once")
        return rows

    def columns(self, index: NDArray[np.int64], rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), k) trajectories of single weights: those of the probe from it, the others chunk by chunk."""
        places = np.minimum(np.searchsorted(self.probe_index, index), self.probe_index.size - 1)
        inside = self.probe_index[places] == index
        if not inside.any():
            return self.weights.gather(rows, index)
        probe: NDArray[np.float32] = self.archive.read(PROBE, rows, (0, self.probe_index.size))
        found = probe[:, places]
        if not inside.all():
            found[:, ~inside] = self.weights.gather(rows, index[~inside])
        return found

    def trajectory(self, name: str, epochs: Iterable[int] | None = None) -> NDArray[Any]:
        """(E, *shape) values of one tensor, weight or buffer, over all epochs or the given ones.

        float32 for weights (float16 and bfloat16 are exact in it), the stored dtype for buffers.
        """
        entry, rows = self.layout[name], self.rows_of(epochs)
        if entry.size == 0:
            return np.empty((len(rows), *entry.shape), entry.vector if entry.kind == "buffer" else np.float32)
        values = self.archive.read(_path(entry), rows, (entry.offset, entry.stop))
        return values.reshape(len(rows), *entry.shape)

    def checkpoint(self, epoch: int) -> dict[str, NDArray[Any]]:
        """Name -> array of every tensor at an epoch, aliases of tied tensors included (they share memory).

        Arrays have the original dtype; bfloat16, which NumPy lacks, is given as float32.
        """
        arrays = self._recorded(epoch)
        originals = {entry: _original(arrays[entry.name], entry) for entry in self.layout.tensors}
        return {name: array for entry, array in originals.items() for name in entry.names}

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Name -> `torch.Tensor` of every tensor at an epoch as recorded, for `Module.load_state_dict`."""
        return to_tensors(self.layout, self._recorded(epoch))

    def _recorded(self, epoch: int) -> dict[str, NDArray[Any]]:
        vector = self.weights[self.row_of(epoch)]
        return self.layout.split(vector, self.layout.weights) | self.stored_buffers(epoch)

    def stored_buffers(self, epoch: int) -> dict[str, NDArray[Any]]:
        """Name -> array of every buffer at an epoch, in its stored dtype and shape."""
        row = self.row_of(epoch)
        arrays: dict[str, NDArray[Any]] = {}
        for dtype, size in self.layout.buffer_sizes.items():
            vector = self.archive.read(buffer_path(dtype), [row], (0, size))[0]
            arrays |= self.layout.split(vector, [entry for entry in self.layout.buffers if entry.vector == dtype])
        empty = {entry.name: np.empty(entry.shape, entry.vector) for entry in self.layout.buffers if entry.size == 0}
        return arrays | empty

    @cached_property
    def results(self) -> Results:
        """Where fits and evaluations of the run are."""
        archive = self.archive
        folder, run = self.results_folder, archive.objects
        beside = None if folder is None else results_beside(folder, run, archive.lineage)
        return Results(run, beside, archive.layout, archive.lineage)

    @property
    def fits(self) -> tuple[str, ...]:
        """Names of the saved fits, in order of name."""
        return self.results.fit_names

    def fit(self, name: str) -> Decomposition:
        """Open a saved fit.

        Raises `UnknownNameError` naming those that exist, `DamagedRunError` for one that is damaged, or that was made
        of another run or of other weights than the run has.
        """
        stored = self.results.fit(name)
        return (OnlineDecomposition if stored.attributes["settings"].get("online") else Decomposition)(self, stored)

    def average(
        self,
        epochs: str | Iterable[int] | None = None,
        ema: float | None = None,
        up_to: int | None = None,
        *,
        ema_half_life: float | None = None,
    ) -> Average:
        """The average of recorded epochs, of which nothing is read yet; those marked as bad are left out.

        epochs: ``"last:10"``, the last ten up to `up_to`; or labels, such as ``range(30, 40)``. All weigh the same.
        ema: instead, the decay in [0, 1) per recorded epoch of an exponential moving average over all epochs up to
            `up_to`, such as 0.9.
        ema_half_life: instead, its half-life in recorded epochs, such as 5; the decay is 2^(-1/half-life).
        up_to: by default the last epoch.

        Raises `InputError` for more epochs than there are, or for none; `UnknownNameError` for one that is not
        recorded. Gives a `trajkit.TrajkitWarning` for an EMA that holds more than 5 % of its first epoch.
        """
        return Averaging(epochs, ema, ema_half_life).of(self, up_to)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The saved evaluations, oldest first; raises `DamagedRunError` as `fit` does."""
        return self.results.evaluations

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, fits and evaluations included."""
        return sum(length for _, length in self.archive.objects.lengths(""))

    @property
    def epoch_bytes(self) -> int:
        """Bytes that an epoch takes on disk, on average."""
        return self.forecast().epoch_bytes

    def forecast(self, epochs: int | None = None) -> Forecast:
        """What so many epochs take, by what those took that are recorded; of these alone when None."""
        recorded = self.archive.records
        return forecast(self.layout, len(recorded) if epochs is None else epochs, self.path, recorded)


class RunWriter:
    """Appends epochs to a run, which is made with the first one. One writer at a time; a context manager.

    Raises `RunLockedError` while another writer holds the run, and `PathExistsError` where `path` holds something else.
    With `fsync`, an epoch that `append` returned from survives a power cut; without, a killed process.
    `nonfinite` says what becomes of an epoch with NaN or infinite weights: ``"raise"`` refuses it.
    """

    def __init__(self, path: PathLike, fsync: bool = True, nonfinite: NonFinite = "raise") -> None:
        if nonfinite not in ("raise", "record"):
            raise InputError(f"nonfinite is {nonfinite!r}, expected 'raise' or 'record'; choose one")
        self._nonfinite = nonfinite
        self._writer = open_writer(path, fsync=fsync)
        self.path = self._writer.root

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the run back to other writers. Every acknowledged epoch is safe already."""
        self._writer.close()

    @property
    def layout(self) -> ParameterLayout | None:
        """The run's layout, None before its first epoch."""
        return self._writer.layout

    @property
    def epochs(self) -> tuple[int, ...]:
        """The recorded epochs, rising."""
        return tuple(record.epoch for record in self._writer.records)

    def append(
        self,
        layout: ParameterLayout,
        epoch: int,
        weights: WeightSource,
        buffers: Mapping[str, NDArray[Any]],
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Record one epoch: `weights` (N,) and `buffers`, stored dtype -> (size,), as `layout` places them.

        `weights` are a float32 array, or anything with a `size` and slices that are such arrays: slices are asked for
        from left to right, each once and of at most 64 MiB, so that a large model need never be in memory as a whole.

        `step` is the training's global step, a second label: every epoch of a run has one, or none has.

        The epoch is recorded when this returns. Raises `LayoutError` where `layout` is not the run's, and
        `InputError` for an epoch or a step that is below 0 or not later than the last one, or for NaN or infinite
        weights.
        """
        label = self.require_next(epoch)
        step = self.require_step(label, step)
        values = EpochValues(label, weights, buffers, plain_metrics(metrics or {}), step, self._nonfinite == "raise")
        probe_index = draw_probe(layout) if self.layout is None else self._probe_index
        self._writer.append(layout, values, probe_index)

    def forecast(self, layout: ParameterLayout, epochs: int, steps: bool = False) -> Forecast:
        """What so many epochs of a layout take, those that are recorded among them; `steps` before the first."""
        return forecast(layout, epochs, self.path, self._writer.records, steps)

    @property
    def healable_epochs(self) -> tuple[int, ...]:
        """The recorded epochs that `repair` has found damaged, and that `heal` can put right; rising."""
        return self._writer.healable_epochs

    @property
    def has_steps(self) -> bool:
        """Whether the recorded epochs have a step."""
        return any(record.step is not None for record in self._writer.records)

    @property
    def lost_epochs(self) -> tuple[int, ...]:
        """The recorded epochs whose commit record is lost, so that nothing can put them right; rising."""
        return self._writer.lost_epochs

    def heal(
        self,
        layout: ParameterLayout,
        epoch: int,
        weights: WeightSource,
        buffers: Mapping[str, NDArray[Any]],
    ) -> tuple[str, ...]:
        """Put back the damaged objects of a bad epoch from its values, as for `append`; their keys.

        Raises `InputError` unless the values are bit for bit those that were recorded.
        """
        return self._writer.heal(layout, EpochValues(_label(epoch, "epoch"), weights, buffers, {}), self._probe_index)

    def keep_source(self, source: Source) -> None:
        """Keep which checkpoint a recorded epoch came from, so that it is not read again while it looks the same."""
        self._writer.keep_source(source)

    def require_next(self, epoch: int) -> int:
        """`epoch` as an integer, if it can be recorded next; raises `InputError`."""
        label = _new_label(epoch, "epoch", self.path)
        self._writer.require_next(label)
        return label

    def require_step(self, epoch: int, step: int | None) -> int | None:
        """`step` as an integer, if it can be that of the next `epoch`; raises `InputError`."""
        step = None if step is None else _new_label(step, "step", self.path)
        self._writer.require_step(epoch, step)
        return step

    @cached_property
    def _probe_index(self) -> NDArray[np.int64]:
        return open_run(self.path).probe_index


def _label(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} is {value!r}, expected an integer; pass the number of the {what}") from None


def _new_label(value: Any, what: str, path: PathLike) -> int:
    """Return the label of what is to be recorded; older runs may hold labels below 0."""
    label = _label(value, what)
    if -(2**63) <= label < 0:
        raise InputError(f"{path}: {what} is {label}, expected 0 or more; count from 0, the weights before training")
    return label


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats: numbers and 0-d arrays or tensors are taken."""
    if not isinstance(metrics, Mapping):
        raise InputError(f"metrics are a {type(metrics).__name__}, expected names and numbers; pass a dict")
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            plain[str(name)] = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"metric '{name}' is {str(value)[:80]!r}, expected a number; pass a float") from error
    return plain


def _path(entry: TensorEntry) -> str:
    return WEIGHTS if entry.kind == "weight" else buffer_path(entry.vector)


def _original(array: NDArray[Any], entry: TensorEntry) -> NDArray[Any]:
    return array if entry.dtype == "bfloat16" else array.astype(entry.dtype, copy=False)
