"""`trajkit repair`"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

import trajkit

from .options import json_option, quiet_option, run_argument
from .output import echo, echo_json, progress

if TYPE_CHECKING:
    from trajkit.store.repair import Repair


@click.command()
@run_argument
@quiet_option
@json_option
def repair(run: str | Path, quiet: bool, as_json: bool) -> None:
    """Make a damaged RUN usable again. Nothing is deleted: what is damaged is moved to RUN/epoch/aside.

    Metadata and whatever follows from other objects is made again. Epochs that are damaged are marked as bad, and
    fits and evaluations leave them out; record the checkpoint of one again to heal it. The exit code is 0 where all is
    sound then, 1 where epochs are bad or something else remains, 2 where RUN could not be repaired.

    \b
    Example:
      trajkit repair runs/first
      trajkit record runs/first checkpoints/epoch12.pt
    """
    with progress("verifying", quiet) as report:
        done = trajkit.repair(run, progress=report)
    if as_json:
        damages = [{**vars(damage), "text": str(damage)} for damage in done.damages]
        echo_json({**vars(done), "run": str(done.run), "damages": damages})
    else:
        _echo(done)
    sys.exit(1 if done.damages else 0)


def _echo(done: Repair) -> None:
    for action in done.actions:
        echo(action)
    for damage in done.damages:
        if damage.row is None:
            echo(f"not cured: {damage}")
    healable = [epoch for epoch in done.bad_epochs if epoch not in done.lost_epochs]
    if healable:
        echo(f"epoch {_spelled(healable)}: bad; its checkpoint heals it (trajkit record {done.run} …), or a copy")
    if done.lost_epochs:
        echo(f"epoch {_spelled(done.lost_epochs)}: bad, its commit record is lost; restore it from a copy")
    left = "usable" if len(done.bad_epochs) < done.epochs else "no epoch is sound"
    verdict = left if done.damages else "sound"
    echo(f"{done.run}: {verdict}" if done.actions else f"{done.run}: {verdict}, nothing to do")


def _spelled(epochs: Iterable[int]) -> str:
    return ", ".join(map(str, epochs))
