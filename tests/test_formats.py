"""Checkpoints as the libraries write them: what is recorded from each is bit for bit what was in the model."""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from test_recorder import Awkward, assert_same, copied
from torch import Tensor, nn

from trajkit import Recorder, import_checkpoints, open_run, repair, write_checkpoint
from trajkit.checkpoints.reading import open_checkpoint
from trajkit.checkpoints.selecting import EVERYTHING, Selection, arrange
from trajkit.checkpoints.stored import StoredFile
from trajkit.checkpoints.streaming import StreamedWeights
from trajkit.errors import InputError, LayoutError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that write


def recorded(path: Path, tmp_path: Path, **selected: Any) -> dict[str, Tensor]:
    """What a run gives back after it was made of one checkpoint."""
    import_checkpoints(tmp_path / "run", [path], first_epoch=0, fsync=False, select=Selection(**selected))
    found: dict[str, Tensor] = open_run(tmp_path / "run").state_dict(0)
    return found


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert_same({name: found[name] for name in expected}, expected)


def awkward() -> nn.Module:
    torch.manual_seed(0)
    model = Awkward()
    del model.double_buffer  # of random values: in a file it cannot be told from a weight
    model.norm(torch.randn(8, 4))
    return model


@pytest.mark.parametrize(
    "save",
    [
        lambda model, path: torch.save(model.state_dict(), path),
        lambda model, path: torch.save({"epoch": 3, "model": model.state_dict(), "loss": 0.5}, path),
        lambda model, path: torch.save(model.state_dict(keep_vars=True), path),
        lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
        lambda model, path: torch.save({"nets": {"a.b": {"g": model.state_dict()}}}, path),
        lambda model, path: torch.save({f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}, path),
        lambda model, path: save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, path),
        lambda model, path: dcp.save({"model": model.state_dict(), "epoch": 3}, checkpoint_id=path),
        lambda model, path: dcp.save(model.state_dict(), checkpoint_id=path),
    ],
    ids=["pt", "nested", "parameters", "legacy", "by key", "wrapped", "safetensors", "dcp", "dcp flat"],
)
def test_every_kind_of_tensor_is_recorded_bit_for_bit(
    save: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = awkward()
    save(model, tmp_path / "epoch0")
    key = "nets.a.b.g" if "by key" in request.node.name else None
    require_same(recorded(tmp_path / "epoch0", tmp_path, key=key), copied(model))


def test_what_trainers_keep_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("out")),
        "accuracy": np.float64(0.5),
        "history": np.arange(3.0),
        "counts": collections.defaultdict(list, a=[1]),
        "seen": {1, 2},
        "optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict(),
    }
    torch.save({"model": awkward().state_dict(), **beside}, tmp_path / "epoch0.pt")
    require_same(recorded(tmp_path / "epoch0.pt", tmp_path), copied(awkward()))


# --- Hugging Face


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50, n_positions=16)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def tied_as_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the name that the library leaves out of its files, since it ties it again."""
    return {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("given", ["the folder", "the index"])
def test_a_sharded_model_of_transformers(given: str, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    tiny.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1KB")
    index = folder / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    imported = import_checkpoints(tmp_path / "run", [folder if given == "the folder" else index])
    assert [item.epoch for item in imported] == [500]
    require_same(open_run(tmp_path / "run").state_dict(500), tied_as_one(copied(tiny)))


def test_a_snapshot_in_the_cache_of_the_hub_may_link_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    blob = snapshot.parents[1] / "blobs" / ("b" * 64)
    save_file({"w": torch.arange(3.0)}, blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    require_same(recorded(snapshot, tmp_path), {"w": torch.arange(3.0)})
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model.safetensors: a symbolic link, expected a file"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("safe", [True, False])
def test_a_sharded_model_of_accelerate(safe: bool, tiny: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(
        tiny, tmp_path / "shards", max_shard_size="1KB", safe_serialization=safe
    )
    name = "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"
    assert (tmp_path / "shards" / name).exists()
    found = recorded(tmp_path / "shards", tmp_path)
    require_same(tied_as_one(found), tied_as_one(copied(tiny)))


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_accelerate_with_two_models(safe: bool, tiny: Any, tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    second = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    models = accelerator.prepare(tiny, second)
    optimizer = accelerator.prepare(torch.optim.Adam(models[1].parameters()))
    models[1](torch.randn(4, 3)).sum().backward()
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)
    accelerator.free_memory()
    require_same(tied_as_one(recorded(tmp_path / "state", tmp_path)), tied_as_one(copied(tiny)))
    (tmp_path / "other").mkdir()
    require_same(recorded(tmp_path / "state", tmp_path / "other", key="model_1"), copied(second))


def test_checkpoints_of_a_trainer(tiny: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    states: dict[int, dict[str, Tensor]] = {}

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            states[state.global_step] = copied(model)

    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    transformers.Trainer(model=tiny.float(), args=arguments, train_dataset=rows, callbacks=[Keep()]).train()
    folders = [tmp_path / "out/checkpoint-4", tmp_path / "out/checkpoint-2"]
    assert [item.epoch for item in import_checkpoints(tmp_path / "run", folders)] == [2, 4]
    assert open_checkpoint(folders[0]).step == 4
    run = open_run(tmp_path / "run")
    for step in (2, 4):
        require_same(run.state_dict(step), tied_as_one(states[step]))


# --- Lightning


def lightning_checkpoints(folder: Path, averaging: str) -> dict[int, dict[str, Tensor]]:
    """Fits two epochs, a checkpoint of each, with or without weight averaging; epoch -> raw weights."""
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    states: dict[int, dict[str, Tensor]] = {}

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Keep(lightning.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            states[trainer.current_epoch] = copied(module)

    torch.manual_seed(0)
    settings = {"swa_lrs": 0.1} if averaging == "StochasticWeightAveraging" else {}
    extra = [getattr(callbacks, averaging)(**settings)] if averaging else []
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[Keep(), *extra, callbacks.ModelCheckpoint(folder, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4))
    return states


@pytest.mark.parametrize("averaging", ["", "WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_checkpoints_of_lightning_give_the_weights_as_trained(averaging: str, tmp_path: Path) -> None:
    states = lightning_checkpoints(tmp_path / "checkpoints", averaging)
    files = sorted((tmp_path / "checkpoints").iterdir())[:2]  # stochastic averaging goes round once more at the end
    assert [path.name for path in files] == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    import_checkpoints(tmp_path / "run", files)
    run = open_run(tmp_path / "run")
    assert run.epochs.tolist() == [0, 1]
    for epoch in (0, 1):
        require_same(run.state_dict(epoch), states[epoch])
        opened = open_checkpoint(files[epoch])
        assert (opened.epoch, opened.step) == (epoch, 2 * epoch + 2)
    if averaging in ("WeightAveraging", "EMAWeightAveraging"):  # the average is there too, and is another
        average = open_checkpoint(files[1], key="state_dict").read("net.0.weight")
        assert not torch.equal(average, states[1]["net.0.weight"])


# --- torch.distributed.checkpoint

SPREAD = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = torch.load(f"{folder}/whole.pt")
placements = {"rows": Shard(0), "uneven": Shard(0), "columns": Shard(1), "same": Replicate()}
spread = {name: distribute_tensor(tensors[name], mesh, [place]) for name, place in placements.items()}
dcp.save({"model": spread, "step": 7}, checkpoint_id=f"{folder}/step7")
dist.destroy_process_group()
"""


def test_tensors_that_two_processes_saved_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {
        "rows": torch.randn(4, 3),
        "uneven": torch.randn(5, 2).bfloat16(),
        "columns": torch.arange(12).view(2, 6),
        "same": torch.tensor([0.5, -0.0, 1e-40]),
    }
    torch.save(whole, tmp_path / "whole.pt")
    command = [sys.executable, "-W", "ignore", "-c", SPREAD]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert {path.name for path in (tmp_path / "step7").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    import_checkpoints(tmp_path / "run", [tmp_path / "step7"])
    require_same(open_run(tmp_path / "run").state_dict(7), whole)
    assert open_checkpoint(tmp_path / "step7").epoch == 7


def test_a_sharded_folder_of_accelerate(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "state/pytorch_model_fsdp_0")
    require_same(recorded(tmp_path / "state", tmp_path), copied(model))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("epoch1.safetensors", {}),
        ("epoch1", {"format": "safetensors", "max_shard_size": 100}),
        ("epoch1.pt", {}),
        ("epoch1.dcp", {"format": "dcp"}),
    ],
)
def test_what_was_exported_is_recorded_again_bit_for_bit(name: str, options: Any, tmp_path: Path) -> None:
    model = awkward()
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        recorder.record(0)
    write_checkpoint(tmp_path / "run", 0, tmp_path / name, **options)
    import_checkpoints(tmp_path / "run", [tmp_path / name], fsync=False, epochs=[1])  # a file may say that it is of 0
    require_same(open_run(tmp_path / "run").state_dict(1), copied(model))


# --- Piece by piece


def test_each_tensor_is_read_once_and_a_slice_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = awkward()
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "epoch0.safetensors")
    torch.save(model.state_dict(), tmp_path / "epoch0.pt")
    sizes: list[int] = []
    read = StoredFile.read_into

    def watched(file: StoredFile, buffer: memoryview, offset: int) -> None:
        sizes.append(len(buffer))
        read(file, buffer, offset)

    monkeypatch.setattr(StoredFile, "read_into", watched)
    for path in (tmp_path / "epoch0.safetensors", tmp_path / "epoch0.pt"):
        arranged = arrange(open_checkpoint(path), EVERYTHING, None)
        expected = StreamedWeights(arranged)[:]
        sizes.clear()
        weights = StreamedWeights(arranged)
        pieces = [weights[start : start + 5] for start in range(0, weights.size, 5)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
        n_bytes = sum(entry.size * getattr(torch, entry.dtype).itemsize for entry in arranged.layout.weights)
        assert sum(sizes) == n_bytes


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_changes_while_it_is_read_is_told(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"epoch0{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({"a": torch.zeros(8), "b": torch.zeros(8)}, path)
    opened = open_checkpoint(path)
    opened.read("a")
    save({"a": torch.ones(8), "b": torch.ones(8)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    with pytest.raises(InputError, match=rf"epoch0{suffix}: was changed while it was read; record it again"):
        opened.read("b")
    path.unlink()
    with pytest.raises(InputError, match=rf"epoch0{suffix}: cannot be read \(No such file"):
        opened.read("b")


# --- Selecting


def test_tensors_are_selected_by_patterns_of_their_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "head": nn.Linear(3, 2)})
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "epoch0.pt")
    checkpoint = open_checkpoint(tmp_path / "epoch0.pt")

    def selected(**options: Any) -> list[str]:
        return list(arrange(checkpoint, Selection(**options), None).layout.names())

    assert selected(include=("head.*",)) == ["head.weight", "head.bias"]
    assert selected(include=("body.*", "*.bias"), exclude=("body.1.*",)) == [
        "body.0.weight",
        "body.0.bias",
        "head.bias",
    ]
    assert "body.1.running_mean" not in selected(trainable_only=True)
    assert len(selected(trainable_only=True)) == 6
    with pytest.raises(InputError, match=r"none of the 9 tensors is selected, .* there are body.0.weight, body"):
        selected(include=("module.*",))
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"], select=Selection(include=("head.*",)))
    shutil.copy(tmp_path / "epoch0.pt", tmp_path / "epoch1.pt")
    with pytest.raises(LayoutError, match=r"'body.0.weight' is new, the run does not have it"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])


def test_what_is_frozen_is_left_out_where_the_file_or_the_run_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    torch.save(model.state_dict(keep_vars=True), tmp_path / "says.pt")
    torch.save(model.state_dict(), tmp_path / "says_nothing.pt")
    only = Selection(trainable_only=True)
    assert list(arrange(open_checkpoint(tmp_path / "says.pt"), only, None).layout.names()) == ["1.weight", "1.bias"]
    unknown = arrange(open_checkpoint(tmp_path / "says_nothing.pt"), only, None).layout
    assert len(unknown.weights) == 4
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        recorder.record(0)
    known = arrange(open_checkpoint(tmp_path / "says_nothing.pt"), only, open_run(tmp_path / "run").layout).layout
    assert list(known.names()) == ["1.weight", "1.bias"]


def test_a_wrapped_model_is_known_by_the_names_that_its_run_has(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = nn.Linear(3, 2)
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        recorder.record(0)
    torch.save(model.state_dict(), tmp_path / "epoch1.pt")  # every name begins with "module.", as the run's do
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(wrapped, tmp_path / "epoch2.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt", tmp_path / "epoch2.pt"])
    assert list(open_run(tmp_path / "run").layout.names()) == ["module.weight", "module.bias"]


def test_a_run_takes_copies_where_it_has_two_tensors_and_one_where_it_has_them_tied(tmp_path: Path) -> None:
    """Whatever a file has tied: it is the run's layout that says what is stored how often."""
    shared = torch.randn(3)
    save_file({"a": shared.clone(), "b": shared.clone()}, tmp_path / "epoch0.safetensors")
    torch.save({"a": shared, "b": shared}, tmp_path / "epoch1.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.safetensors", tmp_path / "epoch1.pt"])
    run = open_run(tmp_path / "run")
    assert [entry.names for entry in run.layout.weights] == [("a",), ("b",)]
    np.testing.assert_array_equal(run.weights[0], run.weights[1])


def test_an_epoch_whose_commit_record_is_lost_is_told(tmp_path: Path) -> None:
    for epoch in range(3):
        torch.save({"w": torch.full((4,), float(epoch))}, tmp_path / f"epoch{epoch}.pt")
    files = sorted(tmp_path.glob("*.pt"))
    import_checkpoints(tmp_path / "run", files)
    (tmp_path / "run/epoch/commits/00000001.json").unlink()
    repair(tmp_path / "run")
    again = import_checkpoints(tmp_path / "run", files)
    assert [(item.new, item.healed, item.lost) for item in again] == [
        (False, False, False),
        (False, False, True),
        (False, False, False),
    ]
