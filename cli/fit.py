"""`trajkit fit`"""

from __future__ import annotations

import time
from pathlib import Path

import click

import trajkit

from .options import epochs_option, json_option, quiet_option, run_argument
from .output import echo_json, echo_table, number, progress


@click.command()
@run_argument
@click.option("--modes", type=click.IntRange(min=1), help="M, the number of modes.  [default: 10]")
@click.option("--cut", type=float, help="Instead of --modes: cut the cluster tree at its largest distance / CUT.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="K, how many weights the clusters are found on.",
)
@click.option(
    "--sampling", type=click.Choice(["balanced", "uniform", "variance"]), default="balanced", show_default=True
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sampling.")
@epochs_option
@click.option("--name", help="Of the fit in the run.  [default: modes10 or the like]")
@quiet_option
@json_option
def fit(
    run: Path,
    modes: int | None,
    cut: float | None,
    samples: int,
    sampling: str,
    seed: int,
    epochs: list[int] | None,
    name: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fit CMD to RUN and save the fit inside it.

    \b
    Example:
      trajkit fit data/digits --modes 10
    """
    if modes is not None and cut is not None:
        raise click.UsageError("--modes and --cut exclude each other; give one")
    opened = trajkit.open_run(run)
    began = time.perf_counter()
    with progress("fitting weights", quiet) as report:
        fitted = trajkit.fit(
            opened,
            modes=trajkit.DistanceCut(cut) if cut is not None else modes or 10,
            samples=samples,
            sampling=sampling,  # type: ignore[arg-type]  # click has checked the choice
            seed=seed,
            epochs=epochs,
            name=name,
            progress=report,
        )
    elapsed_s = time.perf_counter() - began
    if as_json:
        echo_json(
            {
                "run": str(run),
                "fit": fitted.name,
                "modes": fitted.n_modes,
                "epochs": fitted.epochs.tolist(),
                "weights": fitted.quality.weights,
                "variance_explained": fitted.quality.variance_explained,
                "settings": dict(fitted.settings),
                "mode_sizes": [part.weights for part in fitted.quality_by_mode],
                "elapsed_s": elapsed_s,
            }
        )
        return
    rows = [
        [str(mode), str(index), str(part.weights), number(part.variance_explained)]
        for mode, (index, part) in enumerate(zip(fitted.reference_index.tolist(), fitted.quality_by_mode, strict=True))
    ]
    echo_table(["mode", "reference weight", "weights", "variance explained"], rows)
    fewer = f" ({modes} asked for, the sample has no more clusters)" if modes and fitted.n_modes < modes else ""
    click.echo(
        f"\nfit '{fitted.name}': {fitted.n_modes} modes{fewer}, {len(fitted.epochs)} epochs,"
        f" {number(fitted.quality.variance_explained)} of the variance explained, {elapsed_s:.2f} s"
    )
