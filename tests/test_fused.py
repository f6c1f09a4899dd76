"""The compiled kernel against the array-namespace one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import correlated

from trajkit.kernels.affine import BlockFit, References, fit_block, joined
from trajkit.kernels.fused import TILE, fit_block_fused

Array = np.ndarray[Any, Any]


def assert_same(found: BlockFit, expected: BlockFit, block: Array) -> None:
    spread = np.sqrt(expected.variation / len(block))
    sigma = np.where(spread > 0, spread, 1.0)
    sure = np.abs(found.correlation) < 1  # of two references that fit equally well either may be taken
    np.testing.assert_array_equal(found.mode[sure], expected.mode[sure])
    same = found.mode == expected.mode
    np.testing.assert_allclose(found.scale[same], expected.scale[same], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose((found.mean - expected.mean) / sigma, 0, atol=1e-9)
    np.testing.assert_allclose(found.correlation[same], expected.correlation[same], atol=2e-7)
    np.testing.assert_allclose(found.variation, expected.variation, rtol=1e-9)
    assert (found.correlations is None) == (expected.correlations is None)
    if found.correlations is not None and expected.correlations is not None:
        np.testing.assert_allclose(found.correlations, expected.correlations, atol=2e-7)
        chosen = np.take_along_axis(found.correlations, found.mode[None].astype(int), axis=0)[0]
        np.testing.assert_array_equal(chosen, found.correlation)
    assert {name: value.dtype for name, value in vars(found).items() if value is not None} == {
        name: value.dtype for name, value in vars(expected).items() if value is not None
    }


@pytest.mark.parametrize("n_epochs", [2, 3, 4, 5, 7, 40, 101])
@pytest.mark.parametrize("n", [1, TILE - 1, TILE, 3 * TILE + 5])
@pytest.mark.parametrize("m", [1, 10, 33])
@pytest.mark.parametrize("every", [False, True])
def test_it_gives_what_the_array_version_gives(n_epochs: int, n: int, m: int, every: bool) -> None:
    block = correlated(n_epochs, n + m, seed=n_epochs * n)
    references = References(block[:, :m])
    assert_same(fit_block_fused(block[:, m:], references, every), fit_block(block[:, m:], references, every), block)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tiny_and_huge_motions(scale: float) -> None:
    block = (correlated(30, 500).astype(np.float64) * scale).astype(np.float32)
    references = References(correlated(30, 500)[:, :5])
    assert_same(fit_block_fused(block, references), fit_block(block, references), block)


@pytest.mark.parametrize("jump", [1e2, 1e6])
@pytest.mark.parametrize("at", [0, 1, 150])
def test_a_jump_far_beyond_the_motion(jump: float, at: int) -> None:
    """At the first epoch it is the origin of all sums."""
    block = correlated(300, 400)
    references = block[:, :5].copy()
    block[at] += np.float32(jump)
    assert_same(fit_block_fused(block, References(references)), fit_block(block, References(references)), block)


def test_constants_and_what_is_not_finite() -> None:
    block = correlated(20, 300)
    block[:, 3], block[:, 7], block[4, 9], block[2, 11] = 0.1, 0.0, np.nan, np.inf
    references = block[:, 20:24].copy()
    references[:, 1] = 5.0
    found, expected = (kernel(block, References(references), True) for kernel in (fit_block_fused, fit_block))
    assert np.flatnonzero(~np.isfinite(found.variation)).tolist() == [9, 11]
    keep = np.isfinite(found.variation)
    for name in vars(found):
        np.testing.assert_allclose(vars(found)[name][..., keep], vars(expected)[name][..., keep], rtol=1e-6, atol=1e-12)
    assert found.mode[[3, 7]].tolist() == [0, 0]
    assert found.mean[[3, 7]].tolist() == [float(np.float32(0.1)), 0.0]


def test_more_than_256_modes_and_any_memory_order() -> None:
    block = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)
    references = References(block[:, :400])
    for given in (block, np.asfortranarray(block), np.ascontiguousarray(block[:, ::-1])[:, ::-1]):
        found = fit_block_fused(given, references)
        np.testing.assert_array_equal(found.mode[:400], np.arange(400))


def test_the_answer_does_not_depend_on_the_block() -> None:
    block = correlated(25, 10 * TILE + 100)
    references = References(block[:, :6])
    whole = fit_block_fused(block, references, every=True)
    pieces = [block[:, start : start + 2 * TILE] for start in range(0, 2660, 2 * TILE)]
    parts = joined([fit_block_fused(piece, references, every=True) for piece in pieces])
    for name in vars(whole):
        np.testing.assert_array_equal(vars(parts)[name], vars(whole)[name])
