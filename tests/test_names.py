"""Which tensors of a model are weights, and under which names: in a Recorder, in a file alone, and in a file that goes
into the run of a Recorder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wrappers import alone_in_a_group, checkpointed, compiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from trajkit import ParameterLayout, Recorder, import_checkpoints, open_run
from trajkit.errors import TrajkitError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:the model's state_dict does not give:RuntimeWarning"),
    pytest.mark.usefixtures("alone_in_a_group"),
]
__all__ = ["alone_in_a_group"]

State = dict[str, Any]


def net() -> Any:
    """The plain model."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(2, 2)))


BODY = "body.0.weight body.0.bias body.1.weight body.1.bias"
STATISTICS = "body.1.running_mean body.1.running_var body.1.num_batches_tracked"
PLAIN = f"{BODY} head.weight head.bias | {STATISTICS}"
"""The names of the plain model: weights, then buffers."""


def under(prefix: str, names: str = PLAIN) -> str:
    """The names with a prefix."""
    return " ".join(name if name == "|" else prefix + name for name in names.split())


def renamed(old: str, new: str, names: str = PLAIN) -> str:
    """The names, where some begin otherwise."""
    return " ".join(new + name.removeprefix(old) if name.startswith(old) else name for name in names.split())


@dataclass(frozen=True)
class Shape:
    """A model, and what is expected of it: names of weights, a bar, names of buffers; or what a refusal says.

    file: what of its state dict is in a file. alone: the run that is made of the file. into: the run of `run`, a model
    that is recorded first, when the file has gone into it; `run` is the model itself by default.
    """

    model: Callable[[], nn.Module]
    recorded: str = PLAIN
    file: Callable[[State], State] = dict
    alone: str = ""
    into: str = ""
    run: Callable[[], nn.Module] = net


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """The model with one submodule wrapped."""

    def made() -> nn.Module:
        model = net()
        model.body = wrap(model.body)
        return model  # type: ignore[no-any-return]

    return made


def around(*wrappers: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """The model in wrappers, from the inside out."""

    def made() -> nn.Module:
        model = net()
        for wrap in wrappers:
            model = wrap(model)
        return model  # type: ignore[no-any-return]

    return made


def attribute(name: str, **beside: Callable[[], nn.Module | nn.Parameter]) -> Callable[[], nn.Module]:
    """The model as an attribute of a class of somebody's own, alone or beside other attributes."""

    def made() -> nn.Module:
        model = nn.Module()
        setattr(model, name, net())
        for other, make in beside.items():
            setattr(model, other, make())
        return model

    return made


class AbstractGradSampleModule(nn.Module):
    """Named, and made, as the one of Opacus."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module


class GradSampleModule(AbstractGradSampleModule):
    pass


class DeepSpeedEngine(nn.Module):
    """Named, and made, as the one of DeepSpeed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def fsdp(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp_with_names(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2() -> nn.Module:
    return fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))  # type: ignore[no-any-return]


def gathered(state: State) -> State:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def fabric() -> nn.Module:
    lightning = pytest.importorskip("lightning")
    return lightning.Fabric(accelerator="cpu", devices=1).setup(net())  # type: ignore[no-any-return]


def hooked(change: Callable[[State], object], make: Callable[[], nn.Module] = net) -> Callable[[], nn.Module]:
    """The model with a hook that changes its state dict in place."""

    def made() -> nn.Module:
        def hook(_module: nn.Module, state: State, _prefix: str, _metadata: object) -> None:
            change(state)

        model = make()
        model.register_state_dict_post_hook(hook)
        return model

    return made


def each(change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    """A hook that changes every floating tensor."""

    def changed(state: State) -> None:
        state.update({name: change(value) for name, value in state.items() if value.is_floating_point()})

    return changed


def rename(state: State) -> None:
    for name in [name for name in state if name.startswith("head.")]:
        state[f"classifier.{name.removeprefix('head.')}"] = state.pop(name)


def without_head(state: State) -> None:
    del state["head.weight"], state["head.bias"]


def with_more(state: State) -> None:
    state["mean"], state["version"] = state["head.weight"].mean(), torch.tensor(3)


def qkv() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("q", "k", "v")})


def fused(state: State) -> None:
    state["qkv.weight"] = torch.cat([state.pop(f"{name}.weight") for name in ("q", "k", "v")])


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def tied_to_a_buffer() -> nn.Module:
    model = nn.ModuleDict({"mirror": nn.Module(), "head": nn.Linear(2, 2, bias=False)})
    model["mirror"].register_buffer("weight", model["head"].weight.detach())  # type: ignore[operator]
    return model


class Extra(nn.Linear):
    """With a state of its own in the state dict."""

    def get_extra_state(self) -> Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: object) -> None: ...


def adapted() -> nn.Module:
    """As PEFT names LoRA's parameters."""
    layer = nn.Linear(2, 2)
    layer.requires_grad_(False)
    layer.add_module("lora_A", nn.ModuleDict({"default": nn.Linear(2, 1, bias=False)}))
    layer.add_module("lora_B", nn.ModuleDict({"default": nn.Linear(1, 2, bias=False)}))
    return nn.ModuleDict({"base_model": nn.ModuleDict({"model": nn.ModuleDict({"q": layer})})})


ADAPTED = under("base_model.model.q.", "weight bias lora_A.default.weight lora_B.default.weight")


def lists() -> nn.Module:
    model = nn.Module()
    model.list = nn.ParameterList([torch.ones(2), torch.ones(3)])
    model.dict = nn.ParameterDict({"a": torch.ones(2)})
    model.register_buffer("forgotten", torch.ones(2), persistent=False)
    model.register_buffer("counts", torch.ones(2, dtype=torch.int64))
    return model


def with_integers() -> nn.Module:
    model = nn.Linear(2, 2)
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)  # type: ignore[assignment]
    return model


def observed() -> nn.Module:
    ao = torch.ao.quantization
    model = nn.Sequential(nn.Linear(3, 2))
    model.qconfig = ao.QConfig(ao.default_observer, ao.default_weight_observer)  # type: ignore[assignment]
    return ao.prepare(model)  # type: ignore[no-untyped-call, no-any-return]


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


OWN_MODULE = f"{under('module.', PLAIN.split(' | ')[0])} head.weight | {under('module.', STATISTICS)}"
"""The names of a class that has attributes `module`, the plain model, and `head`."""


def own_module() -> nn.Module:
    return attribute("module", head=lambda: nn.Linear(2, 2, bias=False))()


def twice() -> nn.Module:
    """A class with a weight, and a weight of the same name and shape in its attribute `module`."""
    model = nn.Module()
    model.module, model.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(2, 2))
    return model


SHAPES: dict[str, Shape] = {
    # Wrappers around the model: a file has what they add, or a counter, and goes into the run of the plain model.
    "the plain model": Shape(net),
    "DistributedDataParallel": Shape(around(DistributedDataParallel)),
    "DataParallel": Shape(around(DataParallel)),
    "torch.compile": Shape(around(compiled)),
    "AveragedModel": Shape(around(AveragedModel)),
    "an averaged one in DataParallel": Shape(around(AveragedModel, DataParallel)),
    "an average of an average": Shape(around(AveragedModel, AveragedModel)),
    "three wrappers": Shape(around(compiled, DistributedDataParallel, compiled)),
    "activation checkpointing": Shape(around(checkpointed)),
    "Opacus": Shape(around(GradSampleModule)),
    "Opacus in DistributedDataParallel": Shape(around(GradSampleModule, DistributedDataParallel)),
    "DeepSpeed": Shape(around(DeepSpeedEngine)),
    "Fabric": Shape(fabric),
    "FSDP": Shape(around(fsdp)),
    "FSDP with the names of parameters": Shape(around(fsdp_with_names)),
    "FSDP of a submodule": Shape(inside(fsdp_with_names)),
    "FSDP2": Shape(fsdp2, file=gathered),
    "a compiled script": Shape(around(torch.jit.script)),
    # Wrappers around a submodule: a file alone does not say whether "module" is a wrapper's.
    "a compiled submodule": Shape(inside(compiled)),
    "a checkpointed submodule": Shape(inside(checkpointed)),
    "a checkpointed, compiled submodule": Shape(inside(lambda module: checkpointed(compiled(module)))),
    "an averaged submodule": Shape(inside(AveragedModel)),
    "a parallel submodule": Shape(inside(DataParallel), alone=renamed("body.", "body.module.")),
    "a parallel, compiled submodule": Shape(
        inside(lambda module: DataParallel(compiled(module))), alone=renamed("body.", "body.module.")
    ),
    "the run has the long names": Shape(
        inside(compiled), file=lambda _: net().state_dict(), run=attribute("module"), into=under("module.")
    ),
    # What is really called "module" keeps its name.
    "a class with module and head": Shape(own_module, OWN_MODULE, run=own_module),
    "a class with module and head, parallel": Shape(
        lambda: DataParallel(own_module()), OWN_MODULE, alone=OWN_MODULE, run=own_module
    ),
    "a class with module alone": Shape(
        attribute("module"), under("module."), alone=PLAIN, run=attribute("module"), into=under("module.")
    ),
    "a class with _module and head": Shape(
        attribute("_module", head=lambda: nn.Linear(2, 2, bias=False)),
        OWN_MODULE.replace("module", "_module"),
        run=attribute("_module", head=lambda: nn.Linear(2, 2, bias=False)),
    ),
    "equal names in module and beside it": Shape(twice, "weight module.weight |", run=twice),
    "equal names in module and beside it, parallel": Shape(
        lambda: DataParallel(twice()), "weight module.weight |", run=twice
    ),
    # Prefixes, of which a file alone does not say anything.
    "in an attribute model": Shape(attribute("model"), under("model."), into=PLAIN),
    "in an attribute net, parallel": Shape(
        lambda: DataParallel(attribute("net")()), under("net."), alone=under("net."), into=PLAIN
    ),
    "in an attribute model, compiled there": Shape(
        lambda: nn.ModuleDict({"model": compiled(net())}), under("model."), alone=under("model."), into=PLAIN
    ),
    "in base_model.model": Shape(net, file=prefixed("base_model.model."), alone=under("base_model.model."), into=PLAIN),
    "the run in an attribute model": Shape(net, run=attribute("model"), into=under("model.")),
    "a prefix without a part of the model": Shape(
        attribute("model"),
        under("model."),
        file=lambda state: {name: state[name] for name in state if name != "model.head.bias"},
        alone=renamed("model.head.bias", "", under("model.")),
        into=r"all names of the checkpoint begin with 'model.', which those of the run lack; without it,"
        r" 'head.bias' is missing, the run has it; record into a new run",
    ),
    "a prefix and more of the model": Shape(
        attribute("model"),
        under("model."),
        file=lambda state: {**state, "model.extra": torch.ones(3)},
        alone=under("model.").replace(" |", " model.extra |"),
        into=r"'extra' is new, the run does not have it",
    ),
    "student and teacher": Shape(
        attribute("student", teacher=net),
        f"{under('student.', PLAIN.split(' | ')[0])} {under('teacher.', PLAIN)} {under('student.', STATISTICS)}",
        into=r"without this prefix, the names that begin with 'student.' or 'teacher.' are the run's; choose some, such"
        r" as by include=\('student.\*',\) \(--include 'student.\*'\)",
    ),
    "other names": Shape(
        lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}),
        "a.weight a.bias b.weight b.bias |",
        into=r"'body.0.weight' is missing, the run has it \(9 are: also 'body.0.bias', .* and 5 more\), and"
        r" 'a.weight' is new, the run does not have it \(4 are: also 'a.bias', 'b.weight', 'b.bias'\)",
    ),
    # Hooks of the state dict: parameters are known by what they are, not by their names.
    "a hook that renames": Shape(
        hooked(rename), renamed("head.", "classifier."), run=hooked(rename), into=renamed("head.", "classifier.")
    ),
    "a hook that detaches": Shape(hooked(each(Tensor.detach))),
    "a hook that copies": Shape(hooked(each(torch.clone))),
    "a hook that copies tied weights": Shape(
        hooked(each(torch.clone), tied), "embed.weight=head.weight |", alone="embed.weight head.weight |", run=tied
    ),
    "a hook that converts": Shape(hooked(each(Tensor.half)), into="has dtype float16, the run has float32"),
    "a hook that adds": Shape(
        hooked(with_more),
        f"{PLAIN} mean version",
        alone=f"{PLAIN} version".replace(" |", " mean |"),
        run=hooked(with_more),
    ),
    "a hook that leaves parameters out": Shape(
        hooked(without_head), alone=f"{BODY} | {STATISTICS}", into="'head.weight' is missing"
    ),
    "a hook that fuses": Shape(
        hooked(fused, qkv), "q.weight k.weight v.weight |", alone="qkv.weight |", run=qkv, into="'qkv.weight' is new"
    ),
    "a hook that leaves out a tied name": Shape(
        hooked(lambda state: state.pop("head.weight"), tied),
        "embed.weight |",
        run=tied,
        into="embed.weight=head.weight |",
    ),
    # Parameters that are made of others, of classes of their own, or none at all.
    "tied weights": Shape(tied, "embed.weight=head.weight |", run=tied),
    "a weight tied to a buffer": Shape(tied_to_a_buffer, "mirror.weight=head.weight |", run=tied_to_a_buffer),
    "weight_norm": Shape(
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        "bias parametrizations.weight.original0 parametrizations.weight.original1 |",
        run=lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    ),
    "weight_norm of before": Shape(
        lambda: weight_norm(nn.Linear(2, 2)), "bias weight_g weight_v |", run=lambda: weight_norm(nn.Linear(2, 2))
    ),
    "spectral_norm": Shape(
        lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
        "bias parametrizations.weight.original | parametrizations.weight.0._u parametrizations.weight.0._v",
        alone="bias parametrizations.weight.original parametrizations.weight.0._u parametrizations.weight.0._v |",
        run=lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
    ),
    "spectral_norm of before": Shape(
        lambda: spectral_norm(nn.Linear(2, 2)),
        "bias weight_orig | weight_u weight_v",
        alone="bias weight_orig weight_u weight_v |",
        run=lambda: spectral_norm(nn.Linear(2, 2)),
    ),
    "LoRA": Shape(adapted, f"{ADAPTED} |", run=adapted),
    "lists and dicts of parameters": Shape(lists, "list.0 list.1 dict.a | counts", run=lists),
    "observers": Shape(
        observed,
        "0.weight 0.bias | 0.activation_post_process.eps 0.activation_post_process.min_val"
        " 0.activation_post_process.max_val",
        alone="'0.activation_post_process.min_val' has inf",
        run=observed,
    ),
    "integers among the parameters": Shape(with_integers, "weight bias | index", run=with_integers),
    "extra state": Shape(
        lambda: nn.Sequential(Extra(2, 2)), "0.weight 0.bias |", run=lambda: nn.Sequential(Extra(2, 2))
    ),
    "a copy": Shape(lambda: copy.deepcopy(DataParallel(net()))),
}


def kinds(layout: ParameterLayout) -> str:
    """The names of a layout as they stand in the table; tied ones are joined by a sign of equality."""
    weights, buffers = (" ".join("=".join(entry.names) for entry in part) for part in (layout.weights, layout.buffers))
    return f"{weights} | {buffers}"


def sides(names: str) -> list[list[str]]:
    return [sorted(side.split()) for side in names.split("|")]


def require(expected: str, found: Callable[[], str]) -> None:
    """Raise `AssertionError` unless these names are found, or the refusal is raised."""
    if "|" in expected:
        assert sides(found()) == sides(expected)
    else:
        with pytest.raises(TrajkitError, match=expected):
            found()


@pytest.mark.parametrize("name", SHAPES)
def test_the_names_and_kinds_of_a_model(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]

    def made(model: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return model()

    def recorded(model: nn.Module, run: str) -> str:
        with Recorder(model, tmp_path / run, fsync=False) as recorder:
            recorder.record(0)
        return kinds(open_run(tmp_path / run).layout)

    def imported(run: str) -> str:
        import_checkpoints(tmp_path / run, [tmp_path / "epoch1.pt"], fsync=False)
        return kinds(open_run(tmp_path / run).layout)

    model = made(shape.model)
    require(shape.recorded, lambda: recorded(model, "recorded"))
    torch.save(shape.file(model.state_dict()), tmp_path / "epoch1.pt")
    require(shape.alone or shape.recorded, lambda: imported("alone"))
    recorded(made(shape.run), "run")
    require(shape.into or shape.recorded, lambda: imported("run"))
    first, *others = open_run(tmp_path / "run").weights[:]
    assert all((first == weights).all() for weights in others), "a tensor went to the place of another"


def test_the_table_is_of_at_least_thirty_shapes() -> None:
    assert len(SHAPES) >= 30
