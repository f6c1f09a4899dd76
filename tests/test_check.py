from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import MakeRun, correlated, vector_layout
from numpy.typing import NDArray
from trajkit_cli.main import main

import trajkit
from trajkit import ParameterLayout, Run, RunWriter, check, open_run
from trajkit.errors import DamagedRunError, InputError, UnknownNameError
from trajkit.health import reading
from trajkit.health.labels import missing_labels
from trajkit.health.order import home_of, jumps, outliers, squared_distances, swaps
from trajkit.health.reading import read_contents
from trajkit.kernels.contents import contents_of
from trajkit.layout import TensorEntry
from trajkit.store.format import buffer_path

Matrix = NDArray[np.float32]
Buffers = dict[str, NDArray[Any]]


def of(report: Any) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """The findings without their text."""
    return [(finding.kind, finding.epochs, finding.tensors) for finding in report.findings]


def buffers_of(run: Run) -> Buffers:
    """Stored dtype -> (E, n)."""
    rows = np.arange(len(run.epochs))
    return {dtype: run.archive.read(buffer_path(dtype), rows, (0, n)) for dtype, n in run.layout.buffer_sizes.items()}


def record(
    path: Path, layout: ParameterLayout, weights: Matrix, buffers: Buffers | None = None, epochs: Any = None
) -> Run:
    with RunWriter(path, fsync=False, nonfinite="record") as writer:
        for row, epoch in enumerate(range(len(weights)) if epochs is None else epochs):
            here = {dtype: values[row] for dtype, values in (buffers or {}).items()}
            writer.append(layout, epoch, weights[row], here)
    return open_run(path)


@pytest.fixture
def replant(digits_run: Run, tmp_path: Path) -> Callable[..., Run]:
    """The digits run recorded again, after a change of its weights and buffers in place."""

    def again(change: Callable[[Matrix, Buffers], None], epochs: Any = None) -> Run:
        weights, buffers = np.asarray(digits_run.weights), buffers_of(digits_run)
        change(weights, buffers)
        return record(tmp_path / "planted", digits_run.layout, weights, buffers, epochs)

    return again


# --- Healthy runs


def trajectories(kind: str, n_epochs: int, n: int, seed: int) -> Matrix:
    """(E, n) healthy trajectories."""
    rng = np.random.default_rng(seed)
    noise, time = rng.normal(size=(n_epochs, n)), np.arange(n_epochs)
    rate = {
        "random walk": np.ones(n_epochs),
        "cyclic learning rate": 0.51 + 0.5 * np.cos(time % 10 / 10 * np.pi),
        "learning rate drop": np.where(time < n_epochs // 2, 1.0, 0.05),
    }
    if kind in rate:
        weights = (rate[kind][:, None] * noise).cumsum(axis=0)
    elif kind == "noisy random walk":
        weights = noise.cumsum(axis=0) + 0.5 * rng.normal(size=(n_epochs, n))
    elif kind == "independent noise":
        weights = noise
    elif kind == "noise that a lower rate ends":
        weights = np.zeros((n_epochs, n))
        for row in range(1, n_epochs):
            step = 1.0 if row < n_epochs // 2 else 0.1
            weights[row] = weights[row - 1] * (1 - 0.7 * step) + step * noise[row]
    elif kind == "convergence into noise":
        weights = np.exp(-time / 8)[:, None] * rng.normal(size=n) + 0.02 * noise
    elif kind == "oscillation":
        weights = 3 * (-1.0) ** time[:, None] * rng.normal(size=n) + 0.3 * noise.cumsum(axis=0)
    elif kind == "line":
        weights = time[:, None] * rng.normal(size=n)
    else:
        weights = correlated(n_epochs, n, seed)
    return weights.astype(np.float32)


KINDS = [
    "random walk",
    "cyclic learning rate",
    "learning rate drop",
    "noisy random walk",
    "independent noise",
    "noise that a lower rate ends",
    "convergence into noise",
    "oscillation",
    "line",
    "correlated walks",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_epochs", [3, 8, 40, 150])
def test_a_healthy_order_gives_no_alarm(kind: str, n_epochs: int) -> None:
    for seed in range(3):
        positions = trajectories(kind, n_epochs, 500, seed)
        assert outliers(positions).size == 0
        assert swaps(positions) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_run_has_no_findings(kind: str, make_run: MakeRun) -> None:
    weights = trajectories(kind, 30, 600, seed=7)
    assert of(check(make_run(weights, sizes=(400, 150, 50)))) == []


def test_the_recorded_digits_are_healthy(digits_run: Run) -> None:
    report = check(digits_run)
    assert report.healthy
    assert report.notes == ()
    assert report.epochs == tuple(range(40))


def test_bfloat16_weights_that_hardly_move_any_more_are_healthy(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(40, 600)) * 0.03 * np.exp(-np.arange(40) / 8)[:, None]
    weights = (1 + steps.cumsum(axis=0)).astype(np.float32)
    weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    report = check(make_run(weights, sizes=(560, 30, 10)))
    assert all(finding.kind == "duplicate" and not finding.tensors for finding in report.findings), of(report)
    last = int(np.flatnonzero((weights[1:] != weights[:-1]).any(axis=1))[-1]) + 1
    for _, epochs, _ in of(report):  # nothing but what is true: whole epochs that are the same
        assert (weights[list(epochs)] == weights[epochs[0]]).all()
        assert last in range(40)
    assert report.unchanged is not None
    assert report.unchanged[-1] > 0.9 > report.unchanged[0]


# --- Faults in the order


@pytest.mark.parametrize("pair", [(3, 4), (14, 15), (27, 29), (5, 8)])
def test_swapped_neighbours_are_found(pair: tuple[int, int], replant: Callable[..., Run]) -> None:
    def swap(weights: Matrix, _buffers: Buffers) -> None:
        weights[list(pair)] = weights[list(reversed(pair))]

    findings = check(replant(swap)).findings
    assert [finding.kind for finding in findings] == ["order"] * len(findings)
    assert set(pair) == {epoch for finding in findings for epoch in finding.epochs}


@pytest.mark.parametrize("kind", ["random walk", "noisy random walk", "line", "learning rate drop"])
@pytest.mark.parametrize("apart", [1, 2, 3, 5, 8, 20])
def test_swapped_epochs_are_found_at_any_distance(kind: str, apart: int) -> None:
    positions = trajectories(kind, 60, 2000, seed=1)
    first, last = 12, 12 + apart
    positions[[first, last]] = positions[[last, first]]
    far = outliers(positions)
    rest = np.delete(np.arange(60), far)
    found = {int(rest[row]) for pair in swaps(positions[rest]) for row in pair} | set(far.tolist())
    assert found == {first, last}


def test_a_reversed_stretch_is_found() -> None:
    positions = trajectories("random walk", 40, 2000, seed=2)
    positions[10:15] = positions[10:15][::-1].copy()
    assert swaps(positions) == [(10, 14)]


@pytest.mark.parametrize(("place", "content"), [(10, 31), (30, 4)])
def test_the_content_of_another_step_is_told_with_where_it_belongs(
    place: int, content: int, replant: Callable[..., Run]
) -> None:
    def misplace(weights: Matrix, _buffers: Buffers) -> None:
        weights[place] = (weights[content] + weights[content + 1]) / 2  # between two recorded ones: no duplicate

    (finding,) = check(replant(misplace)).findings
    assert (finding.kind, finding.epochs) == ("order", (place,))
    assert (
        f"epoch {place}: lies beside epoch {content}" in finding.text or f"beside epoch {content + 1}" in finding.text
    )
    assert f"not between {place - 1} and {place + 1}" in finding.text


def test_an_outlier_is_found_and_is_nowhere_else_at_home(replant: Callable[..., Run]) -> None:
    def disturb(weights: Matrix, _buffers: Buffers) -> None:
        step = np.sqrt(((weights[21] - weights[20]) ** 2).mean())
        weights[20] += 8 * step * np.random.default_rng(0).normal(size=weights.shape[1]).astype(np.float32)

    report = check(replant(disturb))
    assert of(report) == [("outlier", (20,), ())]
    assert "epoch 20: far from 19 and 21, which are near each other" in report.findings[0].text


def test_the_rule_of_an_outlier_is_its_sentence() -> None:
    for kind in KINDS:
        positions = trajectories(kind, 40, 200, seed=3)
        positions[17] += 6 * np.abs(np.diff(positions, axis=0)).max()
        exact = np.sqrt(((positions.astype(np.float64)[:, None] - positions.astype(np.float64)) ** 2).sum(axis=2))
        for row in outliers(positions):
            assert min(exact[row, row - 1], exact[row, row + 1]) > 1.5 * exact[row - 1, row + 1]
            assert row == 17


def test_distances_agree_with_brute_force() -> None:
    positions = correlated(13, 300)
    wide = positions.astype(np.float64)
    found = squared_distances(positions, 5)
    for row in range(13):
        for steps in range(1, 6):
            if row + steps < 13:
                expected = ((wide[row + steps] - wide[row]) ** 2).sum()
                assert found[row, steps - 1] == pytest.approx(expected, rel=1e-12)
            else:
                assert np.isnan(found[row, steps - 1])


def test_an_outlier_beyond_everything_has_no_home() -> None:
    positions = trajectories("random walk", 20, 500, seed=0)
    positions[9] += 100
    assert home_of(9, positions) is None
    positions[9] = positions[16] + 0.01
    assert home_of(9, positions) == 16


# --- Two trainings one after the other


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("first", [2, 5, 20, 35, 38])
def test_two_trainings_one_after_the_other_are_found(first: int, fast: bool, replant: Callable[..., Run]) -> None:
    def splice(weights: Matrix, _buffers: Buffers) -> None:
        weights[first:] = -weights[first:]  # as good a training as the other, from another beginning

    report = check(replant(splice), fast=fast)
    assert of(report) == [("jump", (first - 1, first), ())]
    assert f"epochs {first - 1} and {first}: more than 20 times as far apart as is usual" in report.findings[0].text
    assert "two trainings may meet here, compare both with their source" in report.findings[0].text


def test_a_training_that_begins_anew_after_another_is_found(replant: Callable[..., Run]) -> None:
    def splice(weights: Matrix, _buffers: Buffers) -> None:
        weights[20:] = -weights[:20]

    assert of(check(replant(splice))) == [("jump", (19, 20), ())]


def test_three_trainings_are_two_jumps(replant: Callable[..., Run]) -> None:
    def splice(weights: Matrix, _buffers: Buffers) -> None:
        weights[12:25] *= -1
        weights[25:, ::2] *= -1

    assert of(check(replant(splice))) == [("jump", (11, 12), ()), ("jump", (24, 25), ())]


def test_a_training_that_jumps_again_and_again_may_be_meant_to(replant: Callable[..., Run]) -> None:
    def reset(weights: Matrix, _buffers: Buffers) -> None:
        for row in range(8, 40, 8):
            weights[row:] *= -1

    report = check(replant(reset))
    assert report.healthy
    assert [(note.kind, note.epochs) for note in report.notes] == [("jump", (row - 1, row)) for row in range(8, 40, 8)]


@pytest.mark.parametrize("end", ["first", "last"])
def test_without_a_usual_step_on_either_side_nothing_is_said(end: str, replant: Callable[..., Run]) -> None:
    def splice(weights: Matrix, _buffers: Buffers) -> None:
        weights[0 if end == "first" else -1] *= -1

    assert check(replant(splice)).healthy


def test_an_outlier_is_no_second_training(replant: Callable[..., Run]) -> None:
    def disturb(weights: Matrix, _buffers: Buffers) -> None:
        weights[20] *= -1

    assert of(check(replant(disturb))) == [("outlier", (20,), ())]


def test_few_steps_do_not_say_what_is_usual(make_run: MakeRun) -> None:
    for n_epochs, found in ((5, []), (6, ["jump"])):
        weights = trajectories("random walk", n_epochs, 600, seed=0) / 100
        weights[3:] += 1
        assert [kind for kind, _, _ in of(check(make_run(weights, name=f"run{n_epochs}")))] == found


@pytest.mark.parametrize("n_epochs", [7, 8, 12, 40, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_healthy_trainings_do_not_jump(kind: str, n_epochs: int) -> None:
    for seed in range(3):
        positions = trajectories(kind, n_epochs, 300, seed)
        powers = np.unique(np.geomspace(1, 10**6, n_epochs).astype(np.int64))
        for labels in (np.arange(n_epochs), 500 * np.arange(n_epochs), powers):
            if labels.size == n_epochs:
                assert jumps(positions, labels).size == 0


SCHEDULES = {
    "warm restarts": lambda time: 0.001 + np.cos(time % 10 / 10 * np.pi / 2) ** 2,
    "restarts from next to nothing": lambda time: 0.0001 + 0.5 * (1 + np.cos(time % 25 / 25 * np.pi)),
    "warm-up and decay": lambda time: np.minimum(1, (time + 1) / 5) * np.exp(-time / 20),
    "steps of ten": lambda time: 10.0 ** -(time // 15),
    "a fast decay": lambda time: np.exp(-time / 4),
    "a disturbance that fades": lambda time: 1 + 60 * np.where(time >= 20, np.exp(-(time - 20) / 3.0), 0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_schedules_of_the_learning_rate_do_not_jump(schedule: str, bfloat16: bool) -> None:
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(60, 500))
        positions = (1 + 0.01 * (SCHEDULES[schedule](np.arange(60))[:, None] * noise).cumsum(axis=0)).astype(np.float32)
        if bfloat16:
            positions = (positions.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert jumps(positions, np.arange(60)).size == 0


def test_a_large_weight_that_rounds_otherwise_is_no_jump_of_weights_at_rest() -> None:
    """In bfloat16 most weights are at rest in the end, and the steps of those that are not differ by orders."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weights = rng.normal(size=2000) * 10.0 ** rng.integers(-4, 1, size=2000)
        steps = rng.normal(size=(80, 2000)) * 0.003 * np.abs(weights) * np.exp(-np.arange(80) / 8)[:, None]
        positions = (weights + steps.cumsum(axis=0)).astype(np.float32)
        positions = (positions.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert jumps(positions, np.arange(80)).size == 0


def test_a_long_gap_in_the_labels_is_no_jump_of_a_training_that_drifts() -> None:
    """Over a gap of 10,000 a line is 100 times as long as the root of the gap says."""
    labels = np.array([*range(20), *range(10_000, 10_020)])
    direction = np.random.default_rng(0).normal(size=500)
    assert jumps((labels[:, None] * direction).astype(np.float32), labels).size == 0
    assert jumps((labels[:, None] * direction).astype(np.float32), np.arange(40)).tolist() == [19]


# --- Missing epochs


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ([0, 1, 2, 4, 5], [3]),
        ([0, 500, 1000, 2000], [1500]),
        ([0, 1, 2, 4, 6, 7, 8], [3, 5]),
        ([0, 2, 3, 4, 5], [1]),
        ([-3, -2, -1, 1, 2], [0]),
        ([1, 2, 4, 8, 16, 32], []),
        ([0, 1, 2, 4, 8, 16, *range(1000, 20000, 1000)], []),
        ([*range(10), *range(10, 100, 10)], []),
        ([*range(0, 100, 10), *range(100, 120)], []),
        ([*range(20), *range(20, 60, 10), *range(60, 80)], []),
        ([0, 1, 2, 3, 10**15], []),
        ([0, 10, 13, 20, 30, 40, 50], []),
        ([4], []),
        ([4, 9], []),
        ([0, 1, 3], []),
        ([-(2**63), 2**63 - 1], []),
    ],
)
def test_gaps_of_the_usual_step_are_missing_epochs(labels: list[int], missing: list[int]) -> None:
    assert [label for gap in missing_labels(labels) for label in gap] == missing


def test_missing_epochs_are_those_that_the_run_does_not_have(make_run: MakeRun) -> None:
    run = make_run(correlated(8, 200), epochs=[0, 1, 2, 3, 5, 6, 7, 8])
    (finding,) = check(run).findings
    assert (finding.kind, finding.epochs) == ("missing", (4,))
    assert finding.text.startswith("epoch 4: missing between 3 and 5")
    assert of(check(run, epochs=[0, 1, 2, 3, 6, 7, 8])) == [("missing", (4,), ())]
    assert of(check(run, epochs=[0, 1, 2, 3])) == []


# --- Duplicates


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("one", "other"), [(12, 13), (0, 1), (38, 39), (6, 30)])
def test_epochs_with_the_same_content_are_found(one: int, other: int, fast: bool, replant: Callable[..., Run]) -> None:
    def repeat(weights: Matrix, buffers: Buffers) -> None:
        weights[other] = weights[one]
        for values in buffers.values():
            values[other] = values[one]

    report = check(replant(repeat), fast=fast)
    assert of(report)[0] == ("duplicate", (one, other), ())
    assert report.findings[0].text.startswith(f"epochs {one} and {other}: bit-identical; ")
    assert {kind for kind, _, _ in of(report)[1:]} <= {"order"}
    assert all(other in epochs for _, epochs, _ in of(report))


def test_the_same_weights_beside_other_buffers_are_told_so(replant: Callable[..., Run]) -> None:
    def repeat(weights: Matrix, _buffers: Buffers) -> None:
        weights[13] = weights[12]

    assert "the weights are bit-identical, the buffers differ" in check(replant(repeat)).findings[0].text


def test_many_duplicates_are_few_findings(make_run: MakeRun) -> None:
    weights = correlated(40, 300)
    weights[20:] = weights[19]
    (finding,) = check(make_run(weights)).findings
    assert finding.epochs == tuple(range(19, 40))
    assert "epochs 19, 20, 21, 22, 23, … and 39 (21 of them): bit-identical" in finding.text


@pytest.mark.parametrize(("one", "other"), [(4, 5), (0, 1), (38, 39), (7, 33)])
def test_a_tensor_that_repeats_itself_is_found(one: int, other: int, replant: Callable[..., Run]) -> None:
    def repeat(weights: Matrix, _buffers: Buffers) -> None:
        weights[other, 72:88] = weights[one, 72:88]  # scale and shift of the first BatchNorm

    report = check(replant(repeat))
    assert of(report) == [("duplicate", (one, other), ("1.weight", "1.bias"))]
    assert report.findings[0].text.startswith(
        f"'1.weight' and '1.bias': bit-identical at epochs {one} and {other}, and"
    )


def test_a_buffer_that_repeats_itself_is_found(replant: Callable[..., Run]) -> None:
    def repeat(_weights: Matrix, buffers: Buffers) -> None:
        buffers["float32"][20, 8:16] = buffers["float32"][10, 8:16]

    assert of(check(replant(repeat))) == [("duplicate", (10, 20), ("1.running_var",))]


def test_layers_that_thaw_or_freeze_stand_still_and_that_is_no_fault(make_run: MakeRun) -> None:
    weights = correlated(20, 300)
    weights[:6, :100] = weights[5, :100]
    weights[14:, 100:200] = weights[14, 100:200]
    report = check(make_run(weights, sizes=(100, 100, 100)))
    assert report.healthy
    assert [(note.kind, note.epochs, note.tensors) for note in report.notes] == [
        ("still", tuple(range(6)), ("layer0",)),
        ("still", tuple(range(14, 20)), ("layer1",)),
    ]


def test_few_values_that_are_the_same_by_chance_or_at_a_clamp_are_no_fault(make_run: MakeRun) -> None:
    weights = correlated(20, 300)
    weights[:, 0] = 0.001 * np.minimum(np.arange(20) % 7, 4)
    weights[:, 1:101] = weights[0, 1:101]
    weights[:, 3] = 0.001 * (np.arange(20) % 2)  # one of a hundred flickers
    assert check(make_run(weights, sizes=(1, 100, 199))).healthy


def test_flipped_signs_are_not_the_same_content() -> None:
    for dtype in (np.float32, np.float64):
        block = np.ones((4, 6), dtype)
        block[1:, 0] *= -1
        block[2:, 1] *= -1
        block[3, 5] = -1
        assert np.unique(contents_of(block, np.array([0, 6]), 0, False).fingerprint).size == 4


# --- Tensors that are dead, explode, or are no numbers


def test_a_trainable_tensor_that_never_changes_is_found(replant: Callable[..., Run]) -> None:
    def kill(weights: Matrix, buffers: Buffers) -> None:
        weights[:, :72] = weights[0, :72]
        buffers["int64"][:] = 3

    report = check(replant(kill))
    assert of(report) == [("constant", (), ("0.weight",))]
    assert "'0.weight': never changes, though it is trainable; see that it has a gradient" in report.findings[0].text
    assert [note.tensors for note in report.notes] == [("1.num_batches_tracked", "5.num_batches_tracked")]


def test_a_frozen_tensor_that_never_changes_is_only_told(tmp_path: Path) -> None:
    layout = ParameterLayout.of(
        [
            TensorEntry("frozen", (50,), "float32", "weight", trainable=False),
            TensorEntry("moving", (150,), "float32", "weight"),
        ]
    )
    weights = correlated(10, 200)
    weights[:, :50] = weights[0, :50]
    report = check(record(tmp_path / "run", layout, weights))
    assert report.healthy
    assert [note.text for note in report.notes] == ["'frozen': never changes, a frozen tensor"]


def test_an_exploding_tensor_is_found(replant: Callable[..., Run]) -> None:
    def explode(weights: Matrix, _buffers: Buffers) -> None:
        weights[25:, 88:1240] *= 3.0 ** np.arange(1, 16, dtype=np.float32)[:, None]

    report = check(replant(explode))
    exploding = [finding for finding in report.findings if finding.kind == "exploding"]
    first = 25 + next(power for power in range(15) if exploding_size(report, power))
    assert [(finding.epochs, finding.tensors) for finding in exploding] == [(tuple(range(first, 40)), ("4.weight",))]
    assert "more than 100 times as large as at first" in exploding[0].text


def exploding_size(report: Any, power: int) -> bool:
    largest = np.abs(open_run(report.path).trajectory("4.weight")).reshape(40, -1).max(axis=1)
    first_of_all = [np.abs(values).max() for values in first_weights(open_run(report.path))]
    return bool(largest[25 + power] > 100 * max(largest[0], np.median(first_of_all)))


def first_weights(run: Run) -> list[NDArray[np.float32]]:
    """Each weight tensor where it is first other than zero."""
    values = [run.trajectory(entry.name).reshape(len(run.epochs), -1) for entry in run.layout.weights]
    return [value[np.flatnonzero(np.abs(value).max(axis=1))[0]] for value in values]


def test_a_tensor_that_grows_from_zero_does_not_explode(make_run: MakeRun) -> None:
    weights = 0.1 * correlated(20, 300)
    weights[:, 200:] = np.geomspace(1e-8, 0.5, 20)[:, None] * np.random.default_rng(0).normal(size=100)
    weights[0, 200:] = 0
    assert "exploding" not in [kind for kind, _, _ in of(check(make_run(weights, sizes=(100, 100, 100))))]


def test_nan_and_infinity_are_found_by_epoch_and_tensor(replant: Callable[..., Run]) -> None:
    def spoil(weights: Matrix, buffers: Buffers) -> None:
        weights[31, 5] = np.nan
        weights[35:, 80] = np.inf
        weights[35:, 100] = -np.inf
        buffers["float32"][9, 0] = np.nan

    report = check(replant(spoil))
    assert of(report) == [
        ("nonfinite", (31,), ("0.weight",)),
        ("nonfinite", tuple(range(35, 40)), ("1.bias", "4.weight")),
        ("nonfinite", (9,), ("1.running_mean",)),
    ]
    assert report.findings[0].text.startswith("'0.weight': NaN or infinite values at epoch 31; ")


def test_a_mask_of_infinities_is_no_fault(tmp_path: Path) -> None:
    mask = TensorEntry("mask", (2, 4), "float16", "buffer")
    layout = ParameterLayout.of([*vector_layout(200).tensors, mask])
    masks = np.where(np.arange(8) % 2, -np.inf, 0).astype(np.float32)
    report = check(record(tmp_path / "run", layout, correlated(9, 200), {"float32": np.tile(masks, (9, 1))}))
    assert report.healthy
    assert [note.kind for note in report.notes] == ["nonfinite", "constant"]


# --- Stubs


@pytest.mark.parametrize("fast", [False, True])
def test_stubs_of_zero_3_are_found(fast: bool, tmp_path: Path) -> None:
    entries = [TensorEntry(name, (0,), "float32", "weight") for name in ("fc.weight", "out.weight")]
    layout = ParameterLayout.of([*entries, TensorEntry("fc.bias", (200,), "float32", "weight")])
    report = check(record(tmp_path / "run", layout, correlated(9, 200)), fast=fast)
    assert of(report) == [("empty", (), ("fc.weight", "out.weight"))]
    text = report.findings[0].text
    assert text.startswith("'fc.weight', 'out.weight' have shape (0,) and no values, as DeepSpeed's ZeRO-3 leaves")
    assert "zero_to_fp32.py" in text
    assert invoke("check", report.path, "-q", code=1).stdout.startswith("empty: 'fc.weight', 'out.weight' have shape")


def test_empty_tensors_that_a_model_has_are_no_stubs(tmp_path: Path) -> None:
    layout = ParameterLayout.of(
        [
            TensorEntry("no rows", (0, 4), "float32", "weight"),
            TensorEntry("frozen", (0,), "float32", "weight", trainable=False),
            TensorEntry("observed", (0,), "float32", "buffer"),
            *vector_layout(200).tensors,
        ]
    )
    assert check(record(tmp_path / "run", layout, correlated(9, 200))).healthy


# --- The pass over the archive


def oracle(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a tensor holds in each row (E, n), slowly."""
    bits = [row.tobytes() for row in rows]
    size = rows.itemsize
    pieces = [[row[i : i + size] for i in range(0, len(row), size)] for row in bits]
    floating = rows.dtype.kind == "f"
    finite = np.isfinite(rows)
    return {
        "changed": np.array(
            [len(pieces[0])]
            + [sum(a != b for a, b in zip(pieces[i], pieces[i - 1], strict=True)) for i in range(1, len(rows))]
        ),
        "nonfinite": (~finite).sum(axis=1),
        "largest": np.abs(np.where(finite, rows, 0).astype(np.float64)).max(axis=1)
        if floating
        else np.zeros(len(rows)),
        "same": np.array([[a == b for b in bits] for a in bits]),
    }


@pytest.mark.parametrize("block_bytes", [1, 20_000_000])
def test_the_pass_agrees_with_a_slow_oracle_across_blocks(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    shapes = [("a", (3, 5)), ("empty", (0, 4)), ("scalar", ()), ("b", (300_000,)), ("none", (0,)), ("c", (7,))]
    weights = [TensorEntry(name, shape, "float32", "weight", aliases=(f"{name}2",)) for name, shape in shapes]
    dtypes = ["float64", "int64", "bool", "int8", "float16", "uint16"]
    buffers = [TensorEntry(f"{dtype}{n}", (n,), dtype, "buffer") for dtype in dtypes for n in (4, 0, 3)]
    layout = ParameterLayout.of([*weights, *buffers])
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, layout.n_weights)).astype(np.float32)
    values[3, ::2] = values[2, ::2]
    values[4, :16] = values[1, :16]
    values[5, [0, 15, 131_080]] = [np.nan, -np.inf, np.inf]
    values[2, 4] = -0.0
    held = {dtype: (4 * rng.normal(size=(6, 7))).astype(dtype) for dtype in layout.buffer_sizes}
    held["float64"][2, 3] = np.nan
    run = record(tmp_path / "run", layout, values, held)
    found = read_contents(run, np.arange(6))
    assert [entry.name for entry in found.entries][:4] == ["a", "scalar", "b", "c"]
    assert len(found.entries) == 4 + 2 * len(dtypes)
    for number, entry in enumerate(found.entries):
        expected = oracle(run.trajectory(entry.name).reshape(6, -1))
        for what in ("changed", "nonfinite", "largest"):
            np.testing.assert_array_equal(getattr(found.contents, what)[number], expected[what], err_msg=entry.name)
        fingerprint = found.contents.fingerprint[number]
        np.testing.assert_array_equal(fingerprint[:, None] == fingerprint, expected["same"], err_msg=entry.name)
    unchanged = check(run).unchanged
    assert unchanged is not None
    same = (values[1:].view(np.uint32) == values[:-1].view(np.uint32)).mean(axis=1)
    np.testing.assert_allclose(unchanged, same, rtol=0, atol=1e-12)


def test_unchanged_shares_are_of_neighbours_among_the_chosen_epochs(make_run: MakeRun) -> None:
    weights = correlated(8, 200)
    weights[6, :50] = weights[2, :50]
    report = check(make_run(weights), epochs=[6, 2, 7])
    assert report.epochs == (2, 6, 7)
    assert report.unchanged == (0.25, 0.0)


def test_progress_counts_values_up_to_all(digits_run: Run) -> None:
    calls: list[tuple[int, int]] = []
    check(digits_run, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3732, 3732)
    assert sorted(calls) == calls


# --- Degenerate runs


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("n_epochs", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("n", [1, 5, 300])
def test_few_epochs_and_few_weights_are_healthy(n_epochs: int, n: int, fast: bool, make_run: MakeRun) -> None:
    report = check(make_run(trajectories("random walk", n_epochs, n, seed=0)), fast=fast)
    assert report.findings == ()
    assert [note.kind for note in report.notes] == (["unjudged"] if n < 100 else [])
    assert report.unchanged == (None if fast else (0.0,) * (n_epochs - 1))


def test_a_run_that_stands_still_is_duplicates_alone(make_run: MakeRun) -> None:
    report = check(make_run(np.tile(correlated(2, 200)[:1], (5, 1)), sizes=(150, 50)))
    assert of(report) == [("duplicate", tuple(range(5)), ())]
    assert report.unchanged == (1.0,) * 4


def test_the_largest_numbers_of_float32_raise_no_warning(make_run: MakeRun) -> None:
    weights = correlated(12, 200)
    weights[8:] = np.float32(3e38) * np.sign(weights[8:])
    kinds = [kind for kind, _, _ in of(check(make_run(weights)))]
    assert "exploding" in kinds


def test_one_epoch_shows_its_nan(make_run: MakeRun) -> None:
    weights = np.ones((1, 200), np.float32)
    weights[0, 3] = np.nan
    assert of(check(make_run(weights, nonfinite="record"))) == [("nonfinite", (0,), ("layer0",))]


def test_only_nan_is_told_and_judged_no_further(make_run: MakeRun) -> None:
    weights = np.full((9, 200), np.nan, np.float32)
    kinds = {kind for kind, _, _ in of(check(make_run(weights, nonfinite="record")))}
    assert kinds == {"duplicate", "nonfinite"}


# --- Errors and the command line


def invoke(*arguments: object, code: int) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


EXAMINING = pytest.mark.parametrize("command", ["check", "verify", "repair"])


@EXAMINING
@pytest.mark.parametrize("place", ["nowhere", "zarr.json"])
def test_exit_code_2_says_that_there_was_nothing_to_look_at(command: str, place: str, digits_path: Path) -> None:
    told = invoke(command, digits_path / place, "-q", code=2)
    assert told.stdout == ""
    assert told.stderr.startswith("Error: ")
    assert told.stderr.count("\n") == 1


@EXAMINING
@pytest.mark.parametrize(
    ("stopped", "said"), [(KeyboardInterrupt, "Aborted!"), (ZeroDivisionError, "ZeroDivisionError")]
)
def test_exit_code_2_says_that_a_command_came_to_no_result(
    stopped: type[BaseException], said: str, command: str, digits_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise stopped

    monkeypatch.setattr(trajkit, command, stop)
    told = invoke(command, digits_path, "-q", code=2)
    assert told.stdout == ""
    assert told.stderr.splitlines()[-1] == said


def test_what_cannot_be_checked_is_refused(digits_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no epoch 99"):
        check(digits_run, epochs=[99])
    with pytest.raises(InputError, match="epoch 3 is named twice"):
        check(digits_run, epochs=[3, 3])
    with pytest.raises(trajkit.TrajkitError, match="no run here"):
        check(tmp_path / "nowhere")


def test_a_damaged_object_names_itself_and_the_way_to_the_others(digits_path: Path) -> None:
    damaged = next(path for path in (digits_path / "weights/c/7").rglob("*") if path.is_file())
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedRunError, match=r"epoch 7: .*; see all that is damaged with: trajkit verify .*digits$"):
        check(digits_path)
    assert check(digits_path, fast=True).healthy
    said = invoke("check", digits_path, "-q", code=2).stderr
    assert len(said.strip().splitlines()) == 1
    assert "trajkit verify" in said


def test_the_command_says_nothing_suspicious(digits_path: Path) -> None:
    result = invoke("check", digits_path, code=0)
    assert result.stdout.endswith("digits: 40 epochs (0 to 39), nothing suspicious\n")
    assert "share of weights unchanged" in result.stdout
    assert "checking values: 3732 of 3732" in result.stderr
    fast = invoke("check", digits_path, "--fast", code=0)
    assert fast.stderr == ""
    assert "unchanged" not in fast.stdout


def test_the_command_fails_with_what_it_found(replant: Callable[..., Run]) -> None:
    def fault(weights: Matrix, buffers: Buffers) -> None:
        weights[13] = weights[12]
        buffers["int64"][:] = 1

    run = replant(fault)
    shown = invoke("check", run.path, "-q", code=1).stdout.splitlines()
    assert shown[0].startswith("duplicate: epochs 12 and 13: the weights are bit-identical")
    assert any(line.startswith("note: '1.num_batches_tracked' and") for line in shown)
    assert shown[-1].endswith("1 suspicious")
    document = json.loads(invoke("check", run.path, "-q", "--json", "--epochs", "10:20", code=1).stdout)
    assert document["healthy"] is False
    assert document["epochs"] == list(range(10, 20))
    assert document["unchanged"]["13"] == 1.0
    assert document["findings"][0].keys() == {"kind", "epochs", "tensors", "text"}
    assert document["findings"][0]["epochs"] == [12, 13]
    assert document["notes"][0]["kind"] == "constant"
