"""A run whose every value names its epoch, and a process that records it until it is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from trajkit import ParameterLayout, RunWriter
from trajkit.layout import TensorEntry

LAYOUT = ParameterLayout.of(
    [
        TensorEntry(name="w", shape=(300,), dtype="float32", kind="weight"),
        TensorEntry(name="mean", shape=(3,), dtype="float32", kind="buffer"),
        TensorEntry(name="count", shape=(), dtype="int64", kind="buffer"),
    ]
)


def epoch_values(epoch: int) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Weights and buffers of an epoch."""
    weights = np.full(300, epoch, dtype=np.float32)
    return weights, {"float32": np.full(3, -epoch, np.float32), "int64": np.array([epoch * 10])}


def append(writer: RunWriter, epoch: int) -> None:
    """Record an epoch."""
    weights, buffers = epoch_values(epoch)
    writer.append(LAYOUT, epoch, weights, buffers, {"epoch": epoch})


def record_forever(path: Path, acknowledged: Path) -> None:
    """Record one epoch after the other; each one that is acknowledged adds a byte to a file."""
    descriptor = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = RunWriter(path)
    epoch = len(writer.epochs)
    while True:
        append(writer, epoch)
        os.write(descriptor, b"+")
        epoch += 1
