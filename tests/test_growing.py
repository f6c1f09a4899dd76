"""Fits that take the epochs recorded since, against fits of all epochs."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeRun, correlated, vector_layout
from test_fit import assert_is_the_oracles_steps_2_and_3, assert_same, snapshot

from trajkit import Run, RunWriter, fit, follow, open_run, update
from trajkit.errors import DamagedRunError, InputError, RunLockedError, RunNotFoundError, UnknownNameError
from trajkit.store.archive import Archive
from trajkit.store.fit_shape import FitShape
from trajkit.store.fits import FitWriter
from trajkit.store.format import WEIGHTS
from trajkit.store.objects import LocalObjects


def grow(run: Run, matrix: np.ndarray[Any, Any]) -> Run:
    """Record the rows of a matrix that a run does not have yet."""
    with RunWriter(run.path, fsync=False) as writer:
        for epoch in range(len(writer.epochs), len(matrix)):
            writer.append(vector_layout(matrix.shape[1]), epoch, matrix[epoch], {})
    return open_run(run.path)


@pytest.mark.parametrize("updatable", [True, False])
def test_an_updated_fit_is_that_of_all_epochs(updatable: bool, make_run: MakeRun) -> None:
    matrix = correlated(40, 3000)
    run = make_run(matrix[:20])
    first = fit(run, modes=6, samples=300, name="a", updatable=updatable)
    reference_index = first.reference_index
    for n_epochs in (21, 30, 40):
        run = grow(run, matrix[:n_epochs])
        updated = update(run, "a")
        assert updated.epochs.tolist() == list(range(n_epochs))
        np.testing.assert_array_equal(updated.reference_index, reference_index)
        np.testing.assert_array_equal(updated.reference, matrix[:n_epochs, reference_index])
        assert_is_the_oracles_steps_2_and_3(run, updated)
    assert updated.settings == first.settings
    assert run.fits == ("a",)
    assert_same(open_run(run.path).fit("a"), updated)
    assert updated.quality.weights == 3000


def test_an_updated_fit_is_a_full_fit_to_rounding(make_run: MakeRun) -> None:
    matrix = correlated(50, 2000)
    fit(make_run(matrix[:25]), modes=5, name="grown", updatable=True)
    run = grow(open_run(make_run(matrix[:25], name="other").path), matrix)
    grown_run = grow(open_run(run.path.parent / "run"), matrix)
    grown = update(grown_run, "grown")
    # The same by the other way: a fit that kept nothing reads all epochs again.
    fit(run, modes=5, name="whole", epochs=range(25))
    whole = update(run, "whole")
    margin = np.sort(np.abs(whole.stored.read("correlations")), axis=0)
    decided = margin[-1] - margin[-2] > 1e-6
    np.testing.assert_array_equal(grown.mode[decided], whole.mode[decided])
    same = grown.mode == whole.mode
    np.testing.assert_allclose(grown.scale[same], whole.scale[same], rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(grown.correlation[same], whole.correlation[same], atol=1e-6)
    assert grown.quality.variance_explained == pytest.approx(whole.quality.variance_explained, rel=1e-6)


def test_an_update_reads_the_new_epochs_alone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = correlated(30, 2000)
    run = make_run(matrix[:25])
    fit(run, modes=5, name="a", updatable=True)
    run = grow(run, matrix)
    touched: set[int] = set()
    read = Archive.read

    def watching(self: Archive, path: str, rows: Any, *rest: Any) -> Any:
        if path == WEIGHTS:
            touched.update(np.asarray(rows).tolist())
        return read(self, path, rows, *rest)

    monkeypatch.setattr(Archive, "read", watching)
    update(run, "a")
    assert touched == set(range(25, 30))


def test_an_update_of_a_fit_of_some_epochs_takes_those_after_it(digits_run: Run) -> None:
    fit(digits_run, name="a", epochs=range(0, 20, 2), samples=200, updatable=True)
    updated = update(digits_run, "a")
    assert updated.epochs.tolist() == [*range(0, 20, 2), *range(19, 40)]
    assert_is_the_oracles_steps_2_and_3(digits_run, updated)


@pytest.mark.parametrize("truth", [1, np.True_])
def test_what_is_true_makes_a_fit_that_can_be_read_and_updated(truth: Any, digits_run: Run) -> None:
    made = fit(digits_run, modes=2, samples=100, epochs=range(9), name="a", updatable=truth)
    assert made.stored.shape.updatable is True
    assert update(open_run(digits_run.path), "a").epochs.size == 40


def test_an_update_without_new_epochs_changes_nothing(digits_run: Run) -> None:
    fit(digits_run, name="a", samples=200)
    before = snapshot(digits_run.path)
    assert_same(update(digits_run, "a"), digits_run.fit("a"))
    assert snapshot(digits_run.path) == before


def test_an_update_at_any_scheduler_and_budget_gives_the_same_bits(make_run: MakeRun) -> None:
    matrix = correlated(12, 140_000)
    runs = [make_run(matrix, name=name) for name in ("one", "other")]
    for run in runs:
        fit(run, modes=4, name="a", epochs=range(8), updatable=True)
    assert_same(update(runs[0], "a"), update(runs[1], "a", memory="64MiB", scheduler="synchronous"))


# --- Old or new, and nothing between


def test_an_update_that_fails_anywhere_leaves_the_old_fit(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(digits_run, name="a", epochs=range(30), samples=200, updatable=True)
    shutil.copytree(digits_run.path, tmp_path / "updated")
    arrays = ("mode", "scale", "mean", "correlation")
    new_fit, old_fit = update(tmp_path / "updated", "a"), digits_run.fit("a")
    old, new = ({name: getattr(fitted, name) for name in arrays} for fitted in (old_fit, new_fit))
    failed = 0
    for name in ("put", "ready", "replace", "sync", "sync_names", "clear_temporary"):
        original = getattr(LocalObjects, name)
        for at in range(1, 40):
            copy = Path(shutil.copytree(digits_run.path, tmp_path / f"{name}-{at}"))
            calls = 0

            def broken(*arguments: Any, _original: Any = original, _at: int = at) -> Any:
                nonlocal calls
                calls += 1
                if calls == _at:
                    raise OSError(28, "No space left on device")
                return _original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(LocalObjects, name, broken)
                try:
                    update(copy, "a")
                except OSError:
                    failed += 1
            found = open_run(copy).fit("a")
            expected = old if len(found.epochs) == 30 else new
            for array, values in expected.items():
                np.testing.assert_array_equal(getattr(found, array), values)
            assert len(update(copy, "a").epochs) == 40
            left = {path.name for path in (copy / "fits/a").iterdir()} - {"1", "zarr.json"}
            assert left <= {"0"}  # where clearing it was what failed; the next update clears it
            if calls < at:
                break
    assert failed > 20


def test_one_who_still_holds_the_old_version_is_told(digits_run: Run) -> None:
    fit(digits_run, name="a", epochs=range(30), samples=200, updatable=True)
    held = digits_run.fit("a")
    _ = held.mode
    update(digits_run, "a")
    with pytest.raises(DamagedRunError, match="fit 'a': was updated or replaced since it was opened; open it again"):
        _ = held.scale


def test_one_who_holds_a_fit_that_was_removed_and_made_again_is_told(digits_run: Run) -> None:
    held = fit(digits_run, name="a", modes=5, samples=200)
    _ = held.modelled([3])
    shutil.rmtree(digits_run.path / "fits/a")
    fit(digits_run, name="a", modes=3, samples=200)
    with pytest.raises(DamagedRunError, match="fit 'a': was updated or replaced since it was opened"):
        held.modelled([3])


def test_readers_beside_updates_see_a_whole_fit_or_are_told(make_run: MakeRun) -> None:
    matrix = correlated(40, 2000)
    run = make_run(matrix)
    fit(run, name="a", modes=4, epochs=range(5), updatable=True)
    done = threading.Event()
    wrong: list[BaseException] = []
    seen: set[int] = set()

    def read() -> None:
        while not done.is_set():
            try:
                found = open_run(run.path).fit("a")
                expected = matrix[: len(found.epochs)].mean(axis=0, dtype=np.float64)
                np.testing.assert_allclose(found.mean, expected, rtol=1e-9, atol=1e-12)
                seen.add(len(found.epochs))
            except DamagedRunError as error:
                if "was updated or replaced since it was opened" not in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for n_epochs in range(6, 41):
            update(Run(_first(run.archive, n_epochs)), "a")
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert len(seen) > 1


def _first(archive: Archive, n_epochs: int) -> Archive:
    """The archive as it was with so many epochs."""
    rebuild, (root, _, _) = archive.__reduce__()
    earlier: Archive = rebuild(root, n_epochs, archive.records[n_epochs - 1].hash)
    return earlier


def test_what_killed_fits_left_is_cleared_by_the_next_fit(digits_run: Run) -> None:
    shape = FitShape(3682, 40, 3, 100, updatable=False)
    busy = FitWriter(digits_run.archive.objects, "busy", shape)
    killed = FitWriter(digits_run.archive.objects, "killed", shape)
    killed._lock.release()
    fit(digits_run, name="a", samples=100)
    assert not (digits_run.path / "fits/killed").exists()
    assert (digits_run.path / "fits/busy").exists()
    busy._lock.release()
    fit(digits_run, name="b", samples=100)
    assert not (digits_run.path / "fits/busy").exists()


def test_two_updates_at_a_time_exclude_each_other(digits_run: Run) -> None:
    previous = fit(digits_run, name="a", epochs=range(30), samples=200)
    with (
        FitWriter(digits_run.archive.objects, "a", previous.stored.shape, previous.stored),
        pytest.raises(RunLockedError, match="fit 'a' is being written by process"),
    ):
        update(digits_run, "a")


def test_an_update_of_what_does_not_exist_or_is_not_finite_is_refused(make_run: MakeRun) -> None:
    matrix = correlated(12, 100)
    matrix[11, 50] = np.nan
    run = make_run(matrix, nonfinite="record")
    with pytest.raises(UnknownNameError, match="no fit 'a'; the run has none"):
        update(run, "a")
    for name, sample in [("a", range(40)), ("b", [50])]:
        fit(run, modes=1, name=name, epochs=range(10), sample_index=sample, updatable=True)
        with pytest.raises(InputError, match="'layer0' is not finite"):
            update(run, name)
        assert len(run.fit(name).epochs) == 10


# --- Beside a training


def test_a_training_is_followed_to_its_end(make_run: MakeRun) -> None:
    matrix = correlated(30, 500)
    run = make_run(matrix[:3])
    writer = RunWriter(run.path, fsync=False)

    def record() -> None:
        with writer:
            for epoch in range(3, 30):
                writer.append(vector_layout(500), epoch, matrix[epoch], {})
                time.sleep(0.02)

    training = threading.Thread(target=record)
    training.start()
    seen = [len(fitted.epochs) for fitted in follow(run.path, warmup=10, interval_s=0.05, modes=4, samples=100)]
    training.join()
    assert seen == sorted(set(seen))
    assert 10 <= seen[0] < 30
    assert seen[-1] == 30
    assert len(seen) > 2
    final = open_run(run.path)
    assert final.fits == ("followed",)
    assert_is_the_oracles_steps_2_and_3(final, final.fit("followed"))


def test_following_goes_on_where_it_stopped(digits_run: Run) -> None:
    fit(digits_run, name="mine", epochs=range(30), samples=200)
    assert [len(fitted.epochs) for fitted in follow(digits_run.path, "mine")] == [40]
    assert [len(fitted.epochs) for fitted in follow(digits_run.path, "mine")] == [40]
    chosen = open_run(digits_run.path).fit("mine").sample_index
    assert [len(fitted.epochs) for fitted in follow(digits_run.path, "mine", sample_index=chosen[::-1])] == [40]
    with pytest.raises(InputError, match="fit 'mine' has sample_index of others, not of these weights"):
        [*follow(digits_run.path, "mine", sample_index=chosen[1:])]
    with pytest.raises(InputError, match="fit 'mine' has modes 10, not 3, and keeps its settings"):
        next(follow(digits_run.path, "mine", modes=3))


def test_what_cannot_be_followed_is_refused(digits_run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError):
        next(follow(tmp_path / "none"))
    for wrong in ({"warmup": 1}, {"interval_s": 0}):
        with pytest.raises(InputError, match="expected at least 2 and more than 0"):
            next(follow(digits_run.path, **wrong))  # type: ignore[arg-type]
