"""What is no run, no fit, no epoch, or needs a PyTorch that is not there: a sentence each. And fits that are given."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeRun, correlated
from torch import nn
from trajkit_cli.main import main

import trajkit
from trajkit import Recorder, Run, RunWriter, evaluate, fit, load_weights, open_run, write_checkpoint
from trajkit.advice import TrajkitWarning
from trajkit.errors import InputError

# --- Places


CALLS: dict[str, Callable[[Any], object]] = {
    "open_run": trajkit.open_run,
    "fit": trajkit.fit,
    "update": lambda run: trajkit.update(run, "a"),
    "follow": lambda run: list(trajkit.follow(run)),
    "check": trajkit.check,
    "verify": trajkit.verify,
    "repair": trajkit.repair,
    "load_weights": trajkit.load_weights,
    "write_checkpoint": lambda run: trajkit.write_checkpoint(run, 0, "a.pt"),
    "evaluate": lambda run: trajkit.evaluate(run, len),
    "RunWriter": trajkit.RunWriter,
    "Recorder": lambda run: trajkit.Recorder(nn.Linear(2, 2), run),
}


@pytest.mark.parametrize("place", [3, 1.5, b"run", [], np.ones((4, 3)), True], ids=lambda place: type(place).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_place_of_a_run_is_one_sentence(call: str, place: Any) -> None:
    with pytest.raises(InputError, match=rf"is of type {type(place).__name__}, expected a (path|Run)") as told:
        CALLS[call](place)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "Recorder"])  # which takes it from the environment
def test_no_place_is_one_sentence(call: str) -> None:
    with pytest.raises(InputError, match=r"is None, expected a (path|Run)"):
        CALLS[call](None)


def test_a_matrix_is_shown_the_way_to_the_estimator() -> None:
    matrix = correlated(12, 50).T
    with pytest.raises(InputError, match=r"a matrix of trajectories in memory, \(weights, epochs\), is fitted by traj"):
        trajkit.fit(matrix)  # type: ignore[arg-type]
    assert trajkit.CMD(n_modes=2).fit(matrix).labels_.shape == (50,)


@pytest.mark.parametrize("path", [None, 3, b"a.pt"])
def test_what_is_no_place_of_a_checkpoint_is_one_sentence(path: Any, digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"path is .*, expected a file or folder to write; pass its path"):
        write_checkpoint(digits_run, 3, path)


def test_what_is_no_function_is_one_sentence(digits_run: Run) -> None:
    with pytest.raises(InputError, match="function is 3, expected one that takes a state dict; pass a function"):
        evaluate(digits_run, 3)  # type: ignore[arg-type]


# --- Epochs


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ("10:40", r"epochs is '10:40', expected several integers; pass range\(10, 40\)"),
        ("39:10", r"epochs is '39:10', expected several integers; pass range\(10, 39\)"),
        ("3,5", r"epochs is '3,5', expected several integers; pass a list or a range"),
        (b"10:40", r"epochs is b'10:40', expected several integers; pass a list or a range"),
        (3, r"epochs is 3, expected several integers"),
        ([1.0], r"epoch is 1.0, expected an integer"),
        ([[1, 2]], r"epoch is \[1, 2\], expected an integer"),
        (np.ones((1, 2), int), r"epoch is array\(\[1, 1\]\), expected an integer"),
        ([True], r"epoch is True, expected an integer"),
        ([2**70], r"no epoch 1180591620717411303424; the run has 40"),
    ],
)
def test_what_names_no_epochs_is_one_sentence(epochs: Any, message: str, digits_run: Run) -> None:
    for call in (
        digits_run.rows_of,
        lambda some: fit(digits_run, epochs=some),
        lambda some: trajkit.check(digits_run, some),
    ):
        with pytest.raises(trajkit.TrajkitError, match=message):
            call(epochs)


@pytest.mark.parametrize("epoch", ["3", 3.5, True, np.float64(3)])
def test_what_is_no_epoch_is_one_sentence(epoch: Any, digits_run: Run) -> None:
    for call in (
        digits_run.state_dict,
        lambda one: load_weights(digits_run, one),
        lambda one: digits_run.average([0], up_to=one),
    ):
        with pytest.raises(InputError, match=r"epoch is .*, expected an integer; pass the number of the epoch"):
            call(epoch)


def test_labels_below_0_are_not_recorded(tmp_path: Path, make_run: MakeRun) -> None:
    with Recorder(nn.Linear(3, 2), tmp_path / "recorded") as recorder:
        for label in ({"epoch": -1}, {"step": -1}, {"epoch": 0, "step": -7}):
            with pytest.raises(InputError, match=r"recorded: (epoch|step) is -[17], expected 0 or more; count from 0"):
                recorder.record(**label)
        recorder.record(0)
    with RunWriter(make_run(correlated(3, 4)).path) as writer, pytest.raises(InputError, match="epoch is -2, expected"):
        writer.require_next(-2)
    assert open_run(tmp_path / "recorded").epochs.tolist() == [0]


def test_a_run_that_has_labels_below_0_is_read(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajkit.run._new_label", lambda value, *_: value)  # as versions did that recorded them
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for row, epoch in enumerate((-3, -1, 0)):
            buffers = {dtype: np.zeros(n, dtype) for dtype, n in digits_run.layout.buffer_sizes.items()}
            writer.append(digits_run.layout, epoch, digits_run.weights[row], buffers)
    run = open_run(tmp_path / "run")
    assert run.epochs.tolist() == [-3, -1, 0]
    np.testing.assert_array_equal(run.weights[run.row_of(-1)], digits_run.weights[1])
    assert fit(run, modes=2, samples=50).epochs.tolist() == [-3, -1, 0]


# --- Fits that are given


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_fit_is_taken_by_its_name_or_itself(digits_run: Run, tmp_path: Path) -> None:
    made = fit(digits_run, modes=4, samples=200)
    reopened = open_run(str(digits_run.path))
    assert same(load_weights(digits_run, 30, made), load_weights(digits_run, 30, "modes4"))
    assert same(load_weights(reopened, 30, made), load_weights(digits_run, 30, "modes4"))
    write_checkpoint(digits_run.path, 30, tmp_path / "a.pt", made)
    assert same(torch.load(tmp_path / "a.pt"), made.state_dict(30))
    evaluation = evaluate(reopened, lambda state: float(state["11.bias"].sum()), made, [30])
    assert evaluation.fit == "modes4"
    assert open_run(digits_run.path).evaluations == (evaluation,)


def test_a_fit_of_before_models_an_epoch_that_came_since(make_run: MakeRun) -> None:
    matrix = correlated(12, 300)
    run = make_run(matrix)
    made = fit(run, modes=3, samples=50)
    with RunWriter(run.path, fsync=False) as writer:
        writer.append(run.layout, 12, matrix[-1], {})
    with pytest.warns(TrajkitWarning, match="epoch 12 is not among the 12 epochs, 0 to 11, that fit 'modes3' was made"):
        load_weights(open_run(run.path), 12, made)


def test_a_fit_of_another_run_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = (make_run(correlated(8, 100, seed), name=f"run{seed}") for seed in (0, 1))
    made = fit(other, modes=2, samples=50)
    for call in (
        lambda: load_weights(one, 3, made),
        lambda: write_checkpoint(one, 3, tmp_path / "a.pt", made),
        lambda: evaluate(one, len, made),
    ):
        with pytest.raises(InputError, match=r"run0: fit 'modes2' is of the run .*run1, expected one of this run"):
            call()
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("wrong", [3, ["modes10"], b"modes10", object])
def test_what_is_no_fit_is_one_sentence(wrong: Any, digits_run: Run) -> None:
    for call in (lambda: load_weights(digits_run, 3, wrong), lambda: evaluate(digits_run, len, wrong)):
        with pytest.raises(
            InputError, match=r"fit is of type \w+, expected the name of a saved fit or a Decomposition"
        ):
            call()


# --- Epochs that a fit was not made for


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(("epoch", "covered"), [(0, True), (8, True), (9, False), (30, False)])
def test_an_epoch_that_a_fit_was_not_made_for_is_told(
    epoch: int, covered: bool, digits_run: Run, tmp_path: Path
) -> None:
    made = fit(digits_run, modes=3, samples=100, name="early", epochs=range(0, 20, 2))
    assert made.covers(epoch) is covered
    said = f"epoch {epoch} is not among the 10 epochs, 0 to 18, that fit 'early' was made of; the weights there are"
    for call in (
        lambda: load_weights(digits_run, epoch, "early"),
        lambda: write_checkpoint(digits_run, epoch, tmp_path / "a.pt", "early", overwrite=True),
        lambda: evaluate(digits_run, len, made, [2, epoch] if epoch != 2 else [2]),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
        assert [(one.category, one.filename) for one in told] == ([] if covered else [(TrajkitWarning, __file__)])
        assert all(said in str(one.message) for one in told)
    for command, out in (("export", "-o"), ("reconstruct", "-o")):
        arguments = (command, digits_run.path, "--fit", "early", "--epoch", epoch, out, tmp_path / "b.pt", "--force")
        assert invoke(*arguments).stderr.count(said) == (not covered)
        assert json.loads(invoke(*arguments, "--json").stdout)["fit_covers_epoch"] is covered


def test_many_epochs_that_a_fit_was_not_made_for_are_one_line(digits_run: Run) -> None:
    fit(digits_run, modes=3, samples=100, name="early", epochs=range(20))
    with pytest.warns(TrajkitWarning, match="20 epochs, 20 to 39, are not among the 20 epochs, 0 to 19, that fit 'ea"):
        evaluate(digits_run, len, "early")


def test_online_fits_are_meant_to_model_later_epochs(digits_run: Run, tmp_path: Path) -> None:
    made = fit(digits_run, modes=3, samples=100, epochs=range(10), online=True)
    assert made.covers(30)
    load_weights(digits_run, 30, made)  # a warning would be an error
    evaluate(digits_run, len, made, [5, 30])
    said = invoke("export", digits_run.path, "--fit", made.name, "--epoch", 30, "-o", tmp_path / "a.pt", "--json")
    assert (said.stderr, json.loads(said.stdout)["fit_covers_epoch"]) == ("", True)


# --- Without PyTorch


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without_torch(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


NEEDED = (
    "needs PyTorch, which cannot be imported (No module named 'torch'); install the build that suits the machine:"
    " pip install torch"
)


def test_what_needs_pytorch_says_so_in_one_sentence_and_the_rest_works(digits_path: Path) -> None:
    code = """
import trajkit
run = trajkit.open_run(sys.argv[1])
fit = trajkit.fit(run, modes=3)
for name in trajkit.__all__:
    try:
        getattr(trajkit, name)
    except trajkit.TrajkitError as error:
        assert isinstance(error, ImportError)
        print(error)
for call in (
    lambda: trajkit.load_weights(run),
    lambda: fit.state_dict(3),
    lambda: run.average("last:2").state_dict(),
    lambda: trajkit.evaluate(run, len),
):
    try:
        call()
    except trajkit.TrajkitError as error:
        print(error)
assert trajkit.check(run).healthy and trajkit.verify(run.path).sound
"""
    done = without_torch(code, digits_path)
    assert done.returncode == 0, done.stderr
    needing = ["EmbeddedCMD", "OnlineCMD", "Recorder", "import_checkpoints", "write_checkpoint"]
    expected = [f"trajkit.{name} {NEEDED}" for name in needing] + [f"a state dict {NEEDED}"] * 4
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["export", "RUN", "-o", "a.pt"], "trajkit.write_checkpoint"),
        (["record", "new", "a.pt"], "trajkit.import_checkpoints"),
        (["record", "new", "--watch", "."], "this command"),
        (["evaluate", "RUN", "--with", "builtins:len", "-q"], "a state dict"),
        (["demo"], "this command"),
    ],
)
def test_a_command_that_needs_pytorch_says_so_in_one_line(arguments: list[str], what: str, digits_path: Path) -> None:
    words = [digits_path if word == "RUN" else word for word in arguments]
    done = without_torch("from trajkit_cli.main import main; main()", *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {what} {NEEDED}\n")
