"""Recording from a real `transformers.Trainer`, on a model of a few hundred weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from trajkit import Run, load_weights, open_run
from trajkit.errors import InputError
from trajkit.training.callbacks.huggingface import RecorderCallback

transformers = pytest.importorskip("transformers")


class Sentences(Dataset[dict[str, Tensor]]):
    """12 sequences to be continued."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = (torch.arange(6) * (number % 3 + 1) + number) % 11
        return {"input_ids": ids, "labels": ids}


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same, without a length."""

    def __iter__(self) -> Any:
        return iter(Sentences()[number] for number in range(12))


def a_model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        bos_token_id=0,
        eos_token_id=0,
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config)


class Witness(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Remembers the weights after each step of the optimizer."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        self.states[state.global_step + 1] = copied(model)


class Swapping(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Puts averaged weights in the place of the trained ones for each evaluation, as EMA callbacks do."""

    def __init__(self) -> None:
        self.live: dict[str, Tensor] | None = None

    def _swap(self, control: Any, model: nn.Module) -> None:
        if control.should_evaluate and self.live is None:
            self.live = copied(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)

    def on_step_end(self, _args: Any, _state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._swap(control, model)

    on_epoch_end = on_step_end

    def on_evaluate(self, _args: Any, _state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        if self.live is not None:
            model.load_state_dict(self.live)
            self.live = None


class Killed(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Dies at an event of a step; what comes after a checkpoint is saved, before any other callback hears of it."""

    def __init__(self, event: str, step: int) -> None:
        def die(_args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

        setattr(self, event, die)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trainer_of(folder: Path, *callbacks: Any, data: Any = None, held_out: Any = None, **arguments: Any) -> Any:
    known: dict[str, Any] = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no",
        "logging_strategy": "epoch", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    options = transformers.TrainingArguments(str(folder / "checkpoints"), **(known | arguments))
    data = Sentences() if data is None else data
    return transformers.Trainer(
        a_model(), options, train_dataset=data, eval_dataset=held_out or Sentences(), callbacks=list(callbacks)
    )


def assert_recorded(run: Run, expected: dict[int, dict[str, Tensor]]) -> None:
    assert run.epochs.tolist() == list(expected)
    for epoch, state in expected.items():
        found = load_weights(run, epoch)
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor), (epoch, name)


def steps_of(run: Run) -> list[int]:
    assert run.steps is not None
    return run.steps.tolist()


def test_each_epoch_is_recorded_with_what_is_logged_of_it(tmp_path: Path) -> None:
    witness = Witness()
    trainer = trainer_of(tmp_path, RecorderCallback(tmp_path / "run"), witness, eval_strategy="epoch")
    trainer.train()
    run = open_run(tmp_path / "run")
    assert_recorded(run, {epoch: witness.states[3 * epoch] for epoch in (1, 2, 3)})
    assert steps_of(run) == [3, 6, 9]
    for epoch in (1, 2, 3):
        entries = [entry for entry in trainer.state.log_history if entry["epoch"] == epoch]
        assert run.metrics[epoch]["loss"] == next(entry["loss"] for entry in entries if "loss" in entry)
        assert run.metrics[epoch]["eval_loss"] == next(entry["eval_loss"] for entry in entries if "eval_loss" in entry)
        assert not {"train_loss", "step", "epoch"} & run.metrics[epoch].keys()
    a_model().load_state_dict(load_weights(run, 3))
    assert run.layout["lm_head.weight"].name == "transformer.wte.weight"


def test_all_of_several_evaluations_are_kept_also_where_a_checkpoint_follows(tmp_path: Path) -> None:
    held_out = {"near": Sentences(), "far": Sentences()}
    how: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "near_loss"}
    trainer_of(tmp_path, RecorderCallback(tmp_path / "run"), held_out=held_out, **how).train()
    for metrics in open_run(tmp_path / "run").metrics.values():
        assert {"loss", "eval_near_loss", "eval_far_loss"} <= metrics.keys()


def test_every_few_steps_are_recorded_by_their_number(tmp_path: Path) -> None:
    witness = Witness()
    recorder = RecorderCallback(tmp_path / "run", every_n_steps=2, exclude="*.bias")
    trainer_of(tmp_path, recorder, witness, logging_strategy="steps", logging_steps=4).train()
    run = open_run(tmp_path / "run")
    kept = {name for name in run.layout.names() if not name.endswith(".bias")}
    assert kept == set(run.layout.names())
    assert_recorded(
        run,
        {step: {name: witness.states[step][name] for name in kept} for step in (2, 4, 6, 8)},
    )
    assert steps_of(run) == [2, 4, 6, 8]
    assert [sorted(run.metrics[step])[-1:] for step in (2, 4, 6, 8)] == [[], ["loss"], [], ["loss"]]


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_live_weights_are_recorded_while_an_evaluation_swaps_them(
    strategy: str, every: int | None, tmp_path: Path
) -> None:
    witness = Witness()
    recorder = RecorderCallback(tmp_path / "run", every_n_steps=every)
    callbacks = Swapping(), recorder, Swapping(), witness
    trainer_of(tmp_path, *callbacks, eval_strategy=strategy, eval_steps=3, gradient_accumulation_steps=2).train()
    expected = {epoch: witness.states[2 * epoch] for epoch in (1, 2, 3)} if every is None else {
        step: witness.states[step] for step in (3, 6)
    }  # fmt: skip
    assert_recorded(open_run(tmp_path / "run"), expected)


@pytest.mark.parametrize("event", ["on_evaluate", "on_save", "on_step_end", "on_optimizer_step", "on_epoch_begin"])
@pytest.mark.parametrize("every", [None, 1])
def test_a_training_that_is_killed_and_resumed_leaves_the_run_of_one_that_was_not(
    event: str, every: int | None, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer_of(tmp_path / "whole", RecorderCallback(tmp_path / "whole/run", every_n_steps=every), **how).train()
    first = RecorderCallback(tmp_path / "run", every_n_steps=every)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Killed(event, 6), first, **how).train()
    assert first.recording is not None
    first.recording.drop()  # as if the process had died
    first.recording.close()
    trainer = trainer_of(tmp_path, RecorderCallback(tmp_path / "run", every_n_steps=every), **how)
    trainer.train(resume_from_checkpoint=True)
    run, whole = open_run(tmp_path / "run"), open_run(tmp_path / "whole/run")
    assert_recorded(run, {epoch: whole.state_dict(epoch) for epoch in whole.epochs.tolist()})
    assert steps_of(run) == steps_of(whole)
    for epoch, metrics in whole.metrics.items():
        timeless = {name for name in metrics if "runtime" not in name and "per_second" not in name}
        assert {name: run.metrics[epoch][name] for name in timeless} == {name: metrics[name] for name in timeless}


def test_a_training_that_starts_anew_in_an_old_run_is_told_so(tmp_path: Path) -> None:
    trainer_of(tmp_path, RecorderCallback(tmp_path / "run"), num_train_epochs=2).train()
    with pytest.warns(
        RuntimeWarning, match="run: the training starts anew, and the run holds epochs up to 2: they are"
    ):
        trainer_of(tmp_path, RecorderCallback(tmp_path / "run")).train()
    assert open_run(tmp_path / "run").epochs.tolist() == [1, 2, 3]


@pytest.mark.parametrize("data", [Sentences(), Stream()], ids=["of a length", "a stream"])
def test_an_epoch_that_ends_early_is_recorded_too(data: Any, tmp_path: Path) -> None:
    witness = Witness()
    trainer_of(tmp_path, RecorderCallback(tmp_path / "run"), witness, data=data, max_steps=5).train()
    run = open_run(tmp_path / "run")
    assert_recorded(run, {1: witness.states[3], 2: witness.states[5]})
    assert steps_of(run) == [3, 5]


def test_without_a_path_or_with_a_wrong_interval_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="every_n_steps is 0, expected a number of steps, at least 1"):
        RecorderCallback(tmp_path / "run", every_n_steps=0)
    monkeypatch.delenv("TRAJKIT_RUN", raising=False)
    with pytest.raises(InputError, match="the recorder has no path and TRAJKIT_RUN is not set"):
        trainer_of(tmp_path, RecorderCallback()).train()
