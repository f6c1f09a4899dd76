"""What a killed process leaves of its warm-up is removed by the next one, and nothing else ever is."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import vector_layout
from torch import nn

from trajkit import OnlineCMD, RunWriter
from trajkit.store.format import LOCKS
from trajkit.training.warmup import FOLDER


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def folder_of_a_dead_process(place: Path, name: str = "dead") -> Path:
    """The lock of its writer is free, and says who held it."""
    folder = place / f"{FOLDER}{name}"
    with RunWriter(folder / "run", fsync=False) as writer:
        writer.append(vector_layout(10), 0, np.zeros(10, np.float32), {})
    return folder


def begin() -> OnlineCMD:
    model = nn.Linear(3, 2)
    cmd = OnlineCMD(model)
    cmd.update_parameters(model)
    return cmd


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    dead = [folder_of_a_dead_process(tmp_path, name) for name in ("one", "two")]
    begin()
    assert not any(folder.exists() for folder in dead)


def test_what_lives_is_kept(tmp_path: Path) -> None:
    first = begin()
    folders = set(tmp_path.iterdir())
    second = begin()
    assert len(folders) == 1
    assert folders < set(tmp_path.iterdir())
    assert first.n_updates == second.n_updates == 1


def test_the_folder_of_another_user_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = folder_of_a_dead_process(tmp_path)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    begin()
    assert dead.exists()


@pytest.mark.parametrize("said", ["", "another host", "no json"])
def test_a_folder_of_which_this_machine_does_not_know_is_kept(said: str, tmp_path: Path) -> None:
    dead = folder_of_a_dead_process(tmp_path)
    lock = dead / "run" / LOCKS / "writer"
    assert json.loads(lock.read_text())["process"] == os.getpid()
    lock.write_text(json.dumps({"process": 1, "host": "elsewhere"}) if said == "another host" else said)
    begin()
    assert dead.exists()


def test_links_files_and_what_is_being_made_are_kept(tmp_path: Path) -> None:
    elsewhere = folder_of_a_dead_process(tmp_path / "elsewhere")
    (tmp_path / f"{FOLDER}link").symlink_to(elsewhere)
    (tmp_path / f"{FOLDER}file").touch()
    (tmp_path / f"{FOLDER}empty").mkdir()
    before = set(tmp_path.iterdir())
    cmd = begin()
    assert before < set(tmp_path.iterdir())
    assert (elsewhere / "run").exists()
    assert not cmd.is_warm
