"""The modelled weights of a fit, compiled: each weight's numbers are read once."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import DTypeLike, NDArray


def model(
    references: NDArray[np.float64],
    mode: NDArray[np.uint16],
    scale: NDArray[np.floating[Any]],
    mean: NDArray[np.float64],
    dtype: DTypeLike,
) -> NDArray[Any]:
    """(k, n) values mean + scale · r of n weights at k epochs, in float64 and then rounded to `dtype`.

    `references` (k, M) are r, less their mean over the fitted epochs. Raises `ValueError` for a mode that they lack:
    compiled code would read what lies behind them.
    """
    if mode.size and mode.max() >= references.shape[1]:
        raise ValueError(f"there is a mode {mode.max()}, but {references.shape[1]} references")
    out = np.empty((len(references), mode.size), dtype=dtype)
    _model(references, mode, scale, mean, out)
    return out


@numba.njit(nogil=True, cache=True)
def _model(
    references: NDArray[np.float64],
    mode: NDArray[np.uint16],
    scale: NDArray[np.floating[Any]],
    mean: NDArray[np.float64],
    out: NDArray[Any],
) -> None:
    for epoch in range(out.shape[0]):
        row, reference = out[epoch], references[epoch]
        for i in range(mode.size):
            row[i] = mean[i] + np.float64(scale[i]) * reference[mode[i]]
