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

from trajkit import import_checkpoints, open_run, repair
from trajkit.checkpoints import watching
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
