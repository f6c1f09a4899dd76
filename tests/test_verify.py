"""verify finds every damage, repair makes of it what can be made, and neither loses a byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import correlated, vector_layout
from counting import LAYOUT, append, epoch_values
from obstore.store import MemoryStore
from trajkit_cli.main import main

import trajkit
from trajkit import RunWriter, evaluate, fit, import_checkpoints, open_run, repair, verify, write_checkpoint
from trajkit.errors import DamagedRunError, InputError, RunLockedError, RunNotFoundError, StorageError, TrajkitError
from trajkit.store import examine_results, examine_run, remote
from trajkit.store import format as store_format
from trajkit.store.format import METADATA
from trajkit.store.lock import WriterLock
from trajkit.store.objects import LocalObjects
from trajkit.store.remote import RemoteObjects

N_EPOCHS = 5


def record(place: Path | str) -> None:
    """A run with buffers, a fit that can be updated, one that was, and evaluations."""
    with RunWriter(place, fsync=False) as writer:
        for epoch in range(N_EPOCHS - 1):
            append(writer, epoch)
    with RunWriter(place, fsync=False) as writer:
        weights, buffers = epoch_values(N_EPOCHS - 1)
        fit(place, modes=1, samples=10, name="updated", updatable=True)
        writer.append(LAYOUT, N_EPOCHS - 1, weights, buffers)
    trajkit.update(place, "updated")
    fit(place, modes=1, samples=10, name="plain")
    for epochs in ([0, 1], [2]):
        evaluate(place, lambda _: 1.0, fit="plain", epochs=epochs)


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "run"
    record(path)
    return path


@pytest.fixture
def sharded_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("COLUMN_GRID", 32), ("CHUNK_VALUES", 64), ("SHARD_CHUNKS", 4)):
        monkeypatch.setattr(store_format, name, value)
    with RunWriter(tmp_path / "sharded", fsync=False) as writer:
        for epoch, weights in enumerate(correlated(4, 1000)):
            writer.append(vector_layout(600, 400), epoch, weights, {})
    return tmp_path / "sharded"


@pytest.fixture
def run_path(sound_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_run, tmp_path / "run"))


def files_of(path: Path) -> dict[str, bytes]:
    """All that is recorded, by key."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return {key: data for key, data in files.items() if not key.startswith("epoch/locks")}


# --- The damage matrix

Damaging = Callable[[bytes, random.Random, bytes], bytes | None]


def flipped(data: bytes, rng: random.Random, _other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncated(data: bytes, rng: random.Random, _other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random, _other: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = rng.randrange(start, len(data)) + 1
    return data[:start] + bytes(stop - start) + data[stop:]


def appended(data: bytes, rng: random.Random, _other: bytes) -> bytes:
    return data + bytes(rng.randrange(33, 256) for _ in range(rng.randrange(1, 9)))


def deleted(_data: bytes, _rng: random.Random, _other: bytes) -> None:
    return None


def swapped(_data: bytes, _rng: random.Random, other: bytes) -> bytes:
    return other


DAMAGES: list[Damaging] = [flipped, truncated, zeroed, appended, deleted, swapped]


@pytest.mark.parametrize("damaging", DAMAGES, ids=lambda damaging: damaging.__name__)
@pytest.mark.parametrize("which", ["sound_run", "sharded_run"])
def test_every_damage_is_found(which: str, damaging: Damaging, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """100 damages of six kinds: to data, shards, commit records and metadata, of the run, its fits and evaluations."""
    sound: Path = request.getfixturevalue(which)
    files, rng = files_of(sound), random.Random(f"{which} {damaging.__name__}")
    path = Path(shutil.copytree(sound, tmp_path / "run"))
    assert verify(path, "full").sound
    order = rng.sample(sorted(files), len(files))
    tried = 0
    while tried < (60 if which == "sound_run" else 40):
        key = order[tried % len(order)]
        other = rng.choice([other for other in files if files[other] != files[key]])
        damaged = damaging(files[key], rng, files[other])
        if damaged == files[key]:
            continue
        touched = {key: damaged} | ({other: files[key]} if damaging is swapped else {})
        for name, data in touched.items():
            (path / name).unlink() if data is None else (path / name).write_bytes(data)
        try:
            found = verify(path, "full")
            noted = found.notes and key.startswith("epoch/results/")  # the ledger of results: a missing entry is a note
            assert found.damages or noted, f"{key} {damaging.__name__}"
        except (DamagedRunError, RunNotFoundError):
            pass  # there is nothing left to say more of
        for name in touched:
            (path / name).write_bytes(files[name])
        tried += 1
    assert verify(path, "full").sound


@pytest.mark.parametrize("how", ["deleted", "truncated", "appended"])
def test_a_wrong_length_is_found_fast(how: str, sound_run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound_run, tmp_path / "run"))
    for key, data in files_of(path).items():
        if "/c/" in key:
            damaged = globals()[how](data, random.Random(0), b"")
            (path / key).unlink() if damaged is None else (path / key).write_bytes(damaged)
            found = verify(path, "fast")
            assert [damage.key for damage in found.damages] == [key]
            assert found.hashed == 0
            (path / key).write_bytes(data)


def test_a_sample_is_hashed_by_default(run_path: Path) -> None:
    found = verify(run_path)
    assert found.sound
    assert 0 < found.hashed < found.objects
    (run_path / "weights/c/4/0").write_bytes(bytes(1204))
    assert [damage.row for damage in verify(run_path).damages] == [4]  # the last epoch always is


def test_a_damage_names_epoch_tensor_object_and_cure(sharded_run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded_run, tmp_path / "run"))
    key = "weights/c/2/2"
    (path / key).write_bytes(flipped((path / key).read_bytes(), random.Random(0), b""))
    (damage,) = verify(path, "full").damages
    assert str(damage) == (
        f"epoch 2: 'layer0' to 'layer1': object {key} does not have the content that was committed;"
        " restore it from a copy of the run, or trajkit repair"
    )


def test_attributes_of_ones_own_and_strange_files_are_no_damage(run_path: Path) -> None:
    import zarr

    zarr.open_array(run_path / "weights").attrs["mine"] = 3
    (run_path / "README.txt").write_text("mine")
    (run_path / "weights/c/notes.txt").write_text("mine")
    assert verify(run_path, "full").sound


def test_what_an_interrupted_recording_left_is_no_damage(run_path: Path) -> None:
    shutil.copytree(run_path / "weights/c/1", run_path / "weights/c/5")
    shutil.copytree(run_path / "fits/plain/0", run_path / "fits/killed/0")
    os.unlink(run_path / "fits/killed/0/mode/objects.json")
    found = verify(run_path, "full")
    assert found.sound
    assert "weights/c/5/0" in found.leftovers
    assert "fits/killed/0/mode/c/0" in found.leftovers
    done = repair(run_path)
    assert len(done.actions) == 2
    assert verify(run_path, "full").leftovers == ()
    assert len(list(run_path.glob("epoch/aside/*/weights/c/5/0"))) == 1


def test_a_run_is_verified_while_it_is_recorded(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes lag behind its records for an instant, and its next row is half written."""
    with RunWriter(run_path) as writer:
        monkeypatch.setattr("trajkit.store.writer.ArchiveWriter._grow", lambda *_: None)
        append(writer, N_EPOCHS)
        shutil.copytree(run_path / "weights/c/1", run_path / "weights/c/6")
        found = verify(run_path, "full")
        assert found.sound, found.damages
        assert (found.epochs, found.leftovers) == (N_EPOCHS + 1, ())
        with pytest.raises(RunLockedError, match="being written"):
            repair(run_path)
    assert not verify(run_path, "full").sound  # nobody will grow them now, but for repair or the next writer
    assert repair(run_path).damages == ()


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run here"):
        verify(tmp_path / "nothing")
    RunWriter(tmp_path / "empty").close()
    with pytest.raises(RunNotFoundError, match="no run here"):
        verify(tmp_path / "empty")
    with pytest.raises(InputError, match="level is 'all', expected one of fast, sampled, full"):
        verify(tmp_path, "all")  # type: ignore[arg-type]


# --- Repair


@pytest.mark.parametrize("damaging", DAMAGES, ids=lambda damaging: damaging.__name__)
def test_a_repaired_run_can_be_used_and_nothing_is_deleted(damaging: Damaging, sound_run: Path, tmp_path: Path) -> None:
    """Whichever file is damaged: all other epochs are as they were, and the run goes on."""
    files, rng = files_of(sound_run), random.Random(damaging.__name__)
    for key in rng.sample(sorted(files), 14):
        path = Path(shutil.copytree(sound_run, tmp_path / key.replace("/", "-")))
        other = rng.choice([other for other in files if files[other] != files[key]])
        damaged = damaging(files[key], rng, files[other])
        if damaged == files[key]:
            continue
        for name, data in ({key: damaged} | ({other: files[key]} if damaging is swapped else {})).items():
            (path / name).unlink() if data is None else (path / name).write_bytes(data)
        contents = set(files_of(path).values())
        done = repair(path)
        assert contents <= set(files_of(path).values()), f"{key}: something is gone"
        assert len(done.bad_epochs) <= 2
        run = open_run(path)
        assert run.bad_epochs == done.bad_epochs
        assert run.epochs.tolist() == list(range(N_EPOCHS))
        good = run.rows_of(None)
        np.testing.assert_array_equal(run.weights[good.tolist()], np.repeat(good[:, None], 300, axis=1))
        np.testing.assert_array_equal(run.trajectory("count"), good * 10)
        for name in run.fits:
            assert run.fit(name).mode.shape == (300,)
        assert all(row.recorded == {"score": 1.0} for evaluation in run.evaluations for row in evaluation.epochs)
        assert fit(path, modes=1, samples=10, name="after").epochs.tolist() == good.tolist()
        with RunWriter(path, fsync=False) as writer:
            append(writer, N_EPOCHS)
        assert {damage.row for damage in verify(path, "full").damages} == set(done.bad_epochs)
        assert repair(path).actions == ()
        shutil.rmtree(path)


@pytest.mark.parametrize("key", ["epoch/c/2", "probe/c/2/0", "probe_index/c/0", "weights/zarr.json", "zarr.json"])
def test_what_follows_from_other_objects_is_made_again_bit_for_bit(key: str, run_path: Path) -> None:
    before = files_of(run_path)
    (run_path / key).write_bytes(b"damaged")
    done = repair(run_path)
    assert done.damages == ()
    after = files_of(run_path)
    assert {name: data for name, data in after.items() if not name.startswith("epoch/aside")} == before
    assert b"damaged" in after.values()


@pytest.mark.parametrize("key", ["weights/c/2/0", "buffers/int64/c/2/0"])
def test_a_bad_epoch_is_healed_by_its_checkpoint(key: str, run_path: Path, tmp_path: Path) -> None:
    before = files_of(run_path)
    for epoch in (1, 2):
        write_checkpoint(run_path, epoch, tmp_path / f"epoch{epoch}.pt")
    (run_path / key).write_bytes(b"damaged")
    assert repair(run_path).bad_epochs == (2,)
    shutil.copy(tmp_path / "epoch1.pt", tmp_path / "wrong-epoch2.pt")
    with pytest.raises(InputError, match=r"wrong-epoch2.pt: .*epoch 2: .*the values are not those that were recorded"):
        import_checkpoints(run_path, [tmp_path / "wrong-epoch2.pt"])
    assert open_run(run_path).bad_epochs == (2,)
    result = CliRunner().invoke(
        main, ["record", str(run_path), str(tmp_path / "epoch2.pt"), str(tmp_path / "epoch1.pt")]
    )
    assert result.exit_code == 0, result.output
    assert "0 epochs recorded, 1 healed, 1 were there already" in result.output
    assert open_run(run_path).bad_epochs == ()
    assert verify(run_path, "full").sound
    beside = ("epoch/aside", "epoch/sources")  # what was moved away, and what the other file is known by again
    after = {name: data for name, data in files_of(run_path).items() if not name.startswith(beside)}
    assert after == before


def test_an_epoch_whose_record_is_lost_says_so(run_path: Path, tmp_path: Path) -> None:
    write_checkpoint(run_path, 2, tmp_path / "epoch2.pt")
    (run_path / "epoch/commits/00000002.json").unlink()
    with pytest.raises(DamagedRunError, match=r"commit record epoch/commits/00000002.json is missing, later"):
        open_run(run_path)
    assert repair(run_path).bad_epochs == (2,)
    with pytest.raises(DamagedRunError, match=r"epoch 2: 'w': object weights/c/2/0 was never committed"):
        _ = open_run(run_path).weights[2]
    (imported,) = import_checkpoints(run_path, [tmp_path / "epoch2.pt"])
    assert not imported.new
    assert not imported.healed
    with (
        RunWriter(run_path) as writer,
        pytest.raises(InputError, match=r"epoch 2: its commit record is lost, so nothing says what was recorded"),
    ):
        writer.heal(LAYOUT, 2, *epoch_values(2))


def test_a_restored_object_is_sound_again(run_path: Path) -> None:
    keys = ("epoch/commits/00000002.json", "weights/c/3/0")
    copies = {key: (run_path / key).read_bytes() for key in keys}
    for key in keys:
        (run_path / key).unlink()
    assert repair(run_path).bad_epochs == (2, 3)
    for key, data in copies.items():
        (run_path / key).write_bytes(data)
    assert repair(run_path).bad_epochs == ()
    assert verify(run_path, "full").sound


def test_a_lost_layout_is_told_and_nothing_is_changed(run_path: Path) -> None:
    copies = (METADATA, "epoch/layout.json", "probe_index/layout.json")
    for key in copies:
        (run_path / key).write_bytes(b"{}")
    before = files_of(run_path)
    with pytest.raises(DamagedRunError, match=f"{', '.join(copies)} are all damaged, expected the layout"):
        repair(run_path)
    assert files_of(run_path) == before


def test_attributes_of_ones_own_survive_a_repair(run_path: Path) -> None:
    document = json.loads((run_path / METADATA).read_bytes())
    document["attributes"]["mine"] = 3
    document["consolidated_metadata"]["metadata"]["weights"]["shape"] = [2, 300]
    (run_path / METADATA).write_text(json.dumps(document))
    assert repair(run_path).actions == ("zarr.json written again",)
    assert json.loads((run_path / METADATA).read_bytes())["attributes"]["mine"] == 3


IN_PLACE_OF = ["weights/c/2/0", "epoch/commits/00000002.json", "epoch/layout.json", "weights/zarr.json", METADATA]


@pytest.mark.parametrize("what", ["folder", "link", "pipe"])
@pytest.mark.parametrize("key", [*IN_PLACE_OF, "fits/plain/zarr.json", "evaluations/0000/zarr.json"])
def test_what_stands_in_the_place_of_an_object_is_found_and_moved(key: str, what: str, run_path: Path) -> None:
    """Even a link to a sound copy: what it leads to can change without the run."""
    place, copy, checkpoint = run_path / key, run_path.parent / "copy", run_path.parent / "epoch2.pt"
    write_checkpoint(run_path, 2, checkpoint)
    place.rename(copy)
    if what == "folder":
        place.mkdir()
        (place / "of somebody").write_text("kept")
    elif what == "link":
        place.symlink_to(copy)
    else:
        os.mkfifo(place)
    assert any(damage.key.startswith(key.rpartition("/")[0]) for damage in verify(run_path, "full").damages)
    done = repair(run_path)
    assert done.bad_epochs == ((2,) if key in IN_PLACE_OF[:2] else ())
    assert open_run(run_path).rows_of(None).size == N_EPOCHS - len(done.bad_epochs)
    assert repair(run_path).actions == ()
    if key == "weights/c/2/0":
        assert [imported.healed for imported in import_checkpoints(run_path, [checkpoint])] == [True]
        assert verify(run_path, "full").sound
    assert len(list(run_path.glob(f"epoch/aside/*/{key}"))) == 1
    assert copy.read_bytes()


def test_metadata_that_the_disk_does_not_give_back_is_damage(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("epoch/commits/00000002.json", "weights/zarr.json", "fits/plain/zarr.json")
    read = LocalObjects.read

    def broken(self: LocalObjects, key: str) -> bytes:
        if key in keys:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, key)

    monkeypatch.setattr(LocalObjects, "read", broken)
    found = {damage.key: damage.what for damage in verify(run_path, "full").damages}
    assert found.keys() == set(keys)
    assert all("Input/output error" in what for what in found.values())
    with pytest.raises(DamagedRunError, match=r"weights/zarr.json cannot be read \(Input/output error\)"):
        open_run(run_path)


def test_a_run_without_a_sound_epoch_is_not_called_usable(run_path: Path) -> None:
    for epoch in range(N_EPOCHS):
        (run_path / f"weights/c/{epoch}/0").write_bytes(b"")
    (run_path / "epoch/commits/00000003.json").unlink()
    result = invoke("repair", str(run_path), "-q")
    assert result.exit_code == 1
    assert "epoch 0, 1, 2, 4: bad; its checkpoint heals it" in result.output
    assert "epoch 3: bad, its commit record is lost; restore it from a copy" in result.output
    assert result.output.endswith("no epoch is sound\n")
    with pytest.raises(TrajkitError, match=r"all its epochs|every epoch|no epoch"):
        trajkit.check(run_path)


# --- Side by side


def test_an_epoch_that_is_recorded_during_a_look_is_no_damage(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records were read before it, and the shapes after it."""
    examine_records = examine_run.examine_records

    def racing(*arguments: Any) -> Iterator[Any]:
        yield from examine_records(*arguments)
        append(writer, N_EPOCHS)

    monkeypatch.setattr(examine_run, "examine_records", racing)
    with RunWriter(run_path) as writer:
        assert verify(run_path, "full").damages == ()


def test_a_fit_that_is_saved_during_a_look_is_no_damage(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for when in ("_expect_fits", "_read_evaluations"):
        look = getattr(examine_results, when)

        def racing(*arguments: Any, _look: Any = look, _name: str = when) -> None:
            _look(*arguments)
            if f"late{_name}" not in open_run(run_path).fits:
                fit(run_path, modes=1, samples=10, name=f"late{_name}")

        with monkeypatch.context() as patch:
            patch.setattr(examine_results, when, racing)
            found = verify(run_path, "full")
            assert (found.damages, found.leftovers) == ((), ())
    with monkeypatch.context() as patch:
        numbers = iter(("now", "then"))  # a repair looks twice
        patch.setattr(
            examine_results, "_read_evaluations", lambda *_: fit(run_path, modes=1, samples=10, name=next(numbers))
        )
        assert repair(run_path).actions == ()
    assert open_run(run_path).fit("now").mode.shape == (300,)


def test_a_repair_that_has_lost_the_run_moves_nothing(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run_path / "weights/c/1", run_path / "weights/c/5")
    before = files_of(run_path)
    monkeypatch.setattr(WriterLock, "confirmed", property(lambda _: False))
    with pytest.raises(RunLockedError, match="another writer has taken the run over; repair again"):
        repair(run_path)
    assert files_of(run_path) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunNotFoundError, match="no run here"):
            repair(place)
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("key", ["weights/c/2/0", "fits/plain/zarr.json", METADATA])
def test_a_store_that_does_not_answer_is_no_damage(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    monkeypatch.setattr(remote, "_client", lambda *_: store)
    record("s3://bucket/run")
    for name in ("digest", "read"):
        original = getattr(RemoteObjects, name)

        def busy(self: RemoteObjects, asked: str, _original: Any = original) -> Any:
            if asked == key:
                raise StorageError("503 Slow Down")
            return _original(self, asked)

        monkeypatch.setattr(RemoteObjects, name, busy)
    for look in (lambda: verify("s3://bucket/run", "full"), lambda: repair("s3://bucket/run")):
        with pytest.raises(StorageError, match="503 Slow Down"):
            look()
    monkeypatch.undo()
    monkeypatch.setattr(remote, "_client", lambda *_: store)
    assert verify("s3://bucket/run", "full").sound
    assert open_run("s3://bucket/run").fits == ("plain", "updated")


# --- The command line, and object stores


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_the_commands_say_what_they_found_and_exit_by_it(run_path: Path) -> None:
    place = str(run_path)
    assert invoke("verify", place, "--fast", "--full").exit_code == 2
    for level in ("--fast", "--sampled", "--full"):
        result = invoke("verify", place, level, "-q")
        assert (result.exit_code, result.output.count("sound")) == (0, 1), result.output
    (run_path / "weights/c/2/0").write_bytes(b"")
    result = invoke("verify", place, "--full", "-q")
    assert result.exit_code == 1
    assert "epoch 2: 'w': object weights/c/2/0 is 0 bytes long, 25 bytes were committed; restore" in result.output
    result = invoke("verify", place, "--json", "-q")
    assert result.exit_code == 1
    document = json.loads(result.output)
    assert (document["sound"], document["damages"][0]["key"]) == (False, "weights/c/2/0")
    result = invoke("repair", place, "-q")
    assert result.exit_code == 1
    assert "epoch 2 marked as bad: weights/c/2/0 is 0 bytes long" in result.output
    assert "bad, see trajkit verify: epoch 2" in invoke("info", place).output
    assert json.loads(invoke("repair", place, "--json", "-q").output)["bad_epochs"] == [2]
    (run_path / "probe/c/3/0").write_bytes(b"")
    assert invoke("repair", place, "-q").exit_code == 1
    assert invoke("verify", str(run_path / "nothing")).exit_code == 2


@pytest.mark.parametrize(
    ("key", "bad"), [("weights/c/2/0", (2,)), ("probe/c/1/0", ()), (METADATA, ()), ("fits/plain/zarr.json", ())]
)
def test_a_run_in_an_object_store_is_verified_and_repaired(
    key: str, bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, url = MemoryStore(), "s3://bucket/run"
    monkeypatch.setattr(remote, "_client", lambda *_: store)
    record(url)
    assert verify(url, "full").sound
    store.put(key, b"damaged")
    assert key in {damage.key for damage in verify(url, "full").damages}
    assert repair(url).bad_epochs == bad
    assert {damage.row for damage in verify(url, "full").damages} == set(bad)
    kept = [item["path"] for some in store.list("epoch/aside") for item in some if item["path"].endswith(key)]
    assert len(kept) == (0 if bad else 1)
    with RunWriter(url) as writer:
        append(writer, N_EPOCHS)
    assert open_run(url).epochs.tolist() == list(range(N_EPOCHS + 1))
