"""SIGKILL: all that was acknowledged is there, nothing torn is seen, and the next process goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import WAYS, Way, kill_fitters, kill_recorders


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_recording_that_is_killed_23_times_loses_nothing(way: Way, tmp_path: Path) -> None:
    toll = kill_recorders(tmp_path, 23, way, seed=WAYS.index(way))
    assert toll.kills == 23
    assert toll.epochs > 3
    assert toll.phases["opening"] > 0
    assert len(toll.phases) >= 3


def test_fits_that_are_killed_8_times_are_old_or_new(tmp_path: Path) -> None:
    assert kill_fitters(tmp_path, 8, seed=0) > 0
