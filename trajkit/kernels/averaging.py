"""Averages over epochs, one epoch at a time, in float64; and the one rounding in the end."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

BLOCK = 1 << 15
"""Weights whose steps are done while they are in the cache."""


def equal_steps(n_epochs: int) -> list[float]:
    """How far `averaged` goes to each of e epochs so that all weigh the same (SWA): 1, 1/2, 1/3, …"""
    return [1 / count for count in range(1, n_epochs + 1)]


def exponential_steps(n_epochs: int, decay: float) -> list[float]:
    """The same for an exponential moving average that starts at the first epoch: 1, then 1 - decay."""
    return [1.0, *[1 - decay] * (n_epochs - 1)]


def averaged(epochs: Iterable[NDArray[np.float32]], steps: Iterable[float]) -> Doubles:
    """(n,) in float64: from the first of the (n,) epochs, a step in [0, 1] of the way to each of the others.

    This is the recursion of `torch.optim.swa_utils`. A weight that never moves comes out as it is, and a step of 1
    gives the epoch itself. No epoch at all is an error.
    """
    average: Doubles | None = None
    motion = np.empty(BLOCK)
    for values, step in zip(epochs, steps, strict=True):
        if average is None:
            average = values.astype(np.float64)
            continue
        with np.errstate(invalid="ignore"):  # where infinite weights were recorded, the average is NaN
            for start in range(0, values.size, BLOCK):
                here, target = average[start : start + BLOCK], values[start : start + BLOCK]
                way = np.subtract(target, here, out=motion[: here.size], dtype=np.float64)
                if step < 0.5:  # from the nearer end, as torch.lerp does
                    way *= step
                    here += way
                else:
                    way *= 1 - step
                    np.subtract(target, way, out=here)
    if average is None:
        raise ValueError("no epoch to average")
    return average


def rounded_to_odd(values: Doubles) -> NDArray[np.float32]:
    """Float32 that may be rounded on to half precision as if `values` themselves had been.

    To round to the nearest twice can miss the nearest: 1 + 2⁻⁸ + 2⁻⁴⁰ lies above the middle of two bfloat16 and its
    nearest float32 in the middle. Cut off instead, with the last bit set where anything was, it stays on its side
    (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    cut = bits - (np.abs(nearest) > np.abs(values))
    return np.where(nearest == values, bits, cut | 1).astype(np.uint32).view(np.float32)
