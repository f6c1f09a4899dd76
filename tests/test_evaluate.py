from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trajkit import Run, evaluate, fit, open_run
from trajkit.demo import test_accuracy as digits_accuracy
from trajkit.errors import InputError, UnknownNameError


def norm_of_bias(state_dict: dict[str, Any]) -> float:
    return float(state_dict["11.bias"].norm())


def test_recorded_and_modelled_weights_are_evaluated_and_kept(digits_run: Run) -> None:
    decomposition = fit(digits_run)
    seen: list[tuple[int, int]] = []
    evaluation = evaluate(
        digits_run, digits_accuracy, "modes10", [0, 39], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row.epoch for row in evaluation.epochs] == [0, 39]
    for row in evaluation.epochs:
        assert row.recorded["test_accuracy"] == pytest.approx(digits_run.metrics[row.epoch]["test_accuracy"], abs=0.003)
        assert row.modelled == digits_accuracy(decomposition.state_dict(row.epoch))
    assert evaluation.epochs[0].recorded["test_accuracy"] < 0.3
    assert evaluation.epochs[1].modelled is not None
    assert evaluation.epochs[1].modelled["test_accuracy"] > 0.9
    assert open_run(digits_run.path).evaluations == (evaluation,)


def test_recorded_weights_alone(digits_run: Run) -> None:
    evaluation = evaluate(digits_run.path, norm_of_bias)
    assert len(evaluation.epochs) == 40
    assert evaluation.epochs[7].modelled is None
    expected = np.linalg.norm(digits_run.trajectory("11.bias", [7]))
    assert evaluation.epochs[7].recorded == {"score": pytest.approx(expected)}
    assert evaluation.function == "test_evaluate:norm_of_bias"


def test_evaluations_are_kept_beside_each_other(digits_run: Run) -> None:
    for epoch in (1, 2, 3):
        evaluate(digits_run, norm_of_bias, epochs=[epoch])
    assert [row.epochs[0].epoch for row in digits_run.evaluations] == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_kept(value: float, digits_run: Run) -> None:
    evaluate(digits_run, lambda _: {"loss": value}, epochs=[1])
    np.testing.assert_equal(digits_run.evaluations[0].epochs[0].recorded["loss"], value)


@pytest.mark.parametrize("returned", [None, "high", {"a": "b"}, [1, 2]])
def test_a_function_that_returns_no_number_is_told(returned: Any, digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"the evaluation function returned .*, expected a number or a dict"):
        evaluate(digits_run, lambda _: returned)
    assert digits_run.evaluations == ()


def test_what_the_function_raises_passes_through_with_its_place(digits_run: Run) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        evaluate(digits_run, lambda _: 1 / 0, epochs=[7])
    assert raised.value.__notes__ == ["while evaluating the recorded weights of epoch 7"]


def test_an_evaluation_that_cannot_be_kept_is_returned_all_the_same(
    digits_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trajkit.training.evaluate.save_evaluation", no_room)
    with pytest.warns(RuntimeWarning, match="the evaluation is not kept in the run: .*No space left"):
        assert evaluate(digits_run, norm_of_bias, epochs=[1]).epochs[0].epoch == 1


def test_no_epochs_are_an_error(digits_run: Run) -> None:
    with pytest.raises(InputError, match="no epochs to evaluate"):
        evaluate(digits_run, norm_of_bias, epochs=[])


def test_unknown_epochs_and_fits_are_told_before_any_work(digits_run: Run) -> None:
    called: list[int] = []
    for arguments in ({"epochs": [99]}, {"fit": "none"}):
        with pytest.raises(UnknownNameError):
            evaluate(digits_run, lambda _: called.append(1) or 0.0, **arguments)  # type: ignore[arg-type]
    assert not called
