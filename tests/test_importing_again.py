"""A checkpoint whose epoch is recorded already is looked into: the same is told so, another one changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from safetensors.torch import save_file
from test_cli import invoke
from torch import nn

from trajkit import Recorder, RunWriter, import_checkpoints, open_run, repair, verify
from trajkit.checkpoints import comparing, importing
from trajkit.checkpoints.selecting import Selection
from trajkit.errors import InputError, LayoutError, RunLockedError
from trajkit.store.sources import read_sources

STATE = {"w": torch.arange(300.0), "b.running_mean": torch.zeros(3), "b.num_batches_tracked": torch.tensor(3)}


def save(path: Path, epoch: int, **changed: torch.Tensor) -> Path:
    """Write a checkpoint whose weights are those of an epoch."""
    torch.save({**STATE, "w": STATE["w"] + epoch, **changed}, path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / f"epoch{epoch}.pt", epoch) for epoch in range(3)]


@pytest.fixture
def run(files: list[Path], tmp_path: Path) -> Path:
    import_checkpoints(tmp_path / "run", files)
    return tmp_path / "run"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that are opened from now on."""
    names: list[str] = []
    real = importing.open_checkpoint

    def spied(path: Path, key: str | None = None) -> Any:
        names.append(path.name)
        return real(path, key)

    monkeypatch.setattr(importing, "open_checkpoint", spied)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path) -> None:
    """Write the same bytes into another file of the same name."""
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


# --- The same


def test_an_unchanged_file_is_not_read_again(run: Path, files: list[Path], opened: list[str]) -> None:
    again = import_checkpoints(run, files)
    assert [item.new for item in again] == [False] * 3
    assert opened == []
    assert "3 were there already, with the same values" in invoke("record", run, *files).stdout


def test_a_file_that_only_looks_different_is_compared_once(run: Path, files: list[Path], opened: list[str]) -> None:
    rewrite(files[1])
    os.utime(files[2])
    before = contents(run)
    assert [item.new for item in import_checkpoints(run, files)] == [False] * 3
    assert set(opened) == {"epoch1.pt", "epoch2.pt"}
    opened.clear()
    import_checkpoints(run, files)
    assert opened == []
    changed = {name for name, data in contents(run).items() if before.get(name) != data}
    assert changed == {"epoch/sources/00000001.json", "epoch/sources/00000002.json"}


def test_a_file_of_another_format_with_the_same_values_is_the_same(run: Path, tmp_path: Path) -> None:
    save_file({**STATE, "w": STATE["w"] + 1}, tmp_path / "epoch1.safetensors")
    (item,) = import_checkpoints(run, [tmp_path / "epoch1.safetensors"])
    assert (item.new, item.healed, item.lost) == (False, False, False)


def test_an_epoch_that_a_training_recorded_is_compared_with_its_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        recorder.record(4)
    torch.save(model.state_dict(), tmp_path / "epoch4.pt")
    assert [item.new for item in import_checkpoints(tmp_path / "run", [tmp_path / "epoch4.pt"])] == [False]
    with torch.no_grad():
        model[1].running_var[1] += 1
    torch.save(model.state_dict(), tmp_path / "epoch4.pt")
    with pytest.raises(InputError, match=r"epoch 4 is recorded already, with other values: '1.running_var' differs"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch4.pt"])


def test_nan_is_equal_to_itself_and_minus_zero_is_not_zero(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), 0.0, 1.0])
    torch.save({"w": values}, tmp_path / "epoch0.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"], nonfinite="record")
    rewrite(tmp_path / "epoch0.pt")
    assert [item.new for item in import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])] == [False]
    torch.save({"w": torch.tensor([float("nan"), -0.0, 1.0])}, tmp_path / "epoch0.pt")
    with pytest.raises(InputError, match=r"with other values: 'w' differs"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])


def test_what_is_selected_of_a_file_is_compared(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "ema": {"w": torch.zeros(3)}}, tmp_path / "epoch0.pt")
    model, ema = Selection(key="model"), Selection(key="ema")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"], select=model)
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"], select=model)
    with pytest.raises(InputError, match=r"with other values: 'w' differs"):  # though the file is unchanged
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"], select=ema)


def test_a_folder_is_the_same_while_none_of_its_files_is_changed(tmp_path: Path, opened: list[str]) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, file in weight_map.items():
        save_file({name: torch.ones(4)}, folder / file)
    for given in (folder, folder / "model.safetensors.index.json"):
        import_checkpoints(tmp_path / "run", [given])
        opened.clear()
        import_checkpoints(tmp_path / "run", [given])
        assert opened == []
    save_file({"b": torch.full((4,), 2.0)}, folder / "model-2.safetensors")
    for given in (folder, folder / "model.safetensors.index.json"):
        with pytest.raises(InputError, match=r"epoch 5 is recorded already, with other values: 'b' differs"):
            import_checkpoints(tmp_path / "run", [given])


# --- Another one


def not_a_checkpoint(path: Path) -> None:
    path.write_text("I am text")


def of_another_model(path: Path) -> None:
    torch.save({"w": torch.ones(7)}, path)


def of_another_epoch(path: Path) -> None:
    save(path, 7)


def with_another_buffer(path: Path) -> None:
    save(path, 1, **{"b.num_batches_tracked": torch.tensor(4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_a_checkpoint, r"epoch1.pt: expected a .safetensors or .pt checkpoint, found 9 bytes of something else"),
        (of_another_model, r"epoch1.pt: .*/run: epoch 1: 'b.running_mean' is missing, the run has it"),
        (of_another_epoch, r"epoch1.pt: .*/run: epoch 1 is recorded already, with other values: 'w' differs; give"),
        (with_another_buffer, r"epoch1.pt: .*with other values: 'b.num_batches_tracked' differs; give another epoch"),
    ],
)
def test_another_file_of_a_recorded_epoch_changes_nothing(
    change: Callable[[Path], None], message: str, run: Path, files: list[Path], tmp_path: Path
) -> None:
    change(files[1])
    new, before = save(tmp_path / "epoch3.pt", 3), contents(run)
    with pytest.raises(InputError, match=message) as raised:
        import_checkpoints(run, [*files, new])
    assert len(str(raised.value).splitlines()) == 1
    assert contents(run) == before
    result = invoke("record", run, *files, new, code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"Error: {files[1]}: ")
    assert contents(run) == before


def test_all_conflicts_are_listed_and_nothing_is_written(run: Path, files: list[Path], tmp_path: Path) -> None:
    not_a_checkpoint(files[0])
    of_another_epoch(files[1])
    of_another_model(files[2])
    before = contents(run)
    with pytest.raises(InputError) as raised:
        import_checkpoints(run, [*files, save(tmp_path / "epoch3.pt", 3)])
    first, *others = str(raised.value).splitlines()
    assert first == "3 checkpoints cannot be recorded, and nothing is written:"
    assert [line.partition(": ")[0].strip() for line in others] == [str(file) for file in files]
    assert contents(run) == before


def test_an_epoch_before_the_last_one_is_a_conflict_too(run: Path, files: list[Path], tmp_path: Path) -> None:
    with RunWriter(run, fsync=False) as writer:
        layout = open_run(run).layout
        buffers = {"float32": np.zeros(3, np.float32), "int64": np.array([3])}
        writer.append(layout, 9, np.zeros(300, np.float32), buffers)
    of_another_epoch(files[1])
    late, new = save(tmp_path / "epoch5.pt", 5), save(tmp_path / "epoch10.pt", 10)
    with pytest.raises(
        InputError, match=r"(?s)2 checkpoints .*epoch 1 is .*epoch5.pt: .* epoch 5 comes before the last"
    ):
        import_checkpoints(run, [*files, late, new])
    assert open_run(run).epochs.tolist() == [0, 1, 2, 9]


def test_a_layout_error_stays_one(run: Path, files: list[Path]) -> None:
    of_another_model(files[1])
    with pytest.raises(LayoutError):
        import_checkpoints(run, files)


def test_values_are_compared_a_piece_at_a_time(run: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = comparing.StreamedWeights.__getitem__

    def spied(self: Any, columns: slice) -> Any:
        asked.append(columns.stop - columns.start)
        return real(self, columns)

    monkeypatch.setattr(comparing.StreamedWeights, "__getitem__", spied)
    monkeypatch.setattr("trajkit.store.format.CHUNK_VALUES", 32)
    monkeypatch.setattr("trajkit.store.format.COLUMN_GRID", 8)
    monkeypatch.setattr("trajkit.store.format.SHARD_CHUNKS", 2)
    other = run.parent / "pieces"
    import_checkpoints(other, files)
    asked.clear()
    save(files[2], 2, w=torch.cat([STATE["w"][:299] + 2, torch.zeros(1)]))
    with pytest.raises(InputError, match="'w' differs"):
        import_checkpoints(other, files)
    assert len(asked) > 4
    assert max(asked) <= 64


# --- What is kept of the files


def test_what_the_epochs_were_recorded_from_is_kept(run: Path, files: list[Path]) -> None:
    sources = read_sources(open_run(run).archive.objects, [0, 1, 2])
    assert [source.path for source in sources.values()] == [str(file) for file in files]
    for source, file in zip(sources.values(), files, strict=True):
        status = file.stat()
        assert (source.look.size, source.look.modified_ns, source.look.inode, source.look.files) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
            None,
        )


def damage_none(place: Path) -> None:
    shutil.rmtree(place)


def damage_text(place: Path) -> None:
    for file in place.iterdir():
        file.write_text("no JSON")


def damage_swap(place: Path) -> None:
    (place / "00000000.json").rename(place / "kept")
    (place / "00000001.json").rename(place / "00000000.json")
    (place / "kept").rename(place / "00000001.json")


def damage_fields(place: Path) -> None:
    for file in place.iterdir():
        file.write_text('{"epoch": 0, "size": "large"}')


def damage_link(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


def damage_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("a file")


def damage_folders(place: Path) -> None:
    for file in place.iterdir():
        file.unlink()
        file.mkdir()


DAMAGES = [damage_none, damage_text, damage_swap, damage_fields, damage_link, damage_file, damage_folders]


def test_plain_zarr_and_xarray_do_not_see_what_is_kept(run: Path) -> None:
    assert sorted(zarr.open_group(run, mode="r")) == ["buffers", "epoch", "probe", "probe_index", "weights"]
    assert xarray.open_zarr(run)["weights"].shape == (3, 300)
    assert (run / "epoch/sources/00000002.json").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_nothing_rests_on_what_is_kept(
    damage: Callable[[Path], None], run: Path, files: list[Path], tmp_path: Path
) -> None:
    damage(run / "epoch/sources")
    assert verify(run, "full").sound
    assert verify(run, "full").leftovers == ()
    done = repair(run)
    assert (done.actions, done.damages) == ((), ())
    new = save(tmp_path / "epoch3.pt", 3)
    assert [item.new for item in import_checkpoints(run, [*files, new])] == [False, False, False, True]
    of_another_epoch(files[1])
    with pytest.raises(InputError, match="with other values"):
        import_checkpoints(run, files)


def test_a_bad_epoch_is_healed_though_its_file_is_unchanged(run: Path, files: list[Path]) -> None:
    (run / "weights/c/1/0").write_bytes(b"damaged")
    assert repair(run).bad_epochs == (1,)
    assert [(item.new, item.healed) for item in import_checkpoints(run, files)] == [
        (False, False),
        (False, True),
        (False, False),
    ]
    assert verify(run, "full").sound


def test_a_file_whose_time_has_no_fractions_and_is_now_is_read_again(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that keeps whole seconds a change in the same second would not show."""
    file = save(tmp_path / "epoch0.pt", 0)
    os.utime(file, (1_000_000, 1_000_000))
    reads = []
    for now in (1_000_001, 1_000_100, 1_000_200):
        monkeypatch.setattr("trajkit.checkpoints.looks.time.time_ns", lambda now=now: now * 10**9)
        opened.clear()
        import_checkpoints(tmp_path / "run", [file])
        reads.append(bool(opened))
    assert reads == [True, True, False]


# --- Told before it is done


def test_a_dry_run_tells_what_would_become_of_each_file_and_writes_nothing(
    run: Path, files: list[Path], tmp_path: Path
) -> None:
    new, before = save(tmp_path / "epoch3.pt", 3), contents(run)
    with RunWriter(run):  # it does not even wait for a writer
        result = invoke("record", run, *files, new, "--dry-run")
        with pytest.raises(RunLockedError):
            import_checkpoints(run, [*files, new])
    assert result.stdout == f"{run}: 1 epochs would be recorded, 3 were there already, with the same values\n"
    assert [line for line in result.stderr.splitlines() if not line.startswith("looking: ")] == [
        *(f"epoch {epoch}: {file}, recorded already" for epoch, file in enumerate(files)),
        f"epoch 3: {new}",
    ]
    assert {name: data for name, data in contents(run).items() if "locks" not in name} == {
        name: data for name, data in before.items() if "locks" not in name
    }
    told = json.loads(invoke("record", tmp_path / "none", new, "--dry-run", "--json", "-q").stdout)
    assert told == {
        "run": str(tmp_path / "none"),
        "dry_run": True,
        "files": [{"path": str(new), "epoch": 3, "new": True, "healed": False, "lost": False, "by": "name"}],
    }
    assert not (tmp_path / "none").exists()
    of_another_epoch(files[0])
    assert "with other values" in invoke("record", run, *files, "--dry-run", code=1).stderr


def test_which_file_becomes_which_epoch_is_told_before_anything_is_written(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "epoch": torch.tensor(0)}, tmp_path / "model_4.pt")
    torch.save({"w": torch.full((3,), float("nan")), "epoch": torch.tensor(0)}, tmp_path / "model_5.pt")
    files = sorted(tmp_path.glob("*.pt"))
    result = invoke("record", tmp_path / "run", *files, code=1)
    lines = result.stderr.splitlines()
    assert lines[:2] == [f"epoch {epoch}: {tmp_path}/model_{epoch}.pt, by the number in its name" for epoch in (4, 5)]
    assert "'w' has nan" in lines[-1]
    quiet = invoke("record", tmp_path / "quiet", files[0], "-q")
    assert (quiet.stderr, quiet.stdout) == ("", f"{tmp_path / 'quiet'}: 1 epochs recorded\n")
    told = json.loads(invoke("record", tmp_path / "json", files[0], "--json", "-q").stdout)
    assert [(item["epoch"], item["by"]) for item in told["files"]] == [(4, "number")]
