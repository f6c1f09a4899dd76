"""Real data for the benchmarks: from the folder that TRAJKIT_DATA names, or `shared/data` beside the repository."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA = Path(os.environ.get("TRAJKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def mnist(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (n, 784) in [0, 1] and labels (n,) of the standard idx files; `split` is ``"train"`` or ``"t10k"``."""
    folder = DATA / "mnist"
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return (images / 255).astype(np.float32), labels.astype(np.int64)
