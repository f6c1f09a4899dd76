"""The bridge from stored arrays to torch tensors. torch is imported when it is crossed: the import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from .layout import ParameterLayout


def to_tensors(layout: ParameterLayout, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Name -> `torch.Tensor` in each tensor's original dtype, in the layout's order, from arrays in stored dtypes.

    Aliases of a tied tensor are the same object. Tensors are their own: writing to one changes no other.
    """
    import torch

    tensors: dict[str, Any] = {}
    for entry in layout.tensors:
        tensor = torch.tensor(arrays[entry.name], dtype=getattr(torch, entry.dtype))
        tensors |= dict.fromkeys(entry.names, tensor)
    return tensors
