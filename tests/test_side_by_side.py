"""Writers that meet, and readers beside a writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from counting import append
from kills import WAYS, processes, record_forever
from wholeness import assert_whole

from trajkit import RunWriter, fit, open_run
from trajkit.errors import DamagedRunError, InputError, RunLockedError
from trajkit.store import lock as store_lock
from trajkit.store.objects import LocalObjects

# --- Two writers


def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        append(writer, 0)
        with pytest.raises(RunLockedError, match=f"being written by process {os.getpid()} on .*; wait for it or stop"):
            RunWriter(tmp_path / "run")
        append(writer, 1)
    with RunWriter(tmp_path / "run") as writer:
        append(writer, 2)
    assert_whole(tmp_path / "run", 3)


def test_workers_forked_from_a_dead_training_do_not_hold_the_run(tmp_path: Path) -> None:
    code = """
import os, sys, time, trajkit
writer = trajkit.RunWriter(sys.argv[1])
if os.fork() == 0:
    print("forked", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        with pytest.raises(RunLockedError):
            RunWriter(tmp_path / "run")
        process.kill()
        process.wait()
        RunWriter(tmp_path / "run").close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def race_of_threads(path: Path, n: int) -> None:
    """All open the same new run at once: exactly one may, and what it records is whole."""
    ready = threading.Barrier(n)

    def race() -> RunWriter | None:
        ready.wait()
        try:
            return RunWriter(path, fsync=False)
        except RunLockedError:
            return None

    with ThreadPoolExecutor(n) as pool:
        writers = [future.result() for future in [pool.submit(race) for _ in range(n)]]
    winners = [writer for writer in writers if writer is not None]
    try:
        assert len(winners) == 1, f"{len(winners)} writers hold the run"
        append(winners[0], 0)
    finally:
        for writer in winners:
            writer.close()
    assert_whole(path, 1)


def test_of_threads_that_race_to_create_a_run_one_wins(tmp_path: Path) -> None:
    for number in range(20):
        race_of_threads(tmp_path / f"run{number}", 8)


def test_a_missing_lock_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "_lock", lambda _: None)
    with pytest.raises(AssertionError, match="8 writers hold the run"):
        race_of_threads(tmp_path / "run", 8)


def race_to_record(path: Path, ready: Barrier, all_tried: Barrier, won: Event) -> None:
    ready.wait()
    try:
        with RunWriter(path) as writer:
            all_tried.wait()
            assert not won.is_set()
            won.set()
            for epoch in range(3):
                append(writer, epoch)
    except RunLockedError:
        all_tried.wait()


def test_of_processes_that_race_to_create_a_run_one_wins(tmp_path: Path) -> None:
    context, n = processes(), 4
    for number in range(3):
        path = tmp_path / f"run{number}"
        shared = context.Barrier(n), context.Barrier(n), context.Event()
        racing = [context.Process(target=race_to_record, args=(path, *shared)) for _ in range(n)]
        for process in racing:
            process.start()
        for process in racing:
            process.join(60)
            assert process.exitcode == 0
        assert_whole(path, 3)


def record_by_two_without_a_lock(path: Path) -> None:
    """The commit records are the fence: what both were told to be recorded must be there."""
    with RunWriter(path) as one, RunWriter(path) as other:
        told = []
        for writer, epoch in [(one, 0), (other, 1), (one, 2)]:
            try:
                append(writer, epoch)
                told.append(epoch)
            except (OSError, InputError):
                pass
    assert set(told) <= set(open_run(path).epochs.tolist()), "an acknowledged epoch is lost"


def test_commit_records_are_the_fence_where_the_lock_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "_lock", lambda _: None)
    record_by_two_without_a_lock(tmp_path / "run")


def test_commit_records_that_overwrite_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwriting(self: LocalObjects, key: str, *parts: bytes) -> None:
        self.replace({key: b"".join(parts)})

    monkeypatch.setattr(store_lock, "_lock", lambda _: None)
    monkeypatch.setattr(LocalObjects, "create", overwriting)
    monkeypatch.setattr(LocalObjects, "create_atomically", overwriting)
    with pytest.raises((AssertionError, DamagedRunError), match=r"an acknowledged epoch is lost|does not follow"):
        record_by_two_without_a_lock(tmp_path / "run")


def test_threads_may_share_a_writer(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer, ThreadPoolExecutor(8) as pool:

        def record(epoch: int) -> bool:
            try:
                append(writer, epoch)
            except InputError:
                return False
            return True

        done = list(pool.map(record, range(40)))
        assert writer.epochs == tuple(epoch for epoch in range(40) if done[epoch])
    assert open_run(tmp_path / "run").epochs.tolist() == [epoch for epoch in range(40) if done[epoch]]


# --- Readers and fits beside a writer


def test_a_reader_that_polls_sees_whole_epochs_only(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = processes().Process(target=record_forever, args=(path, tmp_path / "acknowledged", WAYS[0]))
    process.start()
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + 30
        while len(seen) < 8 and time.monotonic() < deadline:
            if (path / "zarr.json").exists():
                with xarray.open_zarr(path) as dataset:
                    epochs = dataset["epoch"].values
                    assert epochs.tolist() == list(range(len(epochs)))
                    np.testing.assert_array_equal(dataset["weights"].values[:, 0], epochs)
                with_plain_zarr = zarr.open_group(path, mode="r")["weights"]
                np.testing.assert_array_equal(with_plain_zarr[:, 5], np.arange(with_plain_zarr.shape[0]))
                seen.add(len(epochs))
        assert len(seen) >= 8
    finally:
        process.kill()
        process.join()


def test_a_fit_can_be_saved_while_a_training_records(tmp_path: Path) -> None:
    process = processes().Process(target=record_forever, args=(tmp_path / "run", tmp_path / "acknowledged", WAYS[0]))
    process.start()
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "run/epoch/commits/00000005.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in range(10):
            assert fit(tmp_path / "run", modes=2, samples=20).name == (
                "modes2" if number == 0 else f"modes2-{number + 1}"
            )
    finally:
        process.kill()
        process.join()
    with RunWriter(tmp_path / "run") as writer:  # clears its own temporary files, and those of nobody else
        append(writer, len(writer.epochs))
    assert len(open_run(tmp_path / "run").fits) == 10
    assert_whole(tmp_path / "run", range(6, 10**6))
