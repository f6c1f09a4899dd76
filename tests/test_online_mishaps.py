"""Online and embedded CMD where something goes wrong, or is done that few do: Ctrl-C, NaN, full disks, copies."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trajkit import EmbeddedCMD, OnlineCMD, Recorder, fit
from trajkit.errors import InputError
from trajkit.training import embedded, moments, online, threads
from trajkit.training.naive import ReferencesOnly

WARMUP = 3


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))


def train(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def updated(epochs: int, **settings: Any) -> tuple[nn.Module, OnlineCMD]:
    model = small_model()
    cmd = OnlineCMD(model, warmup=WARMUP, modes=2, **settings)
    go_on(model, cmd, range(epochs))
    return model, cmd


def go_on(model: nn.Module, cmd: OnlineCMD, epochs: range) -> None:
    for epoch in epochs:
        train(model, epoch)
        cmd.update_parameters(model)


def same(one: OnlineCMD, other: OnlineCMD) -> bool:
    pairs = [(one.mode, other.mode), (one.scale, other.scale), (one.offset, other.offset)]
    return one.n_updates == other.n_updates and all(np.array_equal(*pair) for pair in pairs)


@contextmanager
def interrupting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[None]:
    """Ctrl-C comes when a function is called."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("epochs", [2, 5])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cmd: pickle.loads(pickle.dumps(cmd))])
def test_a_copy_goes_on_to_the_same_bits_and_leaves_the_original_alone(
    copied: Callable[[Any], Any], epochs: int
) -> None:
    model, cmd = updated(epochs)
    model_of_copy, other = copied((model, cmd))
    go_on(model_of_copy, other, range(epochs, 8))
    _, through = updated(8)
    assert cmd.n_updates == epochs
    assert same(other, through)
    go_on(model, cmd, range(epochs, 8))
    assert same(cmd, through)


def test_a_fit_that_was_interrupted_is_done_with_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    _, through = updated(6)
    model, cmd = updated(WARMUP - 1)
    with interrupting(monkeypatch, online, "fit"):
        go_on(model, cmd, range(WARMUP - 1, WARMUP))
    resumed = OnlineCMD(model, warmup=WARMUP, modes=2)
    resumed.load_state_dict(copy.deepcopy(cmd.state_dict()))
    later = copy.deepcopy(model)
    go_on(model, cmd, range(WARMUP, 6))
    go_on(later, resumed, range(WARMUP, 6))
    assert same(cmd, through)
    assert same(resumed, through)


def test_after_an_update_that_was_interrupted_the_state_has_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, through = updated(6)
    model, cmd = updated(4)
    state = copy.deepcopy(cmd.state_dict())
    with interrupting(monkeypatch, moments, "each"):
        cmd.update_parameters(model)
    for use in (cmd.state_dict, lambda: cmd.scale, lambda: cmd.update_parameters(model)):
        with pytest.raises(InputError, match="update 4 did not end, so that some weights have taken it and others"):
            use()
    cmd.load_state_dict(state)
    go_on(model, cmd, range(4, 6))
    assert same(cmd, through)


def test_an_interrupt_that_a_function_called_by_c_loses_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def parallel(_work: Any, *_: Any) -> None:
        """The main thread is interrupted before the function's first line, and another one does all the work."""
        other = threading.Thread(target=_work, args=(None,))
        other.start()
        other.join()

    monkeypatch.setattr(threads, "_torch_parallel", lambda: parallel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        threads.each(abs, [1, 2], most=2)


def test_a_state_of_the_other_kind_of_warm_up_is_refused(tmp_path: Path) -> None:
    model, own = updated(2)
    of_a_run = OnlineCMD(model, warmup=WARMUP, modes=2, run=tmp_path / "run")
    of_a_run.update_parameters(model)
    with pytest.raises(InputError, match="is of a warm-up that keeps its own epochs"):
        of_a_run.load_state_dict(own.state_dict())
    with pytest.raises(InputError, match="is of a warm-up that is read from the run of the training"):
        own.load_state_dict(of_a_run.state_dict())
    assert own.state_dict()["warm_up"]["weights"].shape == (2, 57)
    for state in ({"version": online.STATE_VERSION}, [], {"state": {}}):
        with pytest.raises(InputError, match="this is no state of OnlineCMD"):
            own.load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_state_that_does_not_fit_the_disk_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cmd = updated(2)
    full = functools.partial(open, "/dev/full", "w+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        cmd.state_dict()


def test_weights_that_are_not_finite_are_told_in_the_warm_up_of_a_recorded_training(tmp_path: Path) -> None:
    model = small_model()
    with Recorder(model, tmp_path / "run", nonfinite="record") as recorder:
        cmd = OnlineCMD(model, warmup=WARMUP, modes=2, run=recorder)
        for epoch in range(6):
            train(model, epoch)
            broken = copy.deepcopy(model.state_dict())
            if epoch == 1:
                model[0].bias.data[2] = float("nan")
            recorder.record(epoch)
            if epoch == 1:
                with pytest.raises(InputError, match=r"'0.bias' is not finite"):
                    cmd.update_parameters(model)
                model.load_state_dict(broken)
            else:
                cmd.update_parameters(model)
    assert cmd.n_updates == 5
    assert np.isfinite(cmd.scale).all()


def test_a_replay_beyond_an_epoch_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with Recorder(model, tmp_path / "run", nonfinite="record") as recorder:
        for epoch in range(8):
            train(model, epoch)
            kept = model[0].bias.detach().clone()
            model[0].bias.data[2] = float("inf") if epoch == 6 else kept[2]
            recorder.record(epoch)
            model[0].bias.data.copy_(kept)
    found = fit(tmp_path / "run", modes=2, epochs=range(4), online=True)
    assert np.isfinite(found.modelled([5])).all()
    for modelled in (lambda: found.modelled([5, 7]), lambda: list(found.one_by_one([7]))):  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"(a reference|'0.bias') is not finite at epoch 6, expected finite"):
            modelled()


def embedded_cmd(model: nn.Module, **settings: Any) -> EmbeddedCMD:
    return EmbeddedCMD(model, **{"warmup": WARMUP, "modes": 2, "window": 2, "percent": 40} | settings)


def step(model: nn.Module, cmd: EmbeddedCMD, epochs: range) -> None:
    for epoch in epochs:
        train(model, epoch)
        cmd.step()


@pytest.mark.parametrize("references", ["centroid", "principal"])
def test_references_of_so_many_weights_that_few_can_be_embedded_are_told(references: str) -> None:
    model = small_model()
    cmd = embedded_cmd(model, references=references, members=1.0)
    step(model, cmd, range(WARMUP - 1))
    with pytest.warns(RuntimeWarning, match=r"made of 57 of the 57 weights .* never embedded: the others are 0\.0%"):
        step(model, cmd, range(WARMUP - 1, WARMUP))
    step(model, cmd, range(WARMUP, 8))
    assert cmd.share == 0


def test_gradients_of_a_parameter_that_took_anothers_place_are_masked() -> None:
    model = small_model()
    cmd = embedded_cmd(model, mask_gradients=True)
    step(model, cmd, range(5))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    step(model, cmd, range(5, 8))
    for models, cmds in ((model, cmd), copy.deepcopy((model, cmd))):
        models(torch.randn(4, 5)).square().sum().backward()
        for name, parameter in models.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad == 0, cmds._masks[name])


def test_after_a_step_that_was_interrupted_the_state_has_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    cmd = embedded_cmd(model)
    step(model, cmd, range(4))
    state = copy.deepcopy(cmd.state_dict())
    with interrupting(monkeypatch, embedded, "_least"):
        step(model, cmd, range(4, 6))
    for use in (cmd.step, cmd.state_dict):
        with pytest.raises(InputError, match="step 6 did not end, expected whole steps"):
            use()
    cmd.load_state_dict(state)
    step(model, cmd, range(4, 6))
    assert cmd.share == pytest.approx(0.8, abs=0.01)


def test_a_fit_that_was_interrupted_leaves_no_gap_in_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    cmd = embedded_cmd(model)
    step(model, cmd, range(WARMUP - 1))
    with interrupting(monkeypatch, online, "fit"):
        step(model, cmd, range(WARMUP - 1, WARMUP))
    step(model, cmd, range(WARMUP, 6))
    assert len(cmd.shares) == cmd.online.n_updates == 6


def test_states_hold_plain_values_and_are_those_of_the_same_kind() -> None:
    model = small_model()
    cmd = embedded_cmd(model, threshold=np.float32(0.5), window=np.int64(2), percent=np.float64(10))
    step(model, cmd, range(5))
    file = io.BytesIO()
    torch.save(cmd.state_dict(), file)
    file.seek(0)
    embedded_cmd(model, threshold=0.5, percent=10).load_state_dict(torch.load(file, weights_only=True))
    state = ReferencesOnly(model, warmup=WARMUP, modes=2).state_dict()
    with pytest.raises(InputError, match="the state was taken with of=None, this has 'all'; make it the same"):
        embedded_cmd(model).load_state_dict(state)
    with pytest.raises(InputError, match="percent is '10', expected a number"):
        EmbeddedCMD(model, percent="10")  # type: ignore[arg-type]
