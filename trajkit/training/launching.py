"""Running a training whose `Recorder` finds its run in the environment."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..errors import RunNotFoundError, TrajkitError
from ..run import PathLike, open_run

logger = logging.getLogger("trajkit")

RUN_VARIABLE = "TRAJKIT_RUN"
"""The environment variable that names the run, by its absolute path or its URL."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a command that cannot be run, as shells give them."""

PASSED_ON = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
FROM_THE_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True)
class Launched:
    """What came of a command: its exit code, 128 + n where signal n ended it, and the epochs that it recorded.

    refused: why it could not be run, None where it was.
    """

    exit_code: int
    epochs: tuple[int, ...]
    refused: str | None = None


def launch(run: PathLike, command: Sequence[str]) -> Launched:
    """Run a command with the address of the run in its environment, and wait for its end.

    Signals are passed on to it. A terminal sends Ctrl-C to the command, too, so that one is not passed on; where there
    is no terminal, the command gets a process group of its own, so that whoever signals the group of this process does
    not reach it twice.

    Raises what `open_run` raises where the run exists and cannot be read.
    """
    place = str(run) if "://" in str(run) else str(Path(run).absolute())
    before = _epochs(run)
    by_terminal = _is_in_foreground()
    with _signals() as signals:
        try:
            child = subprocess.Popen(
                command, env={**os.environ, RUN_VARIABLE: place}, process_group=None if by_terminal else 0
            )
        except OSError as error:
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            return Launched(code, (), f"{command[0]}: cannot be run ({error.strerror}); check the command after --")
        signals.pass_on(child, FROM_THE_KEYBOARD if by_terminal else ())
        code = child.wait()
    code = code if code >= 0 else 128 - code
    try:
        return Launched(code, tuple(epoch for epoch in _epochs(run) if epoch not in before))
    except TrajkitError as error:  # the command has ended all the same, as it did
        logger.warning("%s", error)
        return Launched(code, ())


class _Signals:
    """Keeps signals until there is somebody to pass them on to."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._not: Sequence[int] = ()
        self._kept: list[int] = []

    def take(self, number: int, _: FrameType | None) -> None:
        """A signal has come."""
        if self._child is None:
            self._kept.append(number)
        elif number not in self._not:
            self._child.send_signal(number)

    def pass_on(self, child: subprocess.Popen[bytes], but: Sequence[int]) -> None:
        """Pass on what came and what comes, but some that come to the child without this."""
        self._child, self._not = child, but
        for number in self._kept:
            self.take(number, None)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {}
    try:
        for name in PASSED_ON:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup; the child ignores it, too
                before[number] = signal.signal(number, signals.take)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Whether a terminal sends its signals to the group of this process."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _epochs(run: PathLike) -> tuple[int, ...]:
    try:
        return tuple(open_run(run).epochs.tolist())
    except RunNotFoundError:
        return ()
