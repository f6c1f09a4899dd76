"""Recording beside a training: what `record` promises when it returns, when it cannot, and when nobody waits."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptible import interruptible
from torch import nn

from trajkit import Recorder, RunWriter, load_weights, open_run
from trajkit.errors import InputError, LayoutError, RunNotFoundError
from trajkit.training.background import MOST_UNDER_WAY


def a_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def moved(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@contextmanager
def a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Commits wait until the semaphore lets them go, one by one."""
    gate, append = threading.Semaphore(0), RunWriter.append

    def slowly(*arguments: Any, **named: Any) -> None:
        assert gate.acquire(timeout=60)
        append(*arguments, **named)

    monkeypatch.setattr(RunWriter, "append", slowly)
    yield gate


def fail_at(monkeypatch: pytest.MonkeyPatch, *epochs: int) -> None:
    """The first try to commit these epochs meets a full disk."""
    append, bad = RunWriter.append, set(epochs)

    def full(writer: RunWriter, layout: Any, epoch: int, *others: Any, **named: Any) -> None:
        if epoch in bad:
            bad.remove(epoch)
            raise OSError(28, "No space left on device")
        append(writer, layout, epoch, *others, **named)

    monkeypatch.setattr(RunWriter, "append", full)


# --- What is recorded


def test_the_weights_are_those_of_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    with a_slow_disk(monkeypatch) as gate, Recorder(model, tmp_path / "run") as recorder:
        for epoch in range(6):
            recorder.record(epoch) if epoch < MOST_UNDER_WAY else (gate.release(), recorder.record(epoch))
            moved(model, epoch)
        gate.release(6)
    expected = [a_model().weight, *(torch.full((2, 3), value) for value in range(5))]
    for epoch, weight in enumerate(expected):
        assert torch.equal(load_weights(tmp_path / "run", epoch)["weight"], weight)


def test_metrics_are_those_of_the_moment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = torch.tensor(0.5)
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(0, {"loss": loss})
        loss += 1
        gate.release()
    assert open_run(tmp_path / "run").metrics == {0: {"loss": 0.5}}


def test_an_epoch_is_acknowledged_when_it_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(4)
        assert recorder.epochs == ()
        assert recorder.next_epoch == 5
        with pytest.raises(RunNotFoundError):
            open_run(tmp_path / "run")
        gate.release()
        recorder.flush()
        assert recorder.epochs == (4,)
        assert open_run(tmp_path / "run").epochs.tolist() == [4]
        gate.release()
        recorder.record(5, wait=True)
        assert recorder.epochs == (4, 5)


def test_whoever_records_faster_than_the_disk_waits_and_memory_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:

        def train() -> None:
            for epoch in range(5):
                recorder.record(epoch)
                done.append(epoch)

        training = threading.Thread(target=train)
        training.start()
        for committed in range(4):
            while len(done) < min(committed + MOST_UNDER_WAY, 5):
                training.join(0.001)
            training.join(0.02)
            assert len(done) == min(committed + MOST_UNDER_WAY, 5)
            gate.release()
        gate.release()
        training.join()
        recorder.flush()
        assert recorder._committer is not None
        assert len(recorder._committer._pool) == MOST_UNDER_WAY
    assert open_run(tmp_path / "run").epochs.tolist() == list(range(5))


def test_a_step_is_the_label_where_there_is_no_epoch(tmp_path: Path) -> None:
    with Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(step=1500)
        recorder.record(2000, step=1600)
        with pytest.raises(InputError, match=r"neither epoch nor step is given, .*; pass the epoch"):
            recorder.record()
        for step in (None, 1600):
            with pytest.raises(InputError, match=f"run: epoch 2001 has (no step|step {step}), .*; pass the training's"):
                recorder.record(2001, step=step)
    run = open_run(tmp_path / "run")
    assert run.epochs.tolist() == [1500, 2000]
    assert run.steps is not None
    assert run.steps.tolist() == [1500, 1600]


def test_steps_that_are_not_committed_yet_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(1, step=10)
        for step in (None, 10, 9):
            message = f"run: epoch 2 has step {step}, epoch 1 before it has step 10, .*; pass the training's step"
            with pytest.raises(InputError, match=message):
                recorder.record(2, step=step)
        with pytest.raises(InputError, match="step is 'x', expected an integer"):
            recorder.record(2, step="x")  # type: ignore[arg-type]
        gate.release(2)
        recorder.record(2, step=11)
    assert open_run(tmp_path / "run").epochs.tolist() == [1, 2]


def test_metrics_may_come_later_than_the_weights(tmp_path: Path) -> None:
    model = a_model()
    with Recorder(model, tmp_path / "run") as recorder:
        held = recorder.hold(0)
        moved(model, 7)
        recorder.commit(held, {"accuracy": 0.5})
        recorder.drop(recorder.hold(1))
        recorder.record(1)
    run = open_run(tmp_path / "run")
    assert torch.equal(run.state_dict(0)["weight"], a_model().weight)
    assert torch.equal(run.state_dict(1)["weight"], torch.full((2, 3), 7.0))
    assert run.metrics == {0: {"accuracy": 0.5}, 1: {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_survives_memory_that_is_used_again(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).bfloat16().to(dtype)
    model[2].float()
    states = []
    with Recorder(model, tmp_path / "run") as recorder:
        for epoch in range(4):
            recorder.record(epoch)
            states.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
            with torch.no_grad():
                for tensor in [*model.parameters(), model[1].running_mean]:
                    tensor += torch.randn(tensor.shape).bfloat16().to(tensor.dtype)  # type: ignore[arg-type, operator]
    for epoch, expected in enumerate(states):
        found = load_weights(tmp_path / "run", epoch)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), (epoch, name)


@torch.inference_mode()
def test_a_recorder_may_be_used_in_inference_mode_and_out_of_it(tmp_path: Path) -> None:
    model = a_model()
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        with torch.inference_mode(False):
            recorder.record(1)
        recorder.record(2)
        recorder.record(3)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2, 3]


# --- What goes wrong


def test_an_error_of_the_background_is_raised_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 1)
    with Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(0)
        recorder.record(1)
        with pytest.raises(OSError, match=r"No space left on device\n.*run: not recorded: epoch 1$"):
            recorder.flush()
        recorder.flush()
        assert recorder.next_epoch == 1
        recorder.record(1)
        recorder.record(2)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2]


def test_nothing_is_recorded_behind_an_epoch_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 1)
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:
        gate.release()
        recorder.record(0, wait=True)
        recorder.record(1)
        recorder.record(2)
        gate.release(100)
        with pytest.raises(OSError, match=r"No space left on device\n.*run: not recorded: epoch 1, 2$"):
            recorder.record(3)
        assert recorder.next_epoch == 1
        for epoch in (1, 2, 3):
            recorder.record(epoch)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2, 3]


def test_a_copy_that_was_taken_while_an_earlier_epoch_failed_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 0)
    with a_slow_disk(monkeypatch) as gate, Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(0)
        held = recorder.hold(1)
        gate.release()
        while recorder._committer is not None and recorder._committer.last is not None:
            pass
        with pytest.raises(OSError, match="not recorded: epoch 0"):
            recorder.commit(held)
        gate.release(2)
        recorder.record(0)
        recorder.record(1)
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1]


def test_an_error_surfaces_when_the_recorder_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="not recorded: epoch 1"), Recorder(a_model(), tmp_path / "run") as recorder:  # noqa: PT012
        recorder.record(0)
        recorder.record(1)
    recorder.close()
    with Recorder(a_model(), tmp_path / "run") as recorder:
        assert recorder.next_epoch == 1


def test_the_error_of_the_training_is_the_one_that_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 1)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError, match=r"division by zero\nwhile this was raised, .*No space.*epoch 1"),
        Recorder(a_model(), tmp_path / "run") as recorder,
    ):
        recorder.record(0)
        recorder.record(1)
        _ = 1 / 0
    assert open_run(tmp_path / "run").epochs.tolist() == [0]


def test_the_cheap_checks_are_made_at_once_and_count_what_is_not_committed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(a_model())
    with a_slow_disk(monkeypatch) as gate, Recorder(model, tmp_path / "run") as recorder:
        recorder.record(3)
        with pytest.raises(InputError, match=r"run: epoch 3 is recorded already; go on after epoch 3 or record into a"):
            recorder.record(3)
        with pytest.raises(InputError, match="run: epoch 2 comes before the last one, 3; go on after epoch 3"):
            recorder.record(2)
        with pytest.raises(InputError, match="epoch is 'four', expected an integer"):
            recorder.record("four")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="metric 'loss' is 'low', expected a number"):
            recorder.record(4, {"loss": "low"})
        model.append(nn.Linear(2, 2))
        with pytest.raises(LayoutError, match=r"run: epoch 4: '1\.weight' is new, the run does not have it"):
            recorder.record(4)
        del model[1]
        recorder.record(4)
        assert recorder.epochs == ()
        gate.release(2)
    assert open_run(tmp_path / "run").epochs.tolist() == [3, 4]


def test_a_tensor_that_takes_new_memory_or_becomes_a_buffer_is_noticed(tmp_path: Path) -> None:
    model = a_model()
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
        model.weight.data = torch.full((2, 3), 5.0)
        recorder.record(1)
        bias = model.bias.detach()
        del model.bias
        model.register_buffer("bias", bias)
        with pytest.raises(LayoutError, match="'bias' has kind buffer, the run has weight"):
            recorder.record(2)
    assert torch.equal(load_weights(tmp_path / "run", 1)["weight"], torch.full((2, 3), 5.0))


def test_a_closed_recorder_says_so(tmp_path: Path) -> None:
    with Recorder(a_model(), tmp_path / "run") as recorder:
        recorder.record(0)
    with pytest.raises(InputError, match="run: the recorder is closed; record with a new one"):
        recorder.record(1)
    assert recorder.epochs == (0,)
    recorder.flush()
    recorder.close()


def test_a_recorder_that_nobody_closes_or_keeps_gives_its_run_back(tmp_path: Path) -> None:
    recorder = Recorder(a_model(), tmp_path / "run")
    recorder.record(0)
    thread = next(thread for thread in threading.enumerate() if str(tmp_path) in thread.name)
    del recorder
    gc.collect()
    thread.join()
    with Recorder(a_model(), tmp_path / "run") as recorder:
        assert recorder.epochs == (0,)
    del recorder
    Recorder(a_model(), tmp_path / "run")
    gc.collect()
    Recorder(a_model(), tmp_path / "run").close()


# --- Where to


def test_without_a_path_the_environment_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in ("", None):
        monkeypatch.setenv("TRAJKIT_RUN", unset) if unset is not None else monkeypatch.delenv("TRAJKIT_RUN")
        with pytest.raises(InputError, match=r"no path and TRAJKIT_RUN is not set, .*'trajkit record RUN -- command'"):
            Recorder(a_model())
    monkeypatch.setenv("TRAJKIT_RUN", str(tmp_path / "run"))
    with Recorder(a_model()) as recorder:
        recorder.record(0)
    assert open_run(tmp_path / "run").epochs.tolist() == [0]


# --- What is chosen


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"include": "head.*"}, ["head.weight", "head.bias"]),
        (
            {"include": ["*.weight", "head.*"], "exclude": "encoder.1.*"},
            ["encoder.0.weight", "head.weight", "head.bias"],
        ),
        ({"exclude": ("encoder.?.*",)}, ["head.weight", "head.bias"]),
        ({"trainable_only": True}, ["head.weight", "head.bias"]),
        ({"trainable_only": True, "exclude": "*.bias"}, ["head.weight"]),
    ],
)
def test_only_what_is_chosen_is_recorded(choice: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    model = Parts()
    for epoch in range(2):
        with Recorder(model, tmp_path / "run", **choice) as recorder:
            model.head.requires_grad_(False)  # frozen later: a run holds what it began with
            recorder.record(epoch)
        model.head.requires_grad_(True)
    run = open_run(tmp_path / "run")
    assert list(run.layout.names()) == names
    state = model.state_dict()
    for name, tensor in run.state_dict(1).items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(LayoutError, match=r"'.*' is new, the run does not have it"):
        Recorder(model, tmp_path / "run")


def test_a_pattern_that_no_tensor_has_is_a_typing_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"run: the model: no tensor is called 'haed\.\*', .* such as encoder.0.weight"
    ):
        Recorder(Parts(), tmp_path / "run", exclude=["encoder.*", "haed.*"])
    with pytest.raises(LayoutError, match="the model has no weights"):
        Recorder(Parts(), tmp_path / "run", include="*.running_*")
    assert not (tmp_path / "run").exists()


# --- Processes


TRAINING = """
    import os, sys, threading, time, torch, trajkit
    from torch import nn
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 5).bfloat16())
    append = trajkit.RunWriter.append
    def slowly(*arguments, **named):
        time.sleep(0.1)
        append(*arguments, **named)
    trajkit.RunWriter.append = slowly
    recorder = trajkit.Recorder(model, sys.argv[1])
    for epoch in range(4):
        recorder.record(epoch)
"""


def run_script(more: str, path: Path, begins: str = TRAINING) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(begins) + textwrap.dedent(more)
    command = [sys.executable, "-W", "error", "-c", script, str(path)]
    return subprocess.run(interruptible(command), capture_output=True, text=True, check=False, timeout=120)


def test_a_recorder_that_was_dropped_loses_nothing_when_the_interpreter_ends(tmp_path: Path) -> None:
    done = run_script("del recorder", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2, 3]


def test_ctrl_c_in_the_midst_of_a_training_loses_nothing(tmp_path: Path) -> None:
    done = run_script(
        """
        import signal
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        for epoch in range(4, 1000):
            time.sleep(0.02)
            recorder.record(epoch)
            print(epoch, flush=True)
        """,
        tmp_path / "run",
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("KeyboardInterrupt\n")
    acknowledged = [3, *map(int, done.stdout.split())]
    assert open_run(tmp_path / "run").epochs.tolist()[: acknowledged[-1] + 1] == list(range(acknowledged[-1] + 1))


def test_what_fails_at_the_exit_is_told(tmp_path: Path) -> None:
    done = run_script("model[0].bias.data[3] = torch.nan; recorder.record(4)", tmp_path / "run")
    assert done.returncode == 0
    assert "trajkit: InputError: " in done.stderr
    assert "epoch 4: '0.bias' has nan, 1 of" in done.stderr
    assert done.stderr.endswith("run: not recorded: epoch 4\n")
    assert len(done.stderr.splitlines()) == 1


def test_forked_children_do_not_write_and_the_parent_loses_nothing_when_it_ends_without_close(tmp_path: Path) -> None:
    done = run_script(
        """
        from torch.utils.data import DataLoader
        for batch in DataLoader(torch.randn(8, 300), batch_size=4, num_workers=2, multiprocessing_context="fork"):
            model[0](batch)
        child = os.fork()
        if not child:
            try:
                recorder.record(9)
            except trajkit.TrajkitError as error:
                print("refused:", error, flush=True)
            recorder.flush()
            recorder.close()
            print(recorder.next_epoch, flush=True)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        recorder.record(4)
        """,
        tmp_path / "run",
        begins=TRAINING.replace("import os", "import warnings; warnings.simplefilter('ignore'); import os"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    said, following, code = done.stdout.splitlines()
    assert said.startswith("refused: ")
    assert said.endswith("the recorder belongs to the process that this one was forked from; record there")
    assert int(following) <= 4
    assert code == "7"
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2, 3, 4]


def train(path: Path, diary: Path) -> None:
    """A training as anyone writes it, that goes on where it was killed; "b" in the diary when it has begun."""
    torch.manual_seed(0)
    model = nn.Linear(200, 100)
    descriptor = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Recorder(model, path) as recorder:
        if recorder.next_epoch:
            model.load_state_dict(load_weights(path, recorder.next_epoch - 1))
        os.write(descriptor, b"b")
        for epoch in itertools.count(recorder.next_epoch):
            with torch.no_grad():
                model.weight.mul_(0.99).add_(epoch)
            recorder.record(epoch, {"epoch": epoch})
            os.ftruncate(descriptor, 1)
            os.write(descriptor, str(len(recorder.epochs)).encode())


def test_a_training_that_is_killed_again_and_again_has_one_run_without_gap_or_duplicate(tmp_path: Path) -> None:
    rng, path, diary = np.random.default_rng(0), tmp_path / "run", tmp_path / "diary"
    acknowledged = 0
    for _ in range(8):
        diary.unlink(missing_ok=True)
        training = multiprocessing.get_context("fork").Process(target=train, args=(path, diary))
        training.start()
        while not (diary.exists() and diary.read_bytes()):
            training.join(0.001)
        training.join(rng.uniform(0, 0.1))
        training.kill()
        training.join()
        acknowledged = max(acknowledged, int(diary.read_bytes()[1:] or 0))
        if acknowledged:
            assert len(open_run(path).epochs) >= acknowledged
    run = open_run(path)
    assert acknowledged > 0
    assert run.epochs.tolist() == list(range(len(run.epochs)))
    torch.manual_seed(0)
    weight = nn.Linear(200, 100).weight.detach()
    for epoch in run.epochs.tolist():
        weight = weight.mul(0.99).add(epoch)
        assert run.metrics[epoch] == {"epoch": epoch}
        assert torch.equal(run.state_dict(epoch)["weight"], weight), epoch


def test_a_recorder_made_by_a_forked_child_records(tmp_path: Path) -> None:
    def child() -> None:
        with Recorder(a_model(), tmp_path / "run") as recorder:
            recorder.record(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert open_run(tmp_path / "run").epochs.tolist() == [0]
