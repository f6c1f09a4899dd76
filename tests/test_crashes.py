"""A process that dies before, half through or after any single operation loses nothing and leaves nothing torn."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from faults import Disk, not_waiting_for_the_disk, tree_of, write_tree
from scenarios import RUN, SCENARIOS, Scenario, Story, opening, recording, seen

STORIES = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)

RESUMED = [
    Scenario("resume a creation", (), (recording(1),)),
    Scenario("resume a recording", (recording(1),), (recording(2),)),
]


@STORIES
def test_a_crash_at_any_operation_loses_nothing_and_shows_nothing_torn(scenario: Scenario, fast_folder: Path) -> None:
    story = Story(scenario, fast_folder)
    story.check_kills()
    assert len(story.contents) > 1
    assert story.contents[0] != story.contents[-1]


def test_hundreds_of_crash_points_are_enumerated(fast_folder: Path) -> None:
    """Moments after which the disk is another one than before; each is checked above."""
    points = {}
    for scenario in SCENARIOS:
        moments = Story(scenario, fast_folder / scenario.name).disk.moments
        points[scenario.name] = sum(one.killed != next_one.killed for one, next_one in pairwise(moments))
    assert min(points.values()) >= 10
    assert sum(points.values()) >= 600


@STORIES
def test_every_change_of_the_disk_is_watched(scenario: Scenario, fast_folder: Path) -> None:
    """Nothing reaches the disk by a way that the harness does not know."""
    story = Story(scenario, fast_folder)
    assert tree_of(story.root) == story.disk.now()


@pytest.mark.parametrize("scenario", RESUMED, ids=str)
def test_a_crash_at_any_operation_while_a_crash_is_made_good(scenario: Scenario, fast_folder: Path) -> None:
    """Opening rolls forward what was committed and clears the rest; it may die, too. Each seventh pair is tried."""
    story = Story(scenario, fast_folder)
    begun = 0
    for number, first in enumerate(story.disk.moments):
        disk = story.new_disk()
        write_tree(first.killed, disk / "again")
        with not_waiting_for_the_disk(), Disk(disk / "again") as second:
            found = seen(disk / "again" / RUN)
            for _ in opening(disk / "again" / RUN):
                pass
        for moment in second.moments[1 + number % 7 :: 7]:
            where = f"{first.after} and, when opened again, {moment.after}"
            begun += story.check(moment.killed, first.acknowledged, where, allowed=[found])
    assert begun > 20
