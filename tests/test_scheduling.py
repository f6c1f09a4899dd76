"""The same fit by every scheduler; a real cluster of a scheduler and two worker processes, one of which is killed."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeRun, correlated
from test_fit import assert_same, snapshot

from trajkit import Run, fit, open_run, update
from trajkit.errors import ClusterError, DamagedRunError, InputError

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@contextmanager
def cluster_process(n_workers: int) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """The address of a scheduler in a process of its own, and its worker processes of one thread each."""
    environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "false"}

    def start(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    scheduler = start(SCHEDULER)
    assert scheduler.stdout is not None
    address = scheduler.stdout.readline().strip()
    workers = [start(WORKER.format(address=address)) for _ in range(n_workers)]
    try:
        yield address, workers
    finally:
        for process in [*workers, scheduler]:
            process.kill()
            process.communicate()


SCHEDULER = """
import asyncio
from distributed import Scheduler
async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()
asyncio.run(main())
"""
WORKER = """
import asyncio
from distributed import Worker
async def main():
    async with Worker("{address}", nthreads=1, memory_limit="1GiB") as worker:
        await worker.finished()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with cluster_process(2) as (address, _):
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address


@pytest.fixture
def wide_run(make_run: MakeRun) -> Run:
    """A run of 12 blocks."""
    return make_run(correlated(4, 12 * 131072 - 77), sizes=(100_000, 12 * 131072 - 77 - 100_000))


# --- The same bits everywhere


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_local_schedulers_give_the_same_bits(scheduler: str, make_run: MakeRun) -> None:
    run = make_run(correlated(12, 300_000))
    assert_same(fit(run, modes=6, scheduler=scheduler), fit(run, modes=6, name="other"))


def test_a_cluster_gives_the_same_bits(make_run: MakeRun, cluster: str) -> None:
    run = make_run(correlated(12, 500_000))
    here = fit(run, modes=6, updatable=True)
    seen: list[tuple[int, int]] = []
    there = fit(run, modes=6, updatable=True, scheduler=cluster, progress=lambda *at: seen.append(at))
    assert_same(there, here)
    np.testing.assert_array_equal(there.stored.read("correlations"), here.stored.read("correlations"))
    assert there.quality == here.quality
    assert seen[-1] == (500_000, 500_000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_client_is_used_when_given_and_when_active(make_run: MakeRun, cluster: str) -> None:
    run = make_run(correlated(8, 200_000))
    here = fit(run, modes=4, scheduler="threads")
    with distributed.Client(cluster) as client:
        assert_same(fit(run, modes=4, scheduler=client), here)
        before = _tasks_done(client)
        assert_same(fit(run, modes=4), here)
        assert _tasks_done(client) > before


def _tasks_done(client: Any) -> int:
    stories = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.transition_log))
    return int(stories)


def test_an_update_by_a_cluster_gives_the_same_bits(make_run: MakeRun, cluster: str) -> None:
    matrix = correlated(12, 200_000)
    one, other = make_run(matrix, name="one"), make_run(matrix, name="other")
    for run in (one, other):
        fit(run, modes=4, name="a", epochs=range(8), updatable=True)
    assert_same(update(one, "a", scheduler=cluster), update(other, "a", scheduler="threads"))


def test_the_dashboard_is_named(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trajkit")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        fit(make_run(correlated(5, 100)), modes=2, scheduler=client)
        assert f"dashboard: {client.dashboard_link}" in caplog.messages


# --- What goes wrong on the way


def test_a_worker_that_is_killed_does_not_lose_the_fit(wide_run: Run) -> None:
    expected = fit(wide_run, modes=6, scheduler="threads")
    with cluster_process(2) as (address, workers):
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        killed = False

        def kill(done: int, total: int) -> None:
            nonlocal killed
            if not killed and done < total:
                workers[0].send_signal(signal.SIGKILL)
                workers[0].wait()
                killed = True

        fitted = fit(wide_run, modes=6, name="survived", scheduler=address, progress=kill)
        assert killed
    assert_same(fitted, expected)
    assert_same(open_run(wide_run.path).fit("survived"), expected)


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
def test_a_fit_that_is_stopped_leaves_the_run_as_it_was(
    stopped: type[BaseException], wide_run: Run, cluster: str
) -> None:
    fit(wide_run, modes=4, name="before", scheduler="threads")
    before = snapshot(wide_run.path)

    def stop(*_: int) -> None:
        raise stopped

    with pytest.raises(stopped):
        fit(wide_run, modes=6, name="never", scheduler=cluster, progress=stop)
    with distributed.Client(cluster, set_as_default=False) as client:
        deadline = time.monotonic() + 30
        busy = lambda dask_worker: dask_worker.state.executing_count  # noqa: E731 (a function would travel by its name)
        while any(client.run(busy).values()) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert snapshot(wide_run.path) == before
    assert wide_run.fits == ("before",)


def test_a_helper_that_nobody_waits_for_cannot_write(digits_run: Run) -> None:
    from trajkit.store.fit_shape import FitShape
    from trajkit.store.fits import FitWriter

    shape = FitShape(3682, 40, 3, 100, updatable=True)
    values = {"mode": np.uint16, "scale": np.float32, "mean": np.float64, "correlation": np.float32}
    results = {name: np.zeros(3682, dtype) for name, dtype in values.items()}
    results |= {"variation": np.zeros(3682), "correlations": np.zeros((3, 3682), np.float32)}
    with FitWriter(digits_run.archive.objects, "a", shape) as writer:
        elsewhere = pickle.loads(pickle.dumps(writer.blocks))
        elsewhere.write(0, results)
        elsewhere.write(0, results)  # a task may be done twice
    before = snapshot(digits_run.path)
    with pytest.raises(FileNotFoundError):
        elsewhere.write(0, results)
    assert snapshot(digits_run.path) == before
    with FitWriter(digits_run.archive.objects, "a", shape), pytest.raises(FileNotFoundError):
        elsewhere.write(0, results)


def test_an_error_of_a_task_comes_back_as_it_is(make_run: MakeRun, cluster: str) -> None:
    matrix = correlated(8, 200_000)
    matrix[3, 150_000] = np.nan
    run = make_run(matrix, nonfinite="record")
    with pytest.raises(InputError, match="'layer0' is not finite"):
        fit(run, modes=3, sample_index=range(50), scheduler=cluster)
    assert run.fits == ()


def test_a_cluster_that_is_not_there_is_named(digits_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkit.pipeline.scheduling.TIMEOUT_S", 1)
    with pytest.raises(ClusterError, match=r"scheduler tcp://127.0.0.1:9: cannot be reached .*; start it or correct"):
        fit(digits_run, scheduler="tcp://127.0.0.1:9")
    with (
        cluster_process(0) as (address, _),
        pytest.raises(ClusterError, match=r"scheduler tcp://127.0.0.1:\d+: has no workers; start some"),
    ):
        fit(digits_run, scheduler=address)
    assert digits_run.fits == ()


def test_a_scheduler_that_dies_is_one_clear_line(wide_run: Run) -> None:
    with cluster_process(1) as (address, _):
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            process = client.run_on_scheduler(os.getpid)

        def kill(*_: int) -> None:
            os.kill(process, signal.SIGKILL)

        with pytest.raises(ClusterError, match="the connection to the cluster's scheduler was lost"):
            fit(wide_run, modes=3, scheduler=address, progress=kill)
    assert wide_run.fits == ()


@pytest.mark.parametrize("scheduler", ["thread", "localhost", "tcp://localhost", "http://x:1", 5, ""])
def test_what_is_no_scheduler_is_refused(scheduler: Any, digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"scheduler is .*, expected 'threads', 'synchronous', an address"):
        fit(digits_run, scheduler=scheduler)


# --- What travels


def test_a_run_travels_as_its_path(make_run: MakeRun) -> None:
    run = make_run(correlated(6, 50_000))
    _ = run.weights[:], run.probe_index
    data = pickle.dumps(run.weights)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[:], run.weights[:])
    assert pickle.loads(pickle.dumps(run)).epochs.tolist() == run.epochs.tolist()


def test_where_it_arrives_it_has_the_epochs_it_had(make_run: MakeRun) -> None:
    from conftest import vector_layout

    from trajkit import RunWriter

    run = make_run(correlated(6, 500))
    data = pickle.dumps(run)
    with RunWriter(run.path, fsync=False) as writer:
        writer.append(vector_layout(500), 6, np.zeros(500, np.float32), {})
    assert len(open_run(run.path).epochs) == 7
    arrived = pickle.loads(data)
    assert arrived.weights.shape == (6, 500)
    np.testing.assert_array_equal(arrived.weights[:], run.weights[:])


def test_another_run_at_the_path_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    data = pickle.dumps(make_run(correlated(6, 500)))
    (tmp_path / "run").rename(tmp_path / "moved")
    make_run(correlated(6, 500, seed=1))
    with pytest.raises(
        DamagedRunError, match="not the run that was opened elsewhere; give every worker the same files"
    ):
        pickle.loads(data)


def test_threads_share_the_hashing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(correlated(30, 20_000))
    hashed: list[str] = []
    digest = type(run.archive.objects).digest

    def counting(self: Any, key: str) -> str:
        hashed.append(key)
        return digest(self, key)

    monkeypatch.setattr(type(run.archive.objects), "digest", counting)
    threads = [threading.Thread(target=lambda: run.weights[:]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hashed) == sorted(set(hashed))
    assert len([key for key in hashed if key.startswith("weights")]) == 30
