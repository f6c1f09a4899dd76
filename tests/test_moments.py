"""Fits that take further epochs, against fits of all epochs at once."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import correlated

from trajkit.kernels.affine import BlockFit, References
from trajkit.kernels.fused import fit_block_fused
from trajkit.kernels.moments import extend


def assert_equal_fits(found: BlockFit, whole: BlockFit, n_epochs: int) -> None:
    assert found.correlations is not None
    assert whole.correlations is not None
    best = np.sort(np.abs(whole.correlations), axis=0)
    decided = best[-1] - best[-2] > 1e-6
    assert decided.mean() > 0.5
    np.testing.assert_array_equal(found.mode[decided], whole.mode[decided])
    same = found.mode == whole.mode
    sigma = np.sqrt(whole.variation / n_epochs)
    sigma = np.where(sigma > 0, sigma, 1.0)
    np.testing.assert_allclose(found.correlations, whole.correlations, atol=1e-6)
    np.testing.assert_allclose(found.variation, whole.variation, rtol=1e-8)
    assert (np.abs(found.mean - whole.mean) <= 1e-9 * sigma + 4 * np.finfo(np.float64).eps * np.abs(whole.mean)).all()
    with np.errstate(divide="ignore", invalid="ignore"):
        scale_of_one = np.nan_to_num(np.abs(whole.scale / whole.correlation), posinf=0.0)
    assert (np.abs(found.scale - whole.scale) <= 1e-6 * scale_of_one + 1e-30)[same].all()


@pytest.mark.parametrize("splits", [[30], [2], [59], [2, 3, 4, 5, 30, 31], [10, 20, 30, 40, 50]])
def test_epochs_taken_later_give_the_fit_of_all_epochs(splits: list[int]) -> None:
    block = correlated(60, 800)
    block[:, 10], block[:40, 11] = 0.25, 0.5  # constant, and constant until late
    references = block[:, :7]
    whole = fit_block_fused(block, References(references), every=True)
    fitted = fit_block_fused(block[: splits[0]], References(references[: splits[0]]), every=True)
    for before, after in zip(splits, [*splits[1:], 60], strict=True):
        old, new = References(references[:before]), References(references[:after])
        fitted = extend(fitted, old, block[before:after], new)
    assert_equal_fits(fitted, whole, 60)
    assert (fitted.mode[10], fitted.scale[10], fitted.correlation[10]) == (0, 0, 0)


def test_a_weight_near_one_that_moves_by_a_ten_thousandth_keeps_its_digits() -> None:
    block = (1 + 1e-4 * correlated(40, 500).clip(-1, 1)).astype(np.float32)
    references = block[:, :5]
    fitted = fit_block_fused(block[:25], References(references[:25]), every=True)
    extended = extend(fitted, References(references[:25]), block[25:], References(references))
    assert_equal_fits(extended, fit_block_fused(block, References(references), every=True), 40)


def test_a_weight_that_wakes_up_changes_its_mode() -> None:
    rng = np.random.default_rng(0)
    walks = rng.normal(size=(40, 2)).cumsum(axis=0).astype(np.float32)
    block = np.concatenate([walks, walks[:, :1] + np.r_[np.zeros(20), 50 * walks[20:, 1]][:, None]], axis=1)
    block = block.astype(np.float32)
    references = block[:, :2]
    first = fit_block_fused(block[:20], References(references[:20]), every=True)
    later = extend(first, References(references[:20]), block[20:], References(references))
    assert (first.mode[2], later.mode[2]) == (0, 1)


def test_a_fit_without_its_correlations_cannot_be_extended() -> None:
    block = correlated(10, 20)
    references = References(block[:, :3])
    with pytest.raises(ValueError, match="has not kept its correlations"):
        extend(fit_block_fused(block, references), references, block, references)
