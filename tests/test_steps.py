"""A run may keep the training's step beside each epoch: a second label that is as safe as the first one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from conftest import correlated, vector_layout

from trajkit import RunWriter, check, fit, open_run, repair, verify
from trajkit.digest import canonical_json, digest
from trajkit.errors import DamagedRunError, InputError
from trajkit.store.objects import LocalObjects

LAYOUT = vector_layout(40, 60)
MATRIX = correlated(5, 100)
EPOCHS, STEPS = [0, 1, 2, 5], [0, 391, 782, 2**62]


def append(writer: RunWriter, epoch: Any, step: Any) -> None:
    writer.append(LAYOUT, epoch, MATRIX[-1], {}, step=step)


@pytest.fixture(scope="module")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "run"
    for rows in ([0, 1], [2, 3]):
        with RunWriter(path, fsync=False) as writer:
            for row in rows:
                writer.append(LAYOUT, EPOCHS[row], MATRIX[row], {}, {"loss": 1.0}, STEPS[row])
    return path


@pytest.fixture
def path(_recorded: Path, tmp_path: Path) -> Path:
    """A run with steps."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))


def forge(path: Path, row: int, **fields: Any) -> None:
    """Let a commit record say something else, with a hash that is right; None takes a field away."""
    key = path / f"epoch/commits/{row:08d}.json"
    record = json.loads(key.read_bytes())["record"] | fields
    record = {name: value for name, value in record.items() if value is not None or name == "previous"}
    key.write_bytes(json.dumps({"blake3": digest(canonical_json(record)), "record": record}).encode())


def test_steps_stand_beside_the_epochs_for_every_reader(path: Path) -> None:
    run = open_run(path)
    assert run.epochs.tolist() == EPOCHS
    assert run.steps is not None
    assert (run.steps.tolist(), run.steps.dtype) == (STEPS, np.int64)
    np.testing.assert_array_equal(run.weights[:], MATRIX[:4])
    for group in (zarr.open_group(path, mode="r"), zarr.open_group(path, mode="r", use_consolidated=False)):
        assert group["step"][:].tolist() == STEPS
        assert group["step"].metadata.dimension_names == ("epoch",)
    with xarray.open_zarr(path) as dataset:
        assert dataset["step"].dims == ("epoch",)
        assert dataset.set_coords("step")["weights"].coords["step"].values.tolist() == STEPS
    assert fit(run, modes=2, samples=20).epochs.tolist() == EPOCHS
    assert check(run).epochs == tuple(EPOCHS)
    assert verify(path, "full").sound


def test_a_run_without_steps_knows_nothing_of_them(tmp_path: Path, digits_path: Path) -> None:
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        append(writer, 0, None)
    for place in (tmp_path / "run", digits_path):
        assert open_run(place).steps is None
        assert not (place / "step").exists()
        assert "step" not in json.loads((place / "epoch/commits/00000000.json").read_bytes())["record"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (None, r"run: epoch 6 has no step, the epochs before it have one; pass the training's step"),
        (2**62, rf"run: epoch 6 has step {2**62}, expected one after {2**62}, that of epoch 5; pass the training's"),
        (7, rf"epoch 6 has step 7, expected one after {2**62}, that of epoch 5"),
        (2**63, rf"epoch 6: step {2**63} is no 64-bit integer; count"),
        (8.0, "step is 8.0, expected an integer; pass the number of the step"),
        ("8", "step is '8', expected an integer"),
        (True, "step is True, expected an integer"),
    ],
)
def test_a_step_that_cannot_come_next_is_refused(step: Any, message: str, path: Path) -> None:
    with RunWriter(path, fsync=False) as writer:
        with pytest.raises(InputError, match=message):
            append(writer, 6, step)
        append(writer, 6, np.int64(2**62 + 1))
    steps = open_run(path).steps
    assert steps is not None
    assert steps.tolist() == [*STEPS, 2**62 + 1]


def test_a_run_that_began_without_steps_goes_on_without(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        append(writer, 0, None)
        with pytest.raises(InputError, match="epoch 1 has step 5, the epochs before it have none; leave it out or rec"):
            append(writer, 1, 5)
        append(writer, 1, None)
    assert open_run(tmp_path / "run").steps is None


@pytest.mark.parametrize("then", [None, 3], ids=["without a step", "with another step"])
def test_a_first_epoch_that_failed_decides_nothing(
    then: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(LocalObjects, "create_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
            with pytest.raises(OSError, match="No space"):
                append(writer, 0, 0)
        append(writer, 0, then)
    assert (tmp_path / "run/step").exists() == (then is not None)
    assert verify(tmp_path / "run", "full").sound
    steps = open_run(tmp_path / "run").steps
    assert (None if steps is None else steps.tolist()) == (None if then is None else [then])


@pytest.mark.parametrize("how", ["flipped", "deleted", "emptied"])
def test_a_damaged_step_is_found_and_made_again_bit_for_bit(how: str, path: Path) -> None:
    key = path / "step/c/2"
    before = key.read_bytes()
    if how == "deleted":
        key.unlink()
    else:
        key.write_bytes(b"" if how == "emptied" else bytes([before[0] ^ 1]) + before[1:])
    (damage,) = verify(path, "full").damages
    assert (damage.key, damage.row) == ("step/c/2", 2)
    assert str(damage).startswith("epoch 2: object step/c/2 ")
    done = repair(path)
    assert (done.actions, done.damages) == (("step/c/2 made again, as it was committed",), ())
    assert key.read_bytes() == before
    assert verify(path, "full").sound


def test_damaged_metadata_of_the_steps_is_written_again(path: Path) -> None:
    before = (path / "step/zarr.json").read_bytes()
    (path / "step/zarr.json").write_bytes(b"{}")
    with pytest.raises(DamagedRunError, match=r"step/zarr.json does not describe the array"):
        open_run(path)
    assert repair(path).actions == ("step/zarr.json written again",)
    assert (path / "step/zarr.json").read_bytes() == before


@pytest.mark.parametrize("object_lost", [False, True], ids=["its object is there", "its object is lost, too"])
def test_an_epoch_whose_record_is_lost_keeps_its_step(object_lost: bool, path: Path) -> None:
    record = (path / "epoch/commits/00000001.json").read_bytes()
    (path / "epoch/commits/00000001.json").unlink()
    if object_lost:
        (path / "step/c/1").unlink()
    assert repair(path).bad_epochs == (1,)
    run = open_run(path)
    assert run.steps is not None
    assert run.steps.tolist() == [0, STEPS[2] // 2 if object_lost else 391, *STEPS[2:]]
    assert run.bad_epochs == (1,)
    with RunWriter(path, fsync=False) as writer:
        append(writer, 6, 2**62 + 5)
    assert not verify(path, "full").sound
    (path / "epoch/commits/00000001.json").write_bytes(record)
    assert repair(path).bad_epochs == ()
    steps = open_run(path).steps
    assert steps is not None
    assert steps.tolist() == [*STEPS, 2**62 + 5]
    assert verify(path, "full").sound


def test_a_bad_epoch_with_a_step_is_healed(path: Path) -> None:
    for key in ("weights/c/2/0", "step/c/2"):
        (path / key).write_bytes(b"damaged")
    with RunWriter(path, fsync=False) as writer:
        assert writer.heal(LAYOUT, 2, MATRIX[2], {}) == ("weights/c/2/0", "step/c/2")
    assert verify(path, "full").sound


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (3, {"step": 782}),
        (3, {"step": -1}),
        (3, {"step": None}),
        (0, {"step": None}),
        (3, {"step": 2**63}),
        (3, {"step": "9"}),
        (3, {"step": True}),
        (3, {"step": 1e3}),
    ],
)
def test_a_forged_step_is_found(row: int, fields: dict[str, Any], path: Path) -> None:
    forge(path, row, **fields)
    for open_it in (open_run, RunWriter):
        with pytest.raises(DamagedRunError, match=rf"commit record epoch/commits/0000000{max(row, 1)}.json"):
            open_it(path)
    assert not verify(path, "fast").sound


def test_a_step_in_a_run_that_has_none_is_found(digits_path: Path) -> None:
    forge(digits_path, 39, step=5)
    with pytest.raises(DamagedRunError, match=r"commit record epoch/commits/00000039.json does not follow"):
        open_run(digits_path)
    assert not verify(digits_path, "fast").sound
