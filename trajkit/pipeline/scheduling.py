"""Where tasks run: on threads of this process, or on the workers of a Dask cluster. The only dask."""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dask import config as dask_config
from dask.system import CPU_COUNT
from dask.utils import parse_bytes

from ..blas import one_blas_thread
from ..errors import ClusterError, InputError

if TYPE_CHECKING:
    from distributed import Client, Worker

    Choice = Client | str | None

Item = TypeVar("Item")
Result = TypeVar("Result")
Function = Callable[[Item], Result]

LOCAL = ("threads", "synchronous")
TIMEOUT_S = 10
GROUPS_PER_THREAD = 4

logger = logging.getLogger("trajkit")


class Scheduler(Protocol):
    """Calls a function for each of some items; gives the results in order, and each of them to `done` as it comes."""

    @property
    def workers(self) -> int:
        """How many calls share the memory of a process."""

    @property
    def memory_bytes(self) -> int | None:
        """Memory that such a process may use, None where nothing limits it but the machine."""

    @property
    def shares_memory(self) -> bool:
        """Whether the calls are made in this process, as few at a time as one likes."""

    def limited_to(self, workers: int) -> Scheduler:
        """The same with fewer workers, or itself where it cannot do with fewer."""

    def map(
        self, function: Function[Item, Result], items: Sequence[Item], done: Callable[[Result], None]
    ) -> list[Result]:
        """Call the function; what it raises passes through."""


@contextmanager
def scheduler_of(choice: Choice | Scheduler) -> Iterator[Scheduler]:
    """The scheduler that a user means by ``threads``, ``synchronous`` (a single one), an address or a client; or it.

    None is, in a task of a Dask worker, that task's own thread; else the client that is active in this process, and
    threads where there is none. Raises `InputError` for something else and for a client in its own event loop, which
    nobody could wait for there, and `ClusterError` where there is no cluster at the address, or it has no workers.
    """
    if choice is None:
        choice = _own_thread() or _active_client() or "threads"
    if isinstance(choice, ThreadScheduler | ClusterScheduler):
        yield choice
    elif not isinstance(choice, str):
        client: Any = choice
        if not hasattr(client, "get_executor"):
            raise InputError(f"scheduler is {choice!r}, expected {_EXPECTED}; pass one of these")
        if client.asynchronous:
            raise InputError(
                "scheduler: the client is asynchronous and here is its event loop, expected a place that may wait for"
                " the cluster; call it by asyncio.to_thread, or pass scheduler='threads'"
            )
        yield _cluster(client)
    elif choice in LOCAL:
        yield ThreadScheduler(1 if choice == "synchronous" else _num_workers())
    elif address := re.fullmatch(r"(?:(?:tcp|tls)://)?([^:/]+|\[[0-9a-f:]+\]):([0-9]+)", choice):
        with _client_at(choice, address[1].strip("[]"), int(address[2])) as client:
            yield _cluster(client)
    else:
        raise InputError(f"scheduler is {choice!r}, expected {_EXPECTED}; pass one of these")


def _client_at(address: str, host: str, port: int) -> Client:
    from distributed import Client  # takes longer to import than many a fit

    try:
        # A client that fails to connect lives on for a minute and complains at the end of the process.
        socket.create_connection((host, port), TIMEOUT_S).close()
        return Client(address, timeout=TIMEOUT_S, set_as_default=False)
    except (OSError, OverflowError, ValueError) as error:
        raise ClusterError(f"scheduler {address}: cannot be reached ({error}); start it or correct it") from error


_EXPECTED = "'threads', 'synchronous', an address such as tcp://host:8786 or a distributed.Client"


def bytes_of(memory: int | str | None) -> int | None:
    """A memory budget as users write it, ``2GiB`` or a number of bytes; raises `InputError` for what is none."""
    if memory is None:
        return None
    try:
        n_bytes = int(memory) if hasattr(memory, "__index__") else int(parse_bytes(memory))
    except (ValueError, TypeError, AttributeError, OverflowError):
        n_bytes = 0
    if isinstance(memory, bool) or n_bytes <= 0 or not str(memory).strip():
        raise InputError(f"memory is {memory!r}, expected bytes or a text such as '2GiB'; correct it")
    return n_bytes


@dataclass(frozen=True)
class ThreadScheduler:
    """Threads of this process."""

    workers: int
    memory_bytes: int | None = None
    shares_memory = True

    def limited_to(self, workers: int) -> ThreadScheduler:
        """See `Scheduler`."""
        return replace(self, workers=workers)

    def map(
        self, function: Function[Item, Result], items: Sequence[Item], done: Callable[[Result], None]
    ) -> list[Result]:
        """See `Scheduler`. Leaving it, on Ctrl-C too, waits for the tasks under way: they would write on otherwise."""
        with one_blas_thread(), ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    done(future.result())
            finally:
                pool.shutdown(cancel_futures=True)
            return [future.result() for future in futures]


@dataclass(frozen=True)
class ClusterScheduler:
    """The workers of a Dask cluster. Neighbouring items go together: they need the same objects of the archive."""

    client: Client
    workers: int
    """Threads of the worker process that has most."""
    threads: int
    """Of all worker processes together."""
    memory_bytes: int | None
    shares_memory = False

    def limited_to(self, workers: int) -> ClusterScheduler:  # noqa: ARG002 (each worker has its threads)
        """See `Scheduler`."""
        return self

    def map(
        self, function: Function[Item, Result], items: Sequence[Item], done: Callable[[Result], None]
    ) -> list[Result]:
        """See `Scheduler`; a task whose worker dies is given to another one."""
        with _thread_left_to_others():
            return self._map(function, items, done)

    def _map(
        self, function: Function[Item, Result], items: Sequence[Item], done: Callable[[Result], None]
    ) -> list[Result]:
        import distributed

        size = max(1, len(items) // (GROUPS_PER_THREAD * self.threads))
        groups = [items[start : start + size] for start in range(0, len(items), size)]
        futures = self.client.map(_Group(function), groups, pure=False)
        try:
            for future in distributed.as_completed(futures, loop=self.client.loop):
                for result in future.result():
                    done(result)
            return [result for future in futures for result in future.result()]
        except distributed.KilledWorker as error:
            raise ClusterError(
                f"the workers died at a task, perhaps for want of memory; give less --memory ({error})"
            ) from error
        except CancelledError as error:
            raise ClusterError(
                "the connection to the cluster's scheduler was lost; start it again, and fit again"
            ) from error
        finally:
            self.client.cancel(futures)


class _Group:
    """Calls a function for several items. It stays packed until a worker unpacks it: the scheduler has no archive."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.packed = pickle.dumps(function)

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        with _unpacking:  # one at a time, so that the threads of a worker share what is opened
            function = _unpacked(self.packed)
        return [function(item) for item in items]


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(packed)
    return function


_unpacking = threading.Lock()


def _cluster(client: Client) -> ClusterScheduler:
    if client.status != "running":
        raise ClusterError(f"scheduler: the client is {client.status}, expected a running one; open it again")
    try:
        client.wait_for_workers(1, timeout=TIMEOUT_S)
    except TimeoutError as error:
        address = getattr(client.scheduler, "address", client)
        raise ClusterError(f"scheduler {address}: has no workers; start some") from error
    if client.dashboard_link:
        logger.info("dashboard: %s", client.dashboard_link)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
    threads = [worker["nthreads"] for worker in workers]
    return ClusterScheduler(client, max(threads), sum(threads), min(limits, default=None))


def _active_client() -> Client | None:
    """The client that this process has made its default, as dask itself would use it."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.default_client()  # type: ignore[no-any-return]
    except ValueError:
        return None


def _current_worker() -> Worker | None:
    """Return the Dask worker that has called this as a task of its, None elsewhere."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_worker()  # type: ignore[no-any-return]
    except ValueError:
        return None


def _own_thread() -> ThreadScheduler | None:
    """Return the thread of the task that this is, with its share of the worker's memory; None where this is no task.

    The client that is active in a task is that of the task's own cluster: it would wait for tasks that wait for its
    thread. The other threads of the worker have other tasks.
    """
    worker = _current_worker()
    if worker is None:
        return None
    limit = worker.memory_manager.memory_limit
    return ThreadScheduler(1, limit and limit // worker.state.nthreads)


@contextmanager
def _thread_left_to_others() -> Iterator[None]:
    """Let the worker whose task this is use the thread for what the task waits for."""
    import distributed

    seceded = False
    if _current_worker() is not None:
        with contextlib.suppress(KeyError):  # the task has seceded before
            distributed.secede()
            seceded = True
    try:
        yield
    finally:
        if seceded:
            distributed.rejoin()


def _num_workers() -> int:
    return int(dask_config.get("num_workers", None) or CPU_COUNT)
