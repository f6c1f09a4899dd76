"""`trajkit record RUN -- command`: the training finds its run, signals reach it once, and its exit code comes back."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interruptible import interruptible
from test_cli import invoke

from trajkit import open_run
from trajkit.training.launching import launch

RECORDING = """
import os, sys
import numpy as np
from trajkit import ParameterLayout, RunWriter
from trajkit.layout import TensorEntry
layout = ParameterLayout.of([TensorEntry(name="w", shape=(3,), dtype="float32", kind="weight")])
with RunWriter(os.environ["TRAJKIT_RUN"], fsync=False) as writer:
    for epoch in map(int, sys.argv[1:]):
        writer.append(layout, epoch, np.ones(3, np.float32), {})
"""

COUNTING = """
import signal, sys, time
seen = []
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, _: seen.append(number))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.5)  # another one would come by now
sys.exit(100 * (seen[0] == signal.SIGTERM) + len(seen))
"""


def code(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", text, *map(str, arguments)]


def test_a_training_finds_its_run_and_what_it_recorded_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched = launch("run", code(RECORDING, 0, 1))
    assert (launched.exit_code, launched.epochs) == (0, (0, 1))
    result = invoke("record", "run", "--", *code(RECORDING, 5))
    assert (result.stdout, result.stderr) == ("", "run: 1 epochs recorded (5 to 5)\n")
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 5]


@pytest.mark.parametrize(
    ("command", "expected", "said"),
    [
        (["sh", "-c", "exit 3"], 3, "no epoch recorded; does the training use trajkit.Recorder"),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, "no epoch recorded"),
        (["no-such-command"], 127, "no-such-command: cannot be run (No such file or directory); check the command"),
        (["/tmp"], 126, "/tmp: cannot be run (Permission denied); check the command"),
    ],
)
def test_the_exit_code_is_given_back(command: list[str], expected: int, said: str, tmp_path: Path) -> None:
    result = invoke("record", tmp_path / "run", "--", *command, code=expected)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "a.pt", "--", "python"], "checkpoints and a command after -- exclude each other; give one"),
        (["RUN", "a.pt", "--watch", "x"], "checkpoints and --watch exclude each other; give one"),
        (["RUN", "--watch", "x", "--", "python"], "--watch and a command after -- exclude each other; give one"),
        (["RUN", "--"], "nothing stands after --; give the command of a training"),
        (["RUN"], "nothing to record; give checkpoints, or --watch DIR, or -- and the command of a training"),
        (["--", "python"], "Missing argument 'RUN'"),
        (["RUN", "a.pt", "--until", "3"], "--until goes with --watch; leave it out"),
        (["RUN", "--key", "model", "--", "python"], "a command records by its own settings; leave out --key"),
        (["RUN", "--watch", "x", "--first-epoch", "3"], "--watch takes the numbers in the names"),
        (["RUN", "--watch", "x", "--epoch", "3"], "--watch takes the numbers in the names; leave out --epoch"),
        (["RUN", "--watch", "x", "--dry-run"], "--dry-run goes with checkpoints that are there; leave it out"),
        (["RUN", "--dry-run", "--", "python"], "a command records by its own settings; leave out --dry-run"),
        (["RUN", "a.pt", "--epoch", "3", "--label", "(a)"], "--epoch and --label exclude each other; give one"),
        (["RUN", "a.pt", "b.pt", "--epoch", "3"], "--epoch is for one checkpoint, found 2; use --label or"),
        (["RUN", "a.pt", "--label", "epoch"], "'epoch' has no group; write one around the number, such as 'epoch_"),
        (["RUN", "a.pt", "--label", "("], "'(' is no regular expression (missing ), unterminated subpattern"),
        (["RUN", "--watch", "x", "--idle", "10 days"], "'10 days' is no time; write 90s, 10m or 2h"),
    ],
)
def test_what_excludes_each_other_is_told(arguments: list[str], said: str) -> None:
    assert said in invoke("record", *arguments, code=2).stderr


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 1), (signal.SIGTERM, 101)])
def test_a_signal_without_a_terminal_reaches_the_training_once(
    number: signal.Signals, expected: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "trajkit_cli", "record", tmp_path / "run", "--", *code(COUNTING)]
    process = subprocess.Popen(interruptible(command), stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)  # the whole group, as some supervisors do
    assert process.wait(60) == expected
    process.stdout.close()


def test_ctrl_c_in_a_terminal_reaches_the_training_once(tmp_path: Path) -> None:
    command = interruptible([sys.executable, "-m", "trajkit_cli", "record", tmp_path / "run", "--", *code(COUNTING)])
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    os.close(terminal)
