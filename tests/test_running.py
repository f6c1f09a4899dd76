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


def started(
    trajectories: NDArray[np.float32], candidates: int = 1, decay: float = 1.0
) -> tuple[ReferenceMoments, RunningBlock]:
    """What is kept after the first 20 epochs."""
    references = References(trajectories[:WARMUP, INDEX])
    fitted = fit_block(trajectories[:WARMUP], references, every=candidates > 1)
    moments = ReferenceMoments.of(references, decay)
    if fitted.correlations is None:
        return moments, RunningBlock.of_fit(moments, fitted.mode, fitted.scale, fitted.mean)
    return moments, RunningBlock.of_correlations(
        moments, fitted.correlations, fitted.variation, fitted.mean, candidates
    )


def copied(block: RunningBlock) -> Shelf:
    """The same as tensors."""
    return Shelf({}, **{name: torch.from_numpy(array.copy()) for name, array in vars(block).items()})  # type: ignore[arg-type]


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
    r = (w[:, INDEX] - w[:, INDEX].mean(0))[:, block.mode[0]]
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


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("values", [correlated, near_one])
def test_with_a_decay_scale_and_mean_are_those_of_a_weighted_fit(values: Any, decay: float) -> None:
    trajectories = values(60, 2000)
    moments, block = started(trajectories, decay=decay)
    for weights in trajectories[WARMUP:]:
        assert block.take(weights, moments.take(weights[INDEX]))
    counts = decay ** np.minimum(59 - np.arange(60), 40)[:, None]
    w = trajectories.astype(np.float64)
    mean = (counts * w).sum(0) / counts.sum()
    moved = w - mean
    r = moved[:, INDEX][:, block.mode[0]]
    power, spread = (counts * r**2).sum(0), np.sqrt((counts * moved**2).sum(0))
    a = (counts * moved * r).sum(0) / power
    moving = spread > 1e-5 * np.abs(mean)
    assert moving.mean() > 0.95
    assert (np.abs(block.solved(moments)[1] - a) * np.sqrt(power) / spread)[moving].max() < 2e-6
    assert (np.abs(block.exact_mean() - mean) / spread)[moving].max() < 2e-6


@pytest.mark.parametrize("candidates", [2, 3])
def test_modes_that_may_change_are_the_best_candidates_over_all_epochs(candidates: int) -> None:
    trajectories = correlated(70, 2000)
    early = np.abs(oracle.correlate(*(trajectories[:WARMUP, part] for part in (INDEX, slice(None)))))
    moments, block = started(trajectories, candidates)
    before = block.solved(moments)[0]
    for weights in trajectories[WARMUP:]:
        assert block.take(weights, moments.take(weights[INDEX]))
    w = trajectories.astype(np.float64)
    late = oracle.correlate(w[:, INDEX], w)
    limit = np.sort(early, axis=0)[::-1][candidates - 1]
    scores = np.where(early >= limit, np.abs(late), -1.0)
    expected = scores.argmax(axis=0)
    a = late[expected, np.arange(2000)] * w.std(0) / w[:, INDEX].std(0)[expected]

    mode, scale, offset = block.solved(moments)
    first, second = np.sort(scores, axis=0)[:-3:-1]
    sure = first - second > 1e-5
    assert sure.mean() > 0.99
    assert np.any(mode != before)
    assert np.any(expected != np.abs(late).argmax(axis=0)) == (candidates == 2)
    np.testing.assert_array_equal(mode[sure], expected[sure])
    np.testing.assert_allclose(scale[sure], a[sure], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        offset[sure], (w.mean(0) - a * w[:, INDEX].mean(0)[expected])[sure], rtol=1e-4, atol=1e-6
    )


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


@pytest.mark.parametrize("decay", [0.99, 0.9, 0.5])
def test_scales_stay_sensible_where_nothing_moves_any_more(decay: float) -> None:
    trajectories = correlated(40, 2000)
    moments, block = started(trajectories, decay=decay)
    largest = np.abs(block.solved(moments)[1]).max()
    modelled = np.empty(2000, np.float32)
    for epoch in range(WARMUP, 5000):
        weights = trajectories[min(epoch, 39)]
        block.take(weights, moments.take(weights[INDEX]))
        if epoch < 40:
            largest = max(largest, np.abs(block.solved(moments)[1]).max())
    block.modelled(moments, modelled)
    assert np.abs(block.solved(moments)[1]).max() <= 2 * largest
    np.testing.assert_allclose(modelled, weights, rtol=3e-7)
    weights = weights + trajectories[1] - trajectories[0]
    block.take(weights, moments.take(weights[INDEX]))
    block.modelled(moments, modelled)
    np.testing.assert_allclose(modelled[INDEX], weights[INDEX], rtol=1e-6)
    assert np.isfinite(modelled).all()


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_torch_and_compiled_code_give_the_same_bits(candidates: int) -> None:
    trajectories = correlated(45, 2000)
    trajectories[:, 5] = 0.0
    moments, block = started(trajectories, candidates, decay=0.9)
    shelf = copied(block)
    for weights in trajectories[WARMUP:]:
        step = moments.take(weights[INDEX])
        assert block.take(weights, step)
        assert take_tensor(torch.from_numpy(weights), shelf, step)
    for name, array in vars(block).items():
        np.testing.assert_array_equal(getattr(shelf, name).numpy(), array, err_msg=name)
    modelled = np.empty(2000, np.float32)
    block.modelled(moments, modelled)
    np.testing.assert_array_equal(modelled_tensor(shelf, moments).numpy(), modelled)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("candidates", [1, 2])
def test_a_weight_that_is_not_finite_is_told(value: float, candidates: int) -> None:
    trajectories = correlated(21, 2000)
    moments, block = started(trajectories, candidates)
    trajectories[20, 1999] = value
    step = moments.take(trajectories[20, INDEX])
    shelf = copied(block)
    assert not block.take(trajectories[20], step)
    assert not take_tensor(torch.from_numpy(trajectories[20]), shelf, step)


@pytest.mark.parametrize(("candidates", "n_bytes"), [(1, 11), (2, 16)])
def test_it_takes_at_most_three_floats_a_weight_and_four_where_modes_may_change(candidates: int, n_bytes: int) -> None:
    _, block = started(correlated(20, 2000), candidates)
    assert sum(array.nbytes for array in vars(block).values()) == n_bytes * 2000


def test_a_mean_has_forty_bits() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=10000) * 10.0 ** rng.integers(-20, 20, size=10000)
    high, rest = split_mean(mean)
    block = RunningBlock(high, rest, np.zeros((1, 10000), np.float32), np.zeros((1, 10000), np.uint8))
    np.testing.assert_allclose(block.exact_mean(), mean, rtol=2.0**-39)
