from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import oracle
import pytest
from conftest import correlated
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from trajkit.kernels.affine import PIECE, References, fit_block, joined
from trajkit.kernels.clustering import (
    BLOCK_ROWS,
    DistanceCut,
    choose_references,
    cluster,
    cluster_tree,
    clustering_bytes,
    row_distances,
)
from trajkit.kernels.correlation import correlation_magnitude, correlation_matrix
from trajkit.kernels.model import model
from trajkit.kernels.sampling import balanced_counts, candidates_suffice, draw, draw_by_variance, uniform_counts

Array = np.ndarray[Any, Any]


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def fortran_ordered(array: Array) -> Array:
    return np.asfortranarray(array)


BACKENDS = [np.asarray, read_only, fortran_ordered, array_api_strict.asarray]


def assert_fits(block: Array, references: Array, backend: Callable[[Array], Any] = np.asarray) -> None:
    """Modes, scale and modelled trajectory are the oracle's, to the bars."""
    fitted = fit_block(backend(block), References(references))
    columns = np.concatenate([references, block], axis=1)
    m = references.shape[1]
    expected = oracle.fit(columns, np.arange(m))
    decided = expected.margin[m:] > 1e-6
    np.testing.assert_array_equal(fitted.mode[decided], expected.mode[m:][decided])
    same = fitted.mode == expected.mode[m:]
    w = block.astype(np.float64)
    r = references.astype(np.float64)
    sigma = np.where((w != w[0]).any(0), w.std(0), 1.0)
    sigma_r = np.where((r != r[0]).any(0), r.std(0), 1.0)[fitted.mode]
    scale_error = np.abs(fitted.scale - expected.scale[m:]) / (sigma / sigma_r)
    assert scale_error[same].max(initial=0) < 1e-5
    chosen = r[:, fitted.mode] - References(references).mean[fitted.mode]
    modelled = fitted.mean + fitted.scale.astype(np.float64) * chosen
    assert (np.abs(modelled - expected.modelled[:, m:]) / sigma)[:, same].max(initial=0) < 1e-5
    np.testing.assert_allclose(fitted.correlation[same], expected.correlation[m:][same], atol=2e-6)
    np.testing.assert_allclose(fitted.variation, ((w - w.mean(0)) ** 2).sum(0), rtol=1e-4, atol=1e-300)


# --- Steps 2 and 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_epochs", [2, 3, 40, 200])
def test_modes_and_fits_are_the_oracles(backend: Callable[[Array], Any], n_epochs: int) -> None:
    block = correlated(n_epochs, 3000)
    assert_fits(block, block[:, :5], backend)


def test_weights_near_one_that_move_by_a_ten_thousandth() -> None:
    block = (1 + 1e-4 * correlated(60, 4000).clip(-1, 1)).astype(np.float32)
    block = block[:, (block != block[0]).any(0)]
    assert_fits(block, block[:, :7])


def test_a_reference_mean_far_above_its_spread() -> None:
    walk = np.random.default_rng(1).normal(size=(50, 3)).cumsum(axis=0)
    references = (1 + 1e-4 * walk).astype(np.float32)
    block = np.concatenate([100 * (references - 1), -3 * references, references], axis=1).astype(np.float32)
    assert_fits(block, references)


def test_weights_that_jump_once_and_then_hardly_move() -> None:
    block = correlated(200, 2000)
    block[1:] = block[0] + 1000 * np.abs(block[1:] - block[0]).max() + 0.1 * (block[1:] - block[1])
    assert_fits(block, block[:, :5])


def test_weights_that_move_by_single_roundings() -> None:
    rng = np.random.default_rng(2)
    block = np.float32(1) + np.float32(2**-23) * rng.integers(0, 2, size=(100, 500)).astype(np.float32)
    assert_fits(block, block[:, :5])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e15, 1e19, 1e30])
def test_tiny_and_huge_motions_keep_their_digits(scale: float) -> None:
    block = (correlated(30, 1000).astype(np.float64) * scale).astype(np.float32)
    assert_fits(block, correlated(30, 1000)[:, :5])


def test_the_official_one_pass_formula_would_fail_here() -> None:
    """Trap 1: n·Σxy - ΣxΣy in float32 is infinite or wrong for weights near 1 that move by 5e-4."""
    block = (1 + 5e-4 * correlated(40, 500).clip(-1, 1)).astype(np.float32)
    x, y = block, block[:, :1]
    n = np.float32(len(block))
    with np.errstate(all="ignore"):
        top = n * (x * y).sum(0) - x.sum(0) * y.sum(0)
        bottom = np.sqrt((n * (x * x).sum(0) - x.sum(0) ** 2) * (n * (y * y).sum(0) - y.sum(0) ** 2))
        naive = top / bottom
    exact = oracle.correlate(block.astype(np.float64), block[:, :1].astype(np.float64))[:, 0]
    assert not np.all(np.abs(naive - exact) < 1e-2)
    assert_fits(block, block[:, :5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_weight_gets_mode_zero_and_its_value(backend: Callable[[Array], Any]) -> None:
    block = correlated(20, 50)
    block[:, 3], block[:, 7] = 0.1, 0.0
    fitted = fit_block(backend(block), References(block[:, 10:13]))
    assert fitted.mode[[3, 7]].tolist() == [0, 0]
    assert fitted.scale[[3, 7]].tolist() == [0, 0]
    assert fitted.correlation[[3, 7]].tolist() == [0, 0]
    assert fitted.variation[[3, 7]].tolist() == [0, 0]
    assert fitted.mean[[3, 7]].tolist() == [float(np.float32(0.1)), 0.0]


def test_a_constant_reference_attracts_nothing_and_leaves_no_nan() -> None:
    """Trap 3: an empty mode must not shift the others."""
    block = correlated(20, 200)
    references = block[:, :4].copy()
    references[:, 1] = 5.0
    fitted = fit_block(block, References(references))
    assert not np.any(fitted.mode == 1)
    assert np.isfinite(fitted.scale).all()
    assert_fits(block, references)


def test_all_references_constant() -> None:
    block = correlated(10, 20)
    fitted = fit_block(block, References(np.ones((10, 2), np.float32)))
    assert not fitted.mode.any()
    assert not fitted.scale.any()
    np.testing.assert_allclose(fitted.mean, block.astype(np.float64).mean(0), rtol=1e-6)


def test_more_than_256_modes() -> None:
    """Trap 4: uint8 modes wrap."""
    block = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)
    fitted = fit_block(block, References(block[:, :400]))
    np.testing.assert_array_equal(fitted.mode[:400], np.arange(400))


def test_not_finite_values_are_seen_in_the_variation() -> None:
    block = correlated(10, 30)
    block[4, 5], block[2, 6] = np.nan, np.inf
    fitted = fit_block(block, References(block[:, :3]))
    assert np.flatnonzero(~np.isfinite(fitted.variation)).tolist() == [5, 6]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_model_is_mean_and_scale_times_reference(dtype: type) -> None:
    rng = np.random.default_rng(0)
    references, mode = rng.normal(size=(3, 5)), rng.integers(5, size=1000).astype(np.uint16)
    scale, mean = rng.normal(size=1000).astype(np.float32), rng.normal(size=1000)
    expected = (references[:, mode] * scale.astype(np.float64) + mean).astype(dtype)
    found = model(references, mode, scale, mean, dtype)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == dtype
    assert model(references, mode[:0], scale[:0], mean[:0], dtype).shape == (3, 0)


def test_a_mode_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a mode 5, but 5 references"):
        model(np.zeros((1, 5)), np.array([5], np.uint16), np.ones(1, np.float32), np.ones(1), np.float32)


def test_inputs_stay_as_they_were() -> None:
    block = correlated(12, 100)
    before, references = block.copy(), block[:, :4].copy()
    fit_block(block, References(references))
    np.testing.assert_array_equal(block, before)


def test_the_answer_does_not_depend_on_the_block() -> None:
    block = correlated(25, 3 * PIECE + 100)
    references = References(block[:, :6])
    whole = fit_block(block, references, every=True)
    parts = [
        fit_block(block[:, start : start + width], references, every=True)
        for start, width in [(0, PIECE), (PIECE, 2 * PIECE), (3 * PIECE, 100)]
    ]
    for name, values in vars(joined(parts)).items():
        np.testing.assert_array_equal(values, vars(whole)[name])


def test_the_order_of_epochs_does_not_matter() -> None:
    block = correlated(40, 2000)
    order = np.random.default_rng(3).permutation(40)
    one, other = fit_block(block, References(block[:, :5])), fit_block(block[order], References(block[order, :5]))
    np.testing.assert_allclose(one.correlation, other.correlation, atol=2e-6)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 12), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_any_block_agrees_with_the_oracle(seed: int, n_epochs: int, m: int, n: int) -> None:
    block = correlated(n_epochs, n + m, seed=seed)
    assert_fits(block[:, m:], block[:, :m])


# --- Step 1


def test_correlation_of_constants_is_zero_even_with_themselves() -> None:
    trajectories = correlated(15, 6)
    trajectories[:, 2] = 0.3
    matrix = correlation_matrix(trajectories)
    assert not matrix[2].any()
    assert not matrix[:, 2].any()
    keep = [0, 1, 3, 4, 5]
    expected = np.corrcoef(trajectories[:, keep].astype(np.float64).T)
    np.testing.assert_allclose(matrix[np.ix_(keep, keep)], expected, atol=1e-12)


def test_magnitude_is_the_absolute_correlation() -> None:
    trajectories = read_only(correlated(15, 200))
    np.testing.assert_array_equal(correlation_magnitude(trajectories), np.abs(correlation_matrix(trajectories)))


@pytest.mark.parametrize("k", [1, 2, 3, 300, BLOCK_ROWS, BLOCK_ROWS + 1, BLOCK_ROWS + 2, 3 * BLOCK_ROWS + 17])
@pytest.mark.parametrize("backend", [read_only, fortran_ordered])
def test_gram_distances_are_pdists(k: int, backend: Callable[[Array], Array]) -> None:
    matrix = backend(correlation_magnitude(correlated(30, k)))
    np.testing.assert_allclose(row_distances(matrix), pdist(matrix), atol=1e-6)


def test_equal_rows_have_distance_zero_across_blocks() -> None:
    kind = np.arange(2 * BLOCK_ROWS + 100) % 3
    walks = np.random.default_rng(0).normal(size=(20, 3)).cumsum(axis=0)
    scales = np.random.default_rng(1).normal(size=kind.size)
    distances = row_distances(correlation_magnitude(walks[:, kind] * scales))
    one, other = np.triu_indices(kind.size, 1)
    np.testing.assert_array_equal(distances == 0, kind[one] == kind[other])


@pytest.mark.parametrize("cut", [1, 2, 10, 40, 2.5, 8.0])
def test_references_are_the_oracles(cut: int | float) -> None:
    trajectories = correlated(30, 400, noise=1.0)
    magnitude = np.abs(correlation_matrix(trajectories))
    labels = cluster(cluster_tree(magnitude), cut if isinstance(cut, int) else DistanceCut(cut))
    sizes = np.bincount(labels)
    assert (np.diff(sizes) <= 0).all()
    expected = oracle.step1(trajectories, np.arange(400), cut)
    np.testing.assert_array_equal(choose_references(magnitude, labels), expected)


def test_equal_directions_are_one_cluster_whatever_rounding_says() -> None:
    walks = np.random.default_rng(0).normal(size=(20, 3)).cumsum(axis=0)
    scales = np.random.default_rng(1).normal(size=60)
    magnitude = np.abs(correlation_matrix(walks[:, np.arange(60) % 3] * scales))
    labels = cluster(cluster_tree(magnitude), 10)
    assert np.bincount(labels).tolist() == [20, 20, 20]


def test_fewer_clusters_than_modes() -> None:
    walk = np.random.default_rng(0).normal(size=(20, 2)).cumsum(axis=0)
    magnitude = np.abs(correlation_matrix(np.repeat(walk, 5, axis=1)))
    assert len(np.unique(cluster(cluster_tree(magnitude), 2))) == 2
    assert cluster(cluster_tree(np.ones((1, 1))), 10).tolist() == [0]


@pytest.mark.parametrize("backend", [read_only, fortran_ordered])
def test_the_first_of_equal_members_is_the_reference_of_a_large_cluster(backend: Callable[[Array], Array]) -> None:
    k = BLOCK_ROWS + 50
    twice = np.tile(np.arange(k), 2)
    magnitude = backend(correlation_magnitude(correlated(30, k))[np.ix_(twice, twice)])
    labels = (twice % 5 == 0).astype(np.int64)
    members = [np.flatnonzero(labels == label) for label in (0, 1)]
    expected = [every[magnitude[np.ix_(every, every)].mean(axis=1).argmax()] for every in members]
    assert choose_references(magnitude, labels).tolist() == expected
    assert max(expected) < k


def traced_peak(step: Callable[[], Any]) -> int:
    """Peak bytes that NumPy allocates in `step`, its result included."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_step_1_stays_below_its_estimate_of_memory() -> None:
    k = 2000
    trajectories = correlated(40, k)

    def step_1() -> None:
        magnitude = correlation_magnitude(trajectories)
        choose_references(magnitude, cluster(cluster_tree(magnitude), 10))

    peak = traced_peak(step_1)
    copy_in_linkage = 4 * k * k  # is C's, and not traced
    assert peak < clustering_bytes(k) < 1.3 * (peak + copy_in_linkage)


def test_estimate_of_memory_covers_as_many_epochs_as_samples() -> None:
    trajectories = correlated(800, 800)
    assert traced_peak(lambda: correlation_magnitude(trajectories)) < clustering_bytes(800)


def test_no_step_makes_a_second_matrix() -> None:
    k, n_epochs = 1500, 40
    trajectories = correlated(n_epochs, k)
    magnitude = correlation_magnitude(trajectories)
    block = 8 * BLOCK_ROWS * k
    assert traced_peak(lambda: correlation_magnitude(trajectories)) < magnitude.nbytes + 3 * 8 * n_epochs * k
    assert traced_peak(lambda: row_distances(magnitude)) < magnitude.nbytes / 2 + 2.2 * block
    assert traced_peak(lambda: choose_references(magnitude, np.zeros(k, np.int64))) < 2.2 * block


# --- Sampling


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(any), st.integers(1, 3000))
def test_balanced_counts_add_up_and_fit(sizes: list[int], k: int) -> None:
    layers = np.array(sizes, dtype=np.int64)
    counts = balanced_counts(layers, k)
    assert counts.sum() == min(k, layers.sum())
    assert (counts <= layers).all()
    least = np.minimum(np.minimum(k // (2 * len(sizes)), layers) + (k // 2) * layers // max(layers.sum(), 1), layers)
    if k <= layers.sum():
        assert (counts >= least).all()


def test_balanced_counts_of_huge_layers() -> None:
    counts = balanced_counts(np.array([2**40, 10, 2**45], dtype=np.int64), 16384)
    assert counts.sum() == 16384
    assert counts[1] == 10


def test_uniform_counts_follow_the_sizes() -> None:
    rng = np.random.default_rng(0)
    counts = sum(uniform_counts(np.array([100, 0, 900]), 50, rng) for _ in range(200))
    assert counts[1] == 0
    assert counts[0] / counts.sum() == pytest.approx(0.1, abs=0.01)


def test_draws_are_distinct_rising_candidates_of_their_layers() -> None:
    bounds = np.array([0, 100, 130, 1000])
    candidates = np.sort(np.random.default_rng(1).choice(1000, 400, replace=False))
    counts = np.array([10, 5, 60])
    assert candidates_suffice(counts, bounds, candidates)
    drawn = draw(counts, bounds, np.random.default_rng(0), candidates)
    assert np.isin(drawn, candidates).all()
    assert (np.diff(drawn) > 0).all()
    assert np.diff(np.searchsorted(drawn, bounds)).tolist() == counts.tolist()
    assert not candidates_suffice(np.array([0, 31, 0]), bounds, candidates)


def test_the_same_seed_draws_the_same() -> None:
    bounds = np.array([0, 500, 700])
    once, again, other = (draw(np.array([20, 30]), bounds, np.random.default_rng(seed)).tolist() for seed in (7, 7, 8))
    assert once == again != other


def test_indices_stay_exact_above_two_to_the_24() -> None:
    """Trap 2: reference indices kept as float32 name a neighbour."""
    drawn = draw(np.array([50]), np.array([0, 2**40]), np.random.default_rng(0))
    assert drawn.dtype == np.int64
    assert (drawn % 2).any()
    assert drawn.max() > 2**32


def test_variance_sampling_prefers_what_moves() -> None:
    spread = np.zeros(1000)
    spread[:100] = 5.0  # e^5 = 148 times as likely
    drawn = draw_by_variance(spread, 60, np.arange(1000), np.random.default_rng(0))
    assert (drawn < 100).sum() > 40
    assert len(set(drawn.tolist())) == 60
    assert len(draw_by_variance(spread, 5000, np.arange(1000), np.random.default_rng(0))) == 1000


def test_variance_sampling_survives_a_huge_spread() -> None:
    for k in (2, 3):
        drawn = draw_by_variance(np.array([1e4, 1e4, 0.0]), k, np.arange(3), np.random.default_rng(0))
        assert drawn.tolist() == [0, 1, 2][:k]


def test_variance_sampling_has_the_probabilities_of_the_paper() -> None:
    spread = np.log([1.0, 2.0, 5.0])
    rng = np.random.default_rng(0)
    drawn = np.array([draw_by_variance(spread, 1, np.arange(3), rng)[0] for _ in range(4000)])
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [1 / 8, 2 / 8, 5 / 8], atol=0.03)
