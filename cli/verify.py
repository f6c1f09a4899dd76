"""`trajkit verify`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

import trajkit

from .options import json_option, quiet_option, run_argument
from .output import echo_json, progress, size

if TYPE_CHECKING:
    from trajkit.store.verify import Verification


@click.command()
@run_argument
@click.option("--fast", "level", flag_value="fast", help="Read all metadata, and compare the lengths of all objects.")
@click.option(
    "--sampled",
    "level",
    flag_value="sampled",
    default="sampled",
    help="Hash the first and the last epoch and a tenth of the other objects too.  [default]",
)
@click.option("--full", "level", flag_value="full", help="Hash every object.")
@quiet_option
@json_option
def verify(run: str | Path, level: Literal["fast", "sampled", "full"], quiet: bool, as_json: bool) -> None:
    """Look for damage in RUN: objects that are missing, truncated, flipped, swapped or emptied.

    Nothing is changed, and a training may be recording. The exit code is 0 where all is sound, 1 where something is
    damaged.

    \b
    Example:
      trajkit verify data/digits --full
    """
    with progress("verifying", quiet) as report:
        found = trajkit.verify(run, level, progress=report)
    if as_json:
        damages = [{**vars(damage), "text": str(damage)} for damage in found.damages]
        echo_json({**vars(found), "run": str(found.run), "sound": found.sound, "damages": damages})
    else:
        _echo(found)
    sys.exit(0 if found.sound else 1)


def _echo(found: Verification) -> None:
    for damage in found.damages:
        click.echo(str(damage))
    if found.bad_epochs:
        click.echo(f"marked as bad: epoch {', '.join(map(str, found.bad_epochs))}")
    if found.leftovers:
        click.echo(f"left of an interrupted recording or fit, and harmless: {len(found.leftovers)} objects")
    hashed = f"{found.hashed} of {found.objects} objects hashed, {size(found.hashed_bytes)} in {found.elapsed_s:.2f} s"
    verdict = "sound" if found.sound else f"{len(found.damages)} damaged"
    click.echo(f"{found.run}: {found.epochs} epochs, {hashed}: {verdict}")
