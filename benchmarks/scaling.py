"""How time and peak memory of a fit grow with the number of weights and of epochs, and clustering with the sample."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import synthetic
from measure import alone, exponent

WEIGHTS = (10**6, 10**7, 10**8, 2 * 10**8)
EPOCHS = (20, 50, 100, 200)
NO_WEIGHTS = 1000
NO_EPOCHS = 2
FEW_EPOCHS = 20
SOME_WEIGHTS = 4 * 10**6
SAMPLES = (1000, 3000, 10000)
MEMORY = "1GiB"

Measured = list[tuple[int, int, list[dict[str, Any]]]]
"""Weights, epochs, and what each fit took."""

FIT = """
import shutil, trajkit
trajkit.fit  # imported before
path, n_epochs, memory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
before = peak()
began = time.perf_counter()
fitted = trajkit.fit(path, epochs=range(n_epochs), name="benchmark", memory=memory)
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak(), "above": peak() - before}))
shutil.rmtree(fitted.run.path / "fits/benchmark")
"""

CLUSTER = """
import numpy as np
from trajkit.kernels.clustering import choose_references, cluster, cluster_tree, clustering_bytes
from trajkit.kernels.correlation import correlation_magnitude
k = int(sys.argv[1])
rng = np.random.default_rng(0)
walks = rng.normal(size=(40, 5)).cumsum(axis=0)
trajectories = walks[:, rng.integers(5, size=k)] * rng.normal(size=k) + 0.3 * rng.normal(size=(40, k))
before = peak()
began = time.perf_counter()
magnitude = correlation_magnitude(trajectories)
choose_references(magnitude, cluster(cluster_tree(magnitude), 10))
found = {"seconds": time.perf_counter() - began, "peak": peak(), "above": peak() - before}
print(json.dumps(found | {"planned": clustering_bytes(k)}))
"""


def sizes(cache: Path) -> list[str]:
    measured: Measured = []
    for n_weights in (NO_WEIGHTS, *WEIGHTS):
        path = cache / f"scaling-{n_weights}"
        synthetic.record(path, n_weights, FEW_EPOCHS)
        os.sync()
        measured.append((n_weights, FEW_EPOCHS, _fits(path, FEW_EPOCHS, 5 if n_weights <= 10**7 else 3)))
        shutil.rmtree(path)
    by_weights = _table(measured)
    fixed, *seconds = _medians(measured, "seconds")
    weights_time = exponent(WEIGHTS, [second - fixed for second in seconds])
    weights_peak = exponent(WEIGHTS, _medians(measured, "peak")[1:])
    path = cache / "scaling-epochs"
    synthetic.record(path, SOME_WEIGHTS, max(EPOCHS))
    os.sync()
    measured = [(SOME_WEIGHTS, n_epochs, _fits(path, n_epochs, 5)) for n_epochs in (NO_EPOCHS, *EPOCHS)]
    shutil.rmtree(path)
    without, *seconds = _medians(measured, "seconds")
    epochs_time = exponent([n - NO_EPOCHS for n in EPOCHS], [second - without for second in seconds])
    return [
        f"## Growth with weights and epochs: freshly opened runs, `--memory {MEMORY}`, each fit in its own process",
        "",
        *by_weights,
        *_table(measured)[2:],
        "",
        f"- Above a fit of {NO_WEIGHTS} weights, time grows with N to the power {weights_time:.2f}; above a fit of"
        f" {NO_EPOCHS} epochs, which writes as many results, with E to the power {epochs_time:.2f}.",
        f"- The peak of the process grows with N to the power {weights_peak:.3f}.",
    ]


def _fits(path: Path, n_epochs: int, n: int) -> list[dict[str, Any]]:
    fits = [alone(FIT, path, n_epochs, MEMORY) for _ in range(n + 1)]
    return fits[1:]  # the first one brings the archive into the page cache


def _medians(measured: Measured, what: str) -> list[float]:
    return [statistics.median(fit[what] for fit in fits) for *_, fits in measured]


def _table(measured: Measured) -> list[str]:
    lines = [
        "| weights | epochs | GB | n | median s | spread s | GB/s | peak MB | of these for the fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n_weights, n_epochs, fits in measured:
        seconds = [fit["seconds"] for fit in fits]
        gigabytes, median = 4e-9 * n_weights * n_epochs, statistics.median(seconds)
        peak, above = (max(fit[name] for fit in fits) / 1e6 for name in ("peak", "above"))
        lines.append(
            f"| {n_weights:,} | {n_epochs} | {gigabytes:.2f} | {len(fits)} | {median:.2f} |"
            f" {min(seconds):.2f} to {max(seconds):.2f} | {gigabytes / median:.2f} | {peak:.0f} | {above:.0f} |"
        )
    return lines


def clustering() -> list[str]:
    lines = [
        "## Step 1: correlation, clusters and references of K samples, 40 epochs, each in its own process",
        "",
        "| K | n | median s | spread s | peak MB | of these for Step 1 | planned MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in SAMPLES:
        taken = [alone(CLUSTER, k) for _ in range(3)]
        seconds = [one["seconds"] for one in taken]
        peak, above, planned = (max(one[name] for one in taken) / 1e6 for name in ("peak", "above", "planned"))
        lines.append(
            f"| {k} | {len(taken)} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |"
            f" {peak:.0f} | {above:.0f} | {planned:.0f} |"
        )
    return lines
