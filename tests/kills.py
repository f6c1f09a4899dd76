"""Processes that record or fit until they are killed, and a loop that kills them and looks at what they left.

A test runs the loop a few times, `benchmarks/soak.py` thousands of times.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
from counting import LAYOUT, append
from wholeness import assert_whole

from trajkit import ParameterLayout, RunWriter, fit, open_run, update
from trajkit.layout import TensorEntry
from trajkit.store import format as store_format

SHARDED_LAYOUT = ParameterLayout.of(
    [TensorEntry(name="w", shape=(700,), dtype="float32", kind="weight"), *LAYOUT.buffers],
)
KILLS_A_RUN = 50
"""A new run is begun after so many, so that a long loop costs the same for each kill."""


def processes() -> ForkServerContext:
    """Processes that start fast: what they need is imported once, in the process that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills", "trajkit.run", "trajkit.store.writer", "trajkit.pipeline"])
    return context


@dataclass(frozen=True)
class Way:
    """How a killed process records."""

    fsync: bool
    sharded: bool

    def __str__(self) -> str:
        return f"{'shards' if self.sharded else 'chunks'}, {'with' if self.fsync else 'without'} fsync"

    @property
    def layout(self) -> ParameterLayout:
        return SHARDED_LAYOUT if self.sharded else LAYOUT

    @contextlib.contextmanager
    def rules(self) -> Iterator[None]:
        """Small shards where they are asked for."""
        known = store_format.COLUMN_GRID, store_format.CHUNK_VALUES, store_format.SHARD_CHUNKS
        if self.sharded:
            store_format.COLUMN_GRID, store_format.CHUNK_VALUES, store_format.SHARD_CHUNKS = 8, 32, 4
        try:
            yield
        finally:
            store_format.COLUMN_GRID, store_format.CHUNK_VALUES, store_format.SHARD_CHUNKS = known


WAYS = [Way(fsync, sharded) for fsync in (True, False) for sharded in (False, True)]


# --- What is killed


def record_forever(path: Path, diary: Path, way: Way) -> None:
    """Record epoch after epoch; writes "o" before it opens the run, "r" after, and "+" for each acknowledgement."""
    descriptor = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with way.rules():
        os.write(descriptor, b"o")
        writer = RunWriter(path, fsync=way.fsync)
        os.write(descriptor, b"r")
        for epoch in itertools.count(len(writer.epochs)):
            append(writer, epoch, way.layout)
            os.write(descriptor, b"+")


def fit_forever(path: Path, diary: Path) -> None:
    """Make fits of the first epochs and update them to all, "+" for each; goes on where one was killed."""
    descriptor = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"o")
    for number in itertools.count(len(open_run(path).fits) - 1):
        name = f"fit{max(number, 0)}"
        if name not in open_run(path).fits:
            fit(path, modes=2, samples=20, name=name, epochs=range(3), updatable=True, scheduler="synchronous")
            os.write(descriptor, b"+")
        update(path, name, scheduler="synchronous")
        os.write(descriptor, b"+")


# --- The loop


@dataclass
class Toll:
    """What a loop of kills has come by."""

    kills: int = 0
    epochs: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    """In which phase of a recording the kills fell."""

    def __add__(self, other: Toll) -> Toll:
        return Toll(self.kills + other.kills, self.epochs + other.epochs, self.phases + other.phases)


def kill_recorders(folder: Path, kills: int, way: Way, seed: int) -> Toll:
    """Kill so many recordings, one after the other, and raise `AssertionError` where one lost or tore anything."""
    rng = np.random.default_rng(seed)
    toll = Toll()
    context = processes()
    for number in range(kills):
        path, diary = folder / f"run{number // KILLS_A_RUN}", folder / "diary"
        if number % KILLS_A_RUN == 0:
            found = 0
        diary.write_bytes(b"")
        process = context.Process(target=record_forever, args=(path, diary, way))
        process.start()
        # Every third one as it opens the run, where it makes good what the last one left.
        _wait_for(diary, 1 if number % 3 == 0 else int(rng.integers(2, 5)))
        time.sleep(rng.uniform(0, 0.004 if number % 3 == 0 else 0.015))
        process.kill()
        process.join()
        process.close()
        story = diary.read_bytes()
        acknowledged = found + story.count(b"+")
        toll.phases[_phase(path, story, acknowledged)] += 1
        before, last = found, number % KILLS_A_RUN == KILLS_A_RUN - 1 or number == kills - 1
        with way.rules():
            found = assert_whole(
                path, range(acknowledged, acknowledged + 2), last=None if last else acknowledged - before + 3
            )
        toll.kills += 1
        toll.epochs += found - before
        if last:
            with way.rules(), RunWriter(path, fsync=False) as writer:
                append(writer, found, way.layout)
            with way.rules():
                assert_whole(path, found + 1)
            shutil.rmtree(path)
    return toll


def kill_fitters(folder: Path, kills: int, seed: int) -> int:
    """Kill so many processes that save and update fits; the number of fits and updates that came to their end."""
    rng = np.random.default_rng(seed)
    path, diary, context = folder / "fitted", folder / "diary", processes()
    with RunWriter(path, fsync=False) as writer:
        for epoch in range(6):
            append(writer, epoch)
    first = fit(path, modes=2, samples=20, name="known", epochs=range(3), updatable=True, scheduler="synchronous")
    known = {3: _arrays(first), 6: _arrays(update(path, "known", scheduler="synchronous"))}
    shutil.rmtree(path / "fits/known")
    done = 0
    for _ in range(kills):
        diary.write_bytes(b"")
        process = context.Process(target=fit_forever, args=(path, diary))
        process.start()
        _wait_for(diary, int(rng.integers(1, 4)))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        process.close()
        run = open_run(path)
        fits = [run.fit(name) for name in run.fits]
        for fitted in fits:
            assert _arrays(fitted) == known[len(fitted.epochs)]
        complete = sum(1 if len(fitted.epochs) == 3 else 2 for fitted in fits)
        acknowledged = diary.read_bytes().count(b"+")
        # An update with nothing to do is acknowledged again by the one who goes on.
        assert complete >= done + acknowledged - 1
        done = complete
    assert fit(path, modes=2, samples=20, name="last", epochs=range(3), scheduler="synchronous") is not None
    assert {folder.name for folder in (path / "fits").iterdir() if folder.is_dir()} == set(open_run(path).fits)
    shutil.rmtree(path)
    return done


def _arrays(fitted: Any) -> dict[str, bytes]:
    return {array: fitted.stored.read(array).tobytes() for array in fitted.stored.documents}


def _wait_for(diary: Path, n_entries: int) -> None:
    """Until the process has written so much; importing is not what is to be killed."""
    deadline = time.monotonic() + 120
    while diary.stat().st_size < n_entries:
        assert time.monotonic() < deadline, "the process to be killed does nothing"
        time.sleep(0.0005)


def _phase(path: Path, story: bytes, acknowledged: int) -> str:
    if b"r" not in story:
        return "opening"
    if (path / f"epoch/commits/{acknowledged:08d}.json").exists():
        return "committed, growing"
    if (path / f"epoch/c/{acknowledged}").exists():  # the last object of a row
        return "committing"
    if (path / f"weights/c/{acknowledged}").exists():
        return "data"
    return "between"
