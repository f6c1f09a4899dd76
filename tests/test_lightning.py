"""Recording from a real Lightning `fit`, by both of its packages."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trajkit import Run, load_weights, open_run
from trajkit.errors import InputError
from trajkit.training.callbacks.lightning import RecorderCallback

# What Lightning says of small trainings without a GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]

STEPS = 4


def a_module(package: Any = lightning.pytorch, norm: bool = False) -> Any:
    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss = self.net(batch[0]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss  # type: ignore[no-any-return]

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("val_loss", self.net(batch[0]).square().mean())

        def on_train_epoch_end(self) -> None:
            self.log("late", float(self.current_epoch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def batches() -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(4 * STEPS, 3, generator=torch.Generator().manual_seed(1))), batch_size=4
    )


class Stream(IterableDataset[list[Tensor]]):
    """Batches without a length."""

    def __iter__(self) -> Any:
        return iter(batches())


def witness_of(package: Any = lightning.pytorch) -> Any:
    class Witness(package.Callback):  # type: ignore[misc]
        """Remembers the weights after each step of the optimizer."""

        def __init__(self) -> None:
            self.states: dict[int, dict[str, Tensor]] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
            state = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
            self.states.setdefault(trainer.global_step, state)

    return Witness()


def fit(
    folder: Path,
    *callbacks: Any,
    package: Any = lightning.pytorch,
    module: Any = None,
    data: Any = None,
    **options: Any,
) -> Any:
    known: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "max_epochs": 3, "default_root_dir": folder, "log_every_n_steps": 1, "num_sanity_val_steps": 1,
    }  # fmt: skip
    again = options.pop("ckpt_path", None)
    trainer = package.Trainer(callbacks=list(callbacks), **(known | options))
    trainer.fit(module or a_module(package), batches() if data is None else data, batches(), ckpt_path=again)
    return trainer


def assert_recorded(run: Run, expected: dict[int, dict[str, Tensor]]) -> None:
    assert run.epochs.tolist() == list(expected)
    for epoch, state in expected.items():
        found = load_weights(run, epoch)
        assert list(found) == list(state)
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor), (epoch, name)


def steps_of(run: Run) -> list[int]:
    assert run.steps is not None
    return run.steps.tolist()


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_each_epoch_is_recorded_with_its_metrics(package: Any, tmp_path: Path) -> None:
    witness, recorder = witness_of(package), RecorderCallback(tmp_path / "run")
    assert isinstance(recorder, package.Callback)
    trainer = fit(tmp_path, recorder, witness, package=package)
    run = open_run(tmp_path / "run")
    assert_recorded(run, {epoch: witness.states[(epoch + 1) * STEPS] for epoch in range(3)})
    assert steps_of(run) == [4, 8, 12]
    assert all(run.metrics[epoch]["late"] == epoch for epoch in range(3))
    assert all(set(run.metrics[epoch]) >= {"loss", "loss_step", "loss_epoch", "val_loss"} for epoch in range(3))
    assert len({run.metrics[epoch][name] for epoch in range(3) for name in ("val_loss", "loss_epoch")}) == 6
    assert run.metrics[2]["val_loss"] == trainer.callback_metrics["val_loss"]


def test_every_few_steps_are_recorded_by_their_number(tmp_path: Path) -> None:
    witness, recorder = witness_of(), RecorderCallback(tmp_path / "run", every_n_steps=2, include="net.0.*")
    fit(tmp_path, recorder, witness, accumulate_grad_batches=2, max_epochs=4)
    run = open_run(tmp_path / "run")
    expected = {step: witness.states[step] for step in (2, 4, 6, 8)}
    assert_recorded(run, {step: dict(list(state.items())[:2]) for step, state in expected.items()})
    assert steps_of(run) == [2, 4, 6, 8]
    assert all("loss_step" in metrics for metrics in run.metrics.values())


AVERAGING = {
    "WeightAveraging": WeightAveraging,
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "BatchNorm"])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_live_weights_are_recorded_also_where_others_average_them(
    averaging: str, norm: bool, order: str, tmp_path: Path
) -> None:
    witness, recorder = witness_of(), RecorderCallback(tmp_path / "run")
    average: Any = AVERAGING[averaging]()
    callbacks = [recorder, average] if order == "before" else [average, recorder]
    module = a_module(norm=norm)
    fit(tmp_path, *callbacks, witness, ModelCheckpoint(tmp_path / "saved"), module=module)
    assert_recorded(open_run(tmp_path / "run"), {epoch: witness.states[(epoch + 1) * STEPS] for epoch in range(3)})
    last = load_weights(tmp_path / "run", 2)
    assert not torch.equal(last["net.0.weight"], module.net[0].weight)  # the average is what a fit leaves


class Killed(lightning.pytorch.Callback):
    """Dies in the last hooks of an epoch."""

    def __init__(self, hook: str, epoch: int) -> None:
        def die(trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == epoch and not trainer.sanity_checking:
                raise SystemError("killed")

        setattr(self, hook, die)


@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start"]
)
@pytest.mark.parametrize("on_epoch_end", [False, True], ids=["saved after validation", "saved after the epoch"])
@pytest.mark.parametrize("every", [None, 3])
def test_a_fit_that_is_killed_and_resumed_leaves_the_run_of_one_that_was_not(
    every: int | None, on_epoch_end: bool, hook: str, tmp_path: Path
) -> None:
    def checkpoints(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder / "saved", save_last=True, save_top_k=-1, save_on_train_epoch_end=on_epoch_end)

    fit(tmp_path, RecorderCallback(tmp_path / "whole", every_n_steps=every), checkpoints(tmp_path / "other"))
    first = RecorderCallback(tmp_path / "run", every_n_steps=every)
    first.on_exception = lambda *_: None  # type: ignore[method-assign]  # a process that dies does nothing more
    with pytest.raises(SystemError):
        fit(tmp_path, first, Killed(hook, 1), checkpoints(tmp_path))
    assert first.recording is not None
    first.recording.drop()
    first.recording.close()
    recorder = RecorderCallback(tmp_path / "run", every_n_steps=every)
    fit(tmp_path, recorder, checkpoints(tmp_path), ckpt_path=tmp_path / "saved/last.ckpt")
    run, whole = open_run(tmp_path / "run"), open_run(tmp_path / "whole")
    assert_recorded(run, {epoch: whole.state_dict(epoch) for epoch in whole.epochs.tolist()})
    assert steps_of(run) == steps_of(whole)


def test_an_exception_in_the_training_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemError, match="killed"):
        fit(tmp_path, RecorderCallback(tmp_path / "run"), Killed("on_train_epoch_start", 2))
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1]


def test_a_training_that_starts_anew_in_an_old_run_is_told_so(tmp_path: Path) -> None:
    fit(tmp_path, RecorderCallback(tmp_path / "run"), max_epochs=2)
    with pytest.warns(
        RuntimeWarning, match="run: the training starts anew, and the run holds epochs up to 1: they are"
    ):
        fit(tmp_path, RecorderCallback(tmp_path / "run"))
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2]


@pytest.mark.parametrize("data", [None, Stream()], ids=["of a length", "a stream"])
def test_an_epoch_that_ends_early_is_recorded_too(data: Any, tmp_path: Path) -> None:
    witness = witness_of()
    loader = None if data is None else DataLoader(data, batch_size=None)
    fit(tmp_path, RecorderCallback(tmp_path / "run"), witness, data=loader, max_steps=6, max_epochs=-1)
    assert_recorded(open_run(tmp_path / "run"), {0: witness.states[4], 1: witness.states[6]})


def test_it_can_be_copied_and_pickled_for_other_processes(tmp_path: Path) -> None:
    made = RecorderCallback(tmp_path / "run", every_n_steps=5, exclude="*.bias")
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is type(made)
        assert vars(again) == vars(made)
    assert issubclass(type(made), RecorderCallback)
    assert type(made).__name__ == "RecorderCallback"


def test_a_wrong_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="every_n_steps is -1, expected a number of steps, at least 1; pass it or None"
    ):
        RecorderCallback(tmp_path / "run", every_n_steps=-1)
