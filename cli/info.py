"""`trajkit info`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trajkit

from .options import json_option, run_argument
from .output import echo_json, echo_table, number, size

if TYPE_CHECKING:
    from trajkit import Run


@click.command()
@run_argument
@json_option
def info(run: str | Path, as_json: bool) -> None:
    """Show what RUN holds: tensors, epochs, metrics, size on disk, and fits with their variance explained.

    \b
    Example:
      trajkit info data/digits
    """
    description = describe(trajkit.open_run(run))
    if as_json:
        echo_json(description)
    else:
        _echo(description)


def describe(run: Run) -> dict[str, Any]:
    """Everything that `info` shows, as plain values."""
    fits = {name: run.fit(name) for name in run.fits}
    return {
        "run": str(run.path),
        "weights": run.layout.n_weights,
        "size_bytes": run.size_bytes,
        "epoch_bytes": run.epoch_bytes,
        "epochs": run.epochs.tolist(),
        "bad_epochs": list(run.bad_epochs),
        "metrics": {str(epoch): metrics for epoch, metrics in run.metrics.items()},
        "tensors": run.layout.to_json(),
        "fits": {
            name: {
                "modes": fit.n_modes,
                "epochs": [int(fit.epochs[0]), int(fit.epochs[-1]), len(fit.epochs)],
                "settings": dict(fit.settings),
                "variance_explained": fit.quality.variance_explained,
                "variance_explained_by_tensor": {
                    tensor: quality.variance_explained for tensor, quality in fit.quality_by_tensor.items()
                },
            }
            for name, fit in fits.items()
        },
        "evaluations": [evaluation.to_json() for evaluation in run.evaluations],
    }


def _echo(run: dict[str, Any]) -> None:
    epochs = run["epochs"]
    click.echo(
        f"{run['run']}: {len(epochs)} epochs ({epochs[0]} to {epochs[-1]}) of {run['weights']:,} weights,"
        f" {size(run['size_bytes'])} on disk, {size(run['epoch_bytes'])} an epoch\n"
    )
    if run["bad_epochs"]:
        click.echo(f"bad, see trajkit verify: epoch {', '.join(map(str, run['bad_epochs']))}\n")
    fits = run["fits"]
    rows = [
        [
            ", ".join([tensor["name"], *tensor["aliases"]]),
            "×".join(map(str, tensor["shape"])) or "scalar",
            tensor["dtype"],
            tensor["kind"] if tensor["trainable"] or tensor["kind"] == "buffer" else "frozen",
            *(number(fit["variance_explained_by_tensor"].get(tensor["name"])) for fit in fits.values()),
        ]
        for tensor in run["tensors"]
    ]
    if fits:
        total = [number(fit["variance_explained"]) for fit in fits.values()]
        rows.append(["variance explained, all weights", "", "", "", *total])
    echo_table(["tensor", "shape", "dtype", "kind", *(f"fit {name}" for name in fits)], rows)
    _echo_metrics(run["metrics"])
    for evaluation in run["evaluations"]:
        fit = evaluation["fit"] or "recorded weights alone"
        click.echo(f"\nevaluated {len(evaluation['epochs'])} epochs with {evaluation['function']}, fit: {fit}")


def _echo_metrics(metrics: dict[str, dict[str, float]], shown: int = 10) -> None:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names:
        return
    click.echo("")
    rows = [[epoch, *(number(values.get(name)) for name in names)] for epoch, values in metrics.items()]
    echo_table(["epoch", *names], rows[-shown:])
    if len(rows) > shown:
        click.echo(f"({len(rows) - shown} earlier epochs: trajkit info --json)")
