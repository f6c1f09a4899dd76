"""The thread beside a training that commits what was copied, epoch after epoch."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import InputError, placed
from ..layout import ParameterLayout, require_same_layout
from ..run import RunWriter
from ..store.forecast import Forecast
from .snapshot import HostMemory, SpareVectors

MOST_UNDER_WAY = 2
"""Copies of the model at a time: one is being committed while the next one is taken."""


@dataclass
class Snapshot:
    """An epoch that was copied, with what is recorded of it beside its tensors."""

    epoch: int
    step: int | None
    memory: HostMemory
    metrics: dict[str, float] = field(default_factory=dict)


class Committer:
    """Commits snapshots to a run in the order in which they come, in a thread of its own.

    At most `MOST_UNDER_WAY` snapshots are out of the pool of `memory`; whoever wants one more waits. When one cannot be
    committed, those behind it are dropped, since a run has no gaps, and the error is raised once, by the next call.
    The thread lives until `end`, and the interpreter waits for it at its exit.
    """

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[Snapshot] = deque()
        self._at: Snapshot | None = None
        self._under_way = 0
        self._pool: list[HostMemory] = []
        self._error: BaseException | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def epochs(self) -> tuple[int, ...]:
        """The committed epochs, rising."""
        return self._writer.epochs

    @property
    def last(self) -> int | None:
        """The epoch after which the next one comes: the last one that is committed or in the queue."""
        waiting = [snapshot.epoch for snapshot in self._waiting()]
        return max((*waiting, *self.epochs[-1:]), default=None)

    def forecast(self, layout: ParameterLayout, epochs: int) -> Forecast:
        """What so many epochs of a layout take, those that are committed among them."""
        return self._writer.forecast(layout, epochs)

    def require_next(self, epoch: int, step: int | None, layout: ParameterLayout) -> tuple[int, int | None]:
        """`epoch` and `step` as integers, if they can come next with this layout; raises an earlier epoch's error.

        Raises `InputError` for an epoch or a step that is not later than the last one, `LayoutError` for another
        layout.
        """
        self.require_open()
        label = self._writer.require_next(epoch)
        step = self._writer.require_step(label, step)
        expected, waiting = self._writer.layout, self._waiting()
        if waiting:
            self._require_after(label, step, waiting)
            expected = waiting[-1].memory.layout
        if expected is not None:
            require_same_layout(layout, expected, f"{self._writer.path}: epoch {label}")
        return label, step

    def _require_after(self, epoch: int, step: int | None, waiting: list[Snapshot]) -> None:
        """As the writer does, for those that it does not have yet."""
        last, where = waiting[-1], f"{self._writer.path}: epoch {epoch}"
        if epoch <= last.epoch:
            known = epoch in [snapshot.epoch for snapshot in waiting]
            state = "is recorded already" if known else f"comes before the last one, {last.epoch}"
            raise InputError(f"{where} {state}; go on after epoch {last.epoch} or record into a new run")
        if (step is None) != (last.step is None) or (step is not None and last.step is not None and step <= last.step):
            raise InputError(
                f"{where} has step {step}, epoch {last.epoch} before it has step {last.step}, expected none in all or"
                " one that rises; pass the training's step, or record into a new run"
            )

    def require_open(self) -> None:
        """Raise the error of an earlier epoch, if nobody has seen it yet, or `InputError` where nothing can follow."""
        if os.getpid() != self._process:
            raise InputError(
                f"{self._writer.path}: the recorder belongs to the process that this one was forked from; record there"
            )
        self._raise_error()
        if self._ended:
            raise InputError(f"{self._writer.path}: the recorder is closed; record with a new one")

    def memory(self, layout: ParameterLayout, pinned: bool) -> HostMemory:
        """Memory for a snapshot of this layout, to be given to `put` or `give_back`; waits until some is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < MOST_UNDER_WAY or self._error is not None)
        self.require_open()
        with self._changed:
            self._under_way += 1
            fitting = [memory for memory in self._pool if memory.layout is layout and memory.pinned == pinned]
            self._pool = fitting[:-1]  # what fits no longer goes
        if fitting:
            return fitting[-1]
        try:
            return HostMemory(layout, pinned)
        except BaseException:  # there may be no memory
            with self._changed:
                self._under_way -= 1
            raise

    def give_back(self, memory: HostMemory) -> None:
        """What was in the memory is not needed any more."""
        with self._changed:
            self._pool.append(memory)
            self._under_way -= 1
            self._changed.notify_all()

    def put(self, snapshot: Snapshot) -> None:
        """Commit this snapshot when those before it are; raises what went wrong with one of them meanwhile."""
        with self._changed:
            failed = self._error is not None
            if not failed:
                self._queue.append(snapshot)
            if self._thread is None and not failed:
                _live.add(self)
                # A daemon, so that a second Ctrl-C ends the wait for it at the exit.
                self._thread = threading.Thread(target=self._work, name=f"trajkit {self._writer.path}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if failed:
            self.give_back(snapshot.memory)
            self._raise_error()

    def wait(self) -> None:
        """Return when everything that was `put` is committed; raises what went wrong, if nobody has seen it yet."""
        if os.getpid() == self._process:
            with self._changed:
                self._changed.wait_for(self._is_idle)
            self._raise_error()

    def end(self) -> None:
        """Let the thread finish what was `put` and give the run back to other writers; returns at once."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            if self._thread is None:
                self._writer.close()

    def join(self) -> None:
        """Wait for the thread after `end`; raises as `wait`."""
        if self._thread is not None and os.getpid() == self._process:
            self._thread.join()
            self._raise_error()

    def _waiting(self) -> list[Snapshot]:
        """What was `put` and may not be committed yet, in its order."""
        if os.getpid() != self._process:  # forked, perhaps while the other thread had the lock
            return []
        with self._changed:
            return [snapshot for snapshot in (self._at, *self._queue) if snapshot is not None]

    def _raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _is_idle(self) -> bool:
        return not self._queue and self._at is None

    def _work(self) -> None:
        spare = SpareVectors()
        try:
            while (snapshot := self._next()) is not None:
                try:
                    self._commit(snapshot, spare)
                except BaseException as error:
                    self._fail(snapshot, error)
                self._done(snapshot)
        finally:
            self._writer.close()

    def _next(self) -> Snapshot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended)
            self._at = self._queue.popleft() if self._queue else None
            return self._at

    def _commit(self, snapshot: Snapshot, spare: SpareVectors) -> None:
        with placed(f"{self._writer.path}: epoch {snapshot.epoch}"):
            weights, buffers = snapshot.memory.vectors(spare)
        self._writer.append(snapshot.memory.layout, snapshot.epoch, weights, buffers, snapshot.metrics, snapshot.step)

    def _fail(self, snapshot: Snapshot, error: BaseException) -> None:
        """Keep the error for whoever calls next, and drop what was to follow the epoch."""
        with self._changed:
            dropped = [waiting.epoch for waiting in self._queue]
            for waiting in self._queue:
                self._pool.append(waiting.memory)
            self._under_way -= len(dropped)
            self._queue.clear()
            lost = ", ".join(str(epoch) for epoch in (snapshot.epoch, *dropped))
            error.add_note(f"{self._writer.path}: not recorded: epoch {lost}")
            self._error = error

    def _done(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._at = None
        self.give_back(snapshot.memory)


_live: weakref.WeakSet[Committer] = weakref.WeakSet()


def _finish() -> None:
    """At the exit of the interpreter: what was recorded is committed, as if the recorders had been closed."""
    for committer in list(_live):
        try:
            committer.wait()
        except KeyboardInterrupt:
            _live.clear()  # whoever does not want to wait need not say so twice
            raise
        except Exception as error:
            notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
            print(f"trajkit: {type(error).__name__}: {error}{notes}", file=sys.stderr)


# Before the interpreter ends the pools of concurrent.futures, which commits need, as that module does it itself; where
# a future Python has no such hook, at least after it. Both, for threads that train on when the main one has ended.
_before_threads_end: Callable[[Callable[[], None]], None] | None = getattr(threading, "_register_atexit", None)
if _before_threads_end is not None:
    with contextlib.suppress(RuntimeError):  # imported while the interpreter ends
        _before_threads_end(_finish)
atexit.register(_finish)
