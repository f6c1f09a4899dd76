"""What a bad input is told: run, epoch, tensor, what was expected, what was found, and the cure. And what is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trajkit import Recorder, import_checkpoints, load_weights, open_run
from trajkit.errors import InputError, LayoutError

Change = Callable[[nn.Module], object]


class Model(nn.Module):
    """A layer with a bias, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(120, 10)
        self.register_buffer("steps", torch.tensor(3))


def parameter(tensor: Tensor) -> Change:
    """The weights are these."""
    return lambda model: setattr(model.fc, "weight", nn.Parameter(tensor, requires_grad=False))


def with_value(value: float) -> Change:
    """A weight has this value."""
    return lambda model: model.fc.weight.data[0, 7].fill_(value)


def reordered(model: nn.Module) -> None:
    layer = model.fc
    layer.weight = layer._parameters.pop("weight")  # type: ignore[assignment, union-attr]


def quantised(model: nn.Module) -> None:
    model.register_buffer("steps", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))


def lazy(model: nn.Module) -> None:
    model.fc = nn.LazyLinear(10)


def empty(model: nn.Module) -> None:
    del model.fc


def tied(model: nn.Module) -> None:
    model.register_parameter("head", model.fc.weight)  # type: ignore[arg-type]


def doubled(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(torch.full((10, 120), 1 + 1e-12, dtype=torch.float64))


def large_integers(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(torch.full((10, 120), 2**53 + 1), requires_grad=False)  # type: ignore[assignment]


DENSE = "expected a dense real tensor with values"
NEW_RUN = "record into a new run"
BAD: dict[str, tuple[Change, str]] = {
    "NaN": (
        with_value(np.nan),
        "'fc.weight' has nan, 1 of 1210 weights are not finite, expected finite weights;"
        " record with nonfinite='record' (--nonfinite record) to keep them",
    ),
    "an infinity": (
        with_value(-np.inf),
        "'fc.weight' has -inf, 1 of 1210 weights are not finite, expected finite weights;"
        " record with nonfinite='record' (--nonfinite record) to keep them",
    ),
    "another shape": (
        parameter(torch.zeros(10, 84)),
        f"'fc.weight' has shape (10, 84), the run has (10, 120); {NEW_RUN}",
    ),
    "another dtype": (
        parameter(torch.zeros(10, 120).half()),
        f"'fc.weight' has dtype float16, the run has float32; {NEW_RUN}",
    ),
    "another order": (reordered, f"the tensors are in another order than in the run, from 'fc.bias' on; {NEW_RUN}"),
    "another tie": (tied, f"'head' is new, the run does not have it; {NEW_RUN}"),
    "a buffer for a weight": (
        large_integers,
        f"'fc.weight' has dtype int64, the run has float32; {NEW_RUN}",
    ),
    "a missing tensor": (
        lambda model: setattr(model.fc, "bias", None),
        f"'fc.bias' is missing, the run has it; {NEW_RUN}",
    ),
    "a new tensor": (
        lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(3))),
        f"'gain' is new, the run does not have it; {NEW_RUN}",
    ),
    "no weights": (
        empty,
        "the model has no weights, expected at least one parameter; nothing to record",
    ),
    "a complex tensor": (
        parameter(torch.zeros(10, 120, dtype=torch.complex64)),
        f"'fc.weight' is complex, {DENSE}; record torch.view_as_real of it",
    ),
    "a sparse tensor": (
        parameter(torch.eye(10).to_sparse()),
        f"'fc.weight' is torch.sparse_coo, {DENSE}; make it dense",
    ),
    "a quantised tensor": (quantised, f"'steps' is quantised, {DENSE}; record the model before quantisation"),
    "a tensor without values": (
        parameter(torch.zeros(10, 120, device="meta")),
        f"'fc.weight' is on the meta device and has no values, {DENSE}; load the weights first",
    ),
    "a lazy tensor": (lazy, f"'fc.weight' is not initialised yet, {DENSE}; run one forward pass first"),
    "float64 that float32 cannot hold": (
        doubled,
        "'fc.weight' is float64 with values that float32 cannot hold, weights are recorded as float32;"
        " train in float32 or record a copy, model.float()",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_epoch_is_refused_and_the_message_says_all(bad: str, tmp_path: Path) -> None:
    change, message = BAD[bad]
    model = Model()
    if bad == "float64 that float32 cannot hold":
        model.fc.weight = nn.Parameter(torch.zeros(10, 120, dtype=torch.float64))
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(3)
        change(model)
        with pytest.raises(InputError, match="(?m)^" + re.escape(f"{tmp_path / 'run'}: epoch 12: {message}") + "$"):
            recorder.record(12, wait=True)
    assert open_run(tmp_path / "run").epochs.tolist() == [3]


IN_FILES = ["NaN", "another shape", "another dtype", "a missing tensor", "a new tensor", "a complex tensor"]


@pytest.mark.parametrize("bad", IN_FILES)
def test_a_bad_file_is_refused_and_the_message_names_it_too(bad: str, tmp_path: Path) -> None:
    change, message = BAD[bad]
    model = Model()
    torch.save(model.state_dict(), tmp_path / "epoch3.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch3.pt"])
    change(model)
    file = tmp_path / "epoch12.pt"
    torch.save(model.state_dict(), file)
    with pytest.raises(InputError, match="^" + re.escape(f"{file}: {tmp_path / 'run'}: epoch 12: {message}") + "$"):
        import_checkpoints(tmp_path / "run", [file])


@pytest.mark.parametrize(
    ("epoch", "message"),
    [
        (7, "epoch 7 is recorded already; go on after epoch 7 or record into a new run"),
        (5, "epoch 5 comes before the last one, 7; go on after epoch 7 or record into a new run"),
        (2**63, "epoch 9223372036854775808 is no 64-bit integer; number the epochs from 0"),
    ],
)
def test_an_epoch_out_of_order_is_refused(epoch: int, message: str, tmp_path: Path) -> None:
    with Recorder(Model(), tmp_path / "run") as recorder:
        recorder.record(3)
        recorder.record(7)
        with pytest.raises(InputError, match="^" + re.escape(f"{tmp_path / 'run'}: {message}") + "$"):
            recorder.record(epoch)


def test_a_bad_model_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    model = Model()
    lazy(model)
    expected = f"{tmp_path / 'run'}: the model: {BAD['a lazy tensor'][1]}"
    with pytest.raises(LayoutError, match="^" + re.escape(expected) + "$"):
        Recorder(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tensor_of_too_many_dimensions_or_without_a_name_is_refused(tmp_path: Path) -> None:
    for name, shape, message in (
        ("deep", (1,) * 65, "'deep' has 65 dimensions, at most 64 can be recorded; reshape it"),
        ("\ud800", (1,), r"'\ud800' is no text, expected a name that UTF-8 can spell; rename the tensor"),
    ):
        model = Model()
        model.register_buffer(name, torch.zeros(shape))
        with pytest.raises(LayoutError, match=re.escape(message)):
            Recorder(model, tmp_path / "run")


def test_a_metric_whose_name_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    with Recorder(Model(), tmp_path / "run") as recorder:
        recorder.record(0)
        with pytest.raises(
            InputError, match=r"run: epoch 1 could not be read again .*surrogates not allowed.*plain names"
        ):
            recorder.record(1, metrics={"\ud800": 1.0}, wait=True)
        recorder.record(1)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1]


GOOD: dict[str, Tensor] = {
    "a single value": torch.tensor(2.5),
    "a single value that is not contiguous": torch.arange(6.0)[::2],
    "a transposed matrix": torch.arange(6.0).view(2, 3).t(),
    "an expanded row": torch.arange(3.0).expand(4, 3),
    "no values": torch.empty(0, 3),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(5).half(),
    "float64 that float32 holds": torch.tensor([0.5, -1.25], dtype=torch.float64),
    "truth values": torch.tensor([True, False]),
    "small integers": torch.tensor([-3, 7], dtype=torch.int8),
    "large integers": torch.tensor([2**53 + 1, -(2**63)]),
}


@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_is_taken_comes_back_bit_for_bit(kind: str, good: str, tmp_path: Path) -> None:
    model, tensor = Model(), GOOD[good]
    if kind == "parameter":
        model.register_parameter("odd", nn.Parameter(tensor, requires_grad=False))
    else:
        model.register_buffer("odd", tensor)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    found = load_weights(tmp_path / "run", 0)["odd"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)


def test_tied_weights_stand_once_under_both_names(tmp_path: Path) -> None:
    model: Any = Model()
    tied(model)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    run = open_run(tmp_path / "run")
    assert run.layout["head"].names == ("head", "fc.weight")
    assert run.layout.n_weights == 1210
    state = run.state_dict(0)
    assert state["head"] is state["fc.weight"]
