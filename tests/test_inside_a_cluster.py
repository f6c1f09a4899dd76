"""Fits that are called in a task of a Dask cluster, and in an event loop: they end, or say why they cannot."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRun, correlated
from test_fit import assert_same
from threadpoolctl import threadpool_info

import trajkit
from trajkit import Run, fit, open_run
from trajkit.blas import one_blas_thread
from trajkit.errors import InputError
from trajkit.pipeline.scheduling import ThreadScheduler, scheduler_of

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

PATIENCE_S = 120
"""For a task that would never end."""


@contextmanager
def cluster(processes: bool, threads: int) -> Iterator[Any]:
    """The client of a cluster with one worker, which is active here."""
    settings = {
        "n_workers": 1,
        "threads_per_worker": threads,
        "memory_limit": "2GiB",
        "dashboard_address": "127.0.0.1:0",
    }
    before = dict(os.environ)
    with distributed.LocalCluster(processes=processes, **settings) as local, distributed.Client(local) as client:
        # Where workers are processes, it sets OMP_NUM_THREADS=1 and the like here, which later children would inherit.
        os.environ.clear()
        os.environ.update(before)
        yield client


@pytest.fixture(scope="module", params=[(False, 1), (False, 2), (True, 1)], ids=["thread", "threads", "process"])
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    with cluster(*request.param) as active:
        yield active


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """A run of three blocks."""
    return make_run(correlated(10, 300_000))


# The functions are sent by their code, since a worker process does not find this file.


def fit_here(path: Path) -> str:
    import trajkit

    return trajkit.fit(path, modes=3, name="a").name


def fit_by_client(path: Path) -> str:
    import distributed

    import trajkit

    return trajkit.fit(path, modes=3, name="a", scheduler=distributed.get_client()).name


def fit_by_worker_client(path: Path) -> str:
    import distributed

    import trajkit

    with distributed.worker_client() as client:
        return trajkit.fit(path, modes=3, name="a", scheduler=client).name


def fit_twice_by_client(path: Path) -> str:
    import distributed

    import trajkit

    trajkit.fit(path, modes=3, name="first", scheduler=distributed.get_client())
    return trajkit.fit(path, modes=3, name="a", scheduler=distributed.get_client()).name


def update(path: Path) -> str:
    import trajkit

    trajkit.fit(path, modes=3, name="a", epochs=range(8), updatable=True)
    return trajkit.update(path, "a").name


def follow(path: Path) -> str:
    import trajkit

    return [found.name for found in trajkit.follow(path, "a", modes=3)][-1]


@pytest.fixture(autouse=True)
def sent_by_their_code() -> Iterator[None]:
    import sys

    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.parametrize("call", [fit_here, fit_by_client, fit_by_worker_client, fit_twice_by_client, update, follow])
def test_a_fit_in_a_task_ends_with_the_same_bits(call: Callable[[Path], str], run: Run, client: Any) -> None:
    name = client.submit(call, run.path, pure=False).result(timeout=PATIENCE_S)
    found = open_run(run.path).fit(name)
    first = {"epochs": range(8), "updatable": True} if call is update else {}
    expected = fit(run, modes=3, scheduler="threads", name="b", **first)
    if call is update:
        expected = trajkit.update(run, "b", scheduler="threads")
    assert_same(found, expected)


@pytest.mark.parametrize("call", [fit_here, fit_by_client])
def test_several_fits_in_tasks_at_a_time_end(call: Callable[[Path], str], make_run: MakeRun, client: Any) -> None:
    runs = [make_run(correlated(8, 200_000, seed), name=f"run{seed}") for seed in range(4)]
    futures = client.map(call, [run.path for run in runs], pure=False)
    assert client.gather(futures) == ["a"] * 4
    for run in runs:
        assert_same(open_run(run.path).fit("a"), fit(run, modes=3, scheduler="threads", name="b"))


def test_after_a_fit_by_its_client_the_worker_takes_tasks_as_before(run: Run, client: Any) -> None:
    client.submit(fit_by_client, run.path, pure=False).result(timeout=PATIENCE_S)
    assert client.gather(client.map(lambda number: number + 1, range(20))) == list(range(1, 21))


def test_a_task_fits_by_its_thread_in_its_share_of_the_memory() -> None:
    def chosen() -> tuple[int, int | None]:
        from trajkit.pipeline.scheduling import scheduler_of

        with scheduler_of(None) as scheduler:
            return scheduler.workers, scheduler.memory_bytes

    with cluster(False, 2) as client:
        assert client.submit(chosen).result(timeout=PATIENCE_S) == (1, 1 << 30)
        with scheduler_of(None) as scheduler:
            assert not isinstance(scheduler, ThreadScheduler)
    with scheduler_of("threads") as scheduler:
        assert scheduler.memory_bytes is None


def test_an_asynchronous_client_is_told_plainly(run: Run) -> None:
    async def told() -> list[str]:
        settings = {"processes": False, "n_workers": 1, "dashboard_address": "127.0.0.1:0"}
        async with distributed.Client(asynchronous=True, **settings) as client:
            said = []
            for scheduler in (None, client):
                with pytest.raises(
                    InputError, match="the client is asynchronous and here is its event loop"
                ) as refused:
                    fit(run, modes=3, scheduler=scheduler)
                said.append(str(refused.value))
            for number, scheduler in enumerate((None, client)):
                waiting = asyncio.to_thread(fit, run, modes=3, name=f"thread{number}", scheduler=scheduler)
                await asyncio.wait_for(waiting, PATIENCE_S)
            fit(run, modes=3, name="here", scheduler="threads")
            return said

    said = asyncio.run(told())
    assert all(line.endswith("call it by asyncio.to_thread, or pass scheduler='threads'") for line in said)
    assert open_run(run.path).fits == ("here", "thread0", "thread1")


def test_one_thread_of_blas_is_one_until_the_last_one_ends() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert threads() == {1}
    second.__exit__(None, None, None)
    assert threads() == before
