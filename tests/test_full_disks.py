"""A disk that is full or fails: the caller is told, nothing is torn, and all goes on when there is room again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import counting
import pytest
import torch
from click.testing import CliRunner
from faults import CHANGES, NEED_ROOM, Failing, When, not_waiting_for_the_disk, tree_of
from safetensors.torch import save_file
from scenarios import RUN, SCENARIOS, Scenario, Story, opening, recording, seen
from wholeness import assert_whole

from trajkit import RunWriter
from trajkit.errors import InputError, TrajkitError
from trajkit_cli.main import main

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def error_of(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "scenario",
    [
        *(one for one in SCENARIOS if one.name in ("create", "record shards", "fit", "update", "evaluate")),
        Scenario("resume", (recording(2),), (opening, recording(3))),
    ],
    ids=str,
)
def test_an_error_at_any_operation_is_told_and_leaves_nothing_torn(scenario: Scenario, fast_folder: Path) -> None:
    """No space and no quota stay until somebody makes room, an input/output error comes once."""
    story = Story(scenario, fast_folder)
    at, told, more = 1, 0, True
    while more:
        number = ERRORS[at % len(ERRORS)]
        root = story.copy_of_before()
        stays = number != errno.EIO
        with scenario.rules(), not_waiting_for_the_disk():
            acknowledged = 0
            with Failing(root, at, error_of(number), stays=stays, only=NEED_ROOM if stays else CHANGES) as failing:
                try:
                    for _ in scenario.do(root / RUN):
                        acknowledged += 1
                except (OSError, TrajkitError, RuntimeWarning) as error:
                    told += 1
                    kept = error  # as a notebook keeps it, with all that its traceback holds
            story.check(tree_of(root), acknowledged, f"{os.strerror(number)} at operation {at}")
            for _ in opening(root / RUN):  # nobody holds it any more
                pass
        at, more = at + 1, failing.failed
    assert told > 5
    del kept


@pytest.mark.parametrize("stays", [False, True], ids=["once", "until there is room"])
@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_the_same_writer_goes_on_when_there_is_room_again(when: When, stays: bool, tmp_path: Path) -> None:
    """As a notebook does: a refused epoch is recorded when it is tried again, or was recorded after all."""
    path = tmp_path / "run"
    again = done = 0
    with not_waiting_for_the_disk(), RunWriter(path) as writer:
        counting.append(writer, 0)
        at, more = 1, True
        while more:
            epoch = len(writer.epochs)
            error = KeyboardInterrupt if at % 4 == 0 else error_of(ERRORS[at % 3])
            only = NEED_ROOM if stays else CHANGES
            faults = Failing(path, at, error, when, stays, only)
            with contextlib.suppress(KeyboardInterrupt, OSError), faults as failing:
                counting.append(writer, epoch)
            found = assert_whole(path, range(epoch, epoch + 2), last=2)
            if found == epoch:
                counting.append(writer, epoch)
                again += 1
            else:
                with pytest.raises(InputError, match="is recorded already"):
                    counting.append(writer, epoch)
                done += 1
            at, more = at + 1, failing.failed
        assert_whole(path, epoch + 1)
    assert again > 10
    assert done > 5


def test_a_failing_lock_file_does_not_lock_the_run(tmp_path: Path) -> None:
    with (
        Failing(tmp_path, 1, error_of(errno.ENOSPC), only=("pwrite",)),
        pytest.raises(OSError, match="No space") as kept,
    ):
        RunWriter(tmp_path / "run")
    with RunWriter(tmp_path / "run") as writer:
        counting.append(writer, 0)
    assert "No space" in str(kept.value)


@pytest.mark.parametrize("at", [1, 5, 10, 20, 40])
def test_the_command_line_says_in_one_line_that_the_disk_is_full(at: int, tmp_path: Path) -> None:
    for epoch in range(2):
        save_file({"w": torch.full((10,), float(epoch))}, tmp_path / f"epoch{epoch}.safetensors")
    command = ["record", str(tmp_path / "run"), *(str(tmp_path / f"epoch{epoch}.safetensors") for epoch in range(2))]
    with Failing(tmp_path / "run", at, error_of(errno.ENOSPC), stays=True, only=NEED_ROOM) as failing:
        told = CliRunner().invoke(main, [*command, "--quiet"])
    assert failing.failed
    assert told.exit_code == 1
    assert isinstance(told.exception, SystemExit)
    assert told.output.count("\n") == 1
    assert told.output.startswith("Error: ")
    assert "No space left on device; nothing recorded is lost" in told.output
    again = CliRunner().invoke(main, [*command, "--quiet"])
    assert again.exit_code == 0, again.output
    assert len(seen(tmp_path / "run")["epoch"][1]) == 2
