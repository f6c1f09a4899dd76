"""How benchmarks measure and show: actions in turn, medians and their spread, peaks of processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trajkit
from trajkit.run import PathLike

Seconds = Mapping[str, Sequence[float]]

ROUNDS = 7
MACHINE = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


@contextlib.contextmanager
def copy_of(path: PathLike) -> Iterator[trajkit.Run]:
    """A copy of a recorded run for the moment, so that no fit of another version of a benchmark is in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield trajkit.open_run(shutil.copytree(path, Path(folder) / "run"))


def in_turn(
    rounds: int,
    actions: Mapping[str, Callable[[], object]],
    warm: bool = True,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each action, measured one after the other in each round; the first round, to warm up, counts not.

    `before` is done before each action and not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(0 if warm else 1, rounds + 1):
        for name, action in actions.items():
            before()
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(seconds: Seconds, unit: str) -> list[str]:
    """A row for each action, with its median as a multiple of that of the action `unit`."""
    per = statistics.median(seconds[unit])
    return [
        f"| what | n | median s | spread s | × {unit} |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {len(taken)} | {statistics.median(taken):.3f} | {min(taken):.3f} to {max(taken):.3f} |"
            f" {statistics.median(taken) / per:.2f} |"
            for name, taken in seconds.items()
        ),
    ]


def alone(code: str, *arguments: object) -> dict[str, Any]:
    """What `code` prints as JSON, run by a Python process of its own; it may call `peak()` for its peak in bytes."""
    command = [sys.executable, "-c", _PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_PEAK = """
import json, sys, time
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of its size by which a value grows, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
