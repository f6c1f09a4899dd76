"""The entry point: `trajkit COMMAND …`. Errors that trajkit raises on purpose are one line and exit code 1."""

from __future__ import annotations

from typing import Any

import click

from trajkit.errors import TrajkitError

from .check import check
from .demo import demo
from .evaluate import evaluate
from .export import export
from .fit import fit
from .info import info
from .online import online
from .reconstruct import reconstruct
from .record import record
from .repair import repair
from .verify import verify


class _Commands(click.Group):
    """A group that turns errors into one clear line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrajkitError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # who reads has seen enough; click ends quietly
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}; nothing recorded is lost") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trajkit")
def main() -> None:
    """Record the weights of every epoch of a training, and decompose their trajectories into correlated modes.

    \b
    Example:
      trajkit demo
      trajkit fit data/digits --modes 10
    """


for _command in (record, fit, online, reconstruct, export, evaluate, info, check, verify, repair, demo):
    main.add_command(_command)
