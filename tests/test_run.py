from __future__ import annotations

import dask.array
import numpy as np
import pytest
from conftest import MakeRun, correlated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trajkit import Run, open_run
from trajkit.errors import InputError, UnknownNameError


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run(correlated(6, 50), sizes=(20, 0, 30), epochs=[0, 1, 2, 5, 10, 20])


INDICES = [
    np.s_[:],
    np.s_[2],
    np.s_[-1],
    np.s_[1:4],
    np.s_[::-2],
    np.s_[:, 7],
    np.s_[:, -7],
    np.s_[3, 4],
    np.s_[1:5, 10:30],
    np.s_[:, 5:40:7],
    np.s_[:, 40:5:-7],
    np.s_[:, 30:10],
    np.s_[:, 45:99],
    np.s_[4:2],
    np.s_[...],
    np.s_[..., 3],
    np.s_[2, ...],
    np.s_[[0, 3, 3, -1]],
    np.s_[[True, False, True, False, False, True]],
    np.s_[:, [4, 49, 0, -50]],
    np.s_[2, [4, 49, 0]],
    np.s_[:, np.arange(50) % 3 == 0],
    np.s_[np.array([], dtype=int)],
    np.s_[:, []],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_weights_index_like_numpy(index: object, run: Run) -> None:
    expected = np.asarray(correlated(6, 50)[index])  # type: ignore[call-overload]
    found = np.asarray(run.weights[index])
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_slices_read_what_numpy_reads(data: st.DataObject, run: Run) -> None:
    rows, columns = data.draw(st.slices(6)), data.draw(st.slices(50))
    np.testing.assert_array_equal(run.weights[rows, columns], correlated(6, 50)[rows, columns])


@pytest.mark.parametrize(
    "index",
    [6, -7, (0, 50), (0, 0, 0), (None, 1), ([0], [1]), (..., ...), "a", True, np.True_, [[0, 1]], (0, [50]), (0, 1.5)],
)
def test_an_index_out_of_bounds_or_sense_is_an_index_error(index: object, run: Run) -> None:
    with pytest.raises(IndexError):
        run.weights[index]


def test_numpy_and_dask_take_the_weights_as_they_are(run: Run) -> None:
    matrix = correlated(6, 50)
    assert (run.weights.shape, run.weights.dtype, run.weights.ndim, len(run.weights)) == ((6, 50), np.float32, 2, 6)
    np.testing.assert_array_equal(np.asarray(run.weights), matrix)
    assert np.asarray(run.weights, dtype=np.float64).dtype == np.float64
    lazy = dask.array.from_array(run.weights)
    np.testing.assert_array_equal(lazy.compute(), matrix)
    np.testing.assert_allclose(lazy[2:].mean(axis=0).compute(), matrix[2:].mean(axis=0))


def test_trajectories_of_tensors(run: Run) -> None:
    matrix = correlated(6, 50)
    np.testing.assert_array_equal(run.trajectory("layer2"), matrix[:, 20:])
    np.testing.assert_array_equal(run.trajectory("layer0", epochs=[20, 1]), matrix[[1, 5], :20])
    assert run.trajectory("layer1").shape == (6, 0)
    with pytest.raises(UnknownNameError, match="no tensor 'conv' in the layout; it has layer0"):
        run.trajectory("conv")


def test_an_epoch_that_is_not_recorded_names_the_nearest(run: Run) -> None:
    with pytest.raises(UnknownNameError, match=r"no epoch 7; the run has 6, nearest: 2, 5, 10, 20"):
        run.checkpoint(7)
    with pytest.raises(InputError, match="epoch 5 is named twice"):
        run.trajectory("layer0", epochs=[5, 1, 5])


def test_columns_come_from_the_probe_or_the_weights(run: Run, digits_run: Run) -> None:
    index = np.array([3000, 5, 700])
    np.testing.assert_array_equal(digits_run.columns(index, [3, 30]), digits_run.weights[[3, 30]][:, index])
    np.testing.assert_array_equal(digits_run.weights.gather([3, 30], index), digits_run.weights[[3, 30]][:, index])
    assert run.probe_index.tolist() == list(range(50))


def test_a_run_shows_itself(run: Run) -> None:
    assert repr(run).endswith("run', 6 epochs, 50 weights)")
    assert run.size_bytes > 6 * 50 * 4
    assert run.fits == ()
    assert run.evaluations == ()
    with pytest.raises(UnknownNameError, match="no fit 'modes10'; the run has none"):
        run.fit("modes10")


def test_the_golden_run_of_format_1_reads_as_it_was_written(digits_run: Run) -> None:
    assert digits_run.epochs.tolist() == list(range(40))
    assert digits_run.layout.digest == "e48ec7c1da0a1890d1aa32e7025cb386e27715f1e56a958322ca21207f45c0ec"
    assert digits_run.weights[:].astype(np.float64).sum() == pytest.approx(1938.661703601962, rel=1e-12)
    assert digits_run.weights[39, :3].tolist() == [0.06331101059913635, 0.10504467785358429, -0.3540786802768707]
    assert digits_run.checkpoint(39)["1.num_batches_tracked"].tolist() == 39 * 22
    assert digits_run.metrics[39]["test_accuracy"] == pytest.approx(0.97777778)
    assert open_run(digits_run.path).weights.shape == (40, 3682)
