"""One writer at a time where there are no locks: a lease that runs out when nobody renews it.

The lease is an object that its holder rewrites every few seconds, each time on the condition that nobody else has.
A second writer that sees it change is refused; one that sees no change for `LEASE_S` seconds, by its own clock, takes
it over by the same kind of put. A holder that was asleep meanwhile finds out at its next renewal: it asks before it
acknowledges anything, so what it was told is recorded stays recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
import weakref
from typing import Any, Protocol

from ..errors import RunLockedError, StorageError
from .lock import described

LEASE_S = 30.0
RENEWALS = 3
"""In that time."""
TRIES = 3
"""Of a put with a condition that meets no answer: nobody knows whether it was done, so obstore leaves it to us."""


class ConflictError(Exception):
    """An object has another version than a put made its condition."""


class ConditionalObjects(Protocol):
    """Objects with versions."""

    def read_versioned(self, key: str) -> tuple[bytes, Any]:
        """All bytes of an object and its version; raises `FileNotFoundError`."""

    def put_if(self, key: str, data: bytes, version: Any) -> Any:
        """Write an object if it still has a version, or does not exist where that is None; its new version."""


class Lease:
    """Holds the lease at `key` from construction until `release`; raises `RunLockedError` naming the holder."""

    def __init__(self, objects: ConditionalObjects, key: str, what: str) -> None:
        self._state = _State(objects, key, what)
        self._state.take()
        self.release = weakref.finalize(self, self._state.end)
        threading.Thread(target=self._state.renew_until_the_end, name=f"lease of {what}", daemon=True).start()

    @property
    def held(self) -> bool:
        """Whether this process holds the lease, as far as it knows."""
        return self._state.held

    @property
    def confirmed(self) -> bool:
        """Whether it holds it still, asked in the store."""
        self._state.renew()
        return self._state.held

    @staticmethod
    def is_released(content: bytes) -> bool:
        """Whether a lease with this content is nobody's."""
        return bool(_fields(content).get("released"))


class _State:
    """What the holder knows of its lease; shared with the thread that renews it."""

    def __init__(self, objects: ConditionalObjects, key: str, what: str) -> None:
        self._objects, self._key, self._what = objects, key, what
        self._holder = {"holder": uuid.uuid4().hex, "process": os.getpid(), "host": platform.node()}
        self._renewals = 0
        self._version: Any = None
        self._until = 0.0
        self._lost = False
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()

    @property
    def held(self) -> bool:
        mine = os.getpid() == self._holder["process"]
        return mine and not self._lost and not self._ended.is_set() and time.monotonic() < self._until

    def take(self) -> None:
        """Get the lease, new, given back or run out."""
        began = time.monotonic()
        try:
            self._version = self._put(None)
        except ConflictError:
            version = self._version_when_free()
            began = time.monotonic()
            try:
                self._version = self._put(version)
            except ConflictError:
                if not self._adopt():
                    raise self._refused(self._objects.read_versioned(self._key)[0]) from None
        self._until = began + LEASE_S

    def renew(self) -> None:
        """Put the lease anew; where somebody else has, it is lost."""
        with self._one_at_a_time:
            if not self._lost and not self._ended.is_set():
                began = time.monotonic()
                try:
                    self._version = self._put(self._version)
                except ConflictError:
                    self._lost = not self._adopt()
                self._until = began + LEASE_S

    def renew_until_the_end(self) -> None:
        """Renew the lease every few seconds."""
        while not self._ended.wait(LEASE_S / RENEWALS) and not self._lost:
            with contextlib.suppress(StorageError):  # it runs out by itself if this goes on
                self.renew()

    def end(self) -> None:
        """Give the lease back, unless this is a forked child."""
        if os.getpid() != self._holder["process"]:
            return
        with self._one_at_a_time:
            self._ended.set()
            with contextlib.suppress(Exception):  # it runs out by itself
                if not self._lost:
                    self._objects.put_if(self._key, self._content(released=True), self._version)

    def _version_when_free(self) -> Any:
        """The version of the lease when its holder has given it back or has let it run out."""
        content, version = self._objects.read_versioned(self._key)
        if Lease.is_released(content) or _fields(content).get("holder") == self._holder["holder"]:
            return version
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(LEASE_S / RENEWALS / 4)
            content, now = self._objects.read_versioned(self._key)
            if Lease.is_released(content):
                return now
            if now != version:
                raise self._refused(content)
        return version

    def _adopt(self) -> bool:
        """Whether the lease is ours all the same: the answer to an earlier put may have been lost on the way."""
        try:
            content, version = self._objects.read_versioned(self._key)
        except FileNotFoundError:  # somebody has deleted it, and nobody can tell who came after
            return False
        if _fields(content).get("holder") != self._holder["holder"]:
            return False
        self._version = version
        return True

    def _put(self, version: Any) -> Any:
        """Put the lease if it has a version still, and again where there was no answer; its new version."""
        for attempt in range(1, TRIES + 1):
            try:
                return self._objects.put_if(self._key, self._content(), version)
            except StorageError:
                if attempt == TRIES:
                    raise
        raise AssertionError("the last try returns or raises")

    def _content(self, released: bool = False) -> bytes:
        self._renewals += 1
        return json.dumps({**self._holder, "renewals": self._renewals, "released": released}).encode()

    def _refused(self, content: bytes) -> RunLockedError:
        return RunLockedError(
            f"{self._what} is being written by {described(content)}; wait for it or stop it"
            f" (it gives way {LEASE_S:.0f} s after it has stopped)"
        )


def _fields(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {}
