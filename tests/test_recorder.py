from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trajkit import Recorder, load_weights, open_run, write_checkpoint
from trajkit.errors import InputError, LayoutError, RunLockedError


class Awkward(nn.Module):
    """Every kind of tensor that a recorder has to take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.brain = nn.Parameter(torch.randn(3, 2).bfloat16())
        self.float16 = nn.Parameter(torch.randn(5).half())
        self.wide = nn.Parameter(torch.tensor([0.5, -1.25], dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.turned = nn.Parameter(torch.randn(6, 3).t())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.index = nn.Parameter(torch.arange(4), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("small", torch.tensor([[-3, 7]], dtype=torch.int8))
        self.register_buffer("half_buffer", torch.randn(2).bfloat16())
        self.register_buffer("double_buffer", torch.randn(2, dtype=torch.float64))
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("forgotten", torch.randn(2), persistent=False)


def assert_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].shape == tensor.shape, name
        assert torch.equal(state[name], tensor), name


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, states = Awkward(), []
    with Recorder(model, tmp_path / "run") as recorder:
        for epoch in range(3):
            recorder.record(epoch)
            states.append(copied(model))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 1
                model.norm(torch.randn(8, 4))
                model.mask.logical_not_()  # type: ignore[operator]
    for epoch, expected in enumerate(states):
        state = load_weights(tmp_path / "run", epoch)
        assert_same({name: state[name] for name in expected}, expected)
        assert state["head.weight"] is state["embed.weight"]
        Awkward().load_state_dict(state)
    run = open_run(tmp_path / "run")
    assert run.layout["head.weight"].name == "embed.weight"
    assert not run.layout["frozen"].trainable
    assert "forgotten" not in run.layout
    assert run.checkpoint(0)["float16"].dtype == np.float16
    assert run.checkpoint(0)["brain"].dtype == np.float32
    assert run.checkpoint(0)["mask"].tolist() == [True, False, True]
    write_checkpoint(run, 1, tmp_path / "one.safetensors")
    write_checkpoint(run, 1, tmp_path / "one.pt")


def test_metrics_are_numbers_and_come_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0, metrics={"a": 1, "b": torch.tensor(0.5, requires_grad=True), "c": np.float32(2)})
        recorder.record(1)
        with pytest.raises(InputError, match=r"metric 'a' is 'high', expected a number; pass a float"):
            recorder.record(2, metrics={"a": "high"})
    assert open_run(tmp_path / "run").metrics == {0: {"a": 1.0, "b": 0.5, "c": 2.0}, 1: {}}


def test_a_training_that_is_started_again_goes_on(tmp_path: Path) -> None:
    for first in (0, 4, 8):
        with Recorder(nn.Linear(3, 2), tmp_path / "run") as recorder:
            assert recorder.next_epoch == first
            for epoch in range(recorder.next_epoch, recorder.next_epoch + 4):
                recorder.record(epoch)
    assert open_run(tmp_path / "run").epochs.tolist() == list(range(12))


def test_a_recorder_forecasts_what_its_run_will_take(tmp_path: Path) -> None:
    with Recorder(nn.Linear(300, 100), tmp_path / "run") as recorder:
        before = recorder.forecast(20)
        assert str(before).startswith("30,100 weights: ")
        recorder.record(0)
        recorder.record(1, wait=True)
        after = recorder.forecast(20)
        assert (before.recorded, after.recorded) == (0, 2)
        assert before.total_bytes == after.total_bytes
        assert after.epoch_s is not None
    assert open_run(tmp_path / "run").forecast(20).total_bytes == before.total_bytes


def test_recording_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = Awkward()
    before = copied(model)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0, wait=True)
        recorded = load_weights(tmp_path / "run", 0)
        recorded["scalar"].fill_(100)
    assert_same(copied(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (nn.Linear(3, 4), r"the model: 'weight' has shape \(4, 3\), the run has \(2, 3\); record into a new run"),
        (nn.Linear(3, 2).double(), "the model: 'weight' has dtype float64, the run has float32"),
        (nn.Linear(3, 2, bias=False), "the model: 'bias' is missing, the run has it"),
        (nn.Sequential(OrderedDict(inner=nn.Linear(3, 2))), "'weight' is missing"),
    ],
)
def test_another_model_is_refused_when_the_recorder_is_made(changed: nn.Module, message: str, tmp_path: Path) -> None:
    with Recorder(nn.Linear(3, 2), tmp_path / "run") as recorder:
        recorder.record(0)
    with pytest.raises(LayoutError, match=message):
        Recorder(changed, tmp_path / "run")
    with Recorder(nn.Linear(3, 2), tmp_path / "run") as recorder:
        recorder.record(1)


def test_a_model_that_changes_during_training_is_refused_at_that_epoch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        model.append(nn.Linear(2, 2))
        with pytest.raises(LayoutError, match=r"epoch 1: '1.weight' is new, the run does not have it"):
            recorder.record(1)
        del model[1]
        recorder.record(1)


def with_parameter(tensor: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_parameter("odd", nn.Parameter(tensor, requires_grad=False))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_parameter(torch.zeros(2, dtype=torch.complex64)), "'odd' is complex, .*; record torch.view_as_real"),
        (with_parameter(torch.eye(3).to_sparse()), r"'odd' is torch.sparse_coo, .*; make it dense"),
        (with_parameter(torch.zeros(2, device="meta")), "'odd' is on the meta device .*; load the weights first"),
        (nn.LazyLinear(3), "'weight' is not initialised yet, .*; run one forward pass first"),
        (nn.Flatten(), "the model has no weights"),
        (nn.BatchNorm1d(3, affine=False), "the model has no weights"),
    ],
)
def test_a_model_that_cannot_be_recorded_is_refused_by_name(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=message):
        Recorder(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize:UserWarning")
def test_a_quantised_buffer_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("q", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
    with pytest.raises(LayoutError, match=r"'q' is quantised, .*; record the model before quantisation"):
        Recorder(model, tmp_path / "run")


def test_float64_weights_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight += 1e-12
    with Recorder(model, tmp_path / "run") as recorder:
        with pytest.raises(InputError, match=r"'weight' is float64 with values that float32 cannot hold.*model.float"):
            recorder.record(0, wait=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.float())
        recorder.record(0)
    assert_same(load_weights(tmp_path / "run", 0), copied(model))


def test_a_nan_names_its_tensor(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].bias[1] = torch.nan
    with Recorder(model, tmp_path / "run") as recorder, pytest.raises(InputError, match=r"epoch 3: '1.bias' has nan"):
        recorder.record(3, wait=True)
    with Recorder(model, tmp_path / "run", nonfinite="record") as recorder:
        recorder.record(3)


def test_two_recorders_of_one_run(tmp_path: Path) -> None:
    with Recorder(nn.Linear(2, 2), tmp_path / "run"), pytest.raises(RunLockedError, match="being written by process"):
        Recorder(nn.Linear(2, 2), tmp_path / "run")


def test_a_typing_error_in_the_policy_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nonfinite is 'ignore', expected 'raise' or 'record'"):
        Recorder(nn.Linear(2, 2), tmp_path / "run", nonfinite="ignore")  # type: ignore[arg-type]
