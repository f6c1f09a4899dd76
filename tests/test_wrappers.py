"""What a model is wrapped in, or spread over, does not show in its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from trajkit import Recorder, load_weights, open_run
from trajkit.errors import InputError, LayoutError, TrajkitError
from trajkit.vector import flatten, layout_of

# What torch says of itself: no GPU is here, and these parts of it are young.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
]


class Tiny(nn.Module):
    """Tied, uneven and single-valued tensors, a buffer, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.inner[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)) * self.gain)  # type: ignore[no-any-return]


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def train(model: nn.Module, epoch: int) -> None:
    """A step, the same on every rank."""
    x = torch.randint(7, (12,), generator=torch.Generator().manual_seed(epoch))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    nn.functional.cross_entropy(model(x), (x + 1) % 7).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def assert_same_run(path: Path, expected: Path) -> None:
    found, run = open_run(path), open_run(expected)
    assert found.layout == run.layout
    assert found.epochs.tolist() == run.epochs.tolist()
    for epoch in run.epochs.tolist():
        ours, theirs = found.state_dict(epoch), run.state_dict(epoch)
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (epoch, name)


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # the default one takes long to import


def compiled_inside(model: Tiny) -> nn.Module:
    model.inner = compiled(model.inner)  # type: ignore[assignment]
    model.inner._orig_mod[2] = DataParallel(model.inner._orig_mod[2])  # type: ignore[operator, union-attr]
    return model


def once(module: nn.Module, *args: Any) -> Any:
    """Instead of a checkpoint's two forward passes, which would count twice in BatchNorm's statistics."""
    return module(*args)


def checkpointed(model: nn.Module) -> nn.Module:
    return checkpoint_wrapper(model, checkpoint_fn=once)


def checkpointed_inside(model: Tiny) -> nn.Module:
    model.inner[1] = checkpointed(model.inner[1])
    model.inner = checkpointed(model.inner)  # type: ignore[assignment]
    return model


WRAPPERS: dict[str, Callable[[Tiny], nn.Module]] = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "torch.compile": compiled,
    "AveragedModel": AveragedModel,
    "wrappers of wrappers": lambda model: compiled(DistributedDataParallel(compiled(AveragedModel(model)))),
    "wrapped submodules": compiled_inside,
    "activation checkpointing": checkpointed,
    "checkpointed submodules": checkpointed_inside,
}


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_recorded_as_the_plain_one(wrapper: str, tmp_path: Path) -> None:
    with Recorder(tiny(), tmp_path / "plain") as recorder:
        recorder.record(0)
    with Recorder(WRAPPERS[wrapper](tiny()), tmp_path / "wrapped") as recorder:
        recorder.record(0)
    assert_same_run(tmp_path / "wrapped", tmp_path / "plain")
    tiny().load_state_dict(load_weights(tmp_path / "wrapped", 0))


def test_a_run_may_go_on_with_another_wrapper(tmp_path: Path) -> None:
    model = tiny()
    for epoch, wrapped in enumerate((model, compiled(model), DataParallel(model))):
        with Recorder(wrapped, tmp_path / "run", exclude=["head.*", "*num_batches*"]) as recorder:
            recorder.record(epoch)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2]


@pytest.mark.usefixtures("alone_in_a_group")
def test_a_dtensor_in_a_checkpoint_is_refused() -> None:
    tensors = {"w": distribute_tensor(torch.zeros(10, 3), init_device_mesh("cpu", (1,)), [Replicate()])}
    with pytest.raises(LayoutError, match=r"'w' is a DTensor, spread over processes; gather it with full_tensor\(\)"):
        flatten(layout_of(tensors), tensors)


# --- Two processes


def one_of_two(rank: int, folder: Path) -> None:
    init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    for kind in ("sharded", "fsdp1", "fsdp1 on rank 0", "ddp"):
        model: nn.Module = tiny()
        if kind == "sharded":
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        elif kind.startswith("fsdp1"):
            model.inner = checkpointed(model.inner)
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
            on_rank_0 = FullStateDictConfig(rank0_only=kind != "fsdp1")
            FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, on_rank_0)
        else:
            model = DistributedDataParallel(model)
        for first in (0, 2):  # the second time, it is continued
            with Recorder(model, folder / kind) as recorder:
                assert recorder.next_epoch == first
                for epoch in range(first, first + 2):
                    train(model, epoch)
                    recorder.record(epoch, {"loss": epoch}, wait=epoch == 1)
                assert recorder.next_epoch == first + 2
                said = ""
                try:
                    recorder.record(epoch)
                except InputError as error:
                    said = str(error)
                refused = f"epoch {epoch} is recorded already"
                assert refused in said if rank == 0 or kind == "sharded" else not said
        if kind == "fsdp1":
            FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
            with pytest.raises(
                LayoutError, match=r"is a ShardedTensor, .*; call FSDP.set_state_dict_type\(model, State"
            ):
                Recorder(model, folder / "parts")
            continue
        with pytest.raises(TrajkitError, match="expected a run or an empty folder, found 'mine'"):
            Recorder(model, folder / "occupied")
    if rank == 0:  # as many write it
        with Recorder(model, folder / "alone") as recorder:
            recorder.record(0)
        model = tiny()  # trained in the same process: how many threads add up must not matter
        with Recorder(model, folder / "plain") as recorder:
            for epoch in range(4):
                train(model, epoch)
                recorder.record(epoch, {"loss": epoch})
    (folder / f"{rank}.json").write_text(json.dumps("done"))
    destroy_process_group()


def test_two_processes_leave_the_run_that_one_leaves_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "mine").touch()
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call, attr-defined]
    assert (tmp_path / "0.json").exists()
    assert (tmp_path / "1.json").exists()
    assert_same_run(tmp_path / "ddp", tmp_path / "plain")
    assert_same_run(tmp_path / "sharded", tmp_path / "plain")
    assert_same_run(tmp_path / "fsdp1", tmp_path / "plain")
    assert_same_run(tmp_path / "fsdp1 on rank 0", tmp_path / "plain")
    assert open_run(tmp_path / "sharded").metrics == open_run(tmp_path / "plain").metrics
    assert open_run(tmp_path / "alone").layout == open_run(tmp_path / "plain").layout
