"""`trajkit check`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import trajkit

from .options import epochs_option, json_option, quiet_option, run_argument
from .output import echo, echo_json, echo_table, number, progress

if TYPE_CHECKING:
    from trajkit.health.report import HealthReport

SHOWN = 10


@click.command()
@run_argument
@epochs_option
@click.option("--fast", is_flag=True, help="Judge by labels, commit records and probe, without reading the weights.")
@quiet_option
@json_option
@click.pass_context
def check(ctx: click.Context, /, run: Path, epochs: list[int] | None, fast: bool, quiet: bool, as_json: bool) -> None:
    """Look for faults in the content of RUN: epochs and tensors that are not what a training leaves behind.

    Duplicate, missing, out-of-order and outlying epochs; two trainings one after the other; tensors that repeat
    themselves, never change, explode, hold NaN, or are the stubs of ZeRO-3. The exit code is 0 where nothing is
    suspicious, 1 where something is, 2 where RUN could not be looked at.

    \b
    Example:
      trajkit check data/digits
    """
    with progress("checking values", quiet) as report:
        health = trajkit.check(run, epochs, report, fast=fast)
    if as_json:
        echo_json(health.to_json())
    else:
        _echo(health)
    ctx.exit(0 if health.healthy else 1)


def _echo(health: HealthReport) -> None:
    for finding in health.findings:
        echo(f"{finding.kind}: {finding.text}")
    for note in health.notes:
        echo(f"note: {note.text}")
    if health.unchanged:
        _echo_unchanged(health.epochs[1:], health.unchanged)
    found = f"{len(health.findings)} suspicious" if health.findings else "nothing suspicious"
    epochs = f"{len(health.epochs)} epochs ({health.epochs[0]} to {health.epochs[-1]})"
    echo(f"{health.path}: {epochs}, {found}")


def _echo_unchanged(epochs: tuple[int, ...], shares: tuple[float, ...]) -> None:
    """The epochs that have most of their weights from the one before."""
    most = sorted(zip(shares, epochs, strict=True), reverse=True)[:SHOWN]
    echo_table(["epoch", "share of weights unchanged"], [[str(epoch), number(share)] for share, epoch in most])
    if len(shares) > SHOWN:
        echo(f"({len(shares) - SHOWN} epochs with less: trajkit check --json)")
    echo()
