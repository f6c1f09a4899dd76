from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from conftest import correlated
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from trajkit import CMD
from trajkit.kernels.clustering import DistanceCut


@parametrize_with_checks([CMD(), CMD(n_modes=3, sampling="variance", random_state=0)])
def test_scikit_learn_takes_it_as_one_of_its_own(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_oracles(dtype: type) -> None:
    matrix = correlated(30, 2000).astype(dtype)
    model = CMD(n_modes=6, n_samples=300, random_state=0).fit(matrix.T)
    expected = oracle.fit(matrix, oracle.step1(matrix, model.sample_indices_, 6))
    np.testing.assert_array_equal(model.reference_indices_, expected.reference_index)
    np.testing.assert_array_equal(model.labels_, expected.mode)
    np.testing.assert_allclose(model.correlation_, expected.correlation, atol=1e-6)
    np.testing.assert_allclose(model.scale_, expected.scale, rtol=1e-5)
    np.testing.assert_allclose(model.offset_, expected.offset, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.reconstruct(), expected.modelled.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.references_, matrix[:, model.reference_indices_])
    assert model.scale_.dtype == dtype


def test_inverse_transform_gives_the_modelled_trajectories() -> None:
    matrix = correlated(20, 500, seed=1).astype(np.float64).T
    model = CMD(n_modes=5, random_state=0).fit(matrix)
    np.testing.assert_allclose(model.inverse_transform(model.transform(matrix)), model.reconstruct(), atol=1e-9)
    new = correlated(20, 50, seed=2).astype(np.float64).T
    transformed = model.transform(new)
    assert transformed.shape == (50, 3)
    for row, (mode, scale, offset) in zip(new, transformed, strict=True):
        expected = np.polyfit(model.references_[:, int(mode)], row, 1)
        np.testing.assert_allclose([scale, offset], expected, rtol=1e-6, atol=1e-9)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=r"X names modes .*, there are 5"):
            model.inverse_transform([[wrong, 1, 1]])
    with pytest.raises(NotFittedError):
        _ = CMD().offset_
    with pytest.raises(ValueError, match=r"X has shape \(50, 2\), expected \(n, 3\)"):
        model.inverse_transform(transformed[:, :2])


def test_the_seed_and_the_cut_are_parameters() -> None:
    matrix = correlated(20, 500).T
    one, again, other = (CMD(n_samples=50, random_state=seed).fit(matrix) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.sample_indices_, again.sample_indices_)
    assert one.sample_indices_.tolist() != other.sample_indices_.tolist()
    by_distance = clone(CMD(n_modes=DistanceCut(3.0), random_state=0)).fit(matrix)
    assert len(by_distance.reference_indices_) > 1
    assert make_pipeline(CMD(n_modes=3)).fit_transform(matrix).shape == (500, 3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_modes": 0}, "n_modes is 0, expected an integer from 1 to 65535"),
        ({"n_modes": 2.5}, "n_modes is 2.5, expected an integer"),
        ({"n_modes": "3"}, "n_modes is '3', expected an integer"),
        ({"n_modes": DistanceCut(-1)}, "divisor of the distance cut is -1, expected more than 0"),
        ({"sample_index": [-1, 2]}, "sample_index has to hold integers from 0 to 19"),
        ({"sample_index": [1.7]}, "sample_index has to hold integers from 0 to 19"),
        ({"sample_index": [True, False]}, "sample_index has to hold integers from 0 to 19"),
        ({"sample_index": [20]}, "sample_index has to hold integers from 0 to 19"),
        ({"n_samples": 0}, "n_samples is 0, expected at least 1"),
        ({"sampling": "balanced"}, "sampling is 'balanced', expected 'uniform' or 'variance'"),
    ],
)
def test_wrong_parameters_are_told(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CMD(**parameters).fit(correlated(5, 20).T)
