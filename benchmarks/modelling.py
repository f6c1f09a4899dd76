"""Test accuracy of a training's weights and of those that CMD, EMA and SWA make of them; and of CMD embedded in it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import copy_of
from models import MODELS
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from trainings import EPOCHS, WARMUP, Images, accuracy, recorded

import trajkit
from trajkit.training.embedded import schedule

LAST = 10
"""Epochs at the end over which an accuracy is averaged; that of a single one depends on chance by half a point."""

BATCHES = 40
"""By which BatchNorm's statistics are estimated."""

TRAINED = "trained weights"

StateDict = Mapping[str, Tensor]
Weights = Callable[[trajkit.Run, Sequence[int]], Iterator[StateDict]]


def ema(run: trajkit.Run, epochs: Sequence[int]) -> Iterator[StateDict]:
    return (run.average(ema=0.9, up_to=epoch).state_dict() for epoch in epochs)


def swa(run: trajkit.Run, epochs: Sequence[int]) -> Iterator[StateDict]:
    first = len(run.epochs) * 3 // 4
    return (run.average(range(first, epoch + 1)).state_dict() for epoch in epochs)


def post_hoc(**settings: Any) -> Weights:
    return lambda run, epochs: trajkit.fit(run, **settings).state_dicts(epochs)


def online(**settings: Any) -> Weights:
    return post_hoc(epochs=range(WARMUP), online=True, **settings)


WAYS: dict[str, Weights] = {
    "EMA, 0.9 an epoch": ema,
    "SWA, from 75 % of the epochs on": swa,
    "post-hoc CMD, M = 10": post_hoc(modes=10),
    "online CMD, M = 10": online(modes=10),
    "online CMD, M = 10, modes re-assigned": online(modes=10, reassign=10),
    "online CMD, M = 10, centroid references, modes re-assigned": online(modes=10, references="centroid", reassign=10),
    "the same, 2 candidates, decay 0.9": online(modes=10, references="centroid", reassign=True, decay=0.9),
}
NAMES = {
    "embedded": "embedded CMD, L = 10, P = 10",
    "embedded-centroid": "embedded CMD, decay 0.9, centroid references of all 16,384 probe weights",
    "embedded-few": "embedded CMD, decay 0.9, centroid references of 5 % of the weights",
    "overwriting": "naive: all weights overwritten every 20 epochs",
    "references": "naive: only the references trained after the warm-up",
}


def scores(
    run: trajkit.Run,
    model: str,
    cache: Path,
    ways: Mapping[str, Weights],
    epochs: Sequence[int],
    explained: dict[str, float],
) -> dict[str, list[float]]:
    """Test accuracies at some epochs of the weights made in each way; `explained` takes what each fit explains."""
    images, module = Images.of(model, cache), MODELS[model]()

    def scored(state_dict: StateDict) -> float:
        module.load_state_dict(state_dict)
        estimate_batch_statistics(module, images)
        return accuracy(module, images.test)

    found = {}
    with copy_of(run.path) as copy:
        for name, way in ways.items():
            before = set(copy.fits)
            found[name] = [scored(state_dict) for state_dict in way(copy, epochs)]
            for made in set(copy.fits) - before:
                explained[name] = copy.fit(made).quality.variance_explained
    return found


def estimate_batch_statistics(module: nn.Module, images: Images) -> None:
    """Of BatchNorm, on some training images, the same for all ways."""
    if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            update_bn(itertools.islice(images.epoch(), BATCHES), module)


def mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def rows(found: Mapping[str, Sequence[Sequence[float]]], base: Sequence[Sequence[float]]) -> list[str]:
    """Of each way: mean and standard deviation over seeds, at the last epoch and averaged over the last ones."""
    return [
        f"| {name} | {len(seeds)} | {mean_and_spread([each[-1] for each in seeds])}"
        f" | {mean_and_spread([statistics.mean(each) for each in seeds])} | {gain(seeds, base)} |"
        for name, seeds in found.items()
    ]


def gain(seeds: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> str:
    """Mean and standard deviation over seeds of the difference to `base` of the same seed."""
    pairs = zip(seeds, base, strict=False)
    return mean_and_spread([statistics.mean(each) - statistics.mean(other) for each, other in pairs])


def modelling(cache: Path) -> list[str]:
    """LeNet-5 and Adam, the experiment of the paper at a smaller size; trainings.py has recorded the trainings."""
    plain = recorded(cache, "lenet5", "adam")
    every = [scores(run, "lenet5", cache, WAYS, run.epochs.tolist()[-LAST:], {}) for run in plain]
    found = {TRAINED: [last_accuracies(run) for run in plain]}
    found |= {name: [each[name] for each in every] for name in WAYS}
    saved = {}
    epochs = EPOCHS["lenet5"]
    for embedding, name in NAMES.items():
        runs = recorded(cache, "lenet5", "adam", embedding)
        if runs:
            found[name] = [last_accuracies(run) for run in runs]
        if embedding.startswith("embedded"):
            shares = [[run.metrics[epoch]["embedded"] for epoch in run.epochs.tolist()] for run in runs]
            saved[name] = [sum(share[:-1]) / epochs for share in shares]  # a record has the share at the epoch's end
    return [
        f"## CMD beside a training: LeNet-5 (62,006 weights), CIFAR-10, Adam 1e-3, batch 128, {epochs} epochs",
        "",
        f"CIFAR-10 as JPEG of quality 75, crop and flip, warm-up of {WARMUP} epochs, K = 1000. Test accuracy in %, mean"
        " ± standard deviation over seeds; the gain is that of the last 10 epochs' mean over the trained weights of the"
        " same seed.",
        "",
        "| weights | seeds | last epoch | mean of the last 10 | gain, points |",
        "|---|---|---|---|---|",
        *rows(found, found[TRAINED]),
        "",
        *(f"- Trained weights that {name} saved: {mean_and_spread(each)} %." for name, each in saved.items() if each),
        f"- By the schedule of embedded CMD: {100 * statistics.mean(schedule(epochs, WARMUP)):.2f} %.",
    ]


def last_accuracies(run: trajkit.Run) -> list[float]:
    """Those recorded at the last epochs."""
    return [run.metrics[epoch]["test_accuracy"] for epoch in run.epochs.tolist()[-LAST:]]
