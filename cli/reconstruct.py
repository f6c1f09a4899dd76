"""`trajkit reconstruct`"""

from __future__ import annotations

from pathlib import Path

import click

import trajkit

from .options import fit_option, json_option, results_option, run_argument
from .output import echo, echo_json, size


@click.command()
@run_argument
@fit_option
@click.option("--epoch", type=int, required=True, help="A recorded epoch.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write: .safetensors or .pt."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@results_option
@json_option
def reconstruct(
    run: str | Path,
    fit_name: str | None,
    epoch: int,
    output: Path,
    force: bool,
    results: str | None,
    as_json: bool,
) -> None:
    """Write the weights of an epoch as a checkpoint file: modelled by a fit, or as recorded without --fit.

    \b
    Example:
      trajkit reconstruct data/digits --fit modes10 --epoch 39 -o cmd.safetensors
    """
    opened = trajkit.open_run(run, results)
    written = trajkit.write_checkpoint(opened, epoch, output, fit=fit_name, overwrite=force)
    n_bytes = written.stat().st_size
    if as_json:
        covers = {} if fit_name is None else {"fit_covers_epoch": opened.fit(fit_name).covers(epoch)}
        echo_json({"run": str(run), "fit": fit_name, "epoch": epoch, **covers, "file": str(written), "bytes": n_bytes})
    else:
        source = "recorded" if fit_name is None else f"modelled by '{fit_name}'"
        echo(f"{written}: epoch {epoch} {source}, {size(n_bytes)}")
