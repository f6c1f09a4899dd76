"""How long a fit takes, against bare reading of the same archive and against the official code's way.

    python benchmarks/fit.py RUN

Everything is compared in the same process, in turn; medians of 7 rounds and their spread. The archive is in the page
cache. Writes the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import official

import trajkit
from trajkit.kernels.clustering import cluster
from trajkit.kernels.correlation import correlation_matrix

ROUNDS = 7
RESULTS = Path(__file__).with_name("RESULTS.md")


def in_turn(rounds: int, **actions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each action, measured one after the other in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def row(name: str, seconds: list[float], per: float) -> str:
    median = statistics.median(seconds)
    return f"| {name} | {median:.3f} | {min(seconds):.3f} to {max(seconds):.3f} | {median / per:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    path = parser.parse_args().run
    run = trajkit.open_run(path)
    n_epochs, n_weights = run.weights.shape
    name = "benchmark"
    fits = run.path / "fits"

    def fitted() -> None:
        trajkit.fit(path, name=name)
        shutil.rmtree(fits / name)

    weights = np.ascontiguousarray(run.weights[:].T)
    sample = trajkit.fit(run, name=name).sample_index
    shutil.rmtree(fits / name)
    seconds = in_turn(
        ROUNDS,
        bare=lambda: run.weights[:],
        checked=lambda: trajkit.open_run(path).weights[:],
        fit=fitted,
        official=lambda: official.fit(weights, 10, sample),
    )
    bare = statistics.median(seconds["bare"])
    gigabytes = run.weights.nbytes / 1e9
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `make bench`; ratios matter, seconds depend on the machine and on what else it does.",
        "",
        f"## Fit: {n_weights:,} weights, {n_epochs} epochs, 10 modes, {gigabytes:.2f} GB of float32",
        "",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {ROUNDS} rounds in turn.",
        "",
        "| what | median s | spread s | × bare read |",
        "|---|---|---|---|",
        row("bare read of the archive, objects known to be sound", seconds["bare"], bare),
        row("read of a freshly opened run: every object hashed first", seconds["checked"], bare),
        row("`trajkit.fit` of a freshly opened run, everything included", seconds["fit"], bare),
        row("the official code's way, weights already in memory", seconds["official"], bare),
        "",
        f"`trajkit.fit` is {statistics.median(seconds['official']) / statistics.median(seconds['fit']):.1f} times as"
        " fast as the official code's way, which is not charged for reading the weights.",
        "",
        "## Clustering of K samples, Step 1",
        "",
        "| K | median s | spread s | × K = 1000 |",
        "|---|---|---|---|",
    ]
    first = 0.0
    for k in (1000, 3000):
        magnitude = np.abs(correlation_matrix(run.weights.gather(np.arange(n_epochs), run.probe_index[:k])))
        taken = in_turn(3, cluster=lambda: cluster(magnitude, 10))["cluster"]  # noqa: B023 (called at once)
        first = first or statistics.median(taken)
        lines.append(row(str(k), taken, first))
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
