"""Single weights of a model by their places in the flat vector, read from the tensors where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import TensorEntry


class Members:
    """Some weights of a model, in any order and on any devices; looked up once, for they are read at every epoch."""

    def __init__(self, entries: Sequence[TensorEntry], index: NDArray[np.int64]) -> None:
        self._order = np.argsort(index, kind="stable")
        rising = index[self._order]
        self._places: list[tuple[str, slice, Tensor]] = []
        for entry in entries:
            if entry.kind == "weight":
                first, last = np.searchsorted(rising, [entry.offset, entry.stop])
                if first < last:
                    places = torch.from_numpy(rising[first:last] - entry.offset)
                    self._places.append((entry.name, slice(int(first), int(last)), places))

    def values(self, tensors: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """(S,) values now, rounded to float32."""
        rising = np.empty(self._order.size, np.float32)
        for number, (name, here, places) in enumerate(self._places):
            tensor = tensors[name].detach()
            if places.device != tensor.device:
                places = places.to(tensor.device)
                self._places[number] = name, here, places
            rising[here] = tensor.take(places).to("cpu", torch.float32).numpy()
        values = np.empty_like(rising)
        values[self._order] = rising
        return values
