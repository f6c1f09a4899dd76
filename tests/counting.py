"""A run whose every value names its epoch."""

from __future__ import annotations

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


def epoch_values(
    epoch: int, layout: ParameterLayout = LAYOUT
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Weights and buffers of an epoch."""
    weights = np.full(layout.n_weights, epoch, dtype=np.float32)
    return weights, {"float32": np.full(3, -epoch, np.float32), "int64": np.array([epoch * 10])}


def append(writer: RunWriter, epoch: int, layout: ParameterLayout = LAYOUT) -> None:
    """Record an epoch."""
    weights, buffers = epoch_values(epoch, layout)
    writer.append(layout, epoch, weights, buffers, {"epoch": epoch})
