"""The archive's promise: acknowledged epochs survive, torn ones are invisible, damage does not read silently."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from conftest import MakeRun, correlated
from counting import LAYOUT, append, epoch_values
from damage import DAMAGES, damaged
from wholeness import assert_whole
from zarr.storage import MemoryStore

from trajkit import Run, RunWriter, fit, open_run, write_checkpoint
from trajkit.digest import canonical_json, digest
from trajkit.errors import (
    DamagedRunError,
    InputError,
    PathExistsError,
    RunNotFoundError,
    TrajkitError,
    UnsupportedFormatError,
)
from trajkit.store import arrays as store_arrays
from trajkit.store import format as store_format
from trajkit.store import objects as store_objects
from trajkit.store.arrays import encode, with_rows
from trajkit.store.format import COLUMN_GRID, array_document, chunk_rule
from trajkit.store.objects import LocalObjects


def continue_digits(path: Path) -> None:
    """Record one more epoch into the run of the repository."""
    run = open_run(path)
    with RunWriter(path) as writer:
        buffers = {dtype: np.zeros(size, dtype) for dtype, size in run.layout.buffer_sizes.items()}
        writer.append(run.layout, int(run.epochs[-1]) + 1, run.weights[-1], buffers)


# --- Writing and reading


def test_a_failed_append_can_be_repeated_by_the_same_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the epoch is refused, and recorded when there is room again."""
    with RunWriter(tmp_path / "run") as writer:
        append(writer, 0)
        original = LocalObjects.create

        def no_room(self: LocalObjects, key: str, *parts: bytes) -> None:
            if key.startswith("buffers/"):
                raise OSError(28, "No space left on device")
            original(self, key, *parts)

        monkeypatch.setattr(LocalObjects, "create", no_room)
        with pytest.raises(OSError, match="No space left"):
            append(writer, 1)
        assert_whole(tmp_path / "run", 1)
        monkeypatch.undo()
        append(writer, 1)
        append(writer, 2)
    assert_whole(tmp_path / "run", 3)


def test_a_closed_writer_writes_nothing(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        append(writer, 0)
    with RunWriter(tmp_path / "run") as other:
        with pytest.raises(InputError, match="the writer is closed"):
            append(writer, 1)
        append(other, 1)
    assert_whole(tmp_path / "run", 2)


def test_a_forked_child_writes_nothing_and_reads_everything(tmp_path: Path) -> None:
    code = """
import os, sys, numpy as np, trajkit
sys.path.insert(0, sys.argv[2])
from counting import append
from conftest import vector_layout
writer = trajkit.RunWriter(sys.argv[1])
append(writer, 0)
with trajkit.RunWriter(sys.argv[1] + "-big") as big:
    big.append(vector_layout(300_000), 0, np.arange(300_000, dtype=np.float32), {})
run = trajkit.open_run(sys.argv[1] + "-big")
assert run.weights[0, 299_999] == 299_999
child = os.fork()
if child == 0:
    assert run.weights[0, 299_999] == 299_999
    assert trajkit.open_run(sys.argv[1] + "-big").weights[:].shape == (1, 300_000)
    try:
        append(writer, 1)
    except trajkit.TrajkitError:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
append(writer, 1)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "run", Path(__file__).parent], check=True, timeout=60)
    assert_whole(tmp_path / "run", 2)


def test_a_training_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RunWriter("run") as writer:
        append(writer, 0)
        run = open_run("run")
        monkeypatch.chdir(tmp_path / "elsewhere")
        append(writer, 1)
    assert run.weights[0, 0] == 0
    assert_whole(tmp_path / "run", 2)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_plain_zarr_and_xarray_open_a_run_without_a_warning(digits_path: Path) -> None:
    fit(digits_path, samples=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(digits_path, mode="r")
        assert dict(group.members(max_depth=None)).keys() >= {"weights", "epoch", "probe", "buffers/int64"}
        assert zarr.open_group(digits_path / "fits/modes10", mode="r")["0/scale"].shape == (3682,)
        with xarray.open_zarr(digits_path) as dataset:
            assert dataset["weights"].dims == ("epoch", "weight")
            assert dataset["epoch"].values.tolist() == list(range(40))
            np.testing.assert_array_equal(dataset["weights"].values, open_run(digits_path).weights[:])


def test_the_consolidated_metadata_is_that_of_the_nodes(digits_path: Path) -> None:
    fit(digits_path, samples=100)
    continue_digits(digits_path)
    root = json.loads((digits_path / "zarr.json").read_bytes())
    nodes = root["consolidated_metadata"]["metadata"]
    buffers = {"buffers", "buffers/int64", "buffers/float32"}
    assert nodes.keys() == {"weights", "epoch", "probe", "probe_index"} | buffers
    assert nodes["weights"]["shape"] == [41, 3682]
    for path, document in nodes.items():
        assert document == json.loads((digits_path / path / "zarr.json").read_bytes())


# --- Damage


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_row_names_epoch_tensor_and_object(how: str, make_run: MakeRun) -> None:
    path = make_run(correlated(4, 500), sizes=(200, 300), epochs=[10, 20, 30, 40]).path
    damaged(path / "weights/c/2/0", how)
    run = open_run(path)
    assert run.weights[0].shape == (500,)
    for read in (lambda: run.weights[2], lambda: run.weights[:], lambda: run.trajectory("layer0")):
        with pytest.raises(DamagedRunError, match=r"epoch 30: 'layer0' to 'layer1': object weights/c/2/0 .*restore"):
            read()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("key", ["probe/c/2/0", "probe_index/c/0", "buffers/float32/c/2/0", "buffers/int64/c/2/0"])
def test_damage_beside_the_weights_is_found_when_read(key: str, how: str, digits_path: Path) -> None:
    damaged(digits_path / key, how)
    run = open_run(digits_path)
    read = (lambda: run.checkpoint(2)) if key.startswith("buffers") else (lambda: fit(run))
    with pytest.raises(DamagedRunError, match=f"object {key}"):
        read()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_commit_record_is_found_when_the_run_is_opened(how: str, digits_path: Path) -> None:
    damaged(digits_path / "epoch/commits/00000007.json", how)
    for open_it in (open_run, RunWriter):
        with pytest.raises(DamagedRunError, match=r"commit record epoch/commits/00000007.json .*restore it"):
            open_it(digits_path)


def test_swapped_commit_records_are_found(digits_path: Path) -> None:
    one, other = (digits_path / f"epoch/commits/0000000{row}.json" for row in (3, 4))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(DamagedRunError, match=r"00000003.json does not follow"):
        open_run(digits_path)


@pytest.mark.parametrize("change", ["previous", "epoch", "content"])
def test_a_forged_commit_record_is_found(change: str, digits_path: Path) -> None:
    path = digits_path / "epoch/commits/00000004.json"
    record = json.loads(path.read_bytes())["record"]
    hashed = True
    match change:
        case "previous":
            record["previous"] = "0" * 64
        case "epoch":
            record["epoch"] = 3
        case "content":
            record["metrics"]["test_accuracy"], hashed = 1.0, False
    own = digest(canonical_json(record)) if hashed else json.loads(path.read_bytes())["blake3"]
    path.write_bytes(json.dumps({"blake3": own, "record": record}).encode())
    expected = "does not follow" if hashed else "its content does not match its hash"
    with pytest.raises(DamagedRunError, match=f"commit record epoch/commits/00000004.json .*{expected}"):
        open_run(digits_path)


@pytest.mark.parametrize(
    "lie", [{"epoch": "4"}, {"epoch": 10**30}, {"metrics": {"a": 10**400}}, {"objects": 3}, {"row": None}, {"more": 1}]
)
def test_a_nonsensical_commit_record_is_an_error_of_ours(lie: dict[str, Any], digits_path: Path) -> None:
    path = digits_path / "epoch/commits/00000039.json"
    record = json.loads(path.read_bytes())["record"] | lie
    path.write_bytes(json.dumps({"blake3": digest(canonical_json(record)), "record": record}).encode())
    with pytest.raises(DamagedRunError, match=r"commit record epoch/commits/00000039\.json"):
        open_run(digits_path)


def test_lost_commit_records_are_found_and_nothing_is_deleted(digits_path: Path) -> None:
    for lost in ("00000039.json", "*.json"):
        for path in (digits_path / "epoch/commits").glob(lost):
            path.unlink()
        files = sorted(digits_path.rglob("c/*"))
        for open_it in (open_run, RunWriter):
            with pytest.raises(
                DamagedRunError, match=r"epoch has 40 epochs, there are commit records for (39|0); restore"
            ):
                open_it(digits_path)
        assert sorted(digits_path.rglob("c/*")) == files


@pytest.mark.parametrize("array", ["weights", "probe", "probe_index", "epoch", "buffers/int64"])
@pytest.mark.parametrize("change", ["{}", "[]", "dtype", "endian", "chunks", "fill", "shape"])
def test_metadata_that_the_layout_does_not_ask_for_is_found(array: str, change: str, digits_path: Path) -> None:
    path = digits_path / array / "zarr.json"
    document = json.loads(path.read_bytes())
    match change:
        case "{}" | "[]":
            document = json.loads(change)
        case "dtype":
            document["data_type"] = "float64"
        case "endian":
            document["codecs"][0] = {"name": "bytes", "configuration": {"endian": "big"}}
        case "chunks":
            document["chunk_grid"]["configuration"]["chunk_shape"][-1] *= 2
        case "fill":
            document["fill_value"] = 7
        case "shape":
            document["shape"] = [*document["shape"], 2]
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedRunError, match=f"{array}/zarr.json|there are commit records for"):
        open_run(digits_path)


def test_attributes_of_ones_own_do_no_harm(digits_path: Path) -> None:
    zarr.open_group(digits_path, mode="r+", use_consolidated=False)["weights"].attrs["note"] = "mine"
    assert open_run(digits_path).weights[39].shape == (3682,)
    continue_digits(digits_path)
    assert zarr.open_group(digits_path, mode="r")["weights"].attrs["note"] == "mine"


def test_a_stray_file_among_the_objects_does_no_harm(digits_path: Path) -> None:
    (digits_path / "weights/c/.DS_Store").write_bytes(b"x")
    continue_digits(digits_path)
    assert len(open_run(digits_path).epochs) == 41


@pytest.mark.parametrize(
    "key", ["weights", "weights/c/3", "weights/c/3/0", "epoch/commits", "epoch/tmp", "fits/modes10"]
)
def test_no_symbolic_link_is_followed(key: str, digits_path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if (digits_path / key).exists():
        (digits_path / key).rename(outside)
    else:
        (digits_path / key).parent.mkdir(exist_ok=True)
        (outside / "writer").mkdir(parents=True)
        (outside / "writer" / "precious").write_text("mine")
    (digits_path / key).symlink_to(outside)
    before = sorted(path for path in outside.rglob("*"))

    def everything() -> None:
        continue_digits(digits_path)
        fit(digits_path, name="modes10")
        _ = open_run(digits_path).weights[:]

    with pytest.raises(DamagedRunError, match="a symbolic link inside a run, expected none"):
        everything()
    assert sorted(path for path in outside.rglob("*")) == before


def test_a_fit_of_another_run_is_refused(digits_path: Path, make_run: MakeRun) -> None:
    other = make_run(correlated(5, 100), name="other")
    fit(other, modes=2)
    shutil.copytree(other.path / "fits", digits_path / "fits")
    with pytest.raises(DamagedRunError, match="it belongs to a run of another layout"):
        open_run(digits_path).fit("modes2")


def test_a_forged_fit_is_refused(digits_path: Path) -> None:
    fit(digits_path)
    path = digits_path / "fits/modes10/zarr.json"
    content = path.read_text()
    for forged in (content.replace('"seed": 0', '"seed": 1'), content.replace("trajkit_fit", "other"), "{}"):
        path.write_text(forged)
        with pytest.raises(DamagedRunError, match=r"fits/modes10/zarr.json describes no fit"):
            open_run(digits_path).fit("modes10")
    path.write_text(content)
    (digits_path / "fits/modes10/0/mode/objects.json").write_text("{}")
    with pytest.raises(DamagedRunError, match=r"object fits/modes10/0/mode/objects.json is not what was saved"):
        _ = open_run(digits_path).fit("modes10").scale


def test_a_layout_that_was_not_recorded_is_found(digits_path: Path) -> None:
    root = json.loads((digits_path / "zarr.json").read_bytes())
    tensors = root["attributes"]["trajkit"]["layout"]
    tensors[0]["shape"], tensors[0]["name"] = [72], "other"
    (digits_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamagedRunError, match=r"layout in zarr\.json is not the one that was recorded"):
        open_run(digits_path)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_fit_is_found_when_read(how: str, digits_path: Path) -> None:
    decomposition = fit(digits_path, samples=100)
    damaged(digits_path / "fits/modes10/0/scale/c/0", how)
    with pytest.raises(DamagedRunError, match="fit 'modes10': object fits/modes10/0/scale/c/0"):
        _ = decomposition.scale
    with pytest.raises(DamagedRunError, match="fit 'modes10'"):
        open_run(digits_path).fit("modes10").modelled([3])


def test_a_chunk_equal_to_the_fill_value_is_stored(make_run: MakeRun) -> None:
    run = make_run(np.full((2, 5), np.nan, dtype=np.float32), nonfinite="record")
    assert (run.path / "weights/c/0/0").stat().st_size > 5 * 4
    assert np.isnan(run.weights[:]).all()


# --- What is in the way


@pytest.mark.parametrize("shard", [8, 32])
@pytest.mark.parametrize("n", [1, 31, 32, 96, 97, 104])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_raw_objects_have_the_bytes_that_zarr_gives_them(dtype: str, n: int, shard: int) -> None:
    shards = (1, shard) if shard > 8 else None
    document = with_rows(array_document(dtype, (0, n), (1, 8), ("epoch", "weight"), shards), 3)
    values = np.random.default_rng(0).integers(0, 2, (1, n)).astype(dtype)
    for columns in (slice(0, n), *(slice(start, min(start + shard, n)) for start in range(0, n, shard))):
        region = (slice(2, 3), columns)
        stored: dict[str, Any] = {}
        array = store_arrays._array(MemoryStore(stored), "w", document, store_arrays.PYTHON_PIPELINE)
        array[region] = values[:, columns]
        ours = {key: b"".join(parts) for key, parts in encode("w", document, region, values[:, columns])}
        assert ours == {key: buffer.to_bytes() for key, buffer in stored.items()}


def test_no_run_and_no_epoch_yet(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run here"):
        open_run(tmp_path / "nothing")
    with RunWriter(tmp_path / "run"), pytest.raises(RunNotFoundError, match="no run here"):
        open_run(tmp_path / "run")
    with RunWriter(tmp_path / "run") as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalObjects, "create_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(OSError, match="No space"):
            append(writer, 0)
    with pytest.raises(RunNotFoundError, match="no epoch yet"):
        open_run(tmp_path / "run")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PathExistsError, match=r"expected a run or an empty folder, found 'notes.txt'; choose another"):
        RunWriter(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(PathExistsError, match="found a file"):
        RunWriter(tmp_path / "notes.txt")


def test_another_zarr_group_is_no_run(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other").create_array("weights", shape=(3,), dtype="f4")
    with pytest.raises(RunNotFoundError, match="a Zarr node, but not a run"):
        open_run(tmp_path / "other")
    with pytest.raises(PathExistsError):
        RunWriter(tmp_path / "other")


def test_a_later_format_says_so(digits_path: Path) -> None:
    root = json.loads((digits_path / "zarr.json").read_bytes())
    root["attributes"]["trajkit"]["format"] = 2
    (digits_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(UnsupportedFormatError, match="has format 2, this version reads format 1; update trajkit"):
        open_run(digits_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"attributes": 3}'])
def test_broken_metadata_is_an_error_of_ours(content: bytes, digits_path: Path) -> None:
    (digits_path / "zarr.json").write_bytes(content)
    with pytest.raises(TrajkitError):
        open_run(digits_path)


# --- Epochs and values


@pytest.mark.parametrize(
    ("epoch", "message"),
    [
        (5, "epoch 5 is recorded already; go on after epoch 7 or record into a new run"),
        (6, "epoch 6 comes before the last one, 7"),
        ("8", "epoch is '8', expected an integer"),
        (8.0, "epoch is 8.0, expected an integer"),
        (True, "epoch is True, expected an integer"),
    ],
)
def test_an_epoch_that_cannot_come_next_is_refused(epoch: Any, message: str, tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        append(writer, 5)
        append(writer, 7)
        weights, buffers = epoch_values(8)
        with pytest.raises(InputError, match=message):
            writer.append(LAYOUT, epoch, weights, buffers)
        assert writer.epochs == (5, 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_not_finite_weight_is_refused_by_name_or_recorded(bad: float, tmp_path: Path) -> None:
    weights, buffers = epoch_values(0)
    weights[17] = bad
    with (
        RunWriter(tmp_path / "strict") as writer,
        pytest.raises(InputError, match=r"epoch 0: 'w' has .*1 of 300 weights are not finite.*nonfinite='record'"),
    ):
        writer.append(LAYOUT, 0, weights, buffers)
    with RunWriter(tmp_path / "lenient", nonfinite="record") as writer:
        writer.append(LAYOUT, 0, weights, buffers, {"loss": bad})
    run = open_run(tmp_path / "lenient")
    np.testing.assert_array_equal(run.weights[0], weights)
    np.testing.assert_equal(run.metrics[0]["loss"], bad)


def test_every_bit_pattern_of_float32_survives(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=(3, 1000), dtype=np.uint32).view(np.float32)
    run = make_run(bits, nonfinite="record")
    np.testing.assert_array_equal(run.weights[:].view(np.uint32), bits.view(np.uint32))


@pytest.mark.parametrize(
    ("weights", "buffers", "message"),
    [
        (np.zeros(299, np.float32), {}, "weights is ('float32', (299,)), the layout asks for ('float32', (300,))"),
        (np.zeros(301, np.float32), {}, "weights is ('float32', (301,))"),
        (np.zeros(300), {}, "weights is ('float64', (300,))"),
        (np.zeros((300, 1), np.float32), {}, "weights is ('float32', (300, 1))"),
        (None, {"int64": None}, "buffers['int64'] is missing, the layout asks for ('int64', (1,))"),
        (None, {"int64": np.zeros(2, np.int64)}, "buffers['int64'] is ('int64', (2,))"),
        (None, {"float32": np.zeros(3)}, "buffers['float32'] is ('float64', (3,))"),
        (None, {"bool": np.zeros(3, bool)}, "buffers['bool'] is ('bool', (3,)), the layout asks for none"),
    ],
)
def test_vectors_that_the_layout_does_not_place_are_refused(
    weights: Any, buffers: dict[str, Any], message: str, tmp_path: Path
) -> None:
    right_weights, right_buffers = epoch_values(0)
    given = {name: value for name, value in {**right_buffers, **buffers}.items() if value is not None}
    with RunWriter(tmp_path / "run") as writer:
        with pytest.raises(InputError, match=re.escape(message)):
            writer.append(LAYOUT, 0, right_weights if weights is None else weights, given)
        append(writer, 0)
    assert_whole(tmp_path / "run", 1)


@pytest.mark.parametrize("epoch", [2**63, -(2**63) - 1, 10**30])
def test_an_epoch_beyond_64_bits_is_refused(epoch: int, tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer, pytest.raises(InputError, match="is no 64-bit integer"):
        append(writer, epoch)


# --- Chunks, shards and codecs


@pytest.mark.parametrize("n", [1, 100, 131_072, 131_073, 1_333_770, 11_173_962, 16_777_217, 10**9, 2**33])
def test_the_chunk_rule(n: int) -> None:
    rule = chunk_rule(n)
    objects = rule.objects()
    assert objects[0].start == 0
    assert objects[-1].stop == n
    assert rule.stored % rule.chunk == 0
    assert rule.stored * 4 <= 64 << 20
    assert len(objects) <= -(-n // rule.stored)
    if n > 131_072:
        assert rule.chunk % COLUMN_GRID == 0
        assert 65_536 <= rule.chunk <= 131_072
        assert rule.stored * len(objects) <= n * 1.13


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and chunks as a huge model would have them, with few values."""
    monkeypatch.setattr(store_format, "COLUMN_GRID", 8)
    monkeypatch.setattr(store_format, "CHUNK_VALUES", 32)
    monkeypatch.setattr(store_format, "SHARD_CHUNKS", 4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [33, 100, 128, 129, 500, 1000])
def test_sharded_rows_read_back_in_every_way(n: int, make_run: MakeRun) -> None:
    matrix = correlated(5, n)
    run = make_run(matrix)
    assert chunk_rule(n).sharded or n == 33 or chunk_rule(n).chunk < n
    np.testing.assert_array_equal(run.weights[:], matrix)
    np.testing.assert_array_equal(run.weights[1:4, 7 : n - 3], matrix[1:4, 7 : n - 3])
    np.testing.assert_array_equal(run.weights[:, [n - 1, 0, 31, 32]], matrix[:, [n - 1, 0, 31, 32]])
    np.testing.assert_array_equal(zarr.open_group(run.path, mode="r")["weights"][:], matrix)


READS: list[Callable[[Run], object]] = [
    lambda run: run.weights[:],
    lambda run: run.weights[1],
    lambda run: run.weights[:, :],
    lambda run: [run.weights[1, start : start + 1] for start in range(0, run.layout.n_weights, 8)],
    lambda run: run.weights.gather([1], np.arange(run.layout.n_weights)),
    lambda run: run.checkpoint(1),
    lambda run: [run.trajectory(entry.name) for entry in run.layout.weights],
    fit,
    lambda run: write_checkpoint(run, 1, run.path.parent / "never.safetensors"),
    lambda run: write_checkpoint(run, 2, run.path.parent / "never", average="last:2", format="safetensors"),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [33, 128, 500, 509])
@pytest.mark.parametrize("read", range(len(READS)))
def test_a_flipped_bit_anywhere_in_the_weights_is_met_by_every_read(n: int, read: int, make_run: MakeRun) -> None:
    """zarrs checks no checksum inside a shard, nor of a chunk that the array's edge cuts."""
    path = make_run(correlated(3, n)).path
    rng = np.random.default_rng(n)
    objects = sorted((path / "weights/c/1").iterdir())
    for _ in range(8):
        chosen = objects[rng.integers(len(objects))]
        content = chosen.read_bytes()
        place, bit = rng.integers(len(content)), 1 << rng.integers(8)
        chosen.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(DamagedRunError, match=f"epoch 1: 'layer0': object weights/c/1/{chosen.name} does not have"):
            READS[read](open_run(path))
        chosen.write_bytes(content)
    assert not (path.parent / "never.safetensors").exists()
    assert open_run(path).fits == ()


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_shard_names_the_tensors_in_it(make_run: MakeRun) -> None:
    matrix = correlated(3, 500)
    run = make_run(matrix, sizes=(100, 100, 100, 200))
    damaged(run.path / "weights/c/1/1", "flipped")
    np.testing.assert_array_equal(run.weights[1, :100], matrix[1, :100])
    with pytest.raises(DamagedRunError, match="epoch 1: 'layer1' to 'layer2': object weights/c/1/1 "):
        _ = run.weights[:]


def test_swapped_epochs_are_found_when_read(make_run: MakeRun) -> None:
    run = make_run(correlated(4, 100))
    one, other = run.path / "weights/c/1/0", run.path / "weights/c/2/0"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(DamagedRunError, match="epoch 1: 'layer0': object weights/c/1/0 does not have the content"):
        _ = run.weights[:]


def test_bfloat16_values_are_compressed_and_float32_ones_are_not(make_run: MakeRun) -> None:
    matrix = np.random.default_rng(0).normal(size=(2, 200_000)).astype(np.float32)
    halves = (matrix.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    raw, packed = make_run(matrix, name="raw"), make_run(halves, name="packed")
    np.testing.assert_array_equal(packed.weights[:], halves)
    assert raw.epoch_bytes > matrix[0].nbytes
    assert packed.epoch_bytes < 0.75 * raw.epoch_bytes


def test_no_stored_object_holds_two_epochs(digits_path: Path) -> None:
    before = {path: path.read_bytes() for path in digits_path.rglob("c/*") if path.is_file()}
    continue_digits(digits_path)
    assert {path: path.read_bytes() for path in before} == before
    assert len(open_run(digits_path).epochs) == 41


def test_writes_reach_the_disk_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object of an epoch, and its folder, is synced before the commit record appears."""
    synced: set[tuple[int, int]] = set()
    checked = 0
    fsync, link = os.fsync, os.link

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))

    def check(source: Path, target: Path) -> None:
        nonlocal checked
        for path in [tmp_path, tmp_path / "runs", tmp_path / "runs/run", *(tmp_path / "runs/run").rglob("*"), source]:
            if path.relative_to(tmp_path).parts[3:4] in (("locks",), ("tmp",), ("commits",)) and path != source:
                continue
            status = path.stat()
            assert (status.st_dev, status.st_ino) in synced, f"{path} is not on the disk at the commit"
            checked += 1
        link(source, target)
        synced.discard((target.parent.stat().st_dev, target.parent.stat().st_ino))

    monkeypatch.setattr(store_objects.os, "fsync", remember)
    monkeypatch.setattr(store_objects.os, "link", check)
    with RunWriter(tmp_path / "runs" / "run") as writer:
        for epoch in range(3):
            append(writer, epoch)
            status = (tmp_path / "runs/run/epoch/commits").stat()
            assert (status.st_dev, status.st_ino) in synced, "the name of the commit record is not on the disk"
    assert checked > 40
