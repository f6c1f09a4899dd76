from __future__ import annotations

import contextlib
import gzip
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import oracle
import pytest
import torch
from conftest import REPOSITORY, MakeRun, correlated
from torch import nn

import trajkit.pipeline
from trajkit import CMD, Recorder, Run, fit, open_run
from trajkit.errors import InputError, PathExistsError, RunLockedError, UnknownNameError
from trajkit.kernels.clustering import DistanceCut
from trajkit.store import format as store_format
from trajkit.store.fit_shape import FitShape
from trajkit.store.fits import FitWriter
from trajkit.store.objects import LocalObjects

RESULTS = ("mode", "scale", "mean", "offset", "correlation", "reference", "reference_index", "sample_index")


def assert_same(one: Any, other: Any) -> None:
    for name in RESULTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_is_the_oracles(run: Run, decomposition: Any, cut: int | float) -> None:
    """Step 1 gives the same references, and the bars hold for every weight."""
    rows = run.rows_of(decomposition.epochs)
    trajectories = run.weights[rows]
    references = decomposition.reference_index
    expected_references = oracle.step1(trajectories, decomposition.sample_index, cut)
    for found, wanted in zip(references, expected_references, strict=True):
        if found != wanted:  # equal to rounding, as weights that move by single roundings are
            assert abs(np.corrcoef(trajectories[:, found].astype(float), trajectories[:, wanted])[0, 1]) > 1 - 1e-9
    assert_is_the_oracles_steps_2_and_3(run, decomposition)


def assert_is_the_oracles_steps_2_and_3(run: Run, decomposition: Any) -> None:
    """The bars hold for every weight, given the references."""
    trajectories, references = run.weights[run.rows_of(decomposition.epochs)], decomposition.reference_index
    expected = oracle.fit(trajectories, references)
    same = decomposition.mode == expected.mode
    assert same[expected.margin > 1e-6].all()
    w = trajectories.astype(np.float64)
    sigma = np.where((w != w[0]).any(0), w.std(0), 1.0)
    sigma_r = np.where(w[:, references].std(0) > 0, w[:, references].std(0), 1.0)[decomposition.mode]
    assert (np.abs(decomposition.scale - expected.scale) / (sigma / sigma_r))[same].max() < 1e-5
    modelled = w[:, references][:, decomposition.mode] * decomposition.scale.astype(np.float64) + decomposition.offset
    assert (np.abs(modelled - expected.modelled) / sigma)[:, same].max() < 1e-5
    np.testing.assert_allclose(decomposition.correlation[same], expected.correlation[same], atol=2e-6)
    residual = ((w - modelled) ** 2).sum() / ((w - w.mean(0)) ** 2).sum()
    assert decomposition.quality.variance_explained == pytest.approx(1 - residual, abs=1e-5)


# --- Against the oracle


@pytest.mark.parametrize("sampling", ["balanced", "uniform", "variance"])
def test_a_fit_of_a_real_training_is_the_oracles(sampling: Any, digits_run: Run) -> None:
    assert_is_the_oracles(digits_run, fit(digits_run, modes=10, samples=500, sampling=sampling), 10)


@pytest.mark.parametrize("divisor", [1.5, 3.0])
def test_a_distance_cut_is_the_oracles(divisor: float, digits_run: Run) -> None:
    decomposition = fit(digits_run, modes=DistanceCut(divisor), samples=200)
    assert_is_the_oracles(digits_run, decomposition, divisor)
    assert decomposition.name == f"cut{divisor:g}"


def test_some_epochs_are_fitted(digits_run: Run) -> None:
    decomposition = fit(digits_run, epochs=range(39, 9, -3), samples=300)
    assert decomposition.epochs.tolist() == list(range(12, 40, 3))
    assert_is_the_oracles(digits_run, decomposition, 10)


def test_weights_near_one_that_move_by_a_ten_thousandth(make_run: MakeRun) -> None:
    matrix = (1 + 1e-4 * correlated(60, 5000).clip(-1, 1)).astype(np.float32)
    run = make_run(matrix[:, (matrix != matrix[0]).any(0)])
    assert_is_the_oracles(run, fit(run, modes=8, samples=400), 8)


def test_references_with_a_mean_far_above_their_spread(make_run: MakeRun) -> None:
    walks = np.random.default_rng(0).normal(size=(50, 3)).cumsum(axis=0)
    near_one = 1 + 1e-4 * walks[:, [0, 1, 2] * 20] + 1e-6 * np.random.default_rng(1).normal(size=(50, 60))
    far_moving = 100 * 1e-4 * walks[:, [0, 1, 2] * 500] * np.random.default_rng(2).normal(size=1500)
    run = make_run(np.concatenate([near_one, far_moving], axis=1).astype(np.float32))
    decomposition = fit(run, modes=3, sample_index=np.arange(60))
    assert np.abs(decomposition.reference.mean(0)).min() > 1000 * decomposition.reference.std(0).max()
    assert_is_the_oracles(run, decomposition, 3)


def test_an_mnist_training_is_the_oracles(tmp_path: Path) -> None:
    """An MLP of 109,386 weights on real MNIST; `make oracle` does the same with 1.33 M weights."""
    folder = Path(os.environ.get("TRAJKIT_DATA", REPOSITORY.parent / "shared" / "data")) / "mnist"
    if not folder.is_dir():
        pytest.skip("MNIST is not here: set TRAJKIT_DATA to a folder with mnist/train-images-idx3-ubyte.gz")
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        images = torch.from_numpy(np.frombuffer(file.read(16 + 784 * 6000), np.uint8, offset=16).copy())
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = torch.from_numpy(np.frombuffer(file.read(8 + 6000), np.uint8, offset=8).astype(np.int64))
    pixels = images.reshape(-1, 784) / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Recorder(model, tmp_path / "mnist", fsync=False) as recorder:
        for epoch in range(20):
            for batch in torch.randperm(len(labels)).split(128):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            recorder.record(epoch)
    run = open_run(tmp_path / "mnist")
    decomposition = fit(run)
    assert_is_the_oracles(run, decomposition, 10)
    constant = (run.weights[:] == run.weights[0]).all(0)
    assert constant.sum() > 1000  # border pixels never move
    assert not decomposition.scale[constant].any()


# --- The same answer however it is computed


@pytest.fixture
def wide_matrix() -> np.ndarray[Any, Any]:
    return correlated(12, 40_000)


@pytest.mark.parametrize("chunk_values", [8192, 16384, 131072])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_block_size_and_threads_do_not_change_a_bit(
    chunk_values: int,
    threads: int,
    wide_matrix: np.ndarray[Any, Any],
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = fit(make_run(wide_matrix, name="whole", sizes=(25_000, 15_000)), modes=6)
    assert_same(whole, whole)  # reads it, before objects are cut in another way
    monkeypatch.setattr(store_format, "CHUNK_VALUES", chunk_values)
    run = make_run(wide_matrix, name="cut", sizes=(25_000, 15_000))
    assert len(store_format.result_rule(40_000).objects()) == -(-40_000 // min(chunk_values, 40_000))
    with dask.config.set(num_workers=threads):
        assert_same(fit(run, modes=6), whole)


def test_a_matrix_in_memory_gives_what_the_run_on_disk_gives(
    wide_matrix: np.ndarray[Any, Any], make_run: MakeRun
) -> None:
    decomposition = fit(make_run(wide_matrix), modes=6)
    estimator = CMD(n_modes=6, sample_index=decomposition.sample_index).fit(wide_matrix.T)
    for mine, theirs in [
        ("labels_", "mode"),
        ("scale_", "scale"),
        ("offset_", "offset"),
        ("correlation_", "correlation"),
        ("references_", "reference"),
        ("reference_indices_", "reference_index"),
    ]:
        np.testing.assert_array_equal(getattr(estimator, mine), getattr(decomposition, theirs))


def test_the_same_seed_gives_the_same_fit(digits_run: Run) -> None:
    one, again, other = (fit(digits_run, samples=300, seed=seed) for seed in (3, 3, 4))
    assert_same(one, again)
    assert one.sample_index.tolist() != other.sample_index.tolist()


# --- What a fit holds and gives back


def test_a_saved_fit_comes_back_with_its_settings(digits_run: Run) -> None:
    made = fit(digits_run, modes=7, samples=200, sampling="uniform", seed=5, name="mine")
    loaded = open_run(digits_run.path).fit("mine")
    assert_same(made, loaded)
    assert loaded.settings == {"modes": 7, "samples": 200, "sampling": "uniform", "seed": 5}
    assert loaded.epochs.tolist() == list(range(40))
    assert loaded.n_modes == 7
    assert sum(part.weights for part in loaded.quality_by_mode) == 3682
    assert [part.weights for part in loaded.quality_by_mode] == np.bincount(loaded.mode, minlength=7).tolist()
    tensors = loaded.quality_by_tensor
    assert list(tensors) == [entry.name for entry in digits_run.layout.weights]
    assert sum(part.variation for part in tensors.values()) == pytest.approx(loaded.quality.variation)
    assert sum(part.explained for part in tensors.values()) == pytest.approx(loaded.quality.explained)
    assert (loaded.mode.dtype, loaded.scale.dtype, loaded.offset.dtype) == (np.uint16, np.float32, np.float64)
    assert loaded.reference_index.dtype == np.int64


def test_an_empty_tensor_has_nothing_to_explain(make_run: MakeRun) -> None:
    decomposition = fit(make_run(correlated(9, 100), sizes=(40, 0, 60)), modes=3)
    assert decomposition.quality_by_tensor["layer1"].weights == 0
    assert decomposition.quality_by_tensor["layer1"].variance_explained is None


def test_references_are_modelled_exactly(digits_run: Run) -> None:
    decomposition = fit(digits_run)
    np.testing.assert_array_equal(decomposition.mode[decomposition.reference_index], np.arange(10))
    np.testing.assert_allclose(decomposition.correlation[decomposition.reference_index], 1, atol=1e-6)
    modelled = decomposition.modelled(digits_run.epochs)[:, decomposition.reference_index]
    np.testing.assert_allclose(modelled, decomposition.reference, rtol=1e-5, atol=1e-6)


def test_epochs_that_were_not_fitted_are_modelled_too(digits_run: Run) -> None:
    decomposition = fit(digits_run, epochs=range(20), samples=300)
    reference = decomposition.reference_at([30])[0]
    np.testing.assert_array_equal(reference, digits_run.weights[30][decomposition.reference_index])
    expected = decomposition.scale.astype(np.float64) * reference[decomposition.mode] + decomposition.offset
    np.testing.assert_allclose(decomposition.modelled([30])[0], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnknownNameError, match="no epoch 40"):
        decomposition.modelled([40])


def test_slices_of_the_model_are_the_model(digits_run: Run) -> None:
    decomposition = fit(digits_run)
    whole = decomposition.modelled([3, 39])
    np.testing.assert_array_equal(decomposition.modelled([3, 39], 100, 1000), whole[:, 100:1000])
    trajectory = decomposition.trajectory("4.weight")
    assert trajectory.shape == (40, 16, 8, 3, 3)
    np.testing.assert_array_equal(trajectory[3].ravel(), whole[0, slice(*_place(digits_run, "4.weight"))])


def _place(run: Run, name: str) -> tuple[int, int]:
    return run.layout[name].offset, run.layout[name].stop


def test_buffers_of_a_modelled_state_are_those_recorded(digits_run: Run) -> None:
    decomposition = fit(digits_run)
    state, recorded = decomposition.state_dict(17), digits_run.state_dict(17)
    assert list(state) == list(recorded)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(state[name], recorded[name])
    assert not torch.equal(state["0.weight"], recorded["0.weight"])


def test_a_model_of_many_epochs_explains_what_moves(digits_run: Run) -> None:
    few, many = fit(digits_run, modes=2), fit(digits_run, modes=30)
    assert 0.5 < few.quality.variance_explained < many.quality.variance_explained < 1


def test_more_than_256_modes(digits_run: Run) -> None:
    decomposition = fit(digits_run, modes=300)
    assert decomposition.n_modes == 300
    moving = np.ptp(decomposition.reference, axis=0) > 0
    assert moving.sum() > 290
    np.testing.assert_array_equal(decomposition.mode[decomposition.reference_index][moving], np.flatnonzero(moving))


def test_fewer_clusters_than_modes_asked_for(make_run: MakeRun) -> None:
    walk = np.random.default_rng(0).normal(size=(10, 1)).cumsum(axis=0)
    decomposition = fit(make_run(np.repeat(walk, 20, axis=1).astype(np.float32)), modes=10)
    assert 1 <= decomposition.n_modes <= 10
    assert decomposition.quality.variance_explained == pytest.approx(1)


def test_a_run_in_which_nothing_moves(make_run: MakeRun) -> None:
    decomposition = fit(make_run(np.ones((5, 30), np.float32)), modes=4)
    assert not decomposition.mode.any()
    np.testing.assert_array_equal(decomposition.modelled([3])[0], np.ones(30))


def test_one_weight(make_run: MakeRun) -> None:
    decomposition = fit(make_run(correlated(5, 1)), modes=4)
    assert (decomposition.n_modes, decomposition.mode.tolist()) == (1, [0])


def test_two_epochs_are_enough(make_run: MakeRun) -> None:
    decomposition = fit(make_run(correlated(2, 100)), modes=3)
    np.testing.assert_allclose(decomposition.modelled([0, 1]), correlated(2, 100), rtol=1e-4, atol=1e-5)


# --- Sampling


def test_more_samples_than_the_probe_holds_are_read_from_the_weights(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajkit.store.probe.PROBE_SIZE", 64)
    run = make_run(correlated(6, 1000), sizes=(10, 990))
    assert run.probe_index.size == 64
    for samples, inside in [(40, True), (300, False)]:
        decomposition = fit(run, modes=3, samples=samples)
        assert decomposition.sample_index.size == samples
        assert np.isin(decomposition.sample_index, run.probe_index).all() == inside
        assert_is_the_oracles(run, decomposition, 3)
    assert fit(run, modes=3, samples=5000).sample_index.size == 1000
    with pytest.raises(InputError, match="samples is 300, variance sampling chooses among the run's 64 probe weights"):
        fit(run, modes=3, samples=300, sampling="variance")


def test_balanced_samples_take_small_layers_too(digits_run: Run) -> None:
    sample = fit(digits_run, samples=200).sample_index
    per_layer = np.diff(np.searchsorted(sample, digits_run.layout.weight_bounds))
    assert (per_layer > 0).all()
    assert sample.size == 200
    assert len(set(sample.tolist())) == 200


# --- What is refused, and what is left behind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": 0}, "modes is 0, expected an integer from 1 to 65535"),
        ({"modes": 70000}, "modes is 70000"),
        ({"modes": 2.5}, "modes is 2.5, expected an integer"),
        ({"modes": DistanceCut(float("inf"))}, "divisor of the distance cut is inf"),
        ({"samples": 1e3}, "samples is 1000.0, expected an integer"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
        ({"seed": None}, "seed is None"),
        ({"epochs": 5}, "epochs is 5, expected several integers"),
        ({"epochs": "1,2"}, "epochs is '1,2', expected several integers"),
        ({"epochs": [1.7, 2.9]}, "epoch is 1.7, expected an integer"),
        ({"modes": DistanceCut(0)}, "divisor of the distance cut is 0, expected more than 0"),
        ({"samples": 0}, "samples is 0, expected an integer of at least 1"),
        ({"sampling": "clever"}, "sampling is 'clever', expected one of balanced, uniform, variance"),
        ({"epochs": [3]}, "1 epochs to fit, a correlation needs at least 2"),
        ({"epochs": []}, "0 epochs to fit"),
        ({"epochs": [3, 4, 3]}, "epoch 3 is named twice"),
        ({"sample_index": [1, 99999]}, "sample_index has to hold integers from 0 to 3681"),
        ({"sample_index": []}, "sample_index has to hold integers"),
        ({"sample_index": [0.5]}, "sample_index has to hold integers"),
        ({"sample_index": [4, 5, 4]}, "sample_index names a weight twice"),
        ({"name": "../x"}, "fit '../x': expected letters, digits"),
        ({"name": ""}, "fit '': expected letters"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], message: str, digits_run: Run) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace("[", r"\[")):
        fit(digits_run, **settings)
    assert digits_run.fits == ()


def test_a_fit_is_never_overwritten(digits_run: Run) -> None:
    first = fit(digits_run, samples=100, name="mine").scale
    with pytest.raises(PathExistsError, match="fit 'mine' exists; choose another name"):
        fit(digits_run, samples=200, name="mine")
    np.testing.assert_array_equal(digits_run.fit("mine").scale, first)
    assert [fit(digits_run, samples=100).name for _ in range(3)] == ["modes10", "modes10-2", "modes10-3"]
    assert digits_run.fits == ("mine", "modes10", "modes10-2", "modes10-3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 25])
def test_a_not_finite_weight_is_refused_by_name(bad: float, column: int, make_run: MakeRun) -> None:
    matrix = correlated(8, 40)
    matrix[6, column] = bad
    run = make_run(matrix, sizes=(20, 20), nonfinite="record")
    name = "layer0" if column == 0 else "layer1"
    for choice in ({}, {"sample_index": [3, 4, 5]}, {"sampling": "variance"}):
        with pytest.raises(InputError, match=rf"'{name}' is not finite .*fit the other epochs alone, with epochs="):
            fit(run, modes=3, **choice)  # type: ignore[arg-type]
    assert run.fits == ()
    assert fit(run, modes=3, epochs=range(6)).n_modes == 3


def test_a_scale_that_float32_cannot_hold_is_refused(make_run: MakeRun) -> None:
    walk = np.random.default_rng(0).normal(size=(10, 1)).cumsum(axis=0)
    run = make_run(np.concatenate([walk * 1e-30] * 5 + [walk * 1e12], axis=1).astype(np.float32), sizes=(5, 1))
    with pytest.raises(InputError, match="'layer1' moves so far beyond its reference that float32"):
        fit(run, modes=1, sample_index=range(5))


def test_fits_at_the_same_time_take_the_next_default_name(digits_run: Run) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda seed: fit(digits_run, modes=3, samples=100, seed=seed).name, range(4)))
    assert sorted(names) == ["modes3", "modes3-2", "modes3-3", "modes3-4"]
    assert sorted(digits_run.fits) == sorted(names)


def test_a_distance_cut_may_be_any_number(digits_run: Run) -> None:
    assert fit(digits_run, modes=DistanceCut(np.float32(2))).settings["modes"] == {"divisor": 2.0}  # type: ignore[arg-type]
    assert fit(digits_run, modes=DistanceCut(1e300), samples=50).name == "cut1e300"


def test_the_model_of_a_buffer_is_refused(digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"'1.running_var' is a buffer, only weights are modelled"):
        fit(digits_run).trajectory("1.running_var")


def test_modelled_values_are_given_in_float64_too(digits_run: Run) -> None:
    decomposition = fit(digits_run)
    exact = decomposition.modelled([39], dtype=np.float64)
    assert exact.dtype == np.float64
    np.testing.assert_array_equal(exact.astype(np.float32), decomposition.modelled([39]))
    assert (exact != decomposition.modelled([39])).any()


def snapshot(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "locks" not in file.parts}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_fit_leaves_the_run_as_it_was(
    interruption: BaseException, digits_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(digits_run.path)
    for name in ("create", "put", "sync", "replace", "create_atomically", "sync_names"):
        original = getattr(LocalObjects, name)
        for at in range(1, 6):
            calls = 0

            def interrupted(*arguments: Any, _original: Any = original, _at: int = at) -> None:
                nonlocal calls
                calls += 1
                if calls == _at:
                    raise interruption
                _original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(LocalObjects, name, interrupted)
                with contextlib.suppress(KeyboardInterrupt, OSError):
                    fit(digits_run, name=f"{name}-{at}")
            if calls >= at and not digits_run.fits:
                folders = [path for path in digits_run.path.glob("fits") if path.is_dir()]
                assert {
                    path: data for path, data in snapshot(digits_run.path).items() if "fits" not in path.parts
                } == before
                assert not [path for folder in folders for path in folder.glob("*/*")]
            for fitted in digits_run.fits:
                assert digits_run.fit(fitted).scale.any()
                shutil.rmtree(digits_run.path / "fits" / fitted)
    assert fit(digits_run).name == "modes10"


def test_what_a_killed_fit_left_is_cleared_by_the_next(digits_run: Run) -> None:
    writer = FitWriter(digits_run.archive.objects, "modes10", FitShape(3682, 40, 10, 500, updatable=False))
    zeros = {"mode": np.uint16, "scale": np.float32, "mean": np.float64, "correlation": np.float32}
    writer.blocks.write(0, {name: np.zeros(3682, dtype) for name, dtype in zeros.items()})
    with pytest.raises(RunLockedError, match="fit 'modes10' is being written by process"):
        fit(digits_run, name="modes10")
    writer._lock.release()
    assert digits_run.fits == ()
    assert fit(digits_run, name="modes10").scale.any()


def test_progress_counts_weights(digits_run: Run) -> None:
    seen: list[tuple[int, int]] = []
    fit(digits_run, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3682, 3682)


def test_a_path_is_as_good_as_a_run(digits_path: Path) -> None:
    assert trajkit.pipeline.fit(str(digits_path), samples=50).run.path == digits_path
