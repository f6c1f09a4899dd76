"""Work on torch's threads: everything is done once, by several threads, and what is raised arrives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from trajkit.training import threads


@pytest.fixture(params=["torch's threads", "threads of one's own"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "threads of one's own":
        monkeypatch.setattr(threads, "_torch_parallel", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_job_is_done_once() -> None:
    assert sorted(threads.each(lambda job: job * job, range(1000), most=2)) == [job * job for job in range(1000)]


def test_two_jobs_that_wait_for_each_other_are_done() -> None:
    together = threading.Barrier(2, timeout=20)
    assert threads.each(lambda _: together.wait() >= 0, range(2), most=2) == [True, True]


@pytest.mark.parametrize("most", [0, 1])
def test_work_that_is_not_worth_another_thread_is_done_by_this_one(most: int) -> None:
    found = threads.each(lambda _: threading.get_ident(), range(3), most=most)
    assert found == [threading.get_ident()] * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_job_raises_arrives(error: type[BaseException]) -> None:
    def do(job: int) -> int:
        if job == 5:
            raise error("five")
        return job

    with pytest.raises(error, match="five"):
        threads.each(do, range(10), most=2)
    assert sorted(threads.each(lambda job: job, range(3), most=2)) == [0, 1, 2]


def test_operations_of_torch_may_be_used_in_a_job() -> None:
    found = threads.each(lambda n: float(torch.ones(n).sum()), [100_000, 200_000], most=2)
    assert sorted(found) == [100_000.0, 200_000.0]
