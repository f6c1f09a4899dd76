"""The epochs of a warm-up, on disk: in the run that a training records anyway, or in a temporary one."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import blake3
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..layout import ParameterLayout, require_same_layout
from ..run import PathLike, Run, RunWriter, open_run
from ..store.format import LOCKS, PROBE
from ..store.lock import is_abandoned
from ..store.pieces import LOOK
from ..store.probe import draw_probe
from ..store.writer import WRITER
from .members import Members
from .ranks import this_rank

Tensors = Mapping[str, Tensor]

FOLDER = "trajkit-warmup-"
"""How temporary folders are called; what follows is random."""

RUN = "run"
"""The archive in such a folder. Its writer's lock tells whether the process lives."""


class Recording(Protocol):
    """A recorder: where it records, and how to wait until that is committed."""

    @property
    def path(self) -> PathLike:
        """Of the run."""

    def flush(self) -> None:
        """Return when every epoch that was recorded is committed."""


@dataclass(frozen=True)
class LateRecording:
    """A recording that commits an epoch after it was added: when its metrics are known."""

    recording: Recording


class WarmUp(Protocol):
    """The epochs so far, of which no more than a piece is in memory."""

    @property
    def is_late(self) -> bool:
        """Whether the last epoch that was added may be missing until more is known of it."""

    def add(self, tensors: Tensors) -> None:
        """Take an epoch."""

    def whole(self) -> tuple[Run, list[int]]:
        """The run that holds the epochs, and their labels."""

    def state(self) -> dict[str, Any]:
        """What `load` brings back, as plain values and tensors."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the epochs of a state, and forget those there were."""

    def close(self) -> None:
        """The epochs are not needed any more."""


def warm_up(layout: ParameterLayout, run: PathLike | Recording | LateRecording | None) -> WarmUp:
    """Beside a run that the training records, or in a temporary one of one's own.

    Raises `InputError` for a recorded one in a process that does not record.
    """
    if run is None:
        return OwnRun(layout)
    if rank := this_rank():
        raise InputError(
            f"rank {rank}: online CMD has a run for its warm-up, which rank 0 records and fits; leave run out, so that"
            " each process keeps its own warm-up, or make online CMD on rank 0 alone"
        )
    return RecordedRun(layout, run)


class OwnRun:
    """A temporary run, which is gone with `close`, with this object, or with the process.

    What a process that was killed has left is removed when the next one of this user makes a folder.
    """

    is_late = False

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._end: weakref.finalize[Any, OwnRun] | None = None
        self._writer: RunWriter | None = None

    def __reduce__(self) -> Any:
        return _own_run, (self._layout, self.state())

    def add(self, tensors: Tensors) -> None:
        """See `WarmUp`."""
        writer = self._ready()
        buffers = {dtype: np.empty(size, dtype) for dtype, size in self._layout.buffer_sizes.items()}
        for entry in self._layout.buffers:
            if entry.size:
                values = buffers[entry.vector][entry.offset : entry.stop]
                torch.from_numpy(values).view(entry.shape).copy_(tensors[entry.name].detach())
        writer.append(self._layout, len(writer.epochs), PassingModel(self._layout, tensors), buffers)

    def whole(self) -> tuple[Run, list[int]]:
        """See `WarmUp`."""
        run = open_run(self._ready().path)
        return run, run.epochs.tolist()

    def state(self) -> dict[str, Any]:
        """The whole trajectory: a tensor (epochs, N) that lies in a file, and one of each dtype of the buffers."""
        if self._writer is None or not self._writer.epochs:
            return {}
        run, labels = self.whole()
        n = self._layout.n_weights
        width = run.weights.chunks[1]
        with tempfile.TemporaryFile() as file:
            for row in range(len(labels)):  # not into mapped memory, where a full disk would kill the process
                for start in range(0, n, width):
                    file.write(np.ascontiguousarray(run.weights[row, start : start + width]).data)
            file.flush()
            weights = np.memmap(file, np.float32, "r+", shape=(len(labels), n))
        return {
            "weights": torch.from_numpy(weights),
            "buffers": {
                entry.name: torch.from_numpy(run.trajectory(entry.name)) for entry in self._layout.buffers if entry.size
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See `WarmUp`."""
        if state and "weights" not in state:
            raise InputError(
                "the state is of a warm-up that is read from the run of the training, this one keeps its own;"
                " make it with the same run"
            )
        self.close()
        if not state:
            return
        writer = self._ready()
        for epoch, weights in enumerate(state["weights"]):
            buffers = {dtype: np.empty(size, dtype) for dtype, size in self._layout.buffer_sizes.items()}
            for entry in self._layout.buffers:
                if entry.size:
                    buffers[entry.vector][entry.offset : entry.stop] = state["buffers"][entry.name][epoch].ravel()
            writer.append(self._layout, epoch, weights.numpy(), buffers)

    def close(self) -> None:
        """See `WarmUp`."""
        if self._end is not None:
            self._end()
            self._end = self._writer = None

    def _ready(self) -> RunWriter:
        if self._writer is None:
            _sweep()
            folder = tempfile.mkdtemp(prefix=FOLDER)
            self._writer = RunWriter(os.path.join(folder, RUN), fsync=False, nonfinite="record")
            self._end = weakref.finalize(self, _remove, self._writer, folder, os.getpid())
        return self._writer


class RecordedRun:
    """The run that the training records: each epoch there, recorded before it is added, is known by its probe."""

    def __init__(self, layout: ParameterLayout, run: PathLike | Recording | LateRecording) -> None:
        self._layout = layout
        self.is_late = isinstance(run, LateRecording)
        self._recording = run.recording if isinstance(run, LateRecording) else run
        self._probe = Members(layout.weights, draw_probe(layout))
        self._prints: list[str] = []

    @property
    def path(self) -> PathLike:
        """Of the run."""
        return self._recording if isinstance(self._recording, str | os.PathLike) else self._recording.path

    def add(self, tensors: Tensors) -> None:
        """See `WarmUp`."""
        model = PassingModel(self._layout, tensors)
        for start in range(0, model.size, LOOK):
            model[start : min(start + LOOK, model.size)]  # raises where it is not finite
        self._prints.append(_print(self._probe.values(tensors)))

    def whole(self) -> tuple[Run, list[int]]:
        """See `WarmUp`; raises `InputError` for an epoch that was not recorded."""
        if not isinstance(self._recording, str | os.PathLike):
            self._recording.flush()
        run = open_run(self.path)
        require_same_layout(self._layout, run.layout, f"{run.path}: the model")
        labels: list[int] = []
        rows = iter(reversed(run.rows_of(None).tolist()))
        for number in range(len(self._prints), 0, -1):
            row = next((row for row in rows if _print(_recorded_probe(run, row)) == self._prints[number - 1]), None)
            if row is None:
                raise InputError(
                    f"{run.path}: the weights of update {number} of online CMD are not in the run, expected each epoch"
                    " recorded before it; call recorder.record, then update_parameters"
                )
            labels.append(int(run.epochs[row]))
        return run, labels[::-1]

    def state(self) -> dict[str, Any]:
        """Hashes of the probes."""
        return {"probes": list(self._prints)}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `WarmUp`."""
        if state and "probes" not in state:
            raise InputError(
                "the state is of a warm-up that keeps its own epochs, this one reads them from the run of the training;"
                " make it without run"
            )
        self._prints = list(state.get("probes", ()))

    def close(self) -> None:
        """See `WarmUp`."""


@dataclass(frozen=True)
class PassingModel:
    """The weights of a model as the writer of a run asks for them, piece by piece, rounded to float32."""

    layout: ParameterLayout
    tensors: Tensors

    @property
    def size(self) -> int:
        """N."""
        return self.layout.n_weights

    def __getitem__(self, columns: slice) -> NDArray[np.float32]:
        out = torch.empty(columns.stop - columns.start)
        for entry in self.layout.weights:
            first, last = max(entry.offset, columns.start), min(entry.stop, columns.stop)
            if first < last:
                part = self.tensors[entry.name].detach().reshape(-1)[first - entry.offset : last - entry.offset]
                out[first - columns.start : last - columns.start].copy_(part)
        values: NDArray[np.float32] = out.numpy()
        for start in range(0, values.size, LOOK):
            finite = np.isfinite(values[start : start + LOOK])
            if not finite.all():
                name = self.layout.weight_at(columns.start + start + int(finite.argmin()))
                raise InputError(
                    f"'{name}' is not finite, expected finite weights; go on from a checkpoint before that"
                )
        return values


def tracked_layout(layout: ParameterLayout, use_buffers: bool, own: Collection[str]) -> ParameterLayout:
    """Return the layout of the weights of a model and, with `use_buffers`, of its floating buffers.

    own: Names of the tensors that the model has, where `layout` also holds what its state dict makes anew.
    """
    return ParameterLayout.of(
        entry
        for entry in layout.tensors
        if entry.kind == "weight" or (use_buffers and "float" in entry.dtype and entry.name in own)
    )


def _own_run(layout: ParameterLayout, state: Mapping[str, Any]) -> OwnRun:
    made = OwnRun(layout)
    made.load(state)
    return made


def _recorded_probe(run: Run, row: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(run.archive.read(PROBE, [row], (0, run.probe_index.size))[0])


def _print(values: NDArray[np.float32]) -> str:
    return blake3.blake3(values.tobytes()).hexdigest()


def _remove(writer: RunWriter, folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked child has a copy of this object, not the run
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the temporary folders of this user's killed processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):  # whatever it is, nobody waits for it
            found = folder.lstat()
            mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if mine and is_abandoned(folder / RUN / LOCKS / WRITER):
                shutil.rmtree(folder, ignore_errors=True)
