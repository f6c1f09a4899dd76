"""Recordings, refusals, crashes, damage and repair in any order, against a model in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import counting
import numpy as np
import pytest
from damage import DAMAGES, damaged, swapped
from faults import Crash, Failing, not_waiting_for_the_disk
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from scenarios import assert_shown_whole, seen

from trajkit import RunWriter, open_run
from trajkit.errors import DamagedRunError, InputError, RunNotFoundError
from trajkit.store.arrays import VerifiedReader
from trajkit.store.disk import SoundFile, identity_of
from trajkit.store.format import commit_key

EXAMPLES = 60 * int(os.environ.get("TRAJKIT_FUZZ_EXAMPLES", "1"))


class AnyOrder(RuleBasedStateMachine):
    """`epochs` are those that must be there; `lost` the files that are not what was recorded, with their content."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=memory))
        self.path = self.folder / "run"
        self.epochs: list[int] = []
        self.lost: dict[Path, bytes] = {}
        self.writer: RunWriter | None = RunWriter(self.path, fsync=False)

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
        shutil.rmtree(self.folder)

    # Recording

    @precondition(lambda self: self.writer is not None)
    @rule(step=st.integers(1, 3))
    def append(self, step: int) -> None:
        assert self.writer is not None
        epoch = (self.epochs[-1] if self.epochs else -1) + step
        counting.append(self.writer, epoch)
        self.epochs.append(epoch)

    @precondition(lambda self: self.writer is not None and self.epochs)
    @rule(chosen=st.integers(0, 100))
    def an_epoch_that_is_recorded_or_earlier_is_refused(self, chosen: int) -> None:
        assert self.writer is not None
        with pytest.raises(InputError, match=r"is recorded already|comes before the last one"):
            counting.append(self.writer, chosen % (self.epochs[-1] + 1))

    @precondition(lambda self: self.writer is not None)
    @rule(at=st.integers(1, 90), when=st.sampled_from(["before", "half", "after"]))
    def crash(self, at: int, when: Any) -> None:
        assert self.writer is not None
        epoch = (self.epochs[-1] if self.epochs else -1) + 1
        recorded = False
        with Failing(self.path, at, Crash, when):
            try:
                counting.append(self.writer, epoch)
                recorded = True
            except Crash:
                pass
        self.writer.close()  # as the death of the process does
        self.writer = None
        there = _epochs(self.path)
        assert there in ([*self.epochs, epoch], *([] if recorded else [self.epochs]))
        self.epochs = there

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.writer = None

    @precondition(lambda self: self.writer is None and not self.lost)
    @rule()
    def open_again(self) -> None:
        self.writer = RunWriter(self.path, fsync=False)
        assert list(self.writer.epochs) == self.epochs

    # Damage

    @precondition(lambda self: self.writer is None and self.epochs and len(self.lost) < 3)
    @rule(chosen=st.integers(0, 10**6), how=st.sampled_from(DAMAGES))
    def damage(self, chosen: int, how: str) -> None:
        files = self._recorded_files()
        file = files[chosen % len(files)]
        self._keep(file)
        damaged(file, how)
        self._forget_what_is_whole()

    @precondition(lambda self: self.writer is None and self.epochs and len(self.lost) < 3)
    @rule(one=st.integers(0, 10**6), other=st.integers(0, 10**6))
    def swap(self, one: int, other: int) -> None:
        files = self._recorded_files()
        pair = files[one % len(files)], files[other % len(files)]
        for file in pair:
            self._keep(file)
        swapped(*pair)
        self._forget_what_is_whole()

    @precondition(lambda self: self.lost)
    @rule()
    def restore(self) -> None:
        for file, content in self.lost.items():
            file.write_bytes(content)
        self.lost = {}

    def _recorded_files(self) -> list[Path]:
        """What the records name and reading everything touches, and the records, where there is still something."""
        records = [self.path / commit_key(row) for row in range(len(self.epochs))]
        contents = [self.lost.get(file) or file.read_bytes() for file in records]
        named = [self.path / key for content in contents for key in json.loads(content)["record"]["objects"]]
        read = [file for file in named if not file.is_relative_to(self.path / "epoch")]
        if max(_rows_shown(self.path)) < len(self.epochs):
            records.pop()  # after a crash it may be the only trace of its epoch: nothing tells when it is taken away
        return [file for file in (*records, *read) if file.exists() and file.stat().st_size]

    def _keep(self, file: Path) -> None:
        self.lost.setdefault(file, file.read_bytes())

    def _forget_what_is_whole(self) -> None:
        whole = [file for file, content in self.lost.items() if file.exists() and file.read_bytes() == content]
        for file in whole:
            del self.lost[file]

    # What must hold

    @invariant()
    def all_is_there_or_damage_is_told(self) -> None:
        if self.lost:
            with pytest.raises(DamagedRunError, match="restore"):
                seen(self.path)
            return
        content = seen(self.path)
        assert content.get("epoch", ((), []))[1] == [np.int64(epoch).tobytes() for epoch in self.epochs]
        for row, epoch in enumerate(self.epochs):
            weights, buffers = counting.epoch_values(epoch)
            assert content["weights"][1][row] == weights.tobytes()
            assert all(content[f"buffers/{dtype}"][1][row] == values.tobytes() for dtype, values in buffers.items())

    @precondition(lambda self: not self.lost)
    @rule()
    def plain_zarr_sees_nothing_else(self) -> None:
        assert_shown_whole(self.path, content := seen(self.path), [content, *_probe_index()], set())


def _probe_index() -> list[dict[str, Any]]:
    """What plain Zarr may see of a first epoch that is not committed: all 300 weights are in the probe."""
    return [{"probe_index": ((), [np.int64(index).tobytes() for index in range(300)])}]


def _epochs(path: Path) -> list[int]:
    try:
        return [int(epoch) for epoch in open_run(path).epochs]
    except RunNotFoundError:
        return []


def _rows_shown(path: Path) -> list[int]:
    return [json.loads((path / array / "zarr.json").read_bytes())["shape"][0] for array in ("weights", "epoch")]


def explore() -> None:
    """Without shrinking: a failure is as long as it was found, and found again by the same seed."""
    bounds = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with not_waiting_for_the_disk():
        run_state_machine_as_test(AnyOrder, settings=bounds)


def test_in_any_order_nothing_is_lost_and_no_damage_reads_silently() -> None:
    explore()


def test_a_reader_that_trusts_lengths_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hash check, damage of the same length reads silently."""

    def trusted(self: VerifiedReader, key: str) -> SoundFile:
        path = self._objects.path(key)
        return SoundFile(str(path), identity_of(path.stat()))

    monkeypatch.setattr(VerifiedReader, "_checked", trusted)
    with pytest.raises((pytest.fail.Exception, AssertionError), match=r"DID NOT RAISE|pattern did not match"):
        explore()


def test_a_writer_that_takes_any_epoch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkit.store.writer.ArchiveWriter.require_next", lambda *_: None)
    with pytest.raises((pytest.fail.Exception, DamagedRunError), match=r"DID NOT RAISE|does not follow"):
        explore()
