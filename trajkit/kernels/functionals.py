"""A reference as a fixed linear functional of the current weights, so that its later values need no trajectories.

r_m(t) = Σ over the members i of mode m of c_i · (w_i(t) - o_i), with coefficients c and origins o that stay as they are
once the references are chosen. The paper's reference, a single weight, is the one with one member a mode, c = 1, o = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Functional:
    """M references by their S members; arrays are (S,).

    The origins are the members' values at one epoch: a sum of what weights near 1 have moved by keeps its digits where
    one of their values would not.
    """

    n_modes: int
    index: NDArray[np.int64]
    """Which weights the members are."""
    mode: NDArray[np.uint16]
    """Of which mode's reference each is a member."""
    origin: NDArray[np.floating[Any]]
    coefficient: NDArray[np.float64]

    @classmethod
    def of_weights(cls, index: NDArray[np.int64]) -> Functional:
        """Each reference is one weight, (M,)."""
        n_modes = index.size
        return cls(n_modes, index, np.arange(n_modes, dtype=np.uint16), np.zeros(n_modes, np.float32), np.ones(n_modes))

    @property
    def is_weights(self) -> bool:
        """Whether each reference is one weight as it stands."""
        one_each = np.array_equal(self.mode, np.arange(self.n_modes))
        return bool(one_each and (self.coefficient == 1.0).all() and (self.origin == 0.0).all())

    def values(self, members: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """(k, M) values of the references from the members' (k, S), in their dtype; each epoch by itself, to the bit.

        Summed in float64, in the order of the members. Raises `ValueError` for a member of a mode that there is not:
        compiled code would write beyond the result.
        """
        if self.is_weights:
            return members
        if self.mode.size and self.mode.max() >= self.n_modes:
            raise ValueError(f"a reference has mode {self.mode.max()}, but there are {self.n_modes}")
        sums = np.zeros((len(members), self.n_modes))
        _add(members, self.mode, self.origin, self.coefficient, sums)
        with np.errstate(over="ignore"):  # infinite then, which shows
            return sums.astype(members.dtype)


@numba.njit(nogil=True, cache=True)
def _add(
    members: NDArray[np.floating[Any]],
    mode: NDArray[np.uint16],
    origin: NDArray[np.floating[Any]],
    coefficient: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    for epoch in range(members.shape[0]):
        for i in range(mode.size):
            sums[epoch, mode[i]] += coefficient[i] * (np.float64(members[epoch, i]) - np.float64(origin[i]))
