"""What a model is wrapped in does not show in online and embedded CMD; what it is sharded by is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_wrappers import WRAPPERS, alone_in_a_group, compiled, tiny, train
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from trajkit import EmbeddedCMD, OnlineCMD, Recorder
from trajkit.errors import InputError, LayoutError
from trajkit.training.callbacks.modelling import TrainerCMD
from trajkit.training.wrapping import plain_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
    pytest.mark.usefixtures("alone_in_a_group"),
]
__all__ = ["alone_in_a_group"]

SETTINGS: dict[str, Any] = {"warmup": 3, "modes": 2}
EPOCHS = 6


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def trained(model: nn.Module, *given: nn.Module, **settings: Any) -> OnlineCMD:
    """Online CMD of a short training, which is made with the first of these and updated with the others in turn."""
    cmd = OnlineCMD(given[0], **SETTINGS, **settings)
    for epoch in range(EPOCHS):
        train(model, epoch)
        cmd.update_parameters(given[(epoch + 1) % len(given)])
    return cmd


def hooked(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[nn.Module], nn.Module]:
    """The model with a hook that gives what its state dict is to be."""

    def made(model: nn.Module) -> nn.Module:
        def hook(_module: nn.Module, state: dict[str, Any], *_: object) -> None:
            changed = change(dict(state))
            state.clear()
            state.update(changed)

        model.register_state_dict_post_hook(hook)
        return model

    return made


def without_a_weight(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name != "inner.2.bias"}


HOOKED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a hook that renames": hooked(lambda state: {f"net.{name}": tensor for name, tensor in state.items()}),
    "a hook that detaches": hooked(lambda state: {name: tensor.detach() for name, tensor in state.items()}),
    "a hook that copies": hooked(lambda state: {name: tensor.detach().clone() for name, tensor in state.items()}),
    "a hook that adds": hooked(lambda state: state | {"mean": state["gain"].mean()}),
}
EMBEDDED = [
    "DistributedDataParallel",
    "torch.compile",
    "wrapped submodules",
    "activation checkpointing",
    "checkpointed submodules",
    *HOOKED,
]


@cache
def of_the_plain_model() -> OnlineCMD:
    model = tiny()
    return trained(model, model, use_buffers=True)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("first", ["plain", "wrapped"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_cmd_weights_of_the_plain_one(wrapper: str, first: str) -> None:
    model = WRAPPERS[wrapper](tiny())
    plain = plain_model(model)
    cmd = trained(model, *((plain, model) if first == "plain" else (model, plain)), use_buffers=True)
    expected = of_the_plain_model()
    np.testing.assert_array_equal(cmd.mode, expected.mode)
    np.testing.assert_array_equal(cmd.scale, expected.scale)
    np.testing.assert_array_equal(cmd.offset, expected.offset)
    before = values(model)
    for given in (model, plain):
        with cmd.applied_to(given) as same:
            assert same is given
            assert_equal(values(plain), values(expected.module))
        assert_equal(values(model), before)


@pytest.mark.parametrize("hook", HOOKED)
def test_a_hook_of_the_state_dict_does_not_show_in_the_cmd_weights(hook: str) -> None:
    model = HOOKED[hook](tiny())
    cmd = trained(model, model, use_buffers=True)
    expected = of_the_plain_model()
    np.testing.assert_array_equal(cmd.mode, expected.mode)
    np.testing.assert_array_equal(cmd.scale, expected.scale)
    np.testing.assert_array_equal(cmd.offset, expected.offset)
    assert_equal(values(cmd.module), values(expected.module))
    with cmd.applied_to(model):
        assert_equal(values(model), values(expected.module))


@pytest.mark.filterwarnings("ignore:the model's state_dict does not give 'inner.2.bias':RuntimeWarning")
def test_a_trained_weight_that_the_state_dict_lacks_has_cmd_weights() -> None:
    model = hooked(without_a_weight)(tiny())
    cmd = trained(model, model)
    assert "inner.2.bias" in [entry.name for entry in cmd.entries]
    assert cmd.scale.size == sum(parameter.numel() for parameter in model.parameters())
    with cmd.applied_to(model):
        assert torch.equal(model.inner[2].bias, cmd.module.inner[2].bias)  # type: ignore[index, union-attr]
    assert not torch.equal(model.inner[2].bias, cmd.module.inner[2].bias)  # type: ignore[index, union-attr]


def test_a_trainer_leaves_the_cmd_weights_in_a_model_with_a_hook() -> None:
    model = HOOKED["a hook that renames"](tiny())
    modelling = TrainerCMD(model, None, {**SETTINGS, "use_buffers": True})
    for epoch in range(EPOCHS):
        train(model, epoch)
        modelling.update(epoch)
    modelling.leave(modelling.modelled())
    assert_equal(values(model), values(of_the_plain_model().module))


def test_the_warm_up_is_read_from_the_run_of_a_model_with_a_hook(tmp_path: Path) -> None:
    model = HOOKED["a hook that renames"](tiny())
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        cmd = OnlineCMD(model, **SETTINGS, run=recorder)
        for epoch in range(EPOCHS):
            train(model, epoch)
            recorder.record(epoch)
            cmd.update_parameters(model)
    np.testing.assert_array_equal(cmd.scale, of_the_plain_model().scale)
    again = OnlineCMD(model, **SETTINGS, run=tmp_path / "run")
    again.load_state_dict(cmd.state_dict())
    assert_equal(values(again.module), values(cmd.module))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_second_model_is_plain(wrapper: str) -> None:
    model = WRAPPERS[wrapper](tiny())
    cmd = OnlineCMD(model, **SETTINGS)
    module = cmd.module
    assert [type(part) for part in module.modules()] == [type(part) for part in tiny().modules()]
    assert list(module.state_dict()) == list(tiny().state_dict())
    assert module.head.weight is module.embed.weight  # type: ignore[union-attr]
    assert not {id(tensor) for tensor in module.parameters()} & {id(tensor) for tensor in model.parameters()}
    train(model, 0)
    cmd.update_parameters(model)
    assert_equal(values(module), values(plain_model(model)))


def test_a_state_of_a_wrapped_model_is_that_of_the_plain_one() -> None:
    first = DataParallel(tiny())
    cmd = trained(first, first)
    model = tiny()
    again = OnlineCMD(compiled(model), **SETTINGS)
    again.load_state_dict(cmd.state_dict())
    model.load_state_dict(first.module.state_dict())
    for epoch in range(EPOCHS, EPOCHS + 2):
        for mine, its in ((model, again), (first, cmd)):
            train(mine, epoch)
            its.update_parameters(mine)
    assert_equal(values(again.module), values(cmd.module))


def test_the_warm_up_is_read_from_the_run_of_a_wrapped_model(tmp_path: Path) -> None:
    model = tiny()
    wrapped = DistributedDataParallel(compiled(model))
    with Recorder(wrapped, tmp_path / "run", fsync=False) as recorder:
        cmd = OnlineCMD(wrapped, **SETTINGS, run=recorder)
        for epoch in range(EPOCHS):
            train(wrapped, epoch)
            recorder.record(epoch)
            cmd.update_parameters(model if epoch % 2 else wrapped)
    np.testing.assert_array_equal(cmd.scale, of_the_plain_model().scale)
    np.testing.assert_array_equal(cmd.offset, of_the_plain_model().offset)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("wrapper", EMBEDDED)
def test_embedding_in_a_wrapped_model_is_that_in_the_plain_one(wrapper: str, mask: bool) -> None:
    found = {}
    for kind in ("plain", wrapper):
        plain = tiny()
        model = plain if kind == "plain" else (WRAPPERS | HOOKED)[wrapper](plain)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
        cmd = EmbeddedCMD(model, optimizer, window=2, percent=40, mask_gradients=mask, **SETTINGS)
        for epoch in range(8):
            x = torch.randint(7, (12,), generator=torch.Generator().manual_seed(epoch))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x + 1) % 7).backward()  # type: ignore[no-untyped-call]
            masked = [
                bool((parameter.grad[cmd._masks[name]] == 0).all())
                for name, parameter in cmd.online.tensors_of(model).items()
                if name in cmd._masks and parameter.grad is not None
            ]
            optimizer.step()
            cmd.step()
        assert all(masked) == mask
        assert cmd.share > 0.9
        momenta = [optimizer.state[p]["momentum_buffer"] for p in plain.parameters() if p.requires_grad]
        found[kind] = values(model) + momenta
    assert_equal(found[wrapper], found["plain"])


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP"])
def test_a_sharded_model_is_refused_with_what_to_do(kind: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    cmd = OnlineCMD(model, **SETTINGS)
    if kind == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    message = "the model: .* is spread over processes, by FSDP or the like, .* record the training, and run 'trajkit o"
    with pytest.raises(LayoutError, match=message):
        OnlineCMD(model, **SETTINGS)
    with pytest.raises(LayoutError, match=message):
        cmd.update_parameters(model)
    with pytest.raises(LayoutError, match=message):
        EmbeddedCMD(model, **SETTINGS)


# --- Two processes


def one_of_two(rank: int, folder: Path) -> None:
    init_process_group("gloo", init_method=f"file://{folder / 'group of two'}", rank=rank, world_size=2)
    tempfile.tempdir = str(folder)
    model = DistributedDataParallel(tiny())
    cmd = trained(model, model)
    torch.save([cmd.scale, cmd.offset, cmd.mode], folder / f"{rank}.pt")
    if rank == 1:
        with pytest.raises(InputError, match=r"rank 1: online CMD has a run for its warm-up, .*; leave run out"):
            OnlineCMD(model, **SETTINGS, run=folder / "run")
    destroy_process_group()


def test_each_of_two_processes_has_the_same_cmd_weights(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call, attr-defined]
    expected = of_the_plain_model()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for mine, wanted in zip(found, (expected.scale, expected.offset, expected.mode), strict=True):
            np.testing.assert_array_equal(mine, wanted)
