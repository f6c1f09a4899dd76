"""What commands print: no character of a name is a command to the terminal, and no command leaves a handler behind."""

from __future__ import annotations

import json
import logging
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import REPOSITORY
from trajkit_cli.main import main
from trajkit_cli.output import echo, echo_table, printable

from trajkit import ParameterLayout, Run, RunWriter, open_run
from trajkit.advice import TrajkitWarning, warn
from trajkit.errors import DamagedRunError
from trajkit.layout import TensorEntry

EVIL = "\x1b]0;owned\x07\x7f\x1b[2J\nlayer\u202e\x9b31m\u2066\r"
ESCAPED = r"\x1b]0;owned\x07\x7f\x1b[2J\nlayer\u202e\x9b31m\u2066\r"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_printable(result: Result) -> None:
    """On both streams, and that the name was there at all."""
    said = result.output.replace("\n", "")
    assert not [char for char in said if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")], repr(said)
    assert ESCAPED in result.output, result.output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: ü 重 × … é", "plain: ü 重 × … é"),
        (EVIL, ESCAPED),
        ("tab\t, delete\x7f, next line\x85", r"tab\t, delete\x7f, next line\x85"),
        ("\u2028\u2029\u200b\ufeff\u200f\u061c", r"\u2028\u2029\u200b\ufeff\u200f\u061c"),
        (
            "a file name's undecodable byte \udcff, a tag \U000e0041",
            r"a file name's undecodable byte \udcff, a tag \U000e0041",
        ),
        ("spaces that are wide\u3000 or hold together\u202f.", "spaces that are wide\u3000 or hold together\u202f."),
    ],
)
def test_text_is_shown_with_what_a_terminal_would_obey_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_columns_are_aligned_by_the_cells_that_characters_take(capsys: pytest.CaptureFixture[str]) -> None:
    echo_table(["名前", "value"], [["a\x1b", "1"], ["重み重み", "22"]])
    assert capsys.readouterr().out.splitlines() == ["名前      value", r"a\x1b         1", "重み重み     22"]


def test_a_stream_that_lacks_a_character_gets_its_escape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        echo("ü – 重")
    assert (tmp_path / "out").read_text("latin-1") == "ü \\u2013 \\u91cd\n"


def test_only_one_place_prints() -> None:
    for file in (REPOSITORY / "cli").glob("*.py"):
        if file.name != "output.py":
            assert "click.echo" not in file.read_text(), file.name
            assert "print(" not in file.read_text(), file.name


# --- Names of a stranger


@pytest.fixture
def evil_run(tmp_path: Path) -> Run:
    """A run whose tensors and metrics have names that are commands to a terminal; two epochs are bit-identical."""
    layout = ParameterLayout.of(
        [TensorEntry(EVIL, (150,), "float32", "weight"), TensorEntry("b" + EVIL, (50,), "float32", "weight")]
    )
    weights = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32).cumsum(axis=0)
    weights[:, 150:] = weights[0, 150:]
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for epoch, values in enumerate(weights):
            writer.append(layout, epoch, values, {}, {EVIL: float(epoch)})
    return open_run(tmp_path / "run")


def evil_score(state_dict: dict[str, Any]) -> dict[str, float]:
    return {EVIL: float(len(state_dict))}


def evil_failure(_state_dict: dict[str, Any]) -> float:
    raise RuntimeError(f"no {EVIL}")


def evil_warning(_state_dict: dict[str, Any]) -> float:
    warnings.warn(f"no {EVIL}", TrajkitWarning, stacklevel=1)
    return 0.0


def damaged(run: Run) -> None:
    Path(run.path, "weights/c/2/0").write_bytes(b"x")


def not_finite(run: Run) -> None:
    layout = run.layout
    with RunWriter(run.path, fsync=False, nonfinite="record") as writer:
        writer.append(layout, 8, np.full(200, np.nan, np.float32), {})


Before = Callable[[Run], object]


@pytest.mark.parametrize(
    ("before", "arguments"),
    [
        (None, ["info", "RUN"]),
        (None, ["check", "RUN", "-q"]),
        (damaged, ["verify", "RUN", "--full", "-q"]),
        (damaged, ["check", "RUN", "-q"]),
        (not_finite, ["fit", "RUN", "-q"]),
        (None, ["evaluate", "RUN", "--with", "test_output:evil_score", "-q"]),
        (None, ["evaluate", "RUN", "--with", "test_output:evil_failure", "-q"]),
        (None, ["evaluate", "RUN", "--with", "test_output:evil_warning", "-q"]),
        (None, ["evaluate", "RUN", "--with", f"test_output:{EVIL}"]),
        (None, ["info", EVIL]),
        (None, ["reconstruct", "RUN", "--fit", EVIL, "--epoch", "3", "-o", "x.pt"]),
        (None, ["fit", "RUN", "--epochs", EVIL]),
        (None, ["record", "RUN", f"{EVIL}3.pt", "-q"]),
        (None, [f"x{EVIL}"]),
        (None, ["info", "RUN", f"--x{EVIL}"]),
        (None, ["info", "RUN", EVIL]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_name_is_no_command_to_the_terminal(before: Before | None, arguments: list[str], evil_run: Run) -> None:
    if before is not None:
        before(evil_run)
    assert_printable(invoke(*[evil_run.path if word == "RUN" else word for word in arguments]))


def test_files_of_such_names_are_told_of_in_plain_characters(evil_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    name = EVIL.replace("/", "")
    torch.save({EVIL: torch.zeros(150), "b" + EVIL: torch.zeros(50)}, folder / f"{name} epoch9.pt")
    torch.save({"other": torch.zeros(3)}, folder / f"{name} epoch10.pt")
    watched = invoke("record", evil_run.path, "--watch", folder, "--until", "10", "--idle", "2s", "--interval", "0.1")
    assert_printable(watched)
    assert "epoch 9: " in watched.stderr
    assert_printable(invoke("record", evil_run.path, folder / f"{name} epoch10.pt"))


def test_json_is_ascii_without_control_characters(evil_run: Run) -> None:
    described = invoke("info", evil_run.path, "--json").stdout
    assert described.isascii()
    assert not {char for char in described if (char < " " and char != "\n") or char == "\x7f"}
    assert json.loads(described)["tensors"][0]["name"] == EVIL


def test_errors_of_the_library_carry_names_as_they_are(evil_run: Run) -> None:
    damaged(evil_run)
    with pytest.raises(DamagedRunError, match="layer\u202e"):
        evil_run.state_dict(2)


# --- What a command leaves behind


@pytest.fixture
def no_handlers() -> Iterator[logging.Logger]:
    logger = logging.getLogger("trajkit")
    assert logger.handlers == []
    yield logger
    assert logger.handlers == []
    assert logger.level == logging.NOTSET


def test_quiet_is_quiet_after_another_call(no_handlers: logging.Logger, tmp_path: Path) -> None:
    for epoch in range(3):
        torch.save({"weight": torch.full((5,), float(epoch))}, tmp_path / f"epoch{epoch}.pt")
    files = sorted(tmp_path.glob("*.pt"))
    loud = invoke("record", tmp_path / "loud", *files)
    assert "B an epoch" in loud.stderr
    assert no_handlers.handlers == []
    assert invoke("record", tmp_path / "quiet", *files, "-q").stderr == ""


@pytest.mark.usefixtures("no_handlers")
@pytest.mark.parametrize("arguments", [["info", "nowhere"], ["nonsense"], ["fit"], ["--help"]])
def test_a_command_that_fails_leaves_no_handler(arguments: list[str]) -> None:
    before = warnings.showwarning
    invoke(*arguments)
    assert warnings.showwarning is before


def test_a_warning_of_the_library_is_one_line_once(digits_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: Any, **__: Any) -> Run:
        warn("one\ntwo")
        warn("one\ntwo")
        logging.getLogger("trajkit").warning("three")
        return open_run(digits_path)

    monkeypatch.setattr("trajkit_cli.info.trajkit.open_run", warned)
    assert invoke("info", digits_path).stderr == "Warning: one\\ntwo\nthree\n"


def test_a_warning_points_at_the_line_of_the_caller() -> None:
    with pytest.warns(TrajkitWarning, match="told") as told:
        warn("told")
    assert told[0].filename == __file__
