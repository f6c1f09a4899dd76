"""`trajkit demo`"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import json_option, quiet_option
from .output import echo, echo_json, echo_table, number, progress, size

if TYPE_CHECKING:
    from trajkit.demo import DemoResult


@click.command()
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the run in DIR, which must not exist."
)
@quiet_option
@json_option
def demo(keep: Path | None, quiet: bool, as_json: bool) -> None:
    """Train a small CNN on handwritten digits, record it, fit 10 modes, and compare: under a minute, offline.

    \b
    Example:
      trajkit demo --keep /tmp/trajkit-demo
    """
    if keep is not None and keep.exists():
        raise click.ClickException(f"{keep}: exists already; choose a folder that does not exist")
    with tempfile.TemporaryDirectory() as temporary, progress("training epochs", quiet) as report:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        module = importlib.import_module("trajkit.demo")  # torch: only where it is used
        result = module.run_demo(folder / "digits", progress=report)
    if as_json:
        echo_json({**vars(result), "path": str(result.path), "epochs": [vars(line) for line in result.epochs]})
    else:
        _echo(result)
        if keep is not None:
            echo()
            echo(f"look at the run with: trajkit info {result.path}")


def _echo(result: DemoResult) -> None:
    rows = [
        [str(line.epoch), *map(number, (line.recorded_accuracy, line.cmd_accuracy, line.error_relative_to_motion))]
        for line in result.epochs
    ]
    echo_table(["epoch", "recorded accuracy", "CMD accuracy", "error / motion"], rows)
    echo()
    rows = [
        ["modes", str(result.modes)],
        ["variance explained", number(result.variance_explained)],
        ["archive size", f"{size(result.archive_bytes)} ({size(result.weights_bytes)} of float32 weights)"],
        *([f"seconds to {stage}", f"{elapsed:.2f}"] for stage, elapsed in result.seconds.items()),
    ]
    echo_table(None, rows)
