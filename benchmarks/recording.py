"""What recording costs a training: the time until `record` returns, and the time that a training loop loses."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import torch
from measure import in_turn, table
from torch import nn

import trajkit

ROUNDS = 21
BATCH = 256
EPOCH_S = 1.0
N_EPOCHS = 60


def wide() -> nn.Module:
    """11.0 M weights in 8 tensors."""
    sizes = (784, 2048, 2048, 2048, 500)
    layers = [part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers)


def deep() -> nn.Module:
    """11.1 M weights, with BatchNorm, in 420 tensors."""
    return nn.Sequential(*[nn.Sequential(nn.Linear(428, 428), nn.BatchNorm1d(428)) for _ in range(60)])


def n_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def returning(folder: Path, model: nn.Module) -> list[str]:
    """The time until `record` returns against copies of the weights and against a checkpoint, in turn."""
    epochs = count()
    with trajkit.Recorder(model, folder / "run") as recorder:
        actions: dict[str, Callable[[], object]] = {
            "clone of every tensor": lambda: {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "`recorder.record(epoch)`": lambda: recorder.record(next(epochs)),
            "`torch.save(state_dict)`": lambda: torch.save(model.state_dict(), folder / "checkpoint.pt"),
            "`recorder.record(epoch, wait=True)`": lambda: recorder.record(next(epochs), wait=True),
        }
        seconds = in_turn(ROUNDS, actions, before=recorder.flush)
    clone, record, save = (statistics.median(seconds[name]) for name in list(actions)[:3])
    return [
        f"{n_weights(model):,} weights in {len(model.state_dict())} tensors, on the CPU, each call after the one before"
        " is committed:",
        "",
        *table(seconds, "clone of every tensor"),
        "",
        f"- `record` returns within {record / clone:.2f} × the time of cloning the weights (bar: 1.3) and"
        f" {record / save:.3f} × that of `torch.save` (bar: 0.1).",
    ]


def a_training(model: nn.Module) -> Callable[[], None]:
    """An epoch of about a second of training on all cores."""
    images, labels = torch.randn(BATCH, 784), torch.randint(500, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - began

    train(3)
    steps = max(round(EPOCH_S / statistics.median(train(1) for _ in range(9))), 1)
    return lambda: train(steps)  # type: ignore[return-value]


def losing(folder: Path) -> list[str]:
    """Epochs of a training that records, that saves checkpoints, and that does neither, in turn."""
    torch.manual_seed(0)
    model, epochs = wide(), count()
    train = a_training(model)
    with trajkit.Recorder(model, folder / "run") as recorder:

        def recorded() -> None:
            recorder.record(next(epochs))
            train()
            recorder.flush()  # what is left of the work belongs to this epoch

        def saved() -> None:
            torch.save(model.state_dict(), folder / "checkpoint.pt")
            train()

        plain = "an epoch"
        actions = {plain: train, "… recorded": recorded, "… with `torch.save`": saved}
        seconds = in_turn(N_EPOCHS, actions)
    lines = [
        "| what | n | median s | middle half s | lost, of each against the one before it: median | middle half |",
        "|---|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        lost = [100 * (mine / theirs - 1) for mine, theirs in zip(taken, seconds[plain], strict=True)]
        lost_low, lost_middle, lost_high = statistics.quantiles(lost, n=4)
        lines.append(
            f"| {name} | {len(taken)} | {middle:.3f} | {low:.3f} to {high:.3f} |"
            f" {lost_middle:.1f} % | {lost_low:.1f} to {lost_high:.1f} % |"
        )
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    share = 100 * (medians["… recorded"] / medians[plain] - 1)
    return [
        f"A training of {n_weights(model):,} weights on {torch.get_num_threads()} threads, every epoch recorded with"
        " fsync:",
        "",
        *lines,
        "",
        f"- By the medians, a training that records each epoch of {medians[plain]:.2f} s loses {share:.1f} % of its"
        " time (bar: 3 %).",
    ]


def recording(cache: Path) -> list[str]:
    """All tables."""
    lines = ["## Recording beside a training"]
    for part in (lambda folder: returning(folder, wide()), lambda folder: returning(folder, deep()), losing):
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            lines += ["", *part(Path(folder))]
    return lines
