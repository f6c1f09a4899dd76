"""`trajkit verify`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import trajkit

from .options import json_option, quiet_option, results_option, run_argument
from .output import echo, echo_json, progress, size

if TYPE_CHECKING:
    from trajkit.store.verify import Verification


@click.command()
@run_argument
@click.option("--fast", is_flag=True, help="Read all metadata, and compare the lengths of all objects.")
@click.option(
    "--sampled",
    is_flag=True,
    help="Hash the first and the last epoch and a tenth of the other objects too.  [default]",
)
@click.option("--full", is_flag=True, help="Hash every object.")
@results_option
@quiet_option
@json_option
def verify(
    run: str | Path, fast: bool, sampled: bool, full: bool, results: str | None, quiet: bool, as_json: bool
) -> None:
    """Look for damage in RUN: objects that are missing, truncated, flipped, swapped or emptied.

    Nothing is changed, and a training may be recording. The exit code is 0 where all is sound, 1 where something is
    damaged, 2 where RUN could not be looked at: then the error is on stderr and stdout is empty.

    \b
    Example:
      trajkit verify data/digits --full
    """
    if fast + sampled + full > 1:
        raise click.UsageError("--fast, --sampled and --full are three levels; choose one.")
    with progress("verifying", quiet) as report:
        found = trajkit.verify(run, "fast" if fast else "full" if full else "sampled", report, results)
    if as_json:
        damages = [{**vars(damage), "text": str(damage)} for damage in found.damages]
        echo_json({**vars(found), "run": str(found.run), "sound": found.sound, "damages": damages})
    else:
        _echo(found)
    sys.exit(0 if found.sound else 1)


def _echo(found: Verification) -> None:
    for damage in found.damages:
        echo(str(damage))
    for note in found.notes:
        echo(f"note: {note}")
    if found.bad_epochs:
        echo(f"marked as bad: epoch {', '.join(map(str, found.bad_epochs))}")
    if found.leftovers:
        echo(f"left of an interrupted recording or fit, and harmless: {len(found.leftovers)} objects")
    hashed = f"{found.hashed} of {found.objects} objects hashed, {size(found.hashed_bytes)} in {found.elapsed_s:.2f} s"
    verdict = "sound" if found.sound else f"{len(found.damages)} damaged"
    echo(f"{found.run}: {found.epochs} epochs, {hashed}: {verdict}")
