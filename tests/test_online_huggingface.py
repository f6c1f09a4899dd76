"""Online CMD in a real `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alike import assert_same, assert_same_cmd
from test_huggingface import Killed, Sentences, Witness, a_model, assert_recorded, copied, trainer_of, transformers
from torch import Tensor, nn

from trajkit import OnlineCMD, open_run
from trajkit.errors import InputError
from trajkit.training.callbacks.huggingface import STATE_FILE, OnlineCMDCallback, RecorderCallback

STEPS, WARMUP, EPOCHS = 3, 3, 5
KNOWN: dict[str, Any] = {"num_train_epochs": EPOCHS, "eval_strategy": "epoch"}
States = dict[int, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Seen(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Remembers with what weights each evaluation was done, one of an epoch after the other."""

    def __init__(self) -> None:
        self.states: dict[int, list[dict[str, Tensor]]] = {}

    def on_prediction_step(self, _args: Any, state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        self.states.setdefault(state.global_step // STEPS, []).append(copied(model))


@cache
def alone() -> States:
    """What the training makes of the weights without online CMD, by epoch."""
    with tempfile.TemporaryDirectory() as folder:
        witness = Witness()
        trainer_of(Path(folder), witness, num_train_epochs=EPOCHS).train()
    return {step // STEPS: state for step, state in witness.states.items() if step % STEPS == 0}


@cache
def in_a_plain_loop() -> tuple[OnlineCMD, States]:
    """Online CMD of these weights, and its weights by epoch."""
    model, states = a_model(), {}
    cmd = OnlineCMD(model, WARMUP, modes=3, use_buffers=True)
    for epoch, state in alone().items():
        model.load_state_dict(state)
        cmd.update_parameters(model)
        states[epoch] = copied(cmd.module)
    return cmd, states


def callback(**settings: Any) -> OnlineCMDCallback:
    return OnlineCMDCallback(**{"warmup": WARMUP, "modes": 3} | settings)


def assert_as_in_a_plain_loop(cmd: OnlineCMD) -> None:
    assert cmd.n_updates == EPOCHS
    assert_same_cmd(cmd, in_a_plain_loop()[0])


@pytest.mark.parametrize("several", [False, True], ids=["one evaluation set", "several"])
def test_evaluations_have_the_cmd_weights_and_the_training_does_not(several: bool, tmp_path: Path) -> None:
    online, seen, witness = callback(), Seen(), Witness()
    held_out = {"near": Sentences(), "far": Sentences()} if several else None
    trainer = trainer_of(tmp_path, seen, online, witness, held_out=held_out, save_strategy="epoch", **KNOWN)
    trainer.train()
    assert_as_in_a_plain_loop(online.cmd)
    modelled = in_a_plain_loop()[1]
    for epoch, state in alone().items():
        assert_same(witness.states[epoch * STEPS], state)
        for found in seen.states[epoch]:
            assert_same(found, modelled[epoch] if epoch >= WARMUP else state)
        saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"checkpoints/checkpoint-{epoch * STEPS}")
        assert_same(copied(saved), state)
    assert not torch.equal(modelled[4]["lm_head.weight"], alone()[4]["lm_head.weight"])
    assert_same(copied(trainer.model), modelled[EPOCHS])
    trainer.evaluate()
    assert_same(seen.states[EPOCHS][-1], modelled[EPOCHS])


def test_both_can_be_left_to_the_user(tmp_path: Path) -> None:
    online, seen = callback(evaluate=False, apply_at_end=False), Seen()
    trainer = trainer_of(tmp_path, online, seen, **KNOWN)
    trainer.train()
    for epoch, state in alone().items():
        assert_same(seen.states[epoch][0], state)
    assert_same(copied(trainer.model), alone()[EPOCHS])
    with online.cmd.applied_to(trainer.model):
        assert_same(copied(trainer.model), in_a_plain_loop()[1][EPOCHS])


@pytest.mark.parametrize("event", ["on_prediction_step", "on_evaluate"])
def test_the_trained_weights_are_back_after_an_evaluation_that_raises(event: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback(), Killed(event, 4 * STEPS), **KNOWN)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(copied(trainer.model), alone()[4])


@pytest.mark.parametrize(("epoch", "recorded"), [(1, False), (2, True), (3, False), (3, True), (4, False)])
def test_a_training_that_is_killed_and_resumed_ends_with_the_same_bits(
    epoch: int, recorded: bool, tmp_path: Path
) -> None:
    def callbacks() -> tuple[Any, ...]:
        recorder = RecorderCallback(tmp_path / "run")
        return (callback(run=recorder), recorder) if recorded else (callback(),)

    how = KNOWN | {"save_strategy": "epoch"}
    first = callbacks()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Killed("on_step_begin", STEPS * epoch), *first, **how).train()
    if recorded:
        first[1].recording.drop()  # as if the process had died
        first[1].recording.close()
    resumed = callbacks()
    trainer = trainer_of(tmp_path, *resumed, **how)
    trainer.train(resume_from_checkpoint=True)
    assert_as_in_a_plain_loop(resumed[0].cmd)
    assert_same(copied(trainer.model), in_a_plain_loop()[1][EPOCHS])


@pytest.mark.parametrize("order", ["recorder first", "recorder last"])
@pytest.mark.parametrize("epochs", [WARMUP, EPOCHS], ids=["to the end of the warm-up", "further"])
def test_the_recorders_run_serves_for_the_warm_up(order: str, epochs: int, tmp_path: Path) -> None:
    recorder, seen = RecorderCallback(tmp_path / "run"), Seen()
    online = callback(run=recorder)
    pair = (recorder, online) if order == "recorder first" else (online, recorder)
    trainer = trainer_of(tmp_path, *pair, seen, **KNOWN | {"num_train_epochs": epochs})
    trainer.train()
    run = open_run(tmp_path / "run")
    if epochs == EPOCHS:  # the rate of learning falls by how many there are
        assert_as_in_a_plain_loop(online.cmd)
        assert_recorded(run, alone())
        assert_same(seen.states[4][0], in_a_plain_loop()[1][4])
        assert_same(seen.states[WARMUP][0], alone()[WARMUP])  # is recorded only after its evaluation
    assert all({"loss", "eval_loss"} <= metrics.keys() for metrics in run.metrics.values())
    assert online.cmd.is_warm
    assert_same(copied(trainer.model), run.fit("online3").state_dict(epochs))


def test_updates_may_come_every_few_steps(tmp_path: Path) -> None:
    witness, recorder = Witness(), RecorderCallback(tmp_path / "run", every_n_steps=2)
    online = callback(every_n_steps=2, run=recorder)
    trainer_of(tmp_path, online, recorder, witness, **KNOWN).train()
    assert online.cmd.n_updates == EPOCHS * STEPS // 2
    model = a_model()
    cmd = OnlineCMD(model, WARMUP, modes=3)
    for step in range(2, EPOCHS * STEPS + 1, 2):
        model.load_state_dict(witness.states[step])
        cmd.update_parameters(model)
    np.testing.assert_array_equal(online.cmd.scale, cmd.scale)


def test_the_best_checkpoint_is_loaded_with_its_cmd_weights(tmp_path: Path) -> None:
    def worse(_: Any) -> dict[str, float]:
        trainer.calls += 1
        return {"score": float(trainer.calls == 4)}

    trainer = trainer_of(
        tmp_path, callback(), **KNOWN, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.calls, trainer.compute_metrics = 0, worse
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{4 * STEPS}")
    assert_same(copied(trainer.model), in_a_plain_loop()[1][4])


def test_a_checkpoint_without_its_state_is_told(tmp_path: Path) -> None:
    how: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer_of(tmp_path, callback(), **how).train()
    (tmp_path / f"checkpoints/checkpoint-{STEPS}" / STATE_FILE).unlink()
    again = callback()
    with pytest.warns(RuntimeWarning, match=r"checkpoint-3 has no state of online CMD, which starts anew here; resume"):
        trainer_of(tmp_path, again, **how).train(
            resume_from_checkpoint=str(tmp_path / f"checkpoints/checkpoint-{STEPS}")
        )
    assert again.cmd.n_updates == 1


def test_a_run_that_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the RecorderCallback of the same trainer, .*; pass that"):
        OnlineCMDCallback(run=str(tmp_path))  # type: ignore[arg-type]
    recorder = RecorderCallback(tmp_path / "run", every_n_steps=5)
    with pytest.raises(
        InputError, match="run records every 5 steps, online CMD is updated each epoch, expected the same"
    ):
        OnlineCMDCallback(run=recorder)
    with pytest.raises(InputError, match="every_n_steps is 0, expected a number of steps"):
        OnlineCMDCallback(every_n_steps=0)
    with pytest.raises(InputError, match="there is no online CMD yet, expected a training that has begun"):
        _ = callback().cmd
    with pytest.raises(
        InputError, match="records nothing, expected it among the callbacks of the trainer; add it there"
    ):
        trainer_of(tmp_path, callback(run=RecorderCallback(tmp_path / "run"))).train()
