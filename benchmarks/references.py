"""Which references serve: variance explained and test accuracy of post-hoc and online CMD, against EMA and SWA."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from modelling import LAST, TRAINED, ema, mean_and_spread, post_hoc, scores, swa
from trainings import BATCH, EPOCHS, LEARNING_RATES, WARMUP, recorded

import trajkit

MODES = (2, 5, 10, 30)
KINDS = ("weight", "centroid", "principal")
ONLINE: dict[str, dict[str, Any]] = {
    "weight, as in the paper": {},
    "centroid": {"references": "centroid"},
    "centroid, 2 candidates": {"references": "centroid", "reassign": True},
    "centroid, all candidates": {"references": "centroid", "reassign": max(MODES)},
    "centroid, 2 candidates, decay 0.9": {"references": "centroid", "reassign": True, "decay": 0.9},
    "principal, 2 candidates, decay 0.9": {"references": "principal", "reassign": True, "decay": 0.9},
}
OTHERS = {"EMA, 0.9 an epoch": ema, "SWA, from 75 % of the epochs on": swa}

Scores = Mapping[str, Sequence[float]]


def ways() -> dict[str, Any]:
    """By name, how weights are made of a run; with the number of modes behind a `@`."""
    every: dict[str, Any] = dict(OTHERS)
    for modes in MODES:
        every |= {f"post-hoc, {kind} @{modes}": post_hoc(modes=modes, references=kind) for kind in KINDS}
        every |= {
            f"online, {name} @{modes}": post_hoc(modes=modes, epochs=range(WARMUP), online=True, **settings)
            for name, settings in ONLINE.items()
        }
    return every


def of_run(path: Path, model: str, cache: Path) -> tuple[Scores, Mapping[str, float]]:
    """Accuracies of each way at some of the last epochs, and the variance that post-hoc fits explain."""
    torch.set_num_threads(1)
    run = trajkit.open_run(path)
    epochs = run.epochs.tolist()[-1 : -LAST - 1 : -4][::-1]
    explained: dict[str, float] = {}
    found = scores(run, model, cache, ways(), epochs, explained)
    return {TRAINED: [run.metrics[epoch]["test_accuracy"] for epoch in epochs], **found}, explained


def references(cache: Path) -> list[str]:
    """A table for each kind of training that trainings.py has recorded."""
    lines = [
        "## References of one weight and of many",
        "",
        "Test accuracy in %, mean ± standard deviation over seeds, each the mean of three of the last ten epochs; in"
        f" brackets the variance that a post-hoc fit explains. Warm-up of {WARMUP} epochs, K = 1000, batch {BATCH}."
        " Candidates: among how many references a weight's mode may change.",
        "",
    ]
    kinds = [(model, optimizer) for model, kind in LEARNING_RATES for optimizer in (kind, f"{kind}-cosine")]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        every = {
            kind: [pool.submit(of_run, Path(run.path), kind[0], cache) for run in recorded(cache, *kind)]
            for kind in kinds
        }
        for kind, seeds in every.items():
            if seeds:
                lines += table(*kind, [seed.result() for seed in seeds])
    return lines


def table(model: str, optimizer: str, every: Sequence[tuple[Scores, Mapping[str, float]]]) -> list[str]:
    """Rows are ways, columns numbers of modes."""

    def cell(name: str) -> str:
        shown = mean_and_spread([statistics.mean(accuracies[name]) for accuracies, _ in every])
        if not name.startswith("post-hoc"):
            return shown
        return f"{shown} ({statistics.mean(explained[name] for _, explained in every):.3f})"

    once = [f"| {name} | {cell(name)} |{' |' * (len(MODES) - 1)}" for name in (TRAINED, *OTHERS)]
    names = [f"post-hoc, {kind}" for kind in KINDS] + [f"online, {name}" for name in ONLINE]
    rate = LEARNING_RATES[model, optimizer.removesuffix("-cosine")]
    return [
        f"### {model}, {optimizer} {rate:g}, {EPOCHS[model]} epochs, seeds: {len(every)}",
        "",
        f"| weights |{''.join(f' M = {modes} |' for modes in MODES)}",
        "|---|" + "---|" * len(MODES),
        *once,
        *(f"| {name} |" + "".join(f" {cell(f'{name} @{modes}')} |" for modes in MODES) for name in names),
        "",
    ]
