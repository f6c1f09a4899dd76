"""Following a folder into which a training writes: what is whole is recorded, in order, and all else is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from interruptible import interruptible
from safetensors.torch import save_file
from test_cli import invoke, invoke_json

from trajkit import import_checkpoints, open_run, repair, verify
from trajkit.checkpoints import watching
from trajkit.checkpoints.labels import CURE
from trajkit.checkpoints.stored import PlainTensor
from trajkit.checkpoints.watching import Watch
from trajkit.errors import InputError

Script = Callable[[Path], Iterator[None]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


@pytest.fixture
def watch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Watch, list[int]]]:
    """Watches while a script writes: each `yield` in it is a look, a second after the last one; its end is Ctrl-C."""

    def follow(script: Script, **options: Any) -> tuple[Watch, list[int]]:
        steps, now = script(folder), 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            if next(steps, "end") == "end":
                raise KeyboardInterrupt

        next(steps)
        monkeypatch.setattr(watching.time, "sleep", sleep)
        monkeypatch.setattr(watching.time, "monotonic", lambda: now)
        found = Watch(folder.parent / "run", folder, fsync=False, **options)
        recorded = []
        try:
            for item in found.follow():
                recorded.append(item.epoch)
        except KeyboardInterrupt:
            pass
        return found, recorded

    return follow


def save(path: Path, value: int = 0, **more: Any) -> None:
    state = {"w": torch.full((300,), float(value)), "count": torch.tensor(value)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, **more} if more else state, path)


def values(folder: Path) -> dict[int, float]:
    """Epoch -> the value of its weights."""
    run = open_run(folder.parent / "run")
    return {int(epoch): float(run.weights[row][0]) for row, epoch in enumerate(run.epochs)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_read_when_it_is_whole_and_has_stopped_growing(suffix: str, folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder.parent / f"whole{suffix}", 3)
        whole = (folder.parent / f"whole{suffix}").read_bytes()
        for n_bytes in (0, 5, 100, len(whole) // 2, len(whole) - 10):
            (folder / f"epoch3{suffix}").write_bytes(whole[:n_bytes])
            yield  # growing
            yield  # it stands still, and is not whole
            assert not (folder.parent / "run/epoch/zarr.json").exists()
        (folder / f"epoch3{suffix}").write_bytes(whole)
        yield  # whole, and just grown
        assert not (folder.parent / "run/epoch/zarr.json").exists()
        yield
        yield

    assert watch(script)[1] == [3]
    assert values(folder) == {3: 3.0}


def test_a_sharded_folder_is_read_when_all_its_shards_are_there(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        yield
        target = folder / "checkpoint-20"
        target.mkdir()
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        yield
        yield
        save_file({"a": torch.ones(3)}, target / "model-1.safetensors")
        yield
        yield
        assert not (folder.parent / "run/epoch/zarr.json").exists()
        save_file({"b": torch.ones(3)}, target / "model-2.safetensors")
        (target / "trainer_state.json").write_text('{"global_step": 20, "epoch": 0.5}')
        yield
        yield
        yield

    assert watch(script)[1] == [20]
    steps = open_run(folder.parent / "run").steps
    assert steps is not None
    assert steps.tolist() == [20]


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_folder_is_read_when_it_has_its_metadata(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=folder / "step7", no_dist=True)
        (folder / "step7/.metadata").rename(folder / "kept")
        yield
        yield
        yield
        (folder / "kept").rename(folder / "step7/.metadata")
        yield
        yield
        yield

    assert watch(script)[1] == [7]


def test_a_checkpoint_that_is_being_written_holds_up_those_after_it(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        (folder / "epoch9.pt").write_bytes(b"PK\x03\x04")
        save(folder / "epoch10.pt", 10)
        for _ in range(5):
            yield
        assert not (folder.parent / "run/epoch/zarr.json").exists()
        save(folder / "epoch9.pt", 9)
        for _ in range(3):
            yield

    assert watch(script)[1] == [9, 10]


def test_one_that_never_becomes_whole_holds_them_up_for_a_minute(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        (folder / "epoch1.pt").write_bytes(b"PK\x03\x04")
        save(folder / "epoch2.pt", 2)
        for _ in range(70):
            yield

    found, recorded = watch(script)
    assert recorded == [2]
    assert found.unrecorded == {}
    assert list(found.unfinished()) == [folder / "epoch1.pt"]

    def again(folder: Path) -> Iterator[None]:
        (folder / "epoch1.pt").unlink()
        save(folder / "epoch4.pt", 4)
        (folder / "epoch5.pt").write_bytes(b"PK\x03\x04")
        for _ in range(5):
            yield

    found, recorded = watch(again)
    assert recorded == [4]
    assert list(found.unfinished()) == [folder / "epoch5.pt"]
    assert "epoch5.pt: no checkpoint of tensors (File is not a zip file)" in found.unfinished()[folder / "epoch5.pt"]


def test_an_earlier_number_that_comes_late_is_told(folder: Path, watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder / "epoch5.pt", 5)
        yield
        yield
        save(folder / "epoch4.pt", 4)
        save(folder / "epoch6.pt", 6)
        for _ in range(4):
            yield

    found, recorded = watch(script)
    assert recorded == [5, 6]
    assert list(found.unrecorded) == [folder / "epoch4.pt"]
    assert f"{folder / 'epoch4.pt'}: epoch 4 came when epoch 5 was recorded already, and is left out" in caplog.messages


def test_it_ends_at_an_epoch_or_when_nothing_has_changed(watch: Any) -> None:
    def endless(folder: Path) -> Iterator[None]:
        for epoch in range(100):
            save(folder / f"epoch{epoch}.pt", epoch)
            yield
        raise AssertionError("it does not end")

    assert watch(endless, until=3)[1] == [0, 1, 2, 3]
    assert watch(endless, until=3)[1] == []  # reached already

    def quiet(folder: Path) -> Iterator[None]:
        save(folder / "epoch200.pt", 200)
        for _ in range(30):
            yield
        save(folder / "epoch201.pt", 201)
        (folder / "epoch202.pt").write_bytes(b"PK\x03\x04")
        save(folder / "epoch203.pt", 203)
        for _ in range(50):
            yield
        raise AssertionError("it does not end")

    recorded = watch(quiet, idle_s=40.0)[1]
    assert recorded[-3:] == [200, 201, 203]  # at the end, nothing is waited for


def test_names_of_unfinished_files_and_other_files_are_left_alone(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for name in (".epoch1.pt", "epoch2.pt.tmp", "tmp-checkpoint-3.pt", "epoch4.pt.partial"):
            torch.save({"w": torch.ones(3)}, folder / name)
        (folder / "events.out.tfevents.17").write_text("a log")
        (folder / "logs7").mkdir()
        (folder / "logs7/log.txt").write_text("a log")
        torch.save({"state": {}, "param_groups": []}, folder / "a-optimizer-8.pt")
        save(folder / "model-8.pt", 8)
        for _ in range(4):
            yield

    found, recorded = watch(script)
    assert recorded == [8]
    assert found.unrecorded | found.unfinished() == {}


def test_a_pattern_chooses(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for epoch in (1, 2):
            (folder / f"checkpoint-{epoch}").mkdir(exist_ok=True)
            save(folder / f"checkpoint-{epoch}/model.safetensors", epoch)
            save(folder / f"other{epoch + 2}.pt")
        for _ in range(4):
            yield

    assert watch(script, pattern="*/model.safetensors")[1] == [1, 2]
    for pattern in ("/tmp/*", "../*", ""):
        with pytest.raises(InputError, match="expected one of names in the folder"):
            watch(script, pattern=pattern)


def test_a_file_that_is_written_over_and_over_is_recorded_by_what_it_says(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for epoch in range(3):
            save(folder / "last.pt", epoch, epoch=epoch)
            yield
            yield
            yield
        save(folder / "best.pt", 1, epoch=1)
        torch.save({"w": torch.ones(300)}, folder / "final.pt")
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == [0, 1, 2]
    assert values(folder) == {0: 0.0, 1: 1.0, 2: 2.0}
    assert found.unrecorded | found.unfinished() == {}


def test_what_cannot_be_recorded_is_told_and_the_rest_is_recorded(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for epoch in range(4):
            save(folder / f"epoch{epoch}.pt", epoch)
        torch.save({"w": torch.ones(7), "count": torch.tensor(1)}, folder / "epoch1.pt")
        torch.save({"w": torch.full((300,), np.nan), "count": torch.tensor(2)}, folder / "epoch2.pt")
        (folder / "epoch7.pt").write_bytes(b"PK\x03\x04")
        yield
        yield
        (folder / "epoch7.pt").unlink()
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == [0, 3]
    assert "epoch 1: 'w' has shape (7,), the run has (300,)" in found.unrecorded[folder / "epoch1.pt"]
    assert "epoch 2: 'w' has nan" in found.unrecorded[folder / "epoch2.pt"]
    assert found.unrecorded[folder / "epoch7.pt"] == "was removed before it was recorded"


def test_a_watch_that_begins_again_skips_what_is_recorded_and_heals_what_is_damaged(
    folder: Path, watch: Any, tmp_path: Path
) -> None:
    for epoch in range(3):
        save(folder / f"epoch{epoch}.pt", epoch)
    import_checkpoints(tmp_path / "run", sorted(folder.iterdir()), fsync=False)
    (tmp_path / "run/weights/c/1/0").write_bytes(b"damaged")
    repair(tmp_path / "run")
    assert open_run(tmp_path / "run").bad_epochs == (1,)

    def script(_: Path) -> Iterator[None]:
        for _ in range(3):
            yield

    assert watch(script)[1] == [1]
    assert values(folder) == {0: 0.0, 1: 1.0, 2: 2.0}


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: no such folder, expected one to watch; make it"):
        next(Watch(tmp_path / "run", tmp_path / "none").follow())
    assert not (tmp_path / "run").exists()


# --- Which epoch a file is


def test_files_of_the_imagenet_example_are_called_by_their_names(folder: Path, watch: Any) -> None:
    """Each says the number of the next epoch, and model_best is a copy of one of them."""

    def script(folder: Path) -> Iterator[None]:
        for epoch in range(3):
            save(folder / f"checkpoint_{epoch:04d}.pth.tar", epoch, epoch=epoch + 1)
            save(folder / "model_best.pth.tar", epoch, epoch=epoch + 1)
            for _ in range(3):
                yield

    found, recorded = watch(script)
    assert recorded == [0, 1, 2]
    assert values(folder) == {0: 0.0, 1: 1.0, 2: 2.0}
    assert found.unrecorded | found.unfinished() == {}


def test_best_and_last_files_never_end_a_watch(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder / "last.ckpt", 3, epoch=3)
        save(folder / "best.ckpt", 2, epoch=2)
        for _ in range(4):
            yield
        save(folder / "epoch=3.ckpt", 3, epoch=3)  # it is recorded already, and the same
        for _ in range(4):
            yield
        raise AssertionError("it does not end")

    found, recorded = watch(script, until=3)
    assert recorded == [2, 3]
    assert found.unrecorded | found.unfinished() == {}


def test_a_best_file_of_an_earlier_epoch_is_no_failure(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for name in ("epoch=5.ckpt", "epoch=6.ckpt"):
            save(folder / name, int(name[6]))
        yield
        yield
        save(folder / "best.ckpt", 4, epoch=4)
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == [5, 6]
    assert found.unrecorded | found.unfinished() == {}


def test_a_bare_number_follows_the_form_of_the_first_file(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        (folder / "net_3.pt").write_bytes(b"PK\x03\x04")  # being written; what it will be is not known yet
        save(folder / "ema_7.pt", 7)
        for _ in range(3):
            yield
        save(folder / "net_3.pt", 3)
        save(folder / "net_8.pt", 3)
        save(folder / "ema_8.pt", 8)
        save(folder / "ema_8_of_2.pt", 8)
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == [7, 8]
    assert values(folder) == {7: 7.0, 8: 8.0}
    assert found.unrecorded | found.unfinished() == {}


def test_a_file_that_is_numbered_by_something_else_is_told(folder: Path, watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder / "epoch_1.pt", 1)
        yield
        yield
        save(folder / "iter_900.pt", 2)
        save(folder / "epoch_2.pt", 2, epoch=9)
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == [1]
    assert found.unrecorded == {
        folder / "iter_900.pt": f"is numbered by step, {folder / 'epoch_1.pt'} by epoch, and is left out",
        folder / "epoch_2.pt": f"{folder / 'epoch_2.pt'}: is epoch 2 by its name, the file says epoch 9; {CURE}",
    }


def test_a_label_says_which_number_it_is(watch: Any) -> None:
    def script(folder: Path) -> Iterator[None]:
        for epoch in (9, 10):
            save(folder / f"run7-{epoch}of20.pt", epoch)
        save(folder / "other.pt", 11)
        for _ in range(3):
            yield

    assert watch(script, label=r"-(\d+)of")[1] == [9, 10]
    with pytest.raises(InputError, match="label is 'x', expected a group for the number"):
        watch(script, label="x")


# --- What is recorded already


def test_another_file_of_a_recorded_epoch_is_told(folder: Path, watch: Any, tmp_path: Path) -> None:
    for epoch in range(3):
        save(folder / f"epoch{epoch}.pt", epoch)
    import_checkpoints(tmp_path / "run", sorted(folder.iterdir()), fsync=False)
    save(folder / "epoch1.pt", 7)

    def script(folder: Path) -> Iterator[None]:
        yield
        yield
        save(folder / "epoch2.pt", 2, anew=True)  # the same values in a file of another look
        for _ in range(3):
            yield

    found, recorded = watch(script)
    assert recorded == []
    assert list(found.unrecorded) == [folder / "epoch1.pt"]
    assert "epoch 1 is recorded already, with other values: 'w' differs" in found.unrecorded[folder / "epoch1.pt"]
    assert values(folder) == {0: 0.0, 1: 1.0, 2: 2.0}


def test_a_watch_that_begins_again_reads_no_unchanged_file(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(folder: Path) -> Iterator[None]:
        for name, epoch in (("epoch1.pt", 1), ("epoch2.pt", 2), ("last.pt", 2)):
            save(folder / name, epoch, epoch=epoch)
        for _ in range(4):
            yield

    def again(_: Path) -> Iterator[None]:
        for _ in range(4):
            yield

    assert watch(script)[1] == [1, 2]
    opened: list[str] = []
    real = watching.open_checkpoint

    def spied(path: Path, key: str | None) -> Any:
        opened.append(path.name)
        return real(path, key)

    monkeypatch.setattr(watching, "open_checkpoint", spied)
    assert watch(again)[1] == []
    assert opened == ["last.pt"]  # from which nothing was recorded


def test_a_last_file_heals_the_epoch_that_it_was(watch: Any, tmp_path: Path) -> None:
    def script(folder: Path) -> Iterator[None]:
        for epoch in range(3):
            save(folder / "last.pt", epoch, epoch=epoch)
            for _ in range(3):
                yield

    def again(_: Path) -> Iterator[None]:
        for _ in range(3):
            yield

    assert watch(script)[1] == [0, 1, 2]
    (tmp_path / "run/weights/c/2/0").write_bytes(b"damaged")
    assert repair(tmp_path / "run").bad_epochs == (2,)
    assert watch(again)[1] == [2]
    assert verify(tmp_path / "run", "full").sound


# --- Torn files


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files whose values fail their check when they are read, as the CRC of one that is being written does."""
    names: set[str] = set()
    real = PlainTensor.values

    def checked(self: PlainTensor, start: int, stop: int) -> torch.Tensor:
        if self.file.path.name in names:
            raise InputError(f"{self.file.path}: 'data/0' does not have its CRC; write it again")
        return real(self, start, stop)

    monkeypatch.setattr(PlainTensor, "values", checked)
    return names


@pytest.mark.parametrize("name", ["epoch2.safetensors", "last.safetensors"])
def test_a_file_that_fails_its_check_is_looked_at_again(name: str, folder: Path, watch: Any, torn: set[str]) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder / "epoch1.safetensors", 1)
        yield
        torn.add(name)
        save_file({"w": torch.full((300,), 9.0), "count": torch.tensor(9)}, folder / name, {"epoch": "2"})
        save(folder / "epoch3.safetensors", 3)
        for _ in range(4):
            yield
        torn.clear()
        save_file({"w": torch.full((300,), 2.0), "count": torch.tensor(2)}, folder / name, {"epoch": "2"})
        for _ in range(3):
            yield

    found, recorded = watch(script)
    if name == "last.safetensors":  # a copy holds nobody up
        assert recorded == [1, 3]
    else:
        assert recorded == [1, 2, 3]
        assert values(folder) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert found.unrecorded | found.unfinished() == {}
    assert verify(folder.parent / "run", "full").sound


@pytest.mark.parametrize("name", ["epoch2.safetensors", "last.safetensors", "current.safetensors"])
def test_a_file_that_fails_its_check_to_the_end_is_told_then(
    name: str, folder: Path, watch: Any, torn: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    def script(folder: Path) -> Iterator[None]:
        save(folder / "epoch1.safetensors", 1)
        torn.add(name)
        save_file({"w": torch.full((300,), 9.0), "count": torch.tensor(9)}, folder / name, {"epoch": "2"})
        for _ in range(100):
            yield
        raise AssertionError("it does not end")

    found, recorded = watch(script, idle_s=70.0)
    assert recorded == [1]
    assert found.unrecorded == {}
    assert list(found.unfinished()) == [folder / name]
    assert "'data/0' does not have its CRC" in found.unfinished()[folder / name]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert open_run(folder.parent / "run").epochs.tolist() == [1]


def test_a_file_of_a_recorded_epoch_that_cannot_be_read_is_told(
    folder: Path, watch: Any, torn: set[str], tmp_path: Path
) -> None:
    save(folder / "epoch1.safetensors", 1)
    import_checkpoints(tmp_path / "run", [folder / "epoch1.safetensors"], fsync=False)
    save(folder / "epoch1.safetensors", 1)
    torn.add("epoch1.safetensors")

    def script(_: Path) -> Iterator[None]:
        for _ in range(4):
            yield

    found, recorded = watch(script)
    assert recorded == []
    assert found.unrecorded == {}
    assert list(found.unfinished()) == [folder / "epoch1.safetensors"]


# --- The command


def test_the_command_watches_until_an_epoch(folder: Path, tmp_path: Path) -> None:
    for epoch in range(3):
        save(folder / f"epoch{epoch}.pt", epoch)
    (folder / "epoch1.pt").write_bytes(b"PK\x03\x04")  # left by a training that was killed
    options = ["--watch", folder, "--interval", "0.01"]
    result = invoke("record", tmp_path / "run", *options, "--idle", "0.1s", code=1)
    assert result.stdout == f"{tmp_path / 'run'}: 2 epochs recorded\n"
    for said in ("300 weights: ", "epoch 0: ", "epoch 2: "):
        assert said in result.stderr
    (folder / "epoch1.pt").unlink()
    save(folder / "epoch3.pt", 3)
    found = invoke_json("record", tmp_path / "run", *options, "--until", 3, "-q")
    assert [(item["epoch"], item["new"]) for item in found["files"]] == [(3, True)]
    assert found["unrecorded"] == []


def test_the_command_says_which_files_it_left_alone(folder: Path, tmp_path: Path) -> None:
    for epoch in range(3):
        torch.save({"w": torch.ones(3)}, folder / f"model_{epoch}.t7")
    result = invoke("record", tmp_path / "run", "--watch", folder, "--interval", "0.01", "--idle", "0.1s")
    assert "3 files were left alone, such as model_0.t7; choose checkpoints by --pattern" in result.stderr
    options = ["--watch", folder, "--interval", "0.01", "--idle", "0.1s", "--pattern", "*.t7"]
    assert "3 epochs recorded" in invoke("record", tmp_path / "run", *options).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_watch_well(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    save(folder / "epoch0.pt")
    command = [sys.executable, "-m", "trajkit_cli", "record", tmp_path / "run", "--watch", folder, "--interval", "0.01"]
    process = subprocess.Popen(interruptible(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "recorded" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.strip()) == (0, f"{tmp_path / 'run'}: 1 epochs recorded\n", "")
    assert values(folder) == {0: 0.0}
