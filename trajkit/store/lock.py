"""One writer at a time, by a lock of the operating system that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
import weakref
from pathlib import Path

from ..documents import parse, require_fields
from ..errors import RunLockedError


class WriterLock:
    """Holds `path` locked from construction until `release`; raises `RunLockedError` naming the holder.

    The file keeps who holds it, for the error message of the one who comes second. A process forked off the holder
    (a data loader's worker) closes its copy of the file at once, so that a killed training can be restarted while its
    workers are still dying.
    """

    def __init__(self, path: Path, what: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise RunLockedError(f"{what} is being written by {described(holder)}; wait for it or stop it") from error
        self.release = weakref.finalize(self, os.close, descriptor)
        os.register_at_fork(after_in_child=self.release)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"process": os.getpid(), "host": platform.node()}).encode(), 0)
        except BaseException:
            self.release()  # a full disk: nobody gets this object, but an error that is kept would keep it alive
            raise

    @property
    def held(self) -> bool:
        """Whether this object still holds the lock: not after `release`, and not in a forked child."""
        return self.release.alive

    confirmed = held
    """The system would have told us."""


def is_locked(path: Path) -> bool:
    """Whether a writer holds the lock; looking, too, takes it for an instant."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether a process of this machine held the lock and ended without giving it back, as killed ones do.

    The file says who holds it only after that one does: an empty one may be locked at any moment.
    """
    try:
        holder = require_fields(parse(path.read_bytes()), {"process": int, "host": str})
    except (OSError, ValueError):
        return False
    return bool(holder["host"] == platform.node()) and not is_locked(path)


def _lock(descriptor: int) -> None:
    """Take the lock at once, or after the instant for which `is_locked` may hold it."""
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def described(holder: bytes) -> str:
    """Who a lock's content says that holds it."""
    try:
        found = require_fields(parse(holder), {"process": int, "host": str})
        return f"process {found['process']} on {found['host']}"
    except ValueError:
        return "another process"
