"""What a model's state dict gives is matched with its parameters by what they are."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_names import each, fused, hooked, net, qkv, rename, without_head
from test_recorder import assert_same, copied
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from trajkit import EmbeddedCMD, OnlineCMD, Recorder, load_weights, open_run
from trajkit.errors import InputError, LayoutError
from trajkit.training.model import RecordedModel
from trajkit.training.wrapping import plain_copy


def warned(model: nn.Module, **options: Any) -> str:
    """What is warned of when a model is recorded."""
    with pytest.warns(RuntimeWarning) as found:
        RecordedModel(model, **options)
    return " ".join(str(warning.message) for warning in found)


# --- Parameters that the state dict gives otherwise


@pytest.mark.parametrize("change", [Tensor.detach, torch.clone, Tensor.half], ids=["detached", "copied", "converted"])
def test_a_parameter_is_recorded_itself_where_the_state_dict_has_a_copy(change: Any) -> None:
    model = hooked(each(change))()
    tensors = RecordedModel(model).tensors()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensors[name] is tensor


def test_a_layer_that_is_thawed_changes_no_layout_whatever_a_hook_makes_of_it(tmp_path: Path) -> None:
    model = hooked(each(Tensor.half))()
    model.body.requires_grad_(False)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        model.body.requires_grad_(True)
        recorder.record(1)
    layout = open_run(tmp_path / "run").layout
    assert {entry.dtype for entry in layout.weights} == {"float32"}
    assert [entry.name for entry in layout.weights if entry.trainable] == ["head.weight", "head.bias"]


def test_a_renamed_parameter_has_the_name_that_the_state_dict_gives(tmp_path: Path) -> None:
    model = hooked(rename)()
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    assert_same(load_weights(tmp_path / "run", 0), copied(model))
    assert "classifier.weight" in open_run(tmp_path / "run").layout


def test_trained_parameters_that_the_state_dict_lacks_are_recorded_and_warned_of(tmp_path: Path) -> None:
    model = hooked(without_head)()
    with pytest.warns(
        RuntimeWarning, match=r"does not give 'head.weight', 'head.bias', trained parameters, which are re"
    ):
        recorder = Recorder(model, tmp_path / "run")
    with recorder:
        recorder.record(0)
        model.head.requires_grad_(False)  # frozen later, they are recorded all the same
        recorder.record(1)
    assert torch.equal(load_weights(tmp_path / "run", 1)["head.weight"], model.head.weight)


def test_frozen_parameters_that_the_state_dict_lacks_are_left_out_until_they_are_trained(tmp_path: Path) -> None:
    model = hooked(without_head)()
    model.head.requires_grad_(False)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        model.head.requires_grad_(True)
        with pytest.raises(LayoutError, match=r"epoch 1: 'head.weight' is new, .* \(2 are: also 'head.bias'\)"):
            recorder.record(1)
    assert "head.weight" not in open_run(tmp_path / "run").layout


def test_what_a_hook_makes_of_trained_parameters_is_left_out_and_named() -> None:
    assert warned(hooked(fused, qkv)()) == (
        "the model's state_dict does not give 'q.weight', 'k.weight', 'v.weight', trained parameters, which are"
        " recorded as weights; 'qkv.weight', which a hook of the state_dict makes, is left out"
    )


def test_no_warning_of_what_is_excluded() -> None:
    RecordedModel(hooked(without_head)(), exclude="head.*")


def test_a_name_that_the_state_dict_gives_to_another_tensor_is_refused_unless_it_is_excluded() -> None:
    def change(state: dict[str, Any]) -> None:
        state["head.bias"] = state.pop("body.0.bias")

    with pytest.raises(LayoutError, match=r"not give 'head.bias', trained .* other tensors under their names; rename"):
        RecordedModel(hooked(change)())
    assert "head.bias" not in RecordedModel(hooked(change)(), exclude="head.bias").tensors()


def test_a_state_dict_of_somebodys_own_needs_no_options(tmp_path: Path) -> None:
    class Own(nn.Sequential):
        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return {f"own.{name}": tensor for name, tensor in super().state_dict().items()}

    with Recorder(Own(nn.Linear(2, 2), nn.BatchNorm1d(2)), tmp_path / "run") as recorder:
        recorder.record(0)
    layout = open_run(tmp_path / "run").layout
    assert [entry.name for entry in layout.weights] == ["own.0.weight", "own.0.bias", "own.1.weight", "own.1.bias"]
    assert all(entry.trainable for entry in layout.weights)


def test_trainable_only_means_the_parameters_and_not_their_copies() -> None:
    model = hooked(each(Tensor.detach))()
    model.body.requires_grad_(False)
    assert list(RecordedModel(model, trainable_only=True).tensors()) == ["head.weight", "head.bias"]


def test_parameters_of_a_class_without_memory_of_its_own_are_not_tied() -> None:
    model = nn.Module()
    for name in ("a", "b"):
        setattr(model, name, nn.Parameter(TwoTensor(torch.randn(3), torch.randn(3))))  # type: ignore[no-untyped-call]
    recorded = RecordedModel(model)
    assert [entry.names for entry in recorded.layout(recorded.tensors()).weights] == [("a",), ("b",)]


def test_a_parameter_whose_memory_was_freed_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, bias=False)
    model.weight.untyped_storage().resize_(0)  # as the first FSDP leaves it between two passes
    with pytest.raises(LayoutError, match=r"'weight' has no memory, which was freed, .*; record while its values are"):
        Recorder(model, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_second_model_is_made_of_one_with_the_weight_norm_of_before() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)))
    copy = plain_copy(model)
    x = torch.randn(4, 3)
    assert torch.equal(copy(x), model(x))
    with torch.no_grad():
        copy[0].weight_g += 1  # type: ignore[index, operator]
    assert not torch.equal(copy(x), model(x))


# --- What is no tensor


class Extra(nn.Linear):
    """Gives something of its own."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.parametrize("extra", [None, {"amax": 1.0}, io.BytesIO(b"x"), torch.ones(3), torch.tensor(1)])
def test_extra_state_is_left_out_and_said(extra: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Extra(extra), nn.Linear(2, 2))
    with caplog.at_level(logging.INFO, "trajkit"), Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        model[0].extra = torch.ones(7)  # of another size at each epoch, as some are
        recorder.record(1)
    assert caplog.text.count("'0._extra_state' left out, extra state of modules is not recorded") == 1
    assert [entry.name for entry in open_run(tmp_path / "run").layout.tensors] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


@pytest.mark.parametrize("options", [{"exclude": "*_extra_state"}, {"include": "1.*"}, {"trainable_only": True}])
def test_nothing_is_said_of_extra_state_that_nobody_asks_for(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(Extra({}), nn.Linear(2, 2))
    with caplog.at_level(logging.INFO, "trajkit"), Recorder(model, tmp_path / "run", **options) as recorder:
        recorder.record(0)
    assert "extra" not in caplog.text


def packed() -> nn.Module:
    """With values of other kinds, as quantised modules have."""
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(lambda _module, state, *_: state.update(scale=0.5, packed=(1, 2)))
    return model


def test_other_values_are_refused_unless_they_are_excluded(tmp_path: Path) -> None:
    message = (
        r"run: the model: 'scale', 'packed' in the model's state_dict: expected tensors, found float, tuple; .*exclude="
    )
    with pytest.raises(LayoutError, match=message):
        Recorder(packed(), tmp_path / "run")
    with Recorder(packed(), tmp_path / "run", exclude=["scale", "packed"]) as recorder:
        recorder.record(0)
    assert list(open_run(tmp_path / "run").layout.names()) == ["weight", "bias"]


def test_other_values_are_no_matter_of_online_cmd() -> None:
    assert [entry.name for entry in OnlineCMD(packed()).entries] == ["weight", "bias"]


# --- What is no model, or none with weights


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"w": torch.ones(2)},
            "found dict; pass the model itself; state dicts in files are recorded by import_check",
        ),
        (None, "found None; pass the model that is trained"),
        ([torch.ones(2)], "found list; pass the model itself, not its parameters or what trains it"),
        ([nn.Linear(2, 2)], "found list; pass one of the models, or all in a torch.nn.ModuleDict"),
        ({"net": nn.Linear(2, 2)}, "found dict; pass one of the models, or all in a torch.nn.ModuleDict"),
        (nn.Linear, "found the class Linear; pass an instance of it"),
        ("model.pt", "found str; pass the model itself"),
        (nn.Linear(2, 2).parameters(), "found generator; pass the model itself, not its parameters"),
    ],
    ids=["a dict", "None", "a list", "a list of models", "a dict of models", "a class", "a path", "parameters"],
)
def test_what_is_no_model_is_refused_in_a_sentence(given: Any, message: str, tmp_path: Path) -> None:
    cmd = OnlineCMD(nn.Linear(2, 2))
    for call in (
        lambda: Recorder(given, tmp_path / "run"),
        lambda: OnlineCMD(given),
        lambda: EmbeddedCMD(given),
        lambda: cmd.update_parameters(given),
        lambda: cmd.applied_to(given).__enter__(),
    ):
        with pytest.raises(InputError, match=rf"the model: expected a torch.nn.Module, {message}"):
            call()  # type: ignore[no-untyped-call]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_a_model_of_integers_is_refused_in_a_sentence(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    for make in (lambda: Recorder(model, tmp_path / "run"), lambda: OnlineCMD(model)):
        with pytest.raises(LayoutError, match=rf"'weight' is {name}, .*; record the model before it is quantised"):
            make()


# --- ZeRO-3


def stubs() -> nn.Module:
    model = net()
    for layer in (model.head, model.body[0]):
        layer.weight.data = torch.empty(0)
    return model  # type: ignore[no-any-return]


def test_stubs_are_warned_of_when_a_model_is_recorded(tmp_path: Path) -> None:
    message = (
        r"'body.0.weight', 'head.weight' have shape \(0,\) and no values, as DeepSpeed's ZeRO-3 .* zero_to_fp32.py"
    )
    with pytest.warns(RuntimeWarning, match=message):
        recorder = Recorder(stubs(), tmp_path / "run")
    with recorder:
        recorder.record(0)
    with pytest.warns(RuntimeWarning, match=message):
        OnlineCMD(stubs())
    assert open_run(tmp_path / "run").layout.stubs == ("body.0.weight", "head.weight")


def test_a_model_of_stubs_alone_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    with pytest.raises(LayoutError, match=r"all of them have shape \(0,\), as DeepSpeed's ZeRO-3"):
        Recorder(model, tmp_path / "run")
