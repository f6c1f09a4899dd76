"""The whole path on real data in under a minute: train, record, fit, reconstruct, evaluate.

A small CNN learns the 1797 handwritten digits that come with scikit-learn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .checkpoints.writing import write_checkpoint
from .decomposition import Decomposition, relative_to_motion
from .pipeline import fit
from .run import PathLike, Run, open_run
from .training.evaluate import evaluate
from .training.recorder import Recorder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DemoEpoch:
    """One line of the demo's table; accuracies in [0, 1], the error as in `Quality.last_epoch_error`."""

    epoch: int
    recorded_accuracy: float
    cmd_accuracy: float
    error_relative_to_motion: float | None


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` found; times in seconds per stage."""

    path: Path
    modes: int
    epochs: tuple[DemoEpoch, ...]
    variance_explained: float | None
    archive_bytes: int
    weights_bytes: int
    seconds: dict[str, float]


def digits_cnn() -> nn.Module:
    """A CNN with BatchNorm for 8×8 grey images, 3682 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1347, 1, 8, 8) in [0, 1] and labels (1347,), then test images and labels, 450 of them."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return train_images, train_labels, test_images, test_labels


def test_accuracy(state_dict: dict[str, Any]) -> dict[str, float]:
    """Accuracy in [0, 1] of `digits_cnn` with these weights on the test digits: a function for `trajkit evaluate`."""
    model = digits_cnn()
    model.load_state_dict(state_dict)
    _, _, images, labels = digits()
    with _one_thread():
        return {"test_accuracy": _accuracy(model, images, labels)}


def record_digits(path: PathLike, epochs: int = 40, seed: int = 0, progress: Progress | None = None) -> Run:
    """Train `digits_cnn` with Adam and record every epoch, from the initial weights, epoch 0, on."""
    torch.manual_seed(seed)
    model = digits_cnn()
    images, labels, test_images, test_labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with _one_thread(), Recorder(model, path) as recorder:
        for epoch in range(epochs):
            if epoch:
                _train_one_epoch(model, optimizer, images, labels)
            recorder.record(epoch, {"test_accuracy": _accuracy(model, test_images, test_labels)})
            if progress is not None:
                progress(epoch + 1, epochs)
    return open_run(path)


def run_demo(path: PathLike, epochs: int = 40, shown: int = 8, progress: Progress | None = None) -> DemoResult:
    """Record a training into `path`, fit 10 modes, reconstruct and evaluate the last `shown` epochs."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def finish(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[stage], began = now - began, now

    run = record_digits(path, epochs, progress=progress)
    finish("train and record")
    decomposition = fit(run, modes=10)
    finish("fit")
    last = run.epochs[-shown:].tolist()
    write_checkpoint(run, last[-1], Path(run.path).parent / "digits-cmd.safetensors", decomposition)
    finish("reconstruct")
    evaluation = evaluate(run, test_accuracy, decomposition, last)
    finish("evaluate")
    lines = tuple(
        DemoEpoch(
            epoch=row.epoch,
            recorded_accuracy=row.recorded["test_accuracy"],
            cmd_accuracy=(row.modelled or {})["test_accuracy"],
            error_relative_to_motion=error_relative_to_motion(decomposition, row.epoch),
        )
        for row in evaluation.epochs
    )
    return DemoResult(
        path=Path(run.path),
        modes=decomposition.n_modes,
        epochs=lines,
        variance_explained=decomposition.quality.variance_explained,
        archive_bytes=run.size_bytes,
        weights_bytes=run.weights.nbytes,
        seconds=seconds,
    )


def error_relative_to_motion(decomposition: Decomposition, epoch: int) -> float | None:
    """Return ‖recorded - modelled‖ / ‖recorded - mean‖ over all weights at an epoch, see `Quality.last_epoch_error`."""
    run = decomposition.run
    recorded = run.weights[run.row_of(epoch)].astype(np.float64)
    residual = recorded - decomposition.modelled([epoch], dtype=np.float64)[0]
    motion = recorded - decomposition.mean
    return relative_to_motion(float(residual @ residual), float(motion @ motion))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread meanwhile: several of them wait for each other where other work takes the cores.

    An operation of so small a model takes less time than that.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    model.train()
    for batch in torch.randperm(len(images)).split(64):  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())
