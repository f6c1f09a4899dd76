"""`trajkit fit`"""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trajkit

from .options import (
    epochs_option,
    json_option,
    modes_option,
    quiet_option,
    reference_options,
    results_option,
    run_argument,
    sample_options,
)
from .output import echo, echo_json, echo_table, number, progress, talk

if TYPE_CHECKING:
    from trajkit import Decomposition

LAST_ERROR = "last-epoch error / motion"
"""Name of `Quality.last_epoch_error`."""

CHOICES = ("modes", "cut", "samples", "sampling", "seed", "epochs", "references", "weighting", "members")


@click.command()
@run_argument
@modes_option
@click.option("--cut", type=float, help="Instead of --modes: cut the cluster tree at its largest distance / CUT.")
@sample_options
@reference_options
@epochs_option
@click.option("--name", help="Of the fit in the run.  [default: modes10 or the like]")
@click.option("--updatable", is_flag=True, help="Keep what --update needs to read new epochs only.")
@click.option("--update", metavar="NAME", help="Take the epochs recorded since into a saved fit.")
@click.option(
    "--follow", is_flag=True, help="Fit beside a training that records RUN, until it ends, by the name followed."
)
@click.option(
    "--warmup", type=click.IntRange(min=2), default=20, show_default=True, help="Epochs before --follow fits."
)
@click.option("--interval", type=float, default=5.0, show_default=True, help="Seconds between two looks of --follow.")
@click.option(
    "--memory",
    metavar="BYTES",
    help="What the work may use, such as 2GiB; on a cluster, each worker process.  [default: a quarter of what is free,"
    " half of a worker's limit]",
)
@click.option(
    "--scheduler",
    metavar="WHERE",
    help="tcp://host:8786 of a Dask cluster, threads or synchronous.  [default: threads]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")
@results_option
@quiet_option
@json_option
@click.pass_context
def fit(
    ctx: click.Context,
    /,
    run: str | Path,
    name: str | None,
    update: str | None,
    follow: bool,
    warmup: int,
    interval: float,
    results: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit CMD to RUN and save the fit inside it.

    \b
    Example:
      trajkit fit data/digits --modes 10
      trajkit fit runs/mnist --update modes10
    """
    given = _given(ctx)
    _require_compatible(given, update, follow)
    resources = {key: options[key] for key in ("memory", "scheduler")}
    if not quiet:
        talk(logging.getLogger("trajkit"))
    began = time.perf_counter()
    if follow:
        wanted = given | ({"modes"} if "cut" in given else set())
        settings = {key: value for key, value in _choices(options).items() if key in wanted}
        for fitted in trajkit.follow(
            run,
            name or "followed",
            warmup,
            interval,
            **settings,
            **resources,
            device=options["device"],
            results=results,
        ):
            echo_fit(run, fitted, time.perf_counter() - began, as_json, indent=None)
            began = time.perf_counter()
        return
    opened = trajkit.open_run(run, results)
    with progress("fitting weights", quiet) as report:
        if update is not None:
            last = int(opened.fit(update).epochs[-1])
            fitted = trajkit.update(opened, update, report, **resources)
        else:
            fitted = trajkit.fit(
                opened,
                name=name,
                progress=report,
                updatable=options["updatable"],
                device=options["device"],
                **_choices(options),
                **resources,
            )
    if update is not None and fitted.epochs[-1] == last and not as_json:
        echo(f"fit '{update}': nothing was recorded since epoch {last}")
    else:
        echo_fit(run, fitted, time.perf_counter() - began, as_json)


def _given(ctx: click.Context) -> set[str]:
    """Names of the options on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in ctx.params if ctx.get_parameter_source(name) is source}


def _require_compatible(given: set[str], update: str | None, follow: bool) -> None:
    """Raise a usage error for options that exclude each other."""
    if {"modes", "cut"} <= given:
        raise click.UsageError("--modes and --cut exclude each other; give one")
    if update is not None and follow:
        raise click.UsageError("--update and --follow exclude each other; give one")
    if not follow and given & {"warmup", "interval"}:
        raise click.UsageError("--warmup and --interval are for --follow; leave them out")
    if update is not None and (kept := given & {*CHOICES, "name", "updatable"}):
        raise click.UsageError(f"--update keeps the settings of the fit; leave out --{min(kept)}")
    if update is not None and "device" in given:
        raise click.UsageError("--update works on the host; leave out --device")


def _choices(options: dict[str, Any]) -> dict[str, Any]:
    cut = options["cut"]
    return {
        "modes": trajkit.DistanceCut(cut) if cut is not None else options["modes"] or 10,
        **{key: options[key] for key in CHOICES[2:]},
    }


def counted_components(number: int | None) -> str:
    """Return ``1 component`` or ``12 components``."""
    return f"{number} component{'' if number == 1 else 's'}"


def qualities(fitted: Decomposition) -> dict[str, Any]:
    """What is known of how good a fit is, as plain values."""
    pca = dict(zip(("of_equal_storage", "of_one_component_more"), fitted.pca, strict=False))
    tensors = fitted.quality_by_tensor
    return {
        "variance_explained": fitted.quality.variance_explained,
        "variance_explained_by_tensor": {name: part.variance_explained for name, part in tensors.items()},
        "variance_explained_by_mode": [part.variance_explained for part in fitted.quality_by_mode],
        "last_epoch_error": fitted.quality.last_epoch_error,
        "last_epoch_error_by_tensor": {name: part.last_epoch_error for name, part in tensors.items()},
        "last_epoch_error_by_mode": [part.last_epoch_error for part in fitted.quality_by_mode],
        "variance_explained_by_pca": pca or None,
        "pca_components": fitted.pca_components,
        "pca_is_of_equal_storage": fitted.pca_is_of_equal_storage,
        "storage_ratio": fitted.storage_ratio,
        "size_bytes": fitted.size_bytes,
    }


def echo_fit(
    run: str | Path,
    fitted: Decomposition,
    elapsed_s: float,
    as_json: bool,
    indent: int | None = 2,
) -> None:
    """Print a fit that was made now."""
    quality = fitted.quality
    if as_json:
        echo_json(
            {
                "run": str(run),
                "fit": fitted.name,
                "modes": fitted.n_modes,
                "epochs": fitted.epochs.tolist(),
                "weights": quality.weights,
                **qualities(fitted),
                "references": fitted.references,
                "settings": dict(fitted.settings),
                "curve": [{"modes": tried, "variance_explained": score} for tried, score in fitted.curve],
                "mode_sizes": [part.weights for part in fitted.quality_by_mode],
                "reading": fitted.run.archive.reading,
                "elapsed_s": elapsed_s,
            },
            indent,
        )
        return
    functional = fitted.functional
    if fitted.references == "weight":
        what, found = "reference weight", functional.index.tolist()
    else:
        sizes = Counter(functional.mode.tolist())
        what, found = f"{fitted.references} of", [sizes[mode] for mode in range(functional.n_modes)]
    rows = [
        [str(mode), str(value), str(part.weights), number(part.variance_explained), number(part.last_epoch_error)]
        for mode, (value, part) in enumerate(zip(found, fitted.quality_by_mode, strict=True))
    ]
    echo_table(["mode", what, "weights", "variance explained", LAST_ERROR], rows)
    asked = fitted.settings.get("modes")
    short = isinstance(asked, int) and fitted.n_modes < asked
    fewer = f" ({asked} asked for, the sample has no more clusters)" if short else ""
    echo()
    share = quality.variance_explained
    explained = "no weight moves" if share is None else f"{number(share)} of the variance explained"
    epochs = f"{len(fitted.epochs)} epochs"
    echo(f"fit '{fitted.name}': {fitted.n_modes} modes{fewer}, {epochs}, {explained}, {elapsed_s:.2f} s")
    if fitted.pca:
        by_pca, by_one_more = map(number, fitted.pca)
        components = counted_components(fitted.pca_components)
        which = f"equal storage ({components})" if fitted.pca_is_of_equal_storage else components
        echo(f"PCA of {which} explains {by_pca}, with a component more {by_one_more}")
    error, storage = number(quality.last_epoch_error), number(fitted.storage_ratio)
    echo(f"{LAST_ERROR} {error}; takes {storage} of the storage of {epochs}")
    if fitted.curve:
        shown = [
            f"{tried}: {number(score)}{' (chosen)' if tried == fitted.n_modes else ''}"
            for place, (tried, score) in enumerate(fitted.curve)
            if place % 3 == 0 or tried == fitted.n_modes or place == len(fitted.curve) - 1
        ]
        echo(f"explained of held-out weights by so many modes: {', '.join(shown)}")
