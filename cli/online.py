"""`trajkit online`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

import trajkit
from trajkit.errors import InputError

from .fit import echo_fit
from .options import (
    json_option,
    modes_option,
    quiet_option,
    reference_options,
    results_option,
    run_argument,
    sample_options,
)
from .output import echo, progress


@click.command()
@run_argument
@click.option("--warmup", type=click.IntRange(min=2), default=20, show_default=True, help="F, the first epochs.")
@modes_option
@sample_options
@reference_options
@click.option(
    "--reassign",
    metavar="K",
    type=click.IntRange(min=1),
    default=1,
    help="A weight's mode is the best one so far of its K best in the warm-up.  [default: that of the warm-up]",
)
@click.option(
    "--decay",
    type=float,
    default=1.0,
    show_default=True,
    help="Weight of an epoch relative to the next recorded one, after the warm-up, such as 0.9.",
)
@click.option("--name", help="Of the fit in the run.  [default: online10 or the like]")
@click.option(
    "--memory", metavar="BYTES", help="What the fit may use, such as 2GiB.  [default: a quarter of what is free]"
)
@results_option
@quiet_option
@json_option
def online(
    run: str | Path,
    warmup: int,
    modes: str | int | None,
    results: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Save in RUN what `trajkit.OnlineCMD` would have been beside this training.

    The references and modes come from the first epochs, the warm-up; the weights modelled at a later epoch follow from
    all epochs up to that one. Nothing else is stored: `evaluate`, `reconstruct` and `export` model them as they read
    the run, `evaluate` in one pass.

    \b
    Example:
      trajkit online data/digits --warmup 20
      trajkit evaluate data/digits --fit online10 --with trajkit.demo:test_accuracy
    """
    began = time.perf_counter()
    opened = trajkit.open_run(run, results)
    sound = opened.epochs[opened.rows_of(None)]
    if len(sound) <= warmup:
        raise InputError(
            f"{run}: {len(sound)} epochs, expected more than the warm-up's {warmup}; give a smaller --warmup"
        )
    with progress("fitting weights", quiet) as report:
        fitted = trajkit.fit(
            opened,
            modes=modes or 10,
            epochs=sound[:warmup],
            progress=report,
            online=True,
            **settings,
        )
    echo_fit(run, fitted, time.perf_counter() - began, as_json)
    if not as_json:
        echo(f"epochs {sound[warmup]} to {sound[-1]} follow: trajkit evaluate {run} --fit {fitted.name} --with …")
