"""Every command and snippet of the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from s3 import s3_server
from torch import nn

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


TRAINING = """
import torch, trajkit
with trajkit.Recorder(torch.nn.Linear(3, 2)) as recorder:
    recorder.record(0)
print("trained")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of the repository and some checkpoints, where commands and snippets run in order."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "data", folder / "data", ignore=shutil.ignore_patterns("fits", "evaluations"))
    (folder / "checkpoints").mkdir()
    for epoch in range(3):
        torch.save(nn.Linear(3, 2).state_dict(), folder / f"checkpoints/epoch{epoch}.pt")
    (folder / "train.py").write_text(TRAINING)
    return folder


def run_in(folder: Path, command: str | list[str]) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"make", "trajkit"}
    assert len(COMMANDS) >= 7


def test_the_commands_of_the_readme_run_one_after_the_other(workplace: Path) -> None:
    for command in COMMANDS:
        if command == "make test":  # these are the tests: see that make knows what to do
            assert "pytest" in run_in(REPOSITORY, "make --dry-run test")
        elif command.startswith("make"):
            assert "CMD accuracy" in run_in(REPOSITORY, command)
        else:
            assert run_in(workplace, command), command


def test_the_table_of_the_readme_is_the_demos() -> None:
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    words = run_in(REPOSITORY, [sys.executable, "-m", "trajkit_cli", "demo", "-q"]).splitlines()
    first_cells = [line.split("  ")[0] for line in words]
    assert [line.split("  ")[0] for line in shown[1].splitlines()] == first_cells


def test_the_snippets_run_as_one_script(workplace: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    model_of_ones_own = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(200, 6), torch.randint(3, (200,))
def train_one_epoch(model):
    for batch in torch.randperm(200).split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
def test_accuracy(model):
    return (model(x).argmax(1) == y).float().mean()
"""
    (workplace / "script.py").write_text(model_of_ones_own + "\n".join(snippets))
    with s3_server() as s3:
        s3.bucket("bucket")
        run_in(workplace, [sys.executable, "-W", "error", "script.py"])
    assert (workplace / "epoch11.safetensors").exists()
