"""The options that commands share, each once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Command = Callable[..., Any]

MOST_EPOCHS = 10_000_000
"""Epochs that one option can name."""


class RunPlace(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """The path of a run, or its URL in an object store."""

    name = "run"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:  # noqa: ARG002
        """A URL as it is, a path as a path."""
        return value if "://" in str(value) else Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Folders."""
        return click.Path(file_okay=False).shell_complete(ctx, param, incomplete)


run_argument = click.argument("run", metavar="RUN", type=RunPlace())
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
results_option = click.option(
    "--results",
    metavar="FOLDER",
    envvar="TRAJKIT_RESULTS",
    show_envvar=True,
    help="Folder or URL beside RUN in which its fits and evaluations are kept, for a RUN that can only be read.",
)
fit_option = click.option("--fit", "fit_name", metavar="NAME", help="A fit saved in the run.")


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options, in this order, as one decorator."""
    return lambda command: functools.reduce(lambda found, option: option(found), reversed(options), command)


sample_options = _together(
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=1000,
        show_default=True,
        help="K, how many weights the clusters are found on.",
    ),
    click.option(
        "--sampling",
        type=click.Choice(["balanced", "uniform", "variance"]),
        default="balanced",
        show_default=True,
        help="How these are drawn.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sampling."),
)
reference_options = _together(
    click.option(
        "--references",
        type=click.Choice(["weight", "centroid", "principal"]),
        default="weight",
        show_default=True,
        help="What a mode's weights are fitted to: one weight, as in the paper, the mean or the principal trajectory of"
        " many.",
    ),
    click.option(
        "--weighting",
        type=click.Choice(["equal", "variance"]),
        help="What each of these many counts for.  [default: equal for centroid, variance for principal]",
    ),
    click.option(
        "--members",
        metavar="SHARE",
        type=float,
        help="Of at most which share of the weights, such as 0.05, these many are.  [default: all in the probe]",
    ),
)


class Modes(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """M, ``auto``, or a share of the variance such as ``95%``."""

    name = "modes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """Parse one option's value; the library knows which texts there are."""
        try:
            number = int(value)
        except ValueError:
            return value
        if number < 1:
            self.fail(f"{number} is not at least 1", param, ctx)
        return number


modes_option = click.option(
    "--modes",
    metavar="M",
    type=Modes(),
    help="The number of modes; auto, by held-out weights; or 95%, the fewest that explain so much of these."
    "  [default: 10]",
)


class EpochRange(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Epochs such as ``3``, ``0,5,9`` or ``10:40:5`` (from 10 up to, not including, 40)."""

    name = "epochs"

    def convert(self, value: str | list[int], param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse one option's value."""
        if not isinstance(value, str):
            return value
        try:
            parts = [_named(part) for part in value.split(",")]
            n_epochs = sum(map(len, parts)) if all(parts) else 0
        except (ValueError, TypeError, OverflowError):
            n_epochs = 0
        if not 0 < n_epochs <= MOST_EPOCHS:
            what = f"more than {MOST_EPOCHS:,}" if n_epochs else "no"
            self.fail(f"{value!r} names {what} epochs; write 3, or 0,5,9, or 10:40, or 10:40:5", param, ctx)
        return [*itertools.chain.from_iterable(parts)]


def _named(part: str) -> Sequence[int]:
    """Return the epochs of ``3`` or ``10:40:5``."""
    numbers = [int(number) for number in part.split(":")]
    return numbers if len(numbers) == 1 else range(*numbers)


epochs_option = click.option(
    "--epochs",
    type=EpochRange(),
    help="Which epochs: 3, or 0,5,9, or 10:40 or 10:40:5 (40 not included). Default: all.",
)
