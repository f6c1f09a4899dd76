"""A copy of a model on the host, taken while the training waits, and made into flat vectors when it no longer does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import ParameterLayout, TensorEntry
from ..vector import Vectors, is_spread, place

WEIGHTS = "weights"


class HostMemory:
    """Room on the host for the tensors of a layout, each in its own dtype; it is used again for epoch after epoch.

    Tensors of one dtype stand side by side in the order of the layout, so that a vector of tensors that have its own
    dtype, as float32 weights have, is there without another copy. `pinned` memory takes copies from CUDA devices that
    nobody waits for; it needs a CUDA device.
    """

    def __init__(self, layout: ParameterLayout, pinned: bool = False) -> None:
        self.layout, self.pinned = layout, pinned
        sizes: dict[tuple[str, str], int] = {}
        starts: dict[str, int] = {}
        for entry in layout.tensors:
            starts[entry.name] = sizes.get(_part(entry), 0)
            sizes[_part(entry)] = starts[entry.name] + entry.size
        with torch.inference_mode(False):  # a validation may be going on
            self._parts = {
                part: torch.empty(size, dtype=getattr(torch, part[1]), device="cpu", pin_memory=pinned)
                for part, size in sizes.items()
            }
            self._places = {
                entry.name: self._parts[_part(entry)][starts[entry.name] :][: entry.size].view(entry.shape)
                for entry in layout.tensors
            }
        self._rooms = {name: room for name, room in self._places.items() if room.numel()}
        self._copied: list[torch.cuda.Event] = []

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors as they are now, in the order of what is done on their devices.

        Returns when those on the host are copied; the copies of others may still be under way, see `wait`.
        """
        rooms, sources = self._rooms, [tensors[name] for name in self._rooms]
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(list(rooms.values()), sources, non_blocking=self.pinned)
        self._copied = _events(tensors.values()) if self.pinned else []

    def gather(self, tensors: Mapping[str, Tensor]) -> None:
        """As `take`, of a model that is spread over processes, tensor by tensor: all of them have to `gather`."""
        with torch.inference_mode(False), torch.no_grad():
            for name, room in self._places.items():
                room.copy_(_whole(tensors[name]), non_blocking=self.pinned)
        self._copied = _events(tensors.values()) if self.pinned else []

    def vectors(self, spare: SpareVectors) -> Vectors:
        """The weights (N,) and buffers, stored dtype -> (size,); they are valid until the memory is used again.

        Waits for copies that are under way. Raises `InputError` for float64 weights that float32 cannot hold exactly.
        """
        for event in self._copied:
            event.synchronize()
        self._copied = []
        buffers = {dtype: self._vector(dtype, size, spare) for dtype, size in self.layout.buffer_sizes.items()}
        return self._vector(WEIGHTS, self.layout.n_weights, spare), buffers

    def _vector(self, name: str, size: int, spare: SpareVectors) -> NDArray[Any]:
        dtype = "float32" if name == WEIGHTS else name
        if {part for part in self._parts if part[0] == name} == {(name, dtype)}:
            return self._parts[name, dtype].numpy()
        vector = spare.vector(name, dtype, size)
        for entry in self.layout.tensors:
            if entry.vector == name:
                place(entry, self._places[entry.name], vector)
        return vector


class SpareVectors:
    """Memory for vectors whose tensors have to be converted; one thread uses it again and again."""

    def __init__(self) -> None:
        self._known: dict[str, NDArray[Any]] = {}

    def vector(self, name: str, dtype: str, size: int) -> NDArray[Any]:
        """(size,) of this dtype, with any content."""
        found = self._known.get(name)
        if found is None or found.size != size:
            found = self._known[name] = np.empty(size, dtype=dtype)
        return found


def gather_for_another(layout: ParameterLayout, tensors: Mapping[str, Tensor]) -> None:
    """Take part in the `gather` of the process that records, and keep nothing."""
    with torch.inference_mode(False), torch.no_grad():
        for entry in layout.tensors:
            _whole(tensors[entry.name])


def is_pinnable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some of the tensors are on a CUDA device, from where copies into pinned memory need not be waited for."""
    return any(tensor.is_cuda for tensor in tensors.values())


def _part(entry: TensorEntry) -> tuple[str, str]:
    return entry.vector, entry.dtype


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor
    return whole


def _events(tensors: Any) -> list[torch.cuda.Event]:
    """What has to happen on each device until what was asked of it so far is done."""
    events = []
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        # Whoever waits for it sleeps, and leaves the core to the training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events
