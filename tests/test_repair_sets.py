"""A repair never makes a run less readable: whatever objects are lost, every whole epoch is read after it."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from counting import LAYOUT, epoch_values
from damage import DAMAGES, damaged

from trajkit import RunWriter, evaluate, fit, open_run, repair
from trajkit.store.lost_labels import with_guesses

N_EPOCHS = 4
LAYOUTS = {"zarr.json", "epoch/layout.json", "probe_index/layout.json"}


def label_of(row: int) -> int:
    return 10 * row


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    with RunWriter(folder / "run", fsync=False) as writer:
        for row in range(N_EPOCHS):
            writer.append(LAYOUT, label_of(row), *epoch_values(row), {"row": row}, step=100 * row)
    return folder / "run"


@pytest.fixture(scope="module")
def run_with_results(sound_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(sound_run, tmp_path_factory.mktemp("sets") / "run"))
    fit(copy, modes=1, samples=10, name="a", scheduler="synchronous", memory="1GiB")
    evaluate(copy, lambda _: 1.0, epochs=[0])
    return copy


def files_of(path: Path) -> dict[str, Path]:
    """Key -> file of all that is recorded."""
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {key: file for key, file in files.items() if not key.startswith(("epoch/locks/", "epoch/tmp/"))}


def assert_repaired(sound: Path, damages: Mapping[str, str], place: Path) -> None:
    """Damage a copy of a run, repair it, and read every epoch of which commit record, weights and buffers are whole."""
    path = Path(shutil.copytree(sound, place))
    rows = [row for row in range(N_EPOCHS) if not any(_holds_values(key, row) for key in damages)]
    if not rows or damages.keys() >= LAYOUTS:
        return
    for key, how in damages.items():
        damaged(path / key, how)
    before = {file.read_bytes() for file in files_of(path).values()}
    repair(path)
    assert before <= {file.read_bytes() for file in files_of(path).values()}, damages
    run = open_run(path)
    assert np.all(np.diff(run.epochs) > 0), damages
    assert run.steps is None or np.all(np.diff(run.steps) > 0), damages
    for row in rows:
        epoch = label_of(row)
        assert epoch in run.epochs, damages
        assert epoch not in run.bad_epochs, damages
        weights, buffers = epoch_values(row)
        np.testing.assert_array_equal(run.weights[run.row_of(epoch)], weights)
        assert run.stored_buffers(epoch)["count"] == buffers["int64"][0]
    assert not repair(path).actions, damages


def _holds_values(key: str, row: int) -> bool:
    array, _, place = key.partition("/c/")
    if key == f"epoch/commits/{row:08d}.json":
        return True
    return (array == "weights" or array.startswith("buffers/")) and place.startswith(f"{row}/")


def test_any_two_objects_can_be_lost(sound_run: Path, fast_folder: Path) -> None:
    pairs = list(itertools.combinations(files_of(sound_run), 2))
    assert len(pairs) > 500
    for number, pair in enumerate(pairs):
        assert_repaired(sound_run, dict.fromkeys(pair, "missing"), fast_folder / str(number))
        shutil.rmtree(fast_folder / str(number))


@pytest.mark.parametrize("seed", range(10))
def test_any_objects_can_be_lost_or_damaged(seed: int, run_with_results: Path, fast_folder: Path) -> None:
    rng = random.Random(seed)
    keys = list(files_of(run_with_results))
    for number in range(50):
        chosen = rng.sample(keys, rng.choice([1, 2, 3, 4, 6, 8, 12, 20]))
        assert_repaired(run_with_results, {key: rng.choice(DAMAGES) for key in chosen}, fast_folder / str(number))
        shutil.rmtree(fast_folder / str(number))


@pytest.mark.parametrize(
    ("known", "stored", "expected"),
    [
        ([0, 1, None, 3], {}, [0, 1, 2, 3]),
        ([0, 10, None, None, 40], {}, [0, 10, 20, 30, 40]),
        ([0, None, None, 3], {1: 2}, [0, 1, 2, 3]),
        ([0, None, None, 30], {1: 7, 2: 9}, [0, 7, 9, 30]),
        ([0, None, None, 30], {1: 9, 2: 7}, [0, 9, 19, 30]),
        ([None, None, 20, 30], {}, [0, 10, 20, 30]),
        ([0, 10, None, None], {}, [0, 10, 20, 30]),
        ([None, 5], {0: 8}, [4, 5]),
        ([None, None], {}, [0, 1]),
        ([-(2**63), None, 2**63 - 1], {}, [-(2**63), -1, 2**63 - 1]),
        ([0, 2**63 - 3, None, None], {}, [0, 2**63 - 3, 2**63 - 2, 2**63 - 1]),
    ],
)
def test_labels_of_lost_records_rise_between_those_that_are_known(
    known: list[int | None], stored: dict[int, int], expected: list[int]
) -> None:
    assert with_guesses(known, stored) == expected
