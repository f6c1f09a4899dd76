"""`trajkit info`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trajkit
from trajkit.errors import DamagedRunError

from .fit import LAST_ERROR, counted_components, qualities
from .options import json_option, results_option, run_argument
from .output import NOTHING, echo, echo_json, echo_table, number, size

if TYPE_CHECKING:
    from trajkit import Decomposition, Run


@click.command()
@run_argument
@click.option("--planned", type=click.IntRange(min=1), metavar="N", help="Say what N epochs in all take on the disk.")
@results_option
@json_option
def info(run: str | Path, planned: int | None, results: str | None, as_json: bool) -> None:
    """Show what RUN holds: tensors, epochs, metrics, size on disk, and fits with their variance explained.

    \b
    Example:
      trajkit info data/digits
      trajkit info data/digits --planned 100
    """
    description = describe(trajkit.open_run(run, results), planned)
    if as_json:
        echo_json(description)
    else:
        _echo(description)


def describe(run: Run, planned: int | None = None) -> dict[str, Any]:
    """Everything that `info` shows, as plain values; with a forecast for `planned` epochs, or of those there are."""
    forecast = run.forecast(planned)
    fits: dict[str, Decomposition] = {}
    refused: dict[str, str] = {}
    for name in run.fits:
        try:
            fits[name] = run.fit(name)
        except DamagedRunError as error:
            refused[f"fits/{name}"] = str(error)
    evaluations = []
    for place, evaluation in run.results.looked_at_evaluations():
        if isinstance(evaluation, DamagedRunError):
            refused[f"evaluations/{place}"] = str(evaluation)
        else:
            evaluations.append(evaluation)
    return {
        "run": str(run.path),
        "weights": run.layout.n_weights,
        "size_bytes": run.size_bytes,
        "epoch_bytes": forecast.epoch_bytes,
        "epochs": run.epochs.tolist(),
        "steps": None if run.steps is None else run.steps.tolist(),
        "forecast": {
            **vars(forecast),
            "missing_bytes": forecast.missing_bytes,
            "total_bytes": forecast.total_bytes,
            "text": str(forecast),
        },
        "bad_epochs": list(run.bad_epochs),
        "metrics": {str(epoch): metrics for epoch, metrics in run.metrics.items()},
        "tensors": run.layout.to_json(),
        "fits": {
            name: {
                "modes": fit.n_modes,
                "epochs": [int(fit.epochs[0]), int(fit.epochs[-1]), len(fit.epochs)],
                "settings": dict(fit.settings),
                "origin": None if fit.origin is None else fit.origin.to_json(),
                **qualities(fit),
            }
            for name, fit in fits.items()
        },
        "evaluations": [evaluation.to_json() for evaluation in evaluations],
        "refused": refused,
    }


def _echo(run: dict[str, Any]) -> None:
    epochs, steps, forecast = run["epochs"], run["steps"], run["forecast"]
    labels = f"{epochs[0]} to {epochs[-1]}" + (f", steps {steps[0]} to {steps[-1]}" if steps else "")
    seconds = "" if forecast["epoch_s"] is None else f", written in {number(forecast['epoch_s'])} s"
    echo(
        f"{run['run']}: {len(epochs)} epochs ({labels}) of {run['weights']:,} weights,"
        f" {size(run['size_bytes'])} on disk, {size(run['epoch_bytes'])} an epoch{seconds}"
    )
    echo()
    if forecast["epochs"] > len(epochs):
        echo(f"planned: {forecast['text']}")
        echo()
    if run["bad_epochs"]:
        echo(f"bad, see trajkit verify: epoch {', '.join(map(str, run['bad_epochs']))}")
        echo()
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
        of_all = {
            "variance explained, all weights": "variance_explained",
            LAST_ERROR: "last_epoch_error",
            "storage / that of its epochs": "storage_ratio",
        }
        for what, key in of_all.items():
            rows.append([what, "", "", "", *(number(fit[key]) for fit in fits.values())])
        rows.append(["explained by PCA of equal storage", "", "", "", *map(_explained_by_pca, fits.values())])
    echo_table(["tensor", "shape", "dtype", "kind", *(f"fit {name}" for name in fits)], rows)
    if unknown := [name for name, fit in fits.items() if fit["origin"] is None]:
        echo()
        echo(f"origin not recorded, made by an older version: fit {', '.join(unknown)}")
    _echo_metrics(run["metrics"], steps)
    for evaluation in run["evaluations"]:
        fit = evaluation["fit"] or "recorded weights alone"
        origin = "" if "of" in evaluation else " (origin not recorded)"
        echo()
        echo(f"evaluated {len(evaluation['epochs'])} epochs with {evaluation['function']}, fit: {fit}{origin}")
    for why in run["refused"].values():
        echo()
        echo(f"refused: {why}")


def _explained_by_pca(fit: dict[str, Any]) -> str:
    """Return the share, and the number of components, which takes less storage in fits of older versions."""
    if fit["variance_explained_by_pca"] is None:
        return NOTHING
    other = "" if fit["pca_is_of_equal_storage"] else "PCA of "
    share = number(fit["variance_explained_by_pca"]["of_equal_storage"])
    return f"{share} ({other}{counted_components(fit['pca_components'])})"


def _echo_metrics(metrics: dict[str, dict[str, float]], steps: list[int] | None, shown: int = 10) -> None:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names:
        return
    echo()
    labels = (
        [[epoch, str(step)] for epoch, step in zip(metrics, steps, strict=True)] if steps else [[e] for e in metrics]
    )
    rows = [
        [*label, *(number(values.get(name)) for name in names)]
        for label, values in zip(labels, metrics.values(), strict=True)
    ]
    echo_table(["epoch", *(["step"] if steps else []), *names], rows[-shown:])
    if len(rows) > shown:
        echo(f"({len(rows) - shown} earlier epochs: trajkit info --json)")
