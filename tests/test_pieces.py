"""Weights that come piece by piece are recorded as an array of them is, and are never needed as a whole."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import correlated, vector_layout
from numpy.typing import NDArray

from trajkit import RunWriter, open_run, repair, verify
from trajkit.errors import InputError
from trajkit.store import format as store_format
from trajkit.store.format import chunk_rule

SIZES = (200, 300, 137)
LAYOUT = vector_layout(*SIZES)
N = sum(SIZES)
MATRIX = correlated(3, N)
OBJECTS = [128, 128, 128, 128, 125]
Change = Callable[[slice, NDArray[np.float32]], Any]


class Source:
    """Weights that are asked for: remembers how, and gives each piece in the same memory, as one changes it."""

    def __init__(self, values: NDArray[np.float32], change: Change = lambda _, piece: piece) -> None:
        self._values, self._change = values, change
        self.size = values.size
        self.asked: list[slice] = []
        self._memory = np.empty(max(OBJECTS), np.float32)

    def __getitem__(self, columns: slice) -> NDArray[np.float32]:
        self.asked.append(columns)
        piece = self._memory[: columns.stop - columns.start]
        piece[:] = self._values[columns]
        changed: NDArray[np.float32] = self._change(columns, piece)
        return changed


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several objects a row, as a huge model would have them, with few values."""
    for name, value in (("COLUMN_GRID", 8), ("CHUNK_VALUES", 32), ("SHARD_CHUNKS", 4), ("PROBE_SIZE", 60)):
        monkeypatch.setattr(store_format, name, value)
    monkeypatch.setattr("trajkit.store.probe.PROBE_SIZE", 60)


def contents(path: Path) -> dict[str, bytes]:
    """Every stored object and the metadata, but for the identity of the run."""
    files = [*path.rglob("c/**/*"), *path.rglob("zarr.json")]
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.is_file()}
    root = found.get("zarr.json")
    if root is None:  # nothing was recorded
        return found
    return found | {"zarr.json": root.replace(json.loads(root)["attributes"]["trajkit_identity"].encode(), b"")}


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
def test_pieces_are_stored_as_an_array_is(packed: bool, tmp_path: Path) -> None:
    matrix = (MATRIX.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if packed else MATRIX
    sources = [Source(weights) for weights in matrix]
    for name, epochs in (("whole", matrix), ("pieces", sources)):
        with RunWriter(tmp_path / name, fsync=False) as writer:
            for epoch, weights in enumerate(epochs):
                writer.append(LAYOUT, epoch, weights, {})
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert ("zstd" in (tmp_path / "pieces/weights/zarr.json").read_text()) == packed
    run = open_run(tmp_path / "pieces")
    np.testing.assert_array_equal(run.weights[:], matrix)
    np.testing.assert_array_equal(run.columns(run.probe_index, [0, 1, 2]), matrix[:, run.probe_index])
    assert run.probe_index.size == 60
    for source in sources:
        assert source.asked == chunk_rule(N).objects()
        assert [columns.stop - columns.start for columns in source.asked] == OBJECTS


@pytest.mark.parametrize("n_recorded", [0, 1])
@pytest.mark.parametrize("at", range(len(OBJECTS)))
def test_a_source_that_fails_leaves_nothing_and_the_next_epoch_is_whole(
    at: int, n_recorded: int, tmp_path: Path
) -> None:
    def failing(columns: slice, piece: NDArray[np.float32]) -> NDArray[np.float32]:
        if columns.start == 128 * at:
            raise EOFError("the file is cut")
        return piece

    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for epoch in range(n_recorded):
            writer.append(LAYOUT, epoch, MATRIX[epoch], {})
        with pytest.raises(EOFError, match="the file is cut"):
            writer.append(LAYOUT, 1, Source(MATRIX[1], failing), {})
        assert writer.epochs == tuple(range(n_recorded))
        if n_recorded:
            assert open_run(tmp_path / "run").epochs.tolist() == [0]
            assert verify(tmp_path / "run", "full").sound
        writer.append(LAYOUT, 1, Source(MATRIX[1]), {})
    assert verify(tmp_path / "run", "full").sound
    np.testing.assert_array_equal(open_run(tmp_path / "run").weights[:], MATRIX[1 - n_recorded : 2])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_when_it_comes(wrong: float, tmp_path: Path) -> None:
    for at, tensor, seen in ((5, "layer0", "the first 128"), (300, "layer1", "the first 384"), (636, "layer2", "637")):
        bad = MATRIX[0].copy()
        bad[[at, at - 1]] = wrong
        source = Source(bad)
        with RunWriter(tmp_path / "run", fsync=False) as writer:
            with pytest.raises(
                InputError, match=rf"epoch 0: '{tensor}' has -?(nan|inf), 2 of {seen} weights are not .*'rec"
            ):
                writer.append(LAYOUT, 0, source, {})
            assert source.asked == chunk_rule(N).objects()[: at // 128 + 1]
            with pytest.raises(InputError, match=rf"'{tensor}' has -?(nan|inf), 2 of 637 weights are not finite"):
                writer.append(LAYOUT, 0, bad, {})
    with RunWriter(tmp_path / "run", fsync=False, nonfinite="record") as writer:
        writer.append(LAYOUT, 0, Source(bad), {})
    np.testing.assert_array_equal(open_run(tmp_path / "run").weights[0], bad)


PIECES: dict[str, tuple[Callable[[NDArray[np.float32]], Any], str]] = {
    "short": (lambda piece: piece[1:], "('float32', (127,))"),
    "long": (lambda _: np.zeros(129, np.float32), "('float32', (129,))"),
    "float64": (lambda piece: piece.astype(np.float64), "('float64', (128,))"),
    "big-endian": (lambda piece: piece.astype(">f4"), "('>f4', (128,))"),
    "two-dimensional": (lambda piece: piece[None], "('float32', (1, 128))"),
    "a list": (lambda piece: piece.tolist(), "a list"),
    "nothing": (lambda _: None, "a NoneType"),
}


@pytest.mark.parametrize("wrong", PIECES)
def test_a_piece_that_is_none_is_refused_by_its_place(wrong: str, tmp_path: Path) -> None:
    change, found = PIECES[wrong]
    source = Source(MATRIX[0], lambda columns, piece: change(piece) if columns.start == 128 else piece)
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        with pytest.raises(InputError) as refused:
            writer.append(LAYOUT, 0, source, {})
        assert str(refused.value) == (
            f"{tmp_path / 'run'}: epoch 0: weights[128:256] is {found}, the layout asks for ('float32', (128,));"
            " give each slice as a float32 array of its length"
        )
        writer.append(LAYOUT, 0, Source(MATRIX[0]), {})


class Sizeless:
    def __getitem__(self, columns: slice) -> NDArray[np.float32]:
        raise AssertionError("nothing is asked of it")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0] * N, r"weights is a list, expected a float32 array \(637,\), or an object with a size and slices"),
        (Sizeless(), "weights is a Sizeless, expected a float32 array"),
        (Source(MATRIX[0, 1:]), r"weights is \('float32', \(636,\)\), the layout asks for \('float32', \(637,\)\)"),
    ],
    ids=["a list", "no size", "another size"],
)
def test_what_is_no_source_of_these_weights_is_refused_before_anything_is_written(
    weights: Any, message: str, tmp_path: Path
) -> None:
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        with pytest.raises(InputError, match=message):
            writer.append(LAYOUT, 0, weights, {})
        assert contents(tmp_path / "run") == {}


def test_a_bad_epoch_is_healed_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunWriter(path, fsync=False) as writer:
        for epoch, weights in enumerate(MATRIX):
            writer.append(LAYOUT, epoch, weights, {})
    before = contents(path)
    keys = ("weights/c/1/0", "weights/c/1/3")
    for key in keys:
        (path / key).write_bytes(b"damaged")
    assert repair(path).bad_epochs == (1,)
    wrong = MATRIX[1].copy()
    wrong[200] += 1
    with RunWriter(path, fsync=False) as writer:
        with pytest.raises(
            InputError, match=r"epoch 1: 'layer0' to 'layer1': the values are not those .*weights/c/1/1"
        ):
            writer.heal(LAYOUT, 1, Source(wrong), {})
        assert open_run(path).bad_epochs == (1,)  # what came before is back, and is what was committed
        assert [key for key in keys if contents(path)[key] == before[key]] == ["weights/c/1/0"]
        source = Source(MATRIX[1])
        assert writer.heal(LAYOUT, 1, source, {}) == ("weights/c/1/3",)
    assert source.asked == chunk_rule(N).objects()
    assert {key: data for key, data in contents(path).items() if not key.startswith("epoch/aside")} == before
    assert verify(path, "full").sound
    assert open_run(path).bad_epochs == ()


def test_a_piece_is_let_go_before_the_one_after_the_next_is_asked_for(tmp_path: Path) -> None:
    pieces: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def fresh(_: slice, piece: NDArray[np.float32]) -> NDArray[np.float32]:
        alive.append(sum(reference() is not None for reference in pieces))
        own = piece.copy()
        pieces.append(weakref.ref(own))
        return own

    with RunWriter(tmp_path / "run", fsync=False) as writer:
        writer.append(LAYOUT, 0, Source(MATRIX[0], fresh), {})
    assert alive == [0, 1, 1, 1, 1]
