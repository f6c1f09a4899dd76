"""Every example runs, and goes on when it is started again."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trajkit import check, open_run

EXAMPLES = {"plain_loop": [0, 1, 2, 3, 4], "huggingface_trainer": [1, 2, 3, 4], "lightning_fit": [0, 1, 2, 3]}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*is missing from the .* state_dict:UserWarning"),
]


def test_no_example_is_forgotten() -> None:
    assert {path.stem for path in (REPOSITORY / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_twice_and_leaves_one_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"), run_name="__main__")
        assert f"epochs {EXAMPLES[name]}, last " in capsys.readouterr().out
    run = open_run(tmp_path / "run")
    assert run.epochs.tolist() == EXAMPLES[name]
    assert check(run).healthy


def test_the_plain_loop_takes_its_run_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plain_loop"])
    monkeypatch.setenv("TRAJKIT_RUN", str(tmp_path / "run"))
    runpy.run_path(str(REPOSITORY / "examples/plain_loop.py"), run_name="__main__")
    assert open_run(tmp_path / "run").epochs.tolist() == EXAMPLES["plain_loop"]
