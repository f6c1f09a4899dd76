"""What many tests need: trajectories with structure, runs made of them, and the run that comes with the repository."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trajkit import ParameterLayout, Run, RunWriter, open_run
from trajkit.layout import TensorEntry

# The tests run on all cores already. Threads of torch that spin between its operations, which is what they do by
# default, would take the cores from each other: with them a training takes five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).parents[1]
MakeRun = Callable[..., Run]


def vector_layout(*sizes: int) -> ParameterLayout:
    """A model of one-dimensional weight tensors of these sizes."""
    return ParameterLayout.of(
        TensorEntry(name=f"layer{number}", shape=(size,), dtype="float32", kind="weight")
        for number, size in enumerate(sizes)
    )


def correlated(n_epochs: int, n_weights: int, seed: int = 0, noise: float = 0.3) -> NDArray[np.float32]:
    """(E, N) trajectories that follow five random walks, with noise, at many scales and offsets."""
    rng = np.random.default_rng(seed)
    walks = rng.normal(size=(n_epochs, 5)).cumsum(axis=0)
    walks /= walks.std(axis=0)
    follows = rng.integers(5, size=n_weights)
    scale = rng.normal(size=n_weights) * 10.0 ** rng.integers(-4, 1, size=n_weights)
    motion = walks[:, follows] + noise * rng.normal(size=(n_epochs, n_weights))
    return (motion * scale + rng.normal(size=n_weights)).astype(np.float32)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Record an (E, N) matrix, with epochs 0, 1, … or the given ones, and tensors of the given sizes."""

    def make(
        trajectories: NDArray[np.float32],
        sizes: tuple[int, ...] = (),
        epochs: list[int] | None = None,
        name: str = "run",
        nonfinite: str = "raise",
    ) -> Run:
        layout = vector_layout(*(sizes or (trajectories.shape[1],)))
        with RunWriter(tmp_path / name, fsync=False, nonfinite=nonfinite) as writer:  # type: ignore[arg-type]
            for epoch, weights in zip(epochs or range(len(trajectories)), trajectories, strict=True):
                writer.append(layout, epoch, weights, {})
        return open_run(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def _digits_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("golden") / "digits"
    shutil.copytree(REPOSITORY / "data" / "digits", copy, ignore=shutil.ignore_patterns("fits", "evaluations"))
    return copy


@pytest.fixture
def digits_path(_digits_copy: Path, tmp_path: Path) -> Path:
    """A fresh copy of `data/digits`, 40 epochs of a real training."""
    return Path(shutil.copytree(_digits_copy, tmp_path / "digits"))


@pytest.fixture
def digits_run(digits_path: Path) -> Run:
    """`data/digits`, opened."""
    return open_run(digits_path)


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one, for tests that write thousands of files and never wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
