"""The tensors of a checkpoint as the flat vectors of a run, read while they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, TornFileError
from ..layout import TensorEntry
from ..vector import require_exact
from .selecting import Arranged
from .stored import StoredTensor


class StreamedWeights:
    """The weights (N,) of a checkpoint, of which only those are in memory that were asked for last.

    Asked for from left to right, as `RunWriter.append` does, each tensor is read once.
    """

    def __init__(self, arranged: Arranged) -> None:
        self._tensors = arranged.tensors
        self._entries = [entry for entry in arranged.layout.weights if entry.size]
        self._bounds = [entry.offset for entry in self._entries]
        self.size = arranged.layout.n_weights

    def __getitem__(self, columns: slice) -> NDArray[np.float32]:
        """(n,) weights of these columns; raises `InputError` for float64 values that float32 cannot hold."""
        start, stop, _ = columns.indices(self.size)
        found = np.empty(max(stop - start, 0), dtype=np.float32)
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        for entry in self._entries[first:]:
            if entry.offset >= stop:
                break
            begin, end = max(entry.offset, start), min(entry.stop, stop)
            self._fill(found[begin - start : end - start], entry, begin - entry.offset)
        return found

    def _fill(self, out: NDArray[np.float32], entry: TensorEntry, start: int) -> None:
        values = _values(self._tensors[entry.name], start, start + out.size)
        if entry.dtype == "float64":
            require_exact(entry.name, values)
        torch.from_numpy(out).copy_(values)


def read_buffers(arranged: Arranged) -> dict[str, NDArray[Any]]:
    """The buffers, stored dtype -> (size,)."""
    buffers = {dtype: np.empty(size, dtype=dtype) for dtype, size in arranged.layout.buffer_sizes.items()}
    for entry in arranged.layout.buffers:
        if entry.size:
            values = _values(arranged.tensors[entry.name], 0, entry.size)
            torch.from_numpy(buffers[entry.vector][entry.offset : entry.stop]).copy_(values)
    return buffers


def _values(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Return values of a tensor; raises `TornFileError` where its file does not give them: it may be being written."""
    try:
        return tensor.values(start, stop)
    except InputError as error:
        raise TornFileError(str(error)) from error
