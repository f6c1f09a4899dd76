"""`trajkit record`"""

from __future__ import annotations

from pathlib import Path

import click

import trajkit

from .options import json_option, quiet_option, run_argument
from .output import echo_json, progress


@click.command()
@run_argument
@click.argument("checkpoints", metavar="CHECKPOINT…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--first-epoch", type=int, help="Number the files from here on, in natural order of their names.")
@click.option(
    "--nonfinite", type=click.Choice(["raise", "record"]), default="raise", help="What to do with NaN weights."
)
@click.option(
    "--no-fsync", is_flag=True, help="Do not wait for the disk: faster, safe from kills, not from power cuts."
)
@quiet_option
@json_option
def record(
    run: str | Path,
    checkpoints: tuple[Path, ...],
    first_epoch: int | None,
    nonfinite: str,
    no_fsync: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Record checkpoint files (.pt, .safetensors) into RUN, which is made if there is none.

    The epoch is the number in each file's name. Epochs that are recorded already are skipped, so the same command
    again brings in what is new. An epoch that `trajkit repair` has marked as bad is healed by its checkpoint.

    \b
    Example:
      trajkit record runs/mnist checkpoints/epoch*.pt
    """
    with progress("recording", quiet) as report:
        done = 0

        def one(_imported: object) -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(done, len(checkpoints))

        imported = trajkit.import_checkpoints(
            run,
            checkpoints,
            first_epoch=first_epoch,
            fsync=not no_fsync,
            nonfinite="record" if nonfinite == "record" else "raise",
            progress=one,
        )
    new = [item for item in imported if item.new]
    if as_json:
        echo_json({"run": str(run), "files": [{**vars(item), "path": str(item.path)} for item in imported]})
    else:
        healed = sum(item.healed for item in imported)
        skipped = len(imported) - len(new) - healed
        click.echo(
            f"{run}: {len(new)} epochs recorded"
            + (f", {healed} healed" if healed else "")
            + (f", {skipped} were there already" if skipped else "")
        )
