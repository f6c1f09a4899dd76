"""Results belong to what they were made of: a run, and the content that its epochs had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import correlated, vector_layout
from counting import LAYOUT, epoch_values
from numpy.typing import NDArray
from trajkit_cli.main import main

from trajkit import RunWriter, evaluate, fit, load_weights, open_run, repair, update, verify, write_checkpoint
from trajkit.errors import DamagedRunError, PathExistsError, StorageError, UnknownNameError
from trajkit.store.evaluations import EVALUATION_ATTRIBUTE
from trajkit.store.fits import FIT_ATTRIBUTE
from trajkit.store.root import sealed_group

N_WEIGHTS = 300


def record(path: Path, trajectories: NDArray[np.float32], first: int = 0) -> Path:
    """Append the rows of a matrix to a run."""
    layout = vector_layout(200, trajectories.shape[1] - 200)
    with RunWriter(path, fsync=False) as writer:
        for epoch, weights in enumerate(trajectories, start=first):
            writer.append(layout, epoch, weights, {})
    return path


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """A run of six epochs with a fit and an evaluation."""
    path = record(tmp_path / "run", correlated(6, N_WEIGHTS))
    make_results(path)
    return path


def make_results(path: Path) -> None:
    fit(path, modes=2, samples=50, name="a")
    evaluate(path, lambda _: 1.0, epochs=[0, 5])


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


# --- What is recorded


def test_a_commit_record_has_the_hash_of_the_weights(run_path: Path) -> None:
    run = open_run(run_path)
    for row in range(6):
        stored = json.loads((run_path / f"epoch/commits/{row:08d}.json").read_bytes())
        assert stored["weights"][0] == blake3.blake3(run.weights[row].astype("<f4").tobytes()).hexdigest()


def test_the_hash_of_the_weights_does_not_depend_on_the_objects_that_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = correlated(2, N_WEIGHTS)
    plain = open_run(record(tmp_path / "plain", weights)).archive
    for name, value in (("COLUMN_GRID", 16), ("CHUNK_VALUES", 32), ("SHARD_CHUNKS", 2)):
        monkeypatch.setattr(f"trajkit.store.format.{name}", value)
    sharded = open_run(record(tmp_path / "sharded", weights)).archive
    assert sharded.records[1].objects.keys() != plain.records[1].objects.keys()
    assert [record.weights for record in sharded.records] == [record.weights for record in plain.records]


def test_a_flip_in_the_hash_of_the_weights_is_damage(run_path: Path) -> None:
    file = run_path / "epoch/commits/00000002.json"
    stored = json.loads(file.read_bytes())
    stored["weights"][0] = stored["weights"][0][::-1]
    file.write_text(json.dumps(stored))
    assert [damage.key for damage in verify(run_path, "full").damages] == ["epoch/commits/00000002.json"]
    with pytest.raises(DamagedRunError, match="the hash of the weights is not the one that was recorded"):
        open_run(run_path)


def test_the_root_names_the_run_by_its_first_commit_record(run_path: Path) -> None:
    first = json.loads((run_path / "epoch/commits/00000000.json").read_bytes())
    root = json.loads((run_path / "zarr.json").read_bytes())
    assert root["attributes"]["trajkit_identity"] == first["blake3"]
    origin = open_run(run_path).fit("a").origin
    assert origin is not None
    assert origin.run == first["blake3"]
    assert origin.by == "weights"


def test_a_crash_before_the_root_names_the_run_is_made_up_for(run_path: Path) -> None:
    root = json.loads((run_path / "zarr.json").read_bytes())
    identity = root["attributes"].pop("trajkit_identity")
    (run_path / "zarr.json").write_text(json.dumps(root))
    open_run(run_path).fit("a")
    RunWriter(run_path, fsync=False).close()
    assert json.loads((run_path / "zarr.json").read_bytes())["attributes"]["trajkit_identity"] == identity


# --- What is refused


def test_results_of_another_run_are_refused(run_path: Path, tmp_path: Path) -> None:
    other = record(tmp_path / "other", correlated(6, N_WEIGHTS, seed=1))
    for folder in ("fits", "evaluations"):
        shutil.copytree(run_path / folder, other / folder)
    run = open_run(other)
    for refused in (
        lambda: run.fit("a"),
        lambda: run.evaluations,
        lambda: load_weights(run, 3, fit="a"),
        lambda: update(run, "a"),
        lambda: write_checkpoint(run, 3, tmp_path / "out.pt", fit="a"),
    ):
        with pytest.raises(DamagedRunError, match=r"made of another run, [0-9a-f]{8}, this one is [0-9a-f]{8}"):
            refused()
    assert not (tmp_path / "out.pt").exists()
    damages = verify(other, "full").damages
    assert {damage.aside for damage in damages} == {"fits/a", "evaluations/0000"}
    shown = invoke("info", other)
    assert shown.count("refused: ") == 2
    repair(other)
    assert verify(other, "full").sound
    assert open_run(other).fits == ()


def test_results_of_epochs_that_came_back_different_are_refused(tmp_path: Path) -> None:
    weights = correlated(6, N_WEIGHTS)
    path = record(tmp_path / "run", weights[:4])
    shutil.copytree(path, tmp_path / "backup")
    record(path, weights[4:], first=4)
    make_results(path)
    results = {folder: Path(shutil.copytree(path / folder, tmp_path / folder)) for folder in ("fits", "evaluations")}

    def restored(further: NDArray[np.float32]) -> Path:
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "backup", path)
        record(path, further, first=4)
        for folder, kept in results.items():
            shutil.copytree(kept, path / folder)
        return path

    assert open_run(restored(weights[4:])).fit("a").origin is not None
    assert verify(path, "full").sound
    other = weights[4:].copy()
    other[1, 7] += 1
    run = open_run(restored(other))
    for refused in (lambda: run.fit("a"), lambda: run.evaluations):
        with pytest.raises(DamagedRunError, match="epochs whose weights were others than they are now"):
            refused()
    assert {damage.aside for damage in verify(path, "full").damages} == {"fits/a", "evaluations/0000"}
    restored(weights[4:4])
    with pytest.raises(DamagedRunError, match="made of epoch 4, which this run does not have"):
        open_run(path).fit("a")


def test_the_epochs_of_an_older_version_are_known_by_their_objects(digits_path: Path, tmp_path: Path) -> None:
    origin = fit(digits_path, modes=2, name="a").origin
    assert origin is not None
    assert origin.by == "objects"
    copy = shutil.copytree(digits_path, tmp_path / "copy")
    assert open_run(copy).fit("a").origin == origin
    with RunWriter(copy, fsync=False) as writer:
        run = open_run(copy)
        buffers = {dtype: np.zeros(size, dtype) for dtype, size in run.layout.buffer_sizes.items()}
        writer.append(run.layout, 40, run.weights[39], buffers)
    mixed = fit(copy, modes=2, name="b").origin
    assert mixed is not None
    assert mixed.by == "objects"
    assert open_run(copy).fit("a").origin == origin


# --- What stays valid


def test_a_copy_keeps_its_results(run_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_path, tmp_path / "elsewhere")
    assert open_run(copy).fit("a").origin == open_run(run_path).fit("a").origin
    assert len(open_run(copy).evaluations) == 1
    assert verify(copy, "full").sound


def test_healing_an_epoch_keeps_the_results_valid(run_path: Path) -> None:
    weights = open_run(run_path).weights[3]
    (run_path / "weights/c/3/0").write_bytes(b"damaged")
    repair(run_path)
    open_run(run_path).fit("a")
    with RunWriter(run_path, fsync=False) as writer:
        writer.heal(vector_layout(200, 100), 3, weights, {})
    assert open_run(run_path).fit("a").n_modes == 2
    assert verify(run_path, "full").sound


def test_results_of_an_epoch_whose_record_is_lost_are_not_held_against_them(run_path: Path) -> None:
    (run_path / "epoch/commits/00000002.json").unlink()
    repair(run_path)
    run = open_run(run_path)
    assert run.bad_epochs == (2,)
    assert run.fit("a").n_modes == 2
    assert len(run.evaluations) == 1
    assert fit(run, modes=2, samples=50, name="b").origin is not None


@pytest.mark.parametrize("lost", [(0,), (0, 1)])
def test_a_run_whose_first_records_are_lost_is_known_by_its_root(lost: tuple[int, ...], run_path: Path) -> None:
    for row in lost:
        (run_path / f"epoch/commits/{row:08d}.json").unlink()
    repair(run_path)
    assert open_run(run_path).fit("a").n_modes == 2
    (run_path / "zarr.json").unlink()
    repair(run_path)
    assert open_run(run_path).fit("a").n_modes == 2


def test_a_fit_of_epochs_that_came_since_the_run_was_opened_is_opened(run_path: Path) -> None:
    early = open_run(run_path)
    record(run_path, correlated(7, N_WEIGHTS, seed=3)[6:], first=6)
    fit(run_path, modes=2, samples=50, name="later")
    assert early.fit("later").epochs[-1] == 6


def test_an_update_is_of_all_its_epochs(run_path: Path) -> None:
    fit(run_path, modes=2, samples=50, name="growing", updatable=True)
    before = open_run(run_path).fit("growing").origin
    record(run_path, correlated(7, N_WEIGHTS, seed=3)[6:], first=6)
    after = update(run_path, "growing").origin
    assert before is not None
    assert after is not None
    assert before.run == after.run
    assert before.content != after.content


# --- Those of older versions, renamed and removed ones


def as_older(file: Path, attribute: str, name: str) -> None:
    """Take away from a result what older versions did not write."""
    document = json.loads(file.read_bytes())
    content = document["attributes"][attribute][name]
    for field in ("of", "name", "number"):
        content.pop(field, None)
    file.write_text(json.dumps({**document, **sealed_group(attribute, name, content)}))


def test_results_of_older_versions_open_and_are_named(run_path: Path) -> None:
    as_older(run_path / "fits/a/zarr.json", FIT_ATTRIBUTE, "fit")
    as_older(run_path / "evaluations/0000/zarr.json", EVALUATION_ATTRIBUTE, "evaluation")
    run = open_run(run_path)
    assert run.fit("a").origin is None
    assert run.evaluations[0].origin is None
    found = verify(run_path, "full")
    assert found.sound
    assert [note.partition(":")[0] for note in found.notes] == ["fit 'a'", "evaluation 0000"]
    assert "origin not recorded" in invoke("info", run_path)
    assert "its origin is not recorded" in invoke("verify", run_path)


def test_renamed_and_exchanged_results_are_found(run_path: Path) -> None:
    fit(run_path, modes=1, samples=50, name="b")
    evaluate(run_path, lambda _: 2.0, epochs=[0])
    for folder, one, other in (("fits", "a", "b"), ("evaluations", "0000", "0001")):
        (run_path / folder / one).rename(run_path / folder / "x")
        (run_path / folder / other).rename(run_path / folder / one)
        (run_path / folder / "x").rename(run_path / folder / other)
    (run_path / "fits/b").rename(run_path / "fits/c")
    renamed = open_run(run_path).fit("a")
    assert renamed.n_modes == 1
    with pytest.raises(DamagedRunError, match="fits/a holds fit 'b', expected 'a': its folder was renamed or exchange"):
        renamed.modelled([0])
    found = verify(run_path, "fast")
    assert [(damage.key, damage.what.partition(":")[0]) for damage in found.damages] == [
        ("fits/a/zarr.json", "holds fit 'b'"),
        ("fits/c/zarr.json", "holds fit 'a'"),
        ("evaluations/0000/zarr.json", "holds evaluation 0001"),
        ("evaluations/0001/zarr.json", "holds evaluation 0000"),
    ]
    repair(run_path)  # leaves them where they are
    assert open_run(run_path).fits == ("a", "c")


def test_a_result_whose_folder_was_removed_is_a_note(run_path: Path) -> None:
    shutil.rmtree(run_path / "fits/a")
    shutil.rmtree(run_path / "evaluations")
    found = verify(run_path, "full")
    assert found.sound
    assert found.notes == (
        "fits/a is gone: its folder was removed, or saving it was interrupted",
        "evaluations/0000 is gone: its folder was removed, or saving it was interrupted",
    )
    assert "note: fits/a is gone" in invoke("verify", run_path)
    make_results(run_path)
    assert verify(run_path, "full").notes == ()


def test_what_a_repair_has_moved_is_not_called_gone(run_path: Path) -> None:
    (run_path / "fits/a/zarr.json").write_bytes(b"damaged")
    repair(run_path)
    assert verify(run_path, "full").notes == ()


def test_the_ledger_is_verified_and_written_again(run_path: Path) -> None:
    entries = {file: file.read_bytes() for file in (run_path / "epoch/results").rglob("*.json")}
    assert len(entries) == 2
    first, second = entries
    first.write_bytes(b"{}")
    assert [damage.key for damage in verify(run_path, "fast").damages] == [first.relative_to(run_path).as_posix()]
    repair(run_path)
    assert {file: file.read_bytes() for file in entries} == entries
    second.unlink()  # as where a fit was copied from a copy of the run
    found = verify(run_path, "full")
    assert found.sound
    assert found.notes == ("evaluations/0000 is not entered in epoch/results",)


def test_an_interrupted_fit_is_not_entered(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trajkit.store.fits.sealed_group", full_disk)
        with pytest.raises(OSError, match="No space left"):
            fit(run_path, modes=1, samples=50, name="b")
    assert verify(run_path, "full").notes == ()


def test_opening_fits_lists_no_folder(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(run_path)
    objects = type(run.archive.objects)
    listed: list[str] = []
    monkeypatch.setattr(objects, "names", lambda _, prefix: listed.append(prefix) or [])
    run.fit("a")
    assert not listed


# --- Results beside a run


@pytest.fixture
def read_only(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, of which every write is refused."""
    from trajkit.store.objects import LocalObjects

    ready = LocalObjects.ready

    def refusing(self: LocalObjects, key: str) -> Path:
        if self.root == run_path:
            raise OSError(30, "Read-only file system", str(run_path / key))
        return ready(self, key)

    monkeypatch.setattr(LocalObjects, "ready", refusing)
    return run_path


def test_a_run_that_can_only_be_read_says_where_results_can_go(read_only: Path) -> None:
    cure = r"Read-only file system; results can be kept elsewhere: results=FOLDER, --results FOLDER or TRAJKIT_RESULTS"
    with pytest.raises(StorageError, match=cure):
        fit(read_only, modes=2, samples=50)
    with pytest.warns(RuntimeWarning, match=cure):
        evaluate(read_only, lambda _: 1.0, epochs=[0])
    assert "results=FOLDER" in invoke("fit", read_only, "--modes", 2, code=1)


def test_results_are_kept_beside_a_run(read_only: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in read_only.rglob("*") if file.is_file()}
    kept = tmp_path / "results"
    assert fit(read_only, modes=2, samples=50, results=kept).name == "modes2"
    assert fit(read_only, modes=2, samples=50, results=kept).name == "modes2-2"
    fit(read_only, modes=1, samples=50, name="a", results=kept)  # another one of that name is in the run
    evaluate(read_only, lambda _: 2.0, fit="modes2", results=kept)
    run = open_run(read_only, kept)
    assert run.fits == ("a", "modes2", "modes2-2")
    assert run.fit("a").n_modes == 1
    assert [evaluation.fit for evaluation in run.evaluations] == [None, "modes2"]
    assert open_run(read_only).fits == ("a",)
    assert {file: file.read_bytes() for file in read_only.rglob("*") if file.is_file()} == before
    with pytest.raises(PathExistsError):
        fit(run, modes=2, name="modes2", samples=50)
    with pytest.raises(UnknownNameError, match="the run has a, modes2, modes2-2"):
        run.fit("b")


def test_a_fit_beside_a_run_is_updated_where_it_is(run_path: Path, tmp_path: Path) -> None:
    fit(run_path, modes=2, samples=50, name="growing", updatable=True, results=tmp_path / "results")
    record(run_path, correlated(7, N_WEIGHTS, seed=3)[6:], first=6)
    assert update(run_path, "growing", results=tmp_path / "results").epochs[-1] == 6
    assert open_run(run_path).fits == ("a",)


def test_runs_share_a_folder_of_results(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = record(tmp_path / "elsewhere" / "run", correlated(6, N_WEIGHTS, seed=1))
    monkeypatch.setenv("TRAJKIT_RESULTS", str(tmp_path / "results"))
    first, second = (fit(path, modes=2, samples=50, name="same") for path in (run_path, other))
    assert first.stored.objects.root != second.stored.objects.root
    assert open_run(other).fits == ("same",)
    assert not (other / "fits").exists()


def test_results_beside_a_run_are_verified(run_path: Path, tmp_path: Path) -> None:
    saved = fit(run_path, modes=2, samples=50, name="beside", results=tmp_path / "results")
    assert verify(run_path, "full", results=tmp_path / "results").sound
    (Path(saved.stored.objects.root) / "fits/beside/0/mode/c/0").write_bytes(b"damaged")
    found = verify(run_path, "full", results=tmp_path / "results")
    assert [damage.aside for damage in found.damages] == ["fits/beside"]
    assert verify(run_path, "full").sound
    assert "fit 'beside'" in invoke("verify", run_path, "--results", tmp_path / "results", code=1)


def test_the_commands_keep_results_beside_a_run(read_only: Path, tmp_path: Path) -> None:
    where = ("--results", tmp_path / "results")
    invoke("fit", read_only, "--modes", 2, "--samples", 50, *where)
    invoke("online", read_only, "--warmup", 3, "--modes", 2, "--samples", 50, *where)
    invoke("evaluate", read_only, "--fit", "modes2", "--with", "test_origin:one", *where)
    invoke("export", read_only, "--fit", "modes2", "-o", tmp_path / "out.pt", *where)
    invoke("reconstruct", read_only, "--fit", "modes2", "--epoch", 1, "-o", tmp_path / "out.safetensors", *where)
    shown: dict[str, Any] = json.loads(invoke("info", read_only, "--json", *where))
    assert list(shown["fits"]) == ["a", "modes2", "online2"]
    assert shown["fits"]["modes2"]["origin"]["by"] == "weights"


def one(_: dict[str, Any]) -> float:
    return 1.0


# --- A value is only given out as long as its object is what was hashed


@pytest.mark.parametrize("packed", [False, True])
def test_a_value_is_not_read_from_an_object_that_has_changed(packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "run"
    weights = np.random.default_rng(0).normal(size=(4, 5000)).astype(np.float32)
    weights = weights.astype(np.float16).astype(np.float32) if packed else weights
    record(path, weights)
    run = open_run(path)
    assert (run.archive.reading == "raw") != packed
    np.testing.assert_array_equal(run.weights[2], weights[2])
    file = path / "weights/c/2/0"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedRunError, match=r"epoch 2: .*: object weights/c/2/0 does not have the content"):
        run.weights[2]
    file.write_bytes(content)
    np.testing.assert_array_equal(run.weights[2], weights[2])
    file.unlink()
    with pytest.raises(DamagedRunError, match="object weights/c/2/0 is missing"):
        run.weights[2]
    (path / "weights/c/1/0").touch()
    np.testing.assert_array_equal(run.weights[1], weights[1])


def test_values_of_a_fit_are_not_read_from_an_object_that_has_changed(run_path: Path) -> None:
    opened = open_run(run_path).fit("a")
    opened.modelled([1])
    file = run_path / "fits/a/0/scale/c/0"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedRunError, match="fit 'a'"):
        opened.modelled([1])


def test_many_buffers_and_weights_are_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "counting"
    with RunWriter(path, fsync=False) as writer:
        for epoch in range(3):
            writer.append(LAYOUT, epoch, *epoch_values(epoch))
    assert fit(path, modes=1, samples=10).origin is not None
