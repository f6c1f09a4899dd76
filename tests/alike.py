"""Comparing weights and online CMDs, to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, equal

from trajkit import OnlineCMD


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(equal(found[name], tensor) for name, tensor in expected.items())


def assert_same_cmd(found: OnlineCMD, expected: OnlineCMD) -> None:
    assert found.n_updates == expected.n_updates
    np.testing.assert_array_equal(found.mode, expected.mode)
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_array_equal(found.offset, expected.offset)
