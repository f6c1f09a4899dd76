"""How many threads BLAS uses: one, wherever the rounding of a sum must not depend on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


class _OneThread:
    """The limit of the process, which several of its threads may ask for at a time.

    Each limit of its own would restore what it found: the first one that ends would let BLAS use all threads while the
    others still count on one, and the last one would leave the limit of another behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._limits: threadpool_limits | None = None

    def begin(self) -> None:
        with self._lock:
            if self._asking == 0:
                self._limits = threadpool_limits(1, user_api="blas")
            self._asking += 1

    def end(self) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking == 0 and self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None


_one_thread = _OneThread()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS use one thread meanwhile, in all threads of the process."""
    _one_thread.begin()
    try:
        yield
    finally:
        _one_thread.end()
