"""The demo beside other work, and make where Python is too old or an installation was left half made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from trajkit import demo, load_weights


@pytest.mark.parametrize("threads", [1, 3])
def test_the_demo_trains_and_scores_by_one_thread_and_leaves_the_users_setting(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    accuracy = demo._accuracy

    def looking(*arguments: object) -> float:
        seen.append(torch.get_num_threads())
        return accuracy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_accuracy", looking)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = demo.record_digits(tmp_path / "run", epochs=2)
        demo.test_accuracy(load_weights(run))
        assert torch.get_num_threads() == threads
        monkeypatch.setattr(demo, "_train_one_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.record_digits(tmp_path / "other", epochs=2)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1, 1]


# --- make install


PRETENDED = """#!/bin/sh
# A Python that may be old; it makes virtual environments of itself, and writes down what it is asked for.
case "$*" in
    *version_info*) {says_its_version} ;;
    "-m venv --clear"*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; {after_venv} ;;
    "-m pip --version") test -e "$(dirname "$0")/pip" ;;
    "-m ensurepip"*) touch "$(dirname "$0")/pip" ;;
    "-m pip install"*) test -e "$(dirname "$0")/pip" && {pip} ;;
esac
exit_code=$?
echo "$*" >> "{log}"
exit $exit_code
"""


INSTALL = "pip install --quiet --constraint constraints.txt --editable .[dev]"


class Place:
    """A clone, with a `python` of any version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, folder / name)

    def python(self, version: str, after_venv: str = 'touch "$4/bin/pip"', pip: str = "true") -> Path:
        """A program that says that it is Python of some version."""
        program = self.folder / f"python{version}"
        is_old = tuple(map(int, version.split("."))) < (3, 11)
        says = f"printf 'Python {version}'" if is_old else "true"
        program.write_text(PRETENDED.format(says_its_version=says, after_venv=after_venv, pip=pip, log=self.log))
        program.chmod(0o755)
        return program

    def make(self, python: Path | str, target: str = "install") -> subprocess.CompletedProcess[str]:
        """What `make` does there."""
        return subprocess.run(
            ["make", target, f"PYTHON={python}"], cwd=self.folder, capture_output=True, text=True, check=False
        )

    @property
    def asked(self) -> list[str]:
        """What the pretended programs were asked for, and forget it."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.removeprefix("-m ") for line in lines if line.startswith("-m ") and "--version" not in line]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("version", ["3.10.12", "2.7.18", "3.9.0"])
def test_a_python_that_is_too_old_is_one_line_and_leaves_nothing(version: str, place: Place) -> None:
    python = place.python(version)
    done = place.make(python)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    needed = "trajkit needs Python 3.11 or newer; give one: make PYTHON=python3.12"
    assert f"{python} is Python {version}, {needed}." in done.stderr
    assert not (place.folder / ".venv").exists()
    assert place.asked == []


def test_a_python_that_is_not_there_is_one_line_too(place: Place) -> None:
    done = place.make("python-nowhere")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "python-nowhere is no Python that runs, trajkit needs Python 3.11 or newer; give one: make PYT" in done.stderr
    )
    assert not (place.folder / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11.0", "3.12.4", "3.100.0"])
def test_a_python_that_is_new_enough_installs_once(version: str, place: Place) -> None:
    python = place.python(version)
    assert place.make(python).returncode == 0
    assert place.asked == ["venv --clear .venv", INSTALL]
    assert place.make(python).returncode == 0
    assert place.asked == []


def test_an_environment_that_could_not_be_made_is_taken_away(place: Place) -> None:
    """As on Debian without python3-venv, which stops when the folder is half there."""
    python = place.python("3.12.1", after_venv="exit 1")
    assert place.make(python).returncode == 2
    assert not (place.folder / ".venv").exists()


def test_an_environment_that_was_left_half_made_is_completed(place: Place) -> None:
    """A make that was killed in ensurepip leaves a Python without pip."""
    python = place.python("3.12.1")
    (place.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(python, place.folder / ".venv/bin/python")
    assert place.make(python).returncode == 0
    assert place.asked == ["ensurepip --default-pip", INSTALL]


def test_an_environment_whose_python_does_not_run_is_made_again(place: Place) -> None:
    python = place.python("3.12.1")
    (place.folder / ".venv/bin").mkdir(parents=True)
    (place.folder / ".venv/bin/python").symlink_to("/nowhere/python3")
    assert place.make(python).returncode == 0
    assert place.asked == ["venv --clear .venv", INSTALL]


def test_an_environment_of_an_old_python_is_told_and_kept(place: Place) -> None:
    old, new = place.python("3.10.12"), place.python("3.12.1")
    (place.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(old, place.folder / ".venv/bin/python")
    done = place.make(new)
    assert done.returncode == 2
    assert ".venv/bin/python is Python 3.10.12, trajkit needs" in done.stderr
    assert "give one: make clean install PYTHON=python3.12." in done.stderr
    assert (place.folder / ".venv/bin/python").exists()
    assert place.asked == []


def test_an_installation_that_failed_is_not_taken_for_one(place: Place) -> None:
    python = place.python("3.12.1", pip="false")
    assert place.make(python).returncode == 2
    assert not (place.folder / ".venv/.installed").exists()
    place.python("3.12.1")
    shutil.copy(python, place.folder / ".venv/bin/python")
    assert place.make(python).returncode == 0
    assert (place.folder / ".venv/.installed").exists()


def test_the_python_of_these_tests_is_new_enough(place: Place) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "install", f"PYTHON={sys.executable}"],
        cwd=place.folder,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "-m venv" in done.stdout
