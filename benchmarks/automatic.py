"""The number of modes that `modes="auto"` chooses, against every number up to 30, on all recorded runs at hand."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import get_args

from fit import fit_and_remove
from measure import copy_of, in_turn
from trainings import one_of_each

import trajkit
from trajkit.kernels.curve import MOST
from trajkit.kernels.lines import Kind

DIGITS = Path(__file__).parents[1] / "data" / "digits"
ROUNDS = 5


def automatic(cache: Path) -> list[str]:
    """A row for each run and kind of references."""
    runs = [DIGITS, cache / "mnist", *one_of_each(cache)]
    return [
        f'## `modes="auto"` against every number of modes up to {MOST}',
        "",
        "In brackets the share of the variance that the fit explains; times as multiples of a fit with the number that"
        f" was chosen and of one with the best number, medians of {ROUNDS}.",
        "",
        '| run | references | "auto" | best | lacks | × chosen | × best |',
        "|---|---|---|---|---|---|---|",
        *(row(run, kind) for run in runs for kind in get_args(Kind)),
    ]


def row(path: Path, kind: Kind) -> str:
    """What "auto" and every number of modes explain of a run, and what they take."""
    with copy_of(path) as run:
        found = trajkit.fit(run, modes="auto", references=kind, name="auto")
        chosen, explained = found.n_modes, found.quality.variance_explained
        tried = {
            trajkit.fit(run, modes=modes, references=kind, name=f"m{modes}").quality.variance_explained: modes
            for modes in range(1, MOST + 1)
        }
        best = max(tried)
        actions = {
            modes: partial(fit_and_remove, run, modes=modes, references=kind) for modes in ("auto", chosen, tried[best])
        }
        seconds = {modes: statistics.median(taken) for modes, taken in in_turn(ROUNDS, actions).items()}
    return (
        f"| {path.name} | {kind} | {chosen} ({explained:.4f}) | {tried[best]} ({best:.4f}) | {best - explained:.4f}"
        f" | {seconds['auto'] / seconds[chosen]:.2f} | {seconds['auto'] / seconds[tried[best]]:.2f} |"
    )
