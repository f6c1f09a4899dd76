"""What step of a training is usual, and which is far beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import correlated

from trajkit.kernels.steps import FAR, FEWEST_STEPS, far_steps, scaled_steps, usual_step


def steps_of(*positions: float, labels: list[int] | None = None) -> np.ndarray:
    places = np.array(positions, np.float32)[:, None]
    return scaled_steps(places, np.array(labels or range(len(positions)), np.int64))


def test_a_step_is_measured_by_the_root_of_its_gap_in_labels() -> None:
    np.testing.assert_allclose(steps_of(0, 1, 3, 7, labels=[0, 1, 5, 21]), [1, 2 / 2, 4 / 4])
    positions = correlated(6, 50)
    expected = np.linalg.norm(np.diff(positions.astype(np.float64), axis=0), axis=1)
    np.testing.assert_allclose(scaled_steps(positions, np.arange(6)), expected)


def test_no_step_overflows() -> None:
    assert steps_of(-3e38, 3e38)[0] == pytest.approx(6e38, rel=1e-6)
    assert steps_of(0, 1, labels=[-(2**63), 2**63 - 1])[0] == pytest.approx(2.0**-32)
    assert steps_of(1).size == steps_of().size == 0


def test_the_usual_step_is_the_median_of_at_least_five() -> None:
    assert usual_step(steps_of(0, 1, 3, 6, 10)) is None
    assert usual_step(steps_of(0, 1, 3, 6, 10, 15)) == 3
    assert FEWEST_STEPS == 5


def test_a_run_that_does_not_move_has_no_usual_step() -> None:
    assert usual_step(steps_of(*[1] * 9)) is None
    assert far_steps(steps_of(*[1] * 9, 100), None).size == 0


def test_positions_that_are_not_finite_say_nothing() -> None:
    steps = steps_of(0, 1, 2, np.nan, 4, 5, 6, 7)
    usual = usual_step(steps)
    assert usual == 1
    assert far_steps(steps, usual).size == 0
    assert usual_step(steps[:6]) is None


def test_a_step_is_far_beyond_twenty_times_the_usual_one() -> None:
    steps = steps_of(0, 1, 2, 3, 4, 5, 5 + FAR, 5 + 2.01 * FAR, 5 + 2.01 * FAR + 1)
    assert far_steps(steps, usual_step(steps)).tolist() == [6]
