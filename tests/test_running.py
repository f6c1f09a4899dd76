"""The running moments of online CMD: as exact as a fit of all epochs, in 12 bytes a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import correlated
from numpy.typing import NDArray

from trajkit.kernels.affine import References, fit_block
from trajkit.kernels.running import ReferenceMoments, RunningBlock, split_mean
from trajkit.training.moments import Shelf, modelled_tensor, take_tensor

WARMUP = 20
INDEX = np.array([3, 700, 1500])


def started(trajectories: NDArray[np.float32], every: bool = False) -> tuple[ReferenceMoments, RunningBlock]:
    """What is kept after the first 20 epochs."""
    references = References(trajectories[:WARMUP, INDEX])
    fitted = fit_block(trajectories[:WARMUP], references, every=every)
    moments = ReferenceMoments.of(references)
    if fitted.correlations is not None:
        return moments, RunningBlock.of_updatable(moments, fitted.correlations, fitted.variation, fitted.mean)
    return moments, RunningBlock.of_fit(moments, fitted.mode, fitted.scale, fitted.mean)


def near_one(n_epochs: int, n_weights: int = 2000) -> NDArray[np.float32]:
    """(E, N) trajectories near 1 and -1 that move by 1e-4."""
    rng = np.random.default_rng(1)
    moved = correlated(n_epochs, n_weights, noise=0.5).astype(np.float64)
    moved = 1e-4 * (moved - moved.mean(0)) / moved.std(0)
    return (moved + rng.choice([-1.0, 1.0], n_weights)).astype(np.float32)


@pytest.mark.parametrize("n_epochs", [21, 60, 400])
@pytest.mark.parametrize("values", [correlated, near_one])
def test_scale_and_mean_are_those_of_a_fit_of_all_epochs(values: Any, n_epochs: int) -> None:
    trajectories = values(n_epochs, 2000)
    moments, block = started(trajectories)
    for weights in trajectories[WARMUP:]:
        assert block.take(weights, moments.take(weights[INDEX]))
    w = trajectories.astype(np.float64)
    assert block.mode is not None
    r = (w[:, INDEX] - w[:, INDEX].mean(0))[:, block.mode]
    a = ((w - w.mean(0)) * r).sum(0) / (r**2).sum(0)
    moving = w.std(0) > 1e-5 * np.abs(w.mean(0))  # others move by the last bits of a float32
    assert moving.mean() > 0.98
    scale_error = np.abs(block.solved(moments)[1] - a) / (w.std(0) / r.std(0))
    mean_error = np.abs(block.exact_mean() - w.mean(0)) / w.std(0)
    assert scale_error[moving].max() < 1e-6
    assert mean_error[moving].max() < 1e-6
    modelled = np.empty(2000, np.float32)
    block.modelled(moments, modelled)
    np.testing.assert_allclose(modelled, w.mean(0) + a * r[-1], rtol=2e-7, atol=1e-6 * w.std(0).max())


def test_modes_that_may_change_are_those_of_a_fit_of_all_epochs() -> None:
    trajectories = correlated(70, 2000)
    moments, block = started(trajectories, every=True)
    before = block.solved(moments)[0]
    for weights in trajectories[WARMUP:]:
        assert block.take(weights, moments.take(weights[INDEX]))
    expected = oracle.fit(trajectories, INDEX)
    mode, scale, offset = block.solved(moments)
    sure = expected.margin > 1e-5
    assert sure.mean() > 0.99
    assert np.any(mode != before)
    np.testing.assert_array_equal(mode[sure], expected.mode[sure])
    np.testing.assert_allclose(scale[sure], expected.scale[sure], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(offset[sure], expected.offset[sure], rtol=1e-4, atol=1e-6)


def test_constant_weights_stay_their_value_to_the_bit() -> None:
    trajectories = correlated(60, 2000)
    trajectories[:, 10:500] = np.linspace(-3, 1e30, 490, dtype=np.float32)
    trajectories[:, 500] = 0.0
    moments, block = started(trajectories)
    for weights in trajectories[WARMUP:]:
        block.take(weights, moments.take(weights[INDEX]))
    _, scale, offset = block.solved(moments)
    np.testing.assert_array_equal(scale[10:501], 0.0)
    np.testing.assert_array_equal(offset[10:501], trajectories[0, 10:501])


def test_a_reference_that_stands_still_models_nothing_until_it_moves() -> None:
    trajectories = correlated(40, 2000)
    trajectories[:, INDEX] = trajectories[0, INDEX]
    moments, block = started(trajectories)
    block.take(trajectories[20], moments.take(trajectories[20, INDEX]))
    assert np.all(block.solved(moments)[1] == 0)
    moved = trajectories[21].copy()
    moved[INDEX] += 1.0
    block.take(moved, moments.take(moved[INDEX]))
    assert np.all(np.isfinite(block.solved(moments)[1]))


@pytest.mark.parametrize("every", [False, True])
def test_torch_and_compiled_code_give_the_same_bits(every: bool) -> None:
    trajectories = correlated(45, 2000)
    trajectories[:, 5] = 0.0
    moments, block = started(trajectories, every)
    arrays = {name: None if array is None else torch.from_numpy(array.copy()) for name, array in vars(block).items()}
    shelf = Shelf({}, **arrays)  # type: ignore[arg-type]
    for weights in trajectories[WARMUP:]:
        step = moments.take(weights[INDEX])
        assert block.take(weights, step)
        assert take_tensor(torch.from_numpy(weights), shelf, step)
    for name, array in vars(block).items():
        if array is not None:
            np.testing.assert_array_equal(getattr(shelf, name).numpy(), array, err_msg=name)
    modelled = np.empty(2000, np.float32)
    block.modelled(moments, modelled)
    np.testing.assert_array_equal(modelled_tensor(shelf, moments).numpy(), modelled)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("every", [False, True])
def test_a_weight_that_is_not_finite_is_told(value: float, every: bool) -> None:
    trajectories = correlated(21, 2000)
    moments, block = started(trajectories, every)
    trajectories[20, 1999] = value
    step = moments.take(trajectories[20, INDEX])
    shelf = Shelf({}, **{name: None if a is None else torch.from_numpy(a.copy()) for name, a in vars(block).items()})  # type: ignore[arg-type]
    assert not block.take(trajectories[20], step)
    assert not take_tensor(torch.from_numpy(trajectories[20]), shelf, step)


def test_it_takes_at_most_three_floats_a_weight() -> None:
    _, block = started(correlated(20, 2000))
    assert sum(array.nbytes for array in vars(block).values()) == 11 * 2000


def test_a_mean_has_forty_bits() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=10000) * 10.0 ** rng.integers(-20, 20, size=10000)
    high, rest = split_mean(mean)
    block = RunningBlock(high, rest, np.zeros(10000, np.float32), np.zeros(10000, np.uint8))
    np.testing.assert_allclose(block.exact_mean(), mean, rtol=2.0**-39)
