"""The bridge from stored arrays to torch tensors. torch is imported when it is crossed: the import takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import torch_needed
from .kernels.averaging import rounded_to_odd
from .layout import ParameterLayout, TensorEntry

SLAB = 4 << 20
"""Values of the flat vector that are held at a time while tensors are streamed: 16 MiB of float32."""


def to_tensors(layout: ParameterLayout, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Name -> `torch.Tensor` in each tensor's original dtype, in the layout's order, from arrays in stored dtypes.

    Aliases of a tied tensor are the same object. Tensors are their own: writing to one changes no other.
    """
    torch = _torch()
    tensors: dict[str, Any] = {}
    for entry in layout.tensors:
        tensor = torch.tensor(arrays[entry.name], dtype=getattr(torch, entry.dtype))
        tensors |= dict.fromkeys(entry.names, tensor)
    return tensors


def in_original_dtype(values: NDArray[Any], dtype: str) -> Any:
    """A `torch.Tensor` of the values in a layout's dtype, rounded once; it may share their memory."""
    torch = _torch()
    if values.dtype == np.float64 and dtype in ("float16", "bfloat16"):  # torch goes there by way of float32
        values = rounded_to_odd(values)
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))


def _torch() -> Any:
    """Return the module; raise `MissingDependencyError` where it is not installed."""
    with torch_needed("a state dict"):
        import torch
    return torch


@dataclass(frozen=True)
class TensorValues:
    """What all tensors of a layout hold at one moment, piece by piece.

    `weights` gives the values ``start : stop`` of the flat vector, in float32, or in float64 where they are still to be
    rounded; `buffers` has an array in the stored dtype under the name of each buffer.
    """

    layout: ParameterLayout
    weights: Callable[[int, int], NDArray[Any]]
    buffers: Mapping[str, NDArray[Any]]

    def pieces(self, entry: TensorEntry) -> Iterator[NDArray[Any]]:
        """The values of a tensor from left to right, in flat pieces.

        The last slab of the vector is kept: who asks for tensors in the layout's order has each slab read once.
        """
        if entry.kind == "buffer":
            yield self.buffers[entry.name].ravel()
        elif entry.size:
            for number in range(entry.offset // SLAB, -(-entry.stop // SLAB)):
                origin = number * SLAB
                yield self._slab(number)[max(entry.offset - origin, 0) : entry.stop - origin]

    @cached_property
    def _slab(self) -> Callable[[int], NDArray[Any]]:
        @lru_cache(maxsize=1)
        def slab(number: int) -> NDArray[Any]:
            return self.weights(number * SLAB, min((number + 1) * SLAB, self.layout.n_weights))

        return slab

    def to_tensors(self) -> dict[str, Any]:
        """Name -> `torch.Tensor`, as the function `to_tensors` gives them, with no second copy of the model."""
        torch = _torch()
        tensors: dict[str, Any] = {}
        for entry in self.layout.tensors:
            tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            flat, end = tensor.view(-1), 0
            for piece in self.pieces(entry):
                flat[end : end + piece.size] = in_original_dtype(piece, entry.dtype)
                end += piece.size
            tensors |= dict.fromkeys(entry.names, tensor)
        return tensors
