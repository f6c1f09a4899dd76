"""Online CMD in a real Lightning `fit`, by both of its packages."""

from __future__ import annotations

import copy
import pickle
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from alike import assert_same, assert_same_cmd
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lightning import STEPS, Killed, Stream, a_module, assert_recorded, fit, pytestmark, witness_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trajkit import OnlineCMD, open_run
from trajkit.errors import InputError
from trajkit.training.callbacks.lightning import OnlineCMDCallback, RecorderCallback

__all__ = ["pytestmark"]

WARMUP, EPOCHS = 3, 5
States = dict[int, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def seen_by(package: Any = lightning.pytorch) -> Any:
    class Seen(package.Callback):  # type: ignore[misc]
        """Remembers with what weights each validation was done, one of an epoch after the other."""

        def __init__(self) -> None:
            self.states: dict[int, list[dict[str, Tensor]]] = {}

        def on_validation_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.states.setdefault(trainer.current_epoch, []).append(copied(pl_module))

    return Seen()


@cache
def alone() -> States:
    """What the fit makes of the weights without online CMD, by epoch."""
    with tempfile.TemporaryDirectory() as folder:
        witness = witness_of()
        fit(Path(folder), witness, module=a_module(norm=True), max_epochs=EPOCHS)
    return {step // STEPS - 1: state for step, state in witness.states.items() if step and step % STEPS == 0}


@cache
def in_a_plain_loop() -> tuple[OnlineCMD, States]:
    """Online CMD of these weights, and its weights by epoch."""
    model, states = a_module(norm=True), {}
    cmd = OnlineCMD(model, WARMUP, modes=3, use_buffers=True)
    for epoch, state in alone().items():
        model.load_state_dict(state)
        cmd.update_parameters(model)
        with cmd.applied_to(model):
            states[epoch] = copied(model)
    return cmd, states


def callback(**settings: Any) -> Any:
    return OnlineCMDCallback(**{"warmup": WARMUP, "modes": 3} | settings)


def trained(folder: Path, *callbacks: Any, package: Any = lightning.pytorch, **options: Any) -> Any:
    """The module that a fit leaves."""
    module = a_module(package, norm=True)
    fit(folder, *callbacks, package=package, module=module, **{"max_epochs": EPOCHS} | options)
    return module


def checkpoints(folder: Path, on_epoch_end: bool = False) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder / "saved", filename="{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=on_epoch_end
    )


def assert_as_in_a_plain_loop(cmd: OnlineCMD) -> None:
    assert cmd.n_updates == EPOCHS
    assert_same_cmd(cmd, in_a_plain_loop()[0])


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_validations_have_the_cmd_weights_and_the_training_does_not(package: Any, tmp_path: Path) -> None:
    online, seen, witness = callback(), seen_by(package), witness_of(package)
    assert isinstance(online, package.Callback)
    module = trained(tmp_path, seen, online, witness, package=package)
    assert_as_in_a_plain_loop(online.cmd)
    modelled = in_a_plain_loop()[1]
    for epoch, state in alone().items():
        assert_same(witness.states[(epoch + 1) * STEPS], state)
        for found in seen.states[epoch]:
            assert_same(found, modelled[epoch] if epoch >= WARMUP - 1 else state)
    assert not torch.equal(modelled[3]["net.1.running_mean"], alone()[3]["net.1.running_mean"])
    assert_same(copied(module), modelled[EPOCHS - 1])


@pytest.mark.parametrize("on_epoch_end", [False, True], ids=["after validation", "after the epoch"])
def test_checkpoints_have_the_trained_weights_also_the_last_one(on_epoch_end: bool, tmp_path: Path) -> None:
    trained(tmp_path, callback(), checkpoints(tmp_path, on_epoch_end))
    for name, epoch in [*((f"epoch={epoch}", epoch) for epoch in range(EPOCHS)), ("last", EPOCHS - 1)]:
        saved = torch.load(tmp_path / f"saved/{name}.ckpt", weights_only=True)
        assert_same(saved["state_dict"], alone()[epoch])
        assert saved["callbacks"]["OnlineCMDCallback"]["cmd"]["n_updates"] == epoch + 1


def test_both_can_be_left_to_the_user(tmp_path: Path) -> None:
    online, seen = callback(evaluate=False, apply_at_end=False), seen_by()
    module = trained(tmp_path, online, seen)
    for epoch, state in alone().items():
        assert_same(seen.states[epoch][0], state)
    assert_same(copied(module), alone()[EPOCHS - 1])
    with online.cmd.applied_to(module):
        assert_same(copied(module), in_a_plain_loop()[1][EPOCHS - 1])


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_the_trained_weights_are_back_after_a_validation_that_raises(hook: str, tmp_path: Path) -> None:
    module, online = a_module(norm=True), callback()
    saving = ModelCheckpoint(tmp_path, save_top_k=0)  # as it can by itself from Lightning 2.6 on
    saving.on_exception = lambda trainer, *_: trainer.save_checkpoint(tmp_path / "late.ckpt")  # type: ignore[method-assign]
    with pytest.raises(SystemError, match="killed"):
        fit(tmp_path, Killed(hook, 3), online, saving, module=module, max_epochs=EPOCHS)
    assert_same(copied(module), alone()[3])
    assert_same(torch.load(tmp_path / "late.ckpt", weights_only=True)["state_dict"], alone()[3])


@pytest.mark.parametrize("on_epoch_end", [False, True], ids=["after validation", "after the epoch"])
@pytest.mark.parametrize(("epoch", "recorded"), [(0, False), (1, True), (2, False), (2, True), (3, False), (3, True)])
def test_a_fit_that_is_killed_and_resumed_ends_with_the_same_bits(
    epoch: int, recorded: bool, on_epoch_end: bool, tmp_path: Path
) -> None:
    def callbacks() -> tuple[Any, ...]:
        recorder = RecorderCallback(tmp_path / "run")
        return (callback(run=recorder), recorder) if recorded else (callback(),)

    first = callbacks()
    if recorded:
        first[1].on_exception = lambda *_: None  # a process that dies does nothing more
    with pytest.raises(SystemError):
        trained(tmp_path, *first, Killed("on_train_epoch_start", epoch + 1), checkpoints(tmp_path, on_epoch_end))
    if recorded:
        first[1].recording.drop()
        first[1].recording.close()
    resumed = callbacks()
    module = trained(
        tmp_path, *resumed, checkpoints(tmp_path, on_epoch_end), ckpt_path=tmp_path / f"saved/epoch={epoch}.ckpt"
    )
    assert_as_in_a_plain_loop(resumed[0].cmd)
    assert_same(copied(module), in_a_plain_loop()[1][EPOCHS - 1])


@pytest.mark.parametrize("order", ["recorder first", "recorder last"])
@pytest.mark.parametrize("epochs", [WARMUP, EPOCHS], ids=["to the end of the warm-up", "further"])
def test_the_recorders_run_serves_for_the_warm_up(order: str, epochs: int, tmp_path: Path) -> None:
    recorder, seen = RecorderCallback(tmp_path / "run"), seen_by()
    online = callback(run=recorder)
    pair = (recorder, online) if order == "recorder first" else (online, recorder)
    module = trained(tmp_path, *pair, seen, max_epochs=epochs)
    run, modelled = open_run(tmp_path / "run"), in_a_plain_loop()[1]
    assert_recorded(run, {epoch: alone()[epoch] for epoch in range(epochs)})
    assert all({"loss", "val_loss"} <= metrics.keys() for metrics in run.metrics.values())
    assert_same(copied(module), modelled[epochs - 1])
    assert_same(seen.states[WARMUP - 1][0], alone()[WARMUP - 1])  # is recorded only after its validation
    if epochs == EPOCHS:
        assert_as_in_a_plain_loop(online.cmd)
        assert_same(seen.states[WARMUP][0], modelled[WARMUP])
    weights = run.fit("online3").state_dict(epochs - 1)
    assert all(torch.equal(weights[entry.name], modelled[epochs - 1][entry.name]) for entry in run.layout.weights)


def test_updates_may_come_every_few_steps(tmp_path: Path) -> None:
    witness, recorder = witness_of(), RecorderCallback(tmp_path / "run", every_n_steps=3)
    online = callback(every_n_steps=3, run=recorder)
    trained(tmp_path, online, recorder, witness)
    model = a_module(norm=True)
    cmd = OnlineCMD(model, WARMUP, modes=3, use_buffers=True)
    for step in range(3, EPOCHS * STEPS + 1, 3):
        model.load_state_dict(witness.states[step])
        cmd.update_parameters(model)
    assert online.cmd.n_updates == cmd.n_updates == 6
    np.testing.assert_array_equal(online.cmd.scale, cmd.scale)


def test_an_epoch_without_a_length_that_ends_early_counts(tmp_path: Path) -> None:
    online = callback()
    data = DataLoader(Stream(), batch_size=None)
    trained(tmp_path, online, data=data, max_epochs=-1, max_steps=3 * STEPS + 2)
    assert online.cmd.n_updates == 4


def test_a_checkpoint_without_its_state_is_told(tmp_path: Path) -> None:
    trained(tmp_path, checkpoints(tmp_path, True), max_epochs=1)
    online = callback()
    with pytest.warns(
        RuntimeWarning, match=r"the checkpoint has no state of online CMD, which starts anew here; resume"
    ):
        trained(tmp_path, online, checkpoints(tmp_path), ckpt_path=tmp_path / "saved/last.ckpt", max_epochs=2)
    assert online.cmd.n_updates == 1


def test_it_can_be_copied_and_pickled_for_other_processes(tmp_path: Path) -> None:
    recorder = RecorderCallback(tmp_path / "run")
    made = callback(run=recorder, modes=5)
    for again in (copy.deepcopy([made, recorder]), pickle.loads(pickle.dumps([made, recorder]))):
        assert type(again[0]) is type(made)
        assert again[0]._run is again[1]
        assert again[0]._settings == made._settings


def test_a_run_that_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the RecorderCallback of the same trainer, .*; pass that"):
        OnlineCMDCallback(run=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="run records each epoch, online CMD is updated every 5 steps, expected the same"
    ):
        OnlineCMDCallback(run=RecorderCallback(tmp_path / "run"), every_n_steps=5)
    with pytest.raises(InputError, match="there is no online CMD yet, expected a training that has begun"):
        _ = callback().cmd
    with pytest.raises(
        InputError, match="records nothing, expected it among the callbacks of the trainer; add it there"
    ):
        trained(tmp_path, callback(run=RecorderCallback(tmp_path / "run")))
