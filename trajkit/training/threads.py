"""Work on the threads that torch computes with, where it can be reached, else on threads of one's own.

After each operation of torch its threads keep spinning for some milliseconds, in case there is another one. Other
threads would have to share the cores with them: an update of 11 M weights takes 12 ms instead of 8 then.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def each(do: Callable[[Job], Result], jobs: Iterable[Job], most: int) -> list[Result]:
    """What a function that frees the GIL gives for each job, in any order, by at most so many threads; what it raises.

    A thread takes the next job when it has done one.
    """
    left = iter(list(jobs))  # threads may share an iterator of a list
    results: list[Result] = []
    raised: list[BaseException] = []
    ended: set[int] = set()

    def work(*_: Any) -> None:
        try:
            results.extend([do(job) for job in left])
        except BaseException as error:  # nothing may leave a function that C has called
            raised.append(error)
        ended.add(threading.get_ident())

    threads = min(torch.get_num_threads(), most)
    if threads < 2:
        work()
    elif (parallel := _torch_parallel()) is not None:
        parallel(_Body(work), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(work)
            work()
    if raised:
        raise raised[0]
    if threading.get_ident() not in ended:  # Ctrl-C came where a function that C has called cannot pass it on
        raise KeyboardInterrupt
    return results


@cache
def _torch_parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded; None where that is another one."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
