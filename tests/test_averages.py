"""Averages of recorded epochs: what a float64 oracle and PyTorch's own averaging say, rounded once."""

from __future__ import annotations

import re
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeRun, correlated
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trajkit import Recorder, load_weights, open_run, repair, tensors, write_checkpoint
from trajkit.advice import TrajkitWarning
from trajkit.errors import InputError
from trajkit.kernels.averaging import BLOCK, rounded_to_odd

# Averages of few epochs hold much of the first one, and a warning says so.
of_few_epochs = pytest.mark.filterwarnings("ignore::trajkit.advice.TrajkitWarning")


def oracle(matrix: NDArray[np.float32], ema: float | None) -> NDArray[np.float64]:
    weights = matrix.astype(np.float64)
    if ema is None:
        return weights.mean(axis=0)
    average = weights[0]
    for row in weights[1:]:
        average = ema * average + (1 - ema) * row
    return average


@of_few_epochs
@pytest.mark.parametrize("ema", [None, 0.0, 0.3, 0.5, 0.9, 0.999])
def test_an_average_is_what_a_float64_oracle_says(ema: float | None, make_run: MakeRun) -> None:
    n_weights = BLOCK + 500
    matrix = correlated(30, n_weights)
    matrix[:, 7] = 0.1  # never moves
    run = make_run(matrix, sizes=(200, n_weights - 200))
    averaged = run.average(range(30) if ema is None else None, ema)
    np.testing.assert_allclose(averaged.weights(), oracle(matrix, ema), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(averaged.weights(100, 250), averaged.weights()[100:250])
    assert averaged.weights()[7] == np.float32(0.1)
    if ema == 0:
        np.testing.assert_array_equal(averaged.weights(), matrix[-1])
    state = averaged.state_dict()
    np.testing.assert_array_equal(state["layer1"], averaged.weights(200).astype(np.float32))


@of_few_epochs
@pytest.mark.parametrize("ema", [None, 0.3, 0.9])
def test_an_average_is_that_of_an_averaged_model_run_live(ema: float | None, tmp_path: Path) -> None:
    """In float32 to its rounding, and in float64 to float64's: the same recursion from the same start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    rule = None if ema is None else get_ema_multi_avg_fn(ema)
    live, exact = AveragedModel(model, multi_avg_fn=rule), AveragedModel(model.double(), multi_avg_fn=rule)
    model.float()
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        for epoch in range(12):
            recorder.record(epoch)
            live.update_parameters(model)
            exact.update_parameters(model.double())
            model.float()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape)
    averaged = open_run(tmp_path / "run").average("last:12" if ema is None else None, ema)
    flat = torch.cat([parameter.detach().flatten() for parameter in exact.module.parameters()]).numpy()
    np.testing.assert_allclose(averaged.weights(), flat, rtol=1e-13, atol=1e-15)
    state = averaged.state_dict()
    for name, parameter in live.module.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert int(live.n_averaged) == len(averaged.epochs) == 12


def nearest(value: float, dtype: torch.dtype) -> Tensor:
    """The nearest number of a dtype by exact arithmetic, the even one of two."""
    guess = torch.tensor(value, dtype=torch.float64).to(dtype)
    bits = guess.view(torch.int16).item()
    near = torch.tensor([bits - 1, bits, bits + 1], dtype=torch.int16).view(dtype)
    distance = [abs(Fraction(float(number)) - Fraction(value)) for number in near]
    ties = [number for number, far in zip(near, distance, strict=True) if far == min(distance)]
    return next(number for number in ties if len(ties) == 1 or number.view(torch.int16).item() % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """By way of float32, a value just above the middle of two numbers would be rounded to the middle, then down."""
    rng = np.random.default_rng(0)
    lower = torch.from_numpy(rng.normal(size=300)).to(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    middle = (lower.double() + upper.double()).numpy() / 2
    values = np.concatenate([middle * (1 + sign * 2.0**-power) for sign in (-1, 0, 1) for power in (20, 30, 40, 50)])
    expected = torch.stack([nearest(value, dtype) for value in values.tolist()])
    rounded = tensors.in_original_dtype(values, str(dtype).removeprefix("torch."))
    assert torch.equal(rounded, expected)
    assert not torch.equal(torch.from_numpy(values).to(dtype), expected)  # the failing way, as long as torch has it


def test_rounding_to_odd_keeps_what_float32_has() -> None:
    values = np.array([0.0, -0.0, 1.5, -1e-45, np.inf, -np.inf, np.nan, 1e300, -1e-300])
    rounded = rounded_to_odd(values)
    np.testing.assert_array_equal(rounded[:7], values[:7].astype(np.float32))
    assert np.signbit(rounded[1])
    assert rounded[7] == np.finfo(np.float32).max
    assert rounded[8] == -np.finfo(np.float32).smallest_subnormal


def test_an_average_of_weights_that_are_not_finite_is_not_finite(make_run: MakeRun) -> None:
    matrix = np.array([[1, np.inf, np.inf], [2, np.inf, 1], [np.nan, 0, 1]], np.float32)
    run = make_run(matrix, nonfinite="record")
    assert not np.isfinite(run.average("last:3").weights()).any()


@of_few_epochs
def test_the_last_epochs_are_those_up_to_the_epoch(make_run: MakeRun) -> None:
    run = make_run(correlated(5, 10), epochs=[0, 10, 20, 30, 40])
    assert run.average("last:2").epochs == (30, 40)
    assert run.average("last:2", up_to=20).epochs == (10, 20)
    assert run.average(ema=0.9, up_to=20).epochs == (0, 10, 20)
    assert run.average([40, 0]).epochs == (0, 40)
    assert str(run.average("last:2")) == "average of 2 epochs, 30 to 40"
    assert str(run.average([10])) == "average of epoch 10"
    assert str(run.average(ema=0.999)) == "EMA 0.999 of 5 epochs, 0 to 40"
    assert torch.equal(load_weights(run)["layer0"], run.state_dict(40)["layer0"])
    assert torch.equal(load_weights(run, 10, average="last:1")["layer0"], run.state_dict(10)["layer0"])


@of_few_epochs
def test_epochs_that_are_marked_as_bad_are_left_out(make_run: MakeRun) -> None:
    matrix = correlated(6, 10)
    path = make_run(matrix).path
    for row in (3, 5):
        (path / f"weights/c/{row}/0").write_bytes(b"damaged")
    repair(path)
    run = open_run(path)
    assert (run.bad_epochs, run.last_epoch) == ((3, 5), 4)
    for averaged, epochs, left_out in (
        (run.average("last:3"), (1, 2, 4), (3, 5)),
        (run.average("last:2", up_to=3), (1, 2), (3,)),
        (run.average(ema=0.5), (0, 1, 2, 4), (3, 5)),
        (run.average([3, 4]), (4,), (3,)),
    ):
        assert (averaged.epochs, averaged.left_out) == (epochs, left_out)
        np.testing.assert_allclose(averaged.weights(), oracle(matrix[list(epochs)], averaged.decay), rtol=1e-13)
    with pytest.raises(InputError, match=r"the last 5 epochs are to be averaged, there are 4, and 2 marked as bad"):
        run.average("last:5")
    with pytest.raises(InputError, match=r"epochs are to be averaged, there are 0, and 1 marked as bad"):
        run.average([3])


# --- Decays are per recorded epoch


@pytest.mark.parametrize("half_life", [0.5, 1, 5, 20.0, np.float32(3)])
def test_after_a_half_life_an_epoch_counts_for_half(half_life: float, make_run: MakeRun) -> None:
    run = make_run(correlated(200, 5))
    averaged = run.average(ema_half_life=half_life)
    assert averaged.decay is not None
    assert averaged.decay**half_life == pytest.approx(0.5)
    np.testing.assert_array_equal(averaged.weights(), run.average(ema=averaged.decay).weights())


def test_half_lives_beyond_measure_are_the_last_epoch_or_refused(make_run: MakeRun) -> None:
    matrix = correlated(4, 5)
    run = make_run(matrix)
    np.testing.assert_array_equal(run.average(ema_half_life=1e-300).weights(), matrix[-1])
    for wrong in (0, -1, float("nan"), float("inf"), 1e300, True, "5"):
        with pytest.raises(InputError, match=r"ema_half_life is .*, expected a number of recorded epochs above 0; ta"):
            run.average(ema_half_life=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"found ema and ema_half_life; give one of them"):
        run.average(ema=0.9, ema_half_life=5)
    with pytest.raises(InputError, match=r"or its half-life \(ema_half_life\), found neither"):
        run.average()


@pytest.mark.parametrize(
    ("ema", "n_epochs", "share"),
    [
        (0.999, 40, "96.2"),
        (0.9, 12, "31.4"),
        (0.5, 4, "12.5"),
        (0.95, 59, "5.1"),
        (0.9, 2, "90"),
        (0.999, 2000, "13.5"),
    ],
)
def test_an_average_that_holds_much_of_its_first_epoch_warns_with_the_share(
    ema: float, n_epochs: int, share: str, make_run: MakeRun
) -> None:
    run = make_run(correlated(n_epochs, 3))
    with pytest.warns(TrajkitWarning, match=f"EMA .* of {n_epochs} epochs, .*: {share} % of it is the first") as told:
        averaged = run.average(ema=ema)
    one_hot = np.eye(n_epochs, 1, dtype=np.float32)
    weight = oracle(one_hot, ema)[0]
    assert averaged.share_of_first == pytest.approx(weight)
    assert weight > 0.05
    assert [one.filename for one in told] == [__file__]
    cure = re.search(r"half-life of (\S+) or less .* leaves at most 5 %", str(told[0].message))
    assert cure is not None
    assert run.average(ema_half_life=float(cure[1])).share_of_first <= 0.05  # and no warning, or this would fail


def test_an_average_that_holds_little_of_its_first_epoch_does_not_warn(make_run: MakeRun) -> None:
    run = make_run(correlated(40, 3))
    for decay in (0.9, 0.0, 0.926):
        run.average(ema=decay)
    run.average(ema_half_life=5)
    run.average("last:2")
    assert run.average(ema=0.999, up_to=0).share_of_first == 1  # a single epoch is what it is


@pytest.mark.filterwarnings("always")
def test_the_share_is_of_the_epochs_that_are_averaged(make_run: MakeRun) -> None:
    """Bad epochs are left out, and later ones than asked for."""
    path = make_run(correlated(6, 10)).path
    (path / "weights/c/0/0").write_bytes(b"damaged")
    repair(path)
    run = open_run(path)
    with pytest.warns(TrajkitWarning, match="EMA 0.9 of 4 epochs, 1 to 4: 72.9 % of it is the first epoch"):
        assert run.average(ema=0.9, up_to=4).share_of_first == pytest.approx(0.9**3)


def test_each_way_to_averaged_weights_warns_once(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(correlated(6, 10))
    for call in (
        lambda: load_weights(run, ema=0.9),
        lambda: load_weights(run, ema_half_life=50),
        lambda: write_checkpoint(run, None, tmp_path / "a.pt", ema=0.9),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
        assert [(one.category, one.filename) for one in told] == [(TrajkitWarning, __file__)]


@pytest.mark.parametrize(
    ("average", "cure"),
    [
        ("39:10", r"range\(10, 39\)"),
        ("10:40", r"range\(10, 40\)"),
        ("-3: 4", r"range\(-3, 4\)"),
        ("3,5", "last:10"),
        ("last:-1", "last:10"),
        ("", "last:10"),
    ],
)
def test_a_text_that_names_no_average_is_told_with_one_that_does(average: str, cure: str, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=f"average is '{average}', expected last:N .* epochs; write {cure}$"):
        make_run(correlated(4, 3)).average(average)
