"""Power cuts: only what was synced is sure to be there, of the rest any part. What was acknowledged was synced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Crash, Disk, Failing, not_waiting_for_the_disk
from scenarios import RUN, SCENARIOS, Scenario, Story

from trajkit.errors import TrajkitError


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_power_cut_at_any_operation_loses_nothing_and_shows_nothing_torn(
    scenario: Scenario, fast_folder: Path
) -> None:
    Story(scenario, fast_folder, power_cuts=True).check_power_cuts()


def input_output_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


EVERY = {"create": 2, "record": 5, "fit": 5, "evaluate": 1}
"""Scenarios that are done again, and which operations fail: every so many."""


@pytest.mark.parametrize("fault", [Crash, input_output_error])
@pytest.mark.parametrize("scenario", [scenario for scenario in SCENARIOS if scenario.name in EVERY], ids=str)
def test_what_is_done_again_after_a_fault_survives_a_power_cut(
    scenario: Scenario, fault: Callable[[], Any], fast_folder: Path
) -> None:
    """Whoever goes on does not know which names had reached the disk."""
    story = Story(scenario, fast_folder)
    at, more = 1, True
    while more:
        root = story.copy_of_before()
        with not_waiting_for_the_disk(), Disk(root) as disk:
            with Failing(root, at, fault) as failing:
                try:
                    for _ in scenario.do(root / RUN):
                        disk.acknowledge()
                except (Crash, OSError, TrajkitError, RuntimeWarning):
                    pass
            for _ in scenario.do(root / RUN):
                disk.acknowledge()
        # What the fault left was perhaps there already, without anybody having promised it.
        allowed = story.contents[disk.acknowledged :]
        where = f"a fault at operation {at}, going on, and a power cut"
        story.check(disk.after_power_cut(), disk.acknowledged, where, allowed)
        at, more = at + EVERY[scenario.name], failing.failed
    assert at > 10
