"""Online CMD: means and products with the references that take one epoch at a time, in place; no trajectory is kept.

With running means μ of a weight w and ρ of its reference r, an epoch brings

    ρ' = ρ + (r - ρ)/n,   Q += (r - ρ)(r - ρ'),   C += (w - μ)(r - ρ'),   μ' = μ + (w - μ)/n,

and then a = C/Q and b = μ' - a·ρ'. Source: Brokman et al. 2024, Eq. 8-10, in the centred form of Welford 1962. With a
decay d < 1 an epoch counts for d times what the next one does: n, Q and C are multiplied by d before each epoch.

What is kept of a weight takes 11 bytes, 12 with more than 256 modes. A float32 mean would not do: a weight near 1 that
moves by 1e-4 would lose three digits to the rounding of its mean, every epoch anew. So the mean has 40 bits: a float32
and the `rest`, its rounding error in units of 2⁻³⁹ of it. Everything else is float32 arithmetic of the motion, in
which the rounding is relative to the motion. An epoch is read once and its numbers are written once.

Where modes may change, a weight has several candidates, those references that it correlated with most in the warm-up,
and a product with each, 5 bytes a candidate: its mode is the candidate with the largest correlation so far.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .affine import MAX_MODES, References

TILE = 512
"""Weights handled at a time: what is noted of them stays in the first-level cache."""

UNIT = np.float32(2.0**-39)
"""Of the mean: what a step of its `rest` is. Half a unit in the last place of a float32 is at most 2¹⁵ of these."""
MOST = np.float32(32767.0)
ROUNDING = 2.0**-40
"""Of the mean of a reference: less than any step of a float32, more than what a mean in float64 is wrong by."""
ROUNDER = np.float32(1.5 * 2**23)
"""Added and subtracted again, it rounds a float32 of at most 2²² to an integer, halves to even ones."""


@dataclass(frozen=True)
class Step:
    """What an epoch does to every weight: its share 1/n in the mean, what the products fade to, and r - ρ', (M,)."""

    share: np.float32
    fade: np.float32
    gain: NDArray[np.float32]


class ReferenceMoments:
    """Of the M references over the epochs so far: `count`, `mean` (M,), and `power` (M,) Σ(r - mean)²; in float64.

    From here on an epoch counts for `decay` times what the next one does.
    """

    def __init__(self, count: float, mean: NDArray[np.float64], power: NDArray[np.float64], decay: float = 1.0) -> None:
        self.count = count
        self.mean = mean
        self.power = power
        self.decay = decay
        self.values = mean
        """(M,) at the epoch that was taken last."""

    @classmethod
    def of(cls, references: References, decay: float = 1.0) -> ReferenceMoments:
        """Over the epochs of a fit, which all count the same."""
        moments = cls(len(references.trajectories), references.mean.copy(), references.norm**2, decay)
        moments.values = references.trajectories[-1].astype(np.float64)
        return moments

    def take(self, values: NDArray[np.floating]) -> Step:
        """Take the references' (M,) values at one more epoch; what that does to the weights."""
        self.values = values.astype(np.float64)
        self.count = self.decay * self.count + 1
        with np.errstate(invalid="ignore"):  # an infinite reference: whoever takes the weights tells of it
            moved = self.values - self.mean
            self.mean = self.mean + moved / self.count
            gain = self.values - self.mean
            self.power = self.decay * self.power + moved * gain
        return Step(np.float32(1.0 / self.count), np.float32(self.decay), gain.astype(np.float32))

    def per_power(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M,) values / power; 0 for a reference that has not moved, or so long ago that a decay left but rounding."""
        rounding = self.count * (ROUNDING * self.mean) ** 2
        return np.divide(values, self.power, out=np.zeros_like(self.power), where=self.power > rounding)

    @property
    def per_length(self) -> NDArray[np.float32]:
        """(M,) what |products| are multiplied by to compare the correlations of a weight."""
        return np.sqrt(self.per_power(np.ones_like(self.power))).astype(np.float32)

    @property
    def reach(self) -> NDArray[np.float32]:
        """(M,) what a weight's product with its reference is multiplied by to give a·(r - ρ) at the last epoch."""
        return self.per_power(self.values - self.mean).astype(np.float32)


@dataclass(frozen=True)
class RunningBlock:
    """What online CMD keeps of n weights with k candidates each; arrays that `take` changes in place.

    `mean` and `rest` are (n,), `products` and `mode` (k, n): each candidate's number, and the product with it.
    """

    mean: NDArray[np.float32]
    rest: NDArray[np.int16]
    products: NDArray[np.float32]
    mode: NDArray[np.unsignedinteger[Any]]

    @classmethod
    def of_fit(
        cls,
        moments: ReferenceMoments,
        mode: NDArray[np.uint16],
        scale: NDArray[np.float32],
        mean: NDArray[np.float64],
    ) -> RunningBlock:
        """Of weights with fixed modes, from their fit over the epochs of the references."""
        products = (scale.astype(np.float64) * moments.power[mode]).astype(np.float32)
        return cls(*split_mean(mean), products[None], mode.astype(mode_dtype(moments.mean.size))[None])

    @classmethod
    def of_correlations(
        cls,
        moments: ReferenceMoments,
        correlations: NDArray[np.float32],
        variation: NDArray[np.float64],
        mean: NDArray[np.float64],
        candidates: int,
    ) -> RunningBlock:
        """Of weights whose modes may change, from a fit that has kept its (M, n) correlations."""
        best = np.argsort(-np.abs(correlations), axis=0, kind="stable")[:candidates]
        products = np.take_along_axis(correlations, best, axis=0) * np.sqrt(variation) * np.sqrt(moments.power)[best]
        return cls(*split_mean(mean), products.astype(np.float32), best.astype(mode_dtype(moments.mean.size)))

    def part(self, columns: slice) -> RunningBlock:
        """Some of the weights, in the same memory."""
        return RunningBlock(self.mean[columns], self.rest[columns], self.products[:, columns], self.mode[:, columns])

    def take(self, weights: NDArray[np.float32], step: Step) -> bool:
        """Take one more epoch of the weights (n,), in place; False where one of them is not finite. Frees the GIL."""
        rows = tuple(self.products), tuple(self.mode)  # contiguous each, which compiled code is faster with
        return bool(_take(weights, self.mean, self.rest, *rows, step.share, step.fade, step.gain))

    def modelled(self, moments: ReferenceMoments, out: NDArray[np.float32]) -> None:
        """Write the modelled weights (n,) at the references' last epoch to `out`: mean + a·(r - ρ)."""
        mode, products = self.chosen(moments)
        _model(self.mean, self.rest, products, mode, moments.reach, out)

    def chosen(self, moments: ReferenceMoments) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
        """(n,) modes, and the products with their references."""
        if len(self.mode) == 1:
            return self.mode[0], self.products[0]
        best = (np.abs(self.products) * moments.per_length[self.mode]).argmax(axis=0)[None]
        return np.take_along_axis(self.mode, best, axis=0)[0], np.take_along_axis(self.products, best, axis=0)[0]

    def solved(
        self, moments: ReferenceMoments
    ) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float32], NDArray[np.float64]]:
        """(n,) modes, scales a, and offsets b."""
        mode, products = self.chosen(moments)
        scale = products * moments.per_power(np.ones_like(moments.power))[mode]
        return mode, scale.astype(np.float32), self.exact_mean() - scale * moments.mean[mode]

    def exact_mean(self) -> NDArray[np.float64]:
        """(n,) means over the epochs so far."""
        mean = self.mean.astype(np.float64)
        return mean + self.rest * (mean * np.float64(UNIT))


def checked_candidates(reassign: bool | int) -> int:
    """How many candidates a weight has: 1 without re-assignment, 2 or a number with it; raises `InputError`."""
    if isinstance(reassign, bool):
        return 2 if reassign else 1
    if not hasattr(reassign, "__index__") or not 1 <= reassign <= MAX_MODES:
        raise InputError(
            f"reassign is {reassign!r}, expected True, or a number of references to choose among, up to {MAX_MODES};"
            " use True"
        )
    return int(reassign)


def checked_decay(decay: float) -> float:
    """A decay above 0, up to 1, which leaves all epochs their weight; raises `InputError`."""
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real) or not 0 < decay <= 1:
        raise InputError(f"decay is {decay!r}, expected a number above 0, at most 1; use 0.9, or 1 for no decay")
    return float(decay)


def mode_dtype(n_modes: int) -> type[np.unsignedinteger[Any]]:
    """The smallest integer that numbers the modes."""
    return np.uint8 if n_modes <= 256 else np.uint16


def split_mean(mean: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """(n,) means as float32 and the rest of each."""
    rounded = mean.astype(np.float32)
    unit = rounded * UNIT
    rest = np.divide(mean - rounded, unit, out=np.zeros_like(mean), where=unit != 0)
    return rounded, np.clip(np.rint(rest), -MOST, MOST).astype(np.int16)


# No contraction of a·b + c: each operation rounds by itself, so that a device without this code gives the same bits.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _take(
    weights: NDArray[np.float32],
    mean: NDArray[np.float32],
    rest: NDArray[np.int16],
    products: tuple[NDArray[np.float32], ...],
    mode: tuple[NDArray[np.unsignedinteger[Any]], ...],
    share: np.float32,
    fade: np.float32,
    gain: NDArray[np.float32],
) -> bool:
    gains, moved = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    strange = np.zeros(TILE, np.float32)
    for start in range(0, weights.size, TILE):
        width = min(TILE, weights.size - start)
        w, high, low = weights[start : start + width], mean[start : start + width], rest[start : start + width]
        modes, product = mode[0][start : start + width], products[0][start : start + width]
        for i in range(width):
            gains[i] = gain[modes[i]]
        for i in range(width):
            old = high[i]
            below = np.float32(low[i]) * (old * UNIT)
            change = (w[i] - old) - below
            moved[i] = change
            product[i] = product[i] * fade + change * gains[i]
            strange[i] += change * np.float32(0.0)
            more = below + change * share
            new = old + more
            back = new - old
            lost = (old - (new - back)) + (more - back)
            unit = new * UNIT
            steps = lost / unit if unit != np.float32(0.0) else np.float32(0.0)
            steps = min(max((steps + ROUNDER) - ROUNDER, -MOST), MOST)
            high[i] = new
            low[i] = np.int16(steps)
        for k in range(1, len(products)):
            modes, product = mode[k][start : start + width], products[k][start : start + width]
            for i in range(width):
                gains[i] = gain[modes[i]]
            for i in range(width):
                product[i] = product[i] * fade + moved[i] * gains[i]
    return not np.isnan(strange).any()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _model(
    mean: NDArray[np.float32],
    rest: NDArray[np.int16],
    products: NDArray[np.float32],
    mode: NDArray[np.unsignedinteger[Any]],
    reach: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    for i in range(mean.size):
        out[i] = mean[i] + (np.float32(rest[i]) * (mean[i] * UNIT) + products[i] * reach[mode[i]])
