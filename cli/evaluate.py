"""`trajkit evaluate`"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import trajkit

from .options import epochs_option, fit_option, json_option, quiet_option, results_option, run_argument
from .output import echo_json, echo_table, number, progress


@click.command()
@run_argument
@fit_option
@click.option("--with", "function", metavar="MODULE:FUNCTION", required=True, help="What to call for each state dict.")
@epochs_option
@results_option
@quiet_option
@json_option
def evaluate(
    run: str | Path,
    fit_name: str | None,
    function: str,
    epochs: list[int] | None,
    results: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Call your function with the recorded weights of each epoch, and with those modelled by a fit.

    FUNCTION takes a state dict and returns a number or a dict of numbers. The table is kept in the run.

    \b
    Example:
      trajkit evaluate data/digits --fit modes10 --epochs 35:40 --with trajkit.demo:test_accuracy
    """
    called = load_function(function)
    try:
        with progress("evaluating", quiet) as report:
            evaluation = trajkit.evaluate(run, called, fit_name, epochs, report, results)
    except (trajkit.TrajkitError, OSError):
        raise
    except Exception as error:  # whatever the user's function raises
        what = " ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
        raise click.ClickException(f"{function} raised {type(error).__name__}: {what}") from error
    if as_json:
        echo_json({"run": str(run), **evaluation.to_json()})
        return
    metrics = list(dict.fromkeys(metric for row in evaluation.epochs for metric in row.recorded))
    sources = ["recorded"] if fit_name is None else ["recorded", fit_name]
    rows = [
        [
            str(row.epoch),
            *(
                number(scores.get(metric))
                for metric in metrics
                for scores in ([row.recorded] if row.modelled is None else [row.recorded, row.modelled])
            ),
        ]
        for row in evaluation.epochs
    ]
    echo_table(["epoch", *(f"{metric} {source}" for metric in metrics for source in sources)], rows)


def load_function(name: str) -> Callable[[Any], Any]:
    """The function at ``package.module:function``; modules beside the user's work are found."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise click.BadParameter(f"{name!r} is not MODULE:FUNCTION; write it like mypackage.mymodule:accuracy")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
    except Exception as error:  # importing runs the user's module
        raise click.BadParameter(f"{name!r} cannot be loaded ({error}); check module and function") from error
    if not callable(function):
        raise click.BadParameter(f"{name!r} is a {type(function).__name__}, not a function; name a function")
    return function  # type: ignore[no-any-return]
