"""Memory that a thread uses again and again. To touch fresh pages costs as much as to read a file into them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_mine = threading.local()


def scratch(purpose: str, size: int, dtype: Any) -> NDArray[Any]:
    """(size,) values of any content, in the same memory for each call of a thread with this purpose.

    It lives as long as the thread, and grows with what is asked for.
    """
    n_bytes = size * np.dtype(dtype).itemsize
    memory: NDArray[np.uint8] | None = _mine.__dict__.get(purpose)
    if memory is None or memory.size < n_bytes:
        memory = _mine.__dict__[purpose] = np.empty(n_bytes, np.uint8)
    return memory[:n_bytes].view(dtype)
