"""What a checkpoint looks like from outside, by which one that was recorded, or is being written, is known again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..digest import Hasher
from ..store.sources import Look

COARSE_NS = 10**9
"""Nanoseconds between two times of a file system that keeps whole seconds only."""


def look_at(path: Path) -> Look | None:
    """Return the look of a checkpoint, which changes whenever it is written to; None where there is none.

    An index stands for the shards beside it.
    """
    try:
        status = path.stat()
        if not path.is_dir() and path.suffix != ".json":
            return Look(status.st_size, status.st_mtime_ns, status.st_ino)
        hasher, size, modified_ns = Hasher(), 0, status.st_mtime_ns
        folder = path if path.is_dir() else path.parent
        for file in _files(path):
            found = os.lstat(file)
            row = (os.path.relpath(file, folder), found.st_ino, found.st_size, found.st_mtime_ns)
            hasher.update(repr(row).encode())
            size, modified_ns = size + found.st_size, max(modified_ns, found.st_mtime_ns)
    except OSError:
        return None
    return Look(size, modified_ns, status.st_ino, hasher.hexdigest())


def may_change_unseen(look: Look) -> bool:
    """Return whether a change right now would not show, since the time of the last one is now, in whole seconds."""
    return look.modified_ns % COARSE_NS == 0 and abs(time.time_ns() - look.modified_ns) < 3 * COARSE_NS


def _files(path: Path) -> Iterator[str]:
    """Yield the files of a folder, at any depth, or those beside an index; in order of their names."""
    if path.is_dir():
        yield from sorted(os.path.join(at, name) for at, _, names in os.walk(path) for name in names)
    else:
        with os.scandir(path.parent) as entries:
            yield from sorted(entry.path for entry in entries if not entry.is_dir())
