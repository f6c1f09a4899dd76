"""What a recording will take is known before it is begun, and is what it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import correlated, vector_layout
from trajkit_cli.main import main

from trajkit import ParameterLayout, RunWriter, open_run, repair
from trajkit.errors import InputError
from trajkit.layout import TensorEntry
from trajkit.store import format as store_format
from trajkit.store.forecast import Forecast, forecast

BUFFERS = [
    TensorEntry(name=f"buffer_{dtype}", shape=(5,), dtype=dtype, kind="buffer")
    for dtype in ("float64", "int64", "bool")
]
LAYOUTS = {
    "one chunk": vector_layout(500),
    "a shard": vector_layout(200_000, 100_000),
    "buffers": ParameterLayout.of([*vector_layout(300).tensors, *BUFFERS]),
}


def record(path: Path, layout: ParameterLayout, epochs: range, steps: bool = False) -> RunWriter:
    """A writer of a run with these epochs."""
    writer = RunWriter(path, fsync=False)
    rng = np.random.default_rng(epochs.start)
    for epoch in epochs:
        weights = rng.normal(size=layout.n_weights).astype(np.float32)
        buffers = {dtype: np.zeros(size, dtype) for dtype, size in layout.buffer_sizes.items()}
        writer.append(layout, epoch, weights, buffers, step=100 * epoch if steps else None)
    return writer


def object_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())


@pytest.mark.parametrize("steps", [False, True], ids=["without steps", "with steps"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_forecast_is_what_the_recording_takes_to_the_byte(name: str, steps: bool, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    before = forecast(layout, 3, tmp_path / "runs/first", steps=steps)
    with record(tmp_path / "runs/first", layout, range(3), steps) as writer:
        taken = object_bytes(writer.path)  # type: ignore[arg-type]
        assert before.total_bytes == before.missing_bytes == taken
        assert (before.recorded, before.recorded_bytes, before.epoch_s, before.packable) == (0, 0, None, False)
        midway = writer.forecast(layout, 9)
    after = open_run(tmp_path / "runs/first").forecast(9)
    assert midway == Forecast(**{**vars(after), "free_bytes": midway.free_bytes})
    assert (after.epoch_bytes, after.recorded, after.recorded_bytes) == (before.epoch_bytes, 3, taken)
    assert after.total_bytes == forecast(layout, 9, steps=steps).total_bytes
    record(tmp_path / "runs/first", layout, range(3, 9), steps).close()
    assert object_bytes(tmp_path / "runs/first") == after.total_bytes
    if name == "a shard":  # where it matters, metadata is nothing
        assert open_run(tmp_path / "runs/first").size_bytes == pytest.approx(after.total_bytes, rel=0.01)


def test_many_objects_an_epoch_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMN_GRID", 8), ("CHUNK_VALUES", 32), ("SHARD_CHUNKS", 4)):
        monkeypatch.setattr(store_format, name, value)
    for n in (33, 128, 500, 637):
        record(tmp_path / str(n), vector_layout(n), range(2)).close()
        assert forecast(vector_layout(n), 2).total_bytes == object_bytes(tmp_path / str(n))


def test_packed_epochs_are_forecast_by_what_they_took(tmp_path: Path) -> None:
    layout = ParameterLayout.of([TensorEntry(name="w", shape=(200_000,), dtype="bfloat16", kind="weight")])
    before = forecast(layout, 4)
    assert "weights: at most 896.1 KiB an epoch, at most 3.6 MiB for 4 epochs" in str(before)
    halves = (correlated(4, 200_000).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for epoch in range(2):
            writer.append(layout, epoch, halves[epoch], {})
        midway = writer.forecast(layout, 4)
        for epoch in range(2, 4):
            writer.append(layout, epoch, halves[epoch], {})
    assert midway.epoch_bytes < 0.75 * before.epoch_bytes
    assert midway.total_bytes == pytest.approx(object_bytes(tmp_path / "run"), rel=0.02)
    assert "at most" not in str(midway)


def test_a_forecast_says_what_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = vector_layout(1_000_000)
    assert str(forecast(layout, 100)) == "1,000,000 weights: 4.1 MiB an epoch, 406.4 MiB for 100 epochs"
    assert forecast(layout, 100, "s3://bucket/run").free_bytes is None
    disk = SimpleNamespace(free=2**30)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or disk)
    planned = forecast(layout, 100, tmp_path / "not/yet/there")
    assert planned.has_room
    assert str(planned) == "1,000,000 weights: 4.1 MiB an epoch, 406.4 MiB for 100 epochs; 1.0 GiB are free"
    disk.free = 2**28
    planned = forecast(layout, 100, tmp_path / "not/yet/there")
    assert not planned.has_room
    assert str(planned).endswith("; only 256.0 MiB are free")
    assert asked == [tmp_path, tmp_path]


def test_epochs_whose_record_is_lost_are_left_out_of_the_mean(tmp_path: Path) -> None:
    record(tmp_path / "run", LAYOUTS["one chunk"], range(4)).close()
    whole = open_run(tmp_path / "run").forecast()
    (tmp_path / "run/epoch/commits/00000000.json").unlink()
    repair(tmp_path / "run")
    found = open_run(tmp_path / "run").forecast(6)
    assert (found.epoch_bytes, found.recorded, found.missing_bytes) == (whole.epoch_bytes, 4, 2 * whole.epoch_bytes)
    assert found.recorded_bytes == 3 * whole.epoch_bytes


def test_fewer_epochs_than_there_are_cannot_be_planned(digits_path: Path) -> None:
    with pytest.raises(InputError, match="10 epochs are planned, 40 are recorded already; plan for all of them"):
        open_run(digits_path).forecast(10)


def test_info_says_steps_and_what_is_planned(digits_path: Path, tmp_path: Path) -> None:
    def invoke(*arguments: Any) -> str:
        result = CliRunner().invoke(main, ["info", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = invoke(digits_path, "--epochs", 100)
    assert "planned: 3,682 weights: 29.0 KiB and 0.011 s an epoch, 2.9 MiB for 100 epochs, of which 40 are th" in shown
    assert "GiB are free" in shown or "MiB are free" in shown or "TiB are free" in shown
    assert "(0 to 39) of 3,682 weights" in shown
    assert "29.0 KiB an epoch, written in 0.01062 s" in shown
    assert "planned" not in invoke(digits_path)
    described = json.loads(invoke(digits_path, "--epochs", 100, "--json"))
    assert described["steps"] is None
    planned = described["forecast"]
    assert (planned["epochs"], planned["recorded"], planned["epoch_bytes"]) == (100, 40, described["epoch_bytes"])
    assert planned["total_bytes"] == planned["recorded_bytes"] + 60 * planned["epoch_bytes"]
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for epoch in range(3):
            writer.append(vector_layout(10), epoch, np.zeros(10, np.float32), {}, {"loss": 0.5}, 391 * epoch)
    shown = invoke(tmp_path / "run")
    assert "3 epochs (0 to 2, steps 0 to 782) of 10 weights" in shown
    assert [line.split() for line in shown.splitlines()[-4:]] == [
        ["epoch", "step", "loss"], ["0", "0", "0.5"], ["1", "391", "0.5"], ["2", "782", "0.5"],
    ]  # fmt: skip
    assert json.loads(invoke(tmp_path / "run", "--json"))["steps"] == [0, 391, 782]
