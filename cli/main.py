"""The entry point: `trajkit COMMAND …`. Errors that trajkit raises on purpose are one line and exit code 1.

Of the commands that examine a run exit code 1 says what they found, and 2 that they could not look.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from trajkit.errors import TrajkitError, torch_needed

from .check import check
from .demo import demo
from .evaluate import evaluate
from .export import export
from .fit import fit
from .info import info
from .online import online
from .output import echo, printable, speaking
from .reconstruct import reconstruct
from .record import record
from .repair import repair
from .verify import verify

EXAMINING = ("check", "verify", "repair")
COULD_NOT_LOOK = 2
"""Exit code of an examining command that has come to no result; click's usage errors have it, too."""


class _CouldNotLook(click.ClickException):
    """An examining command has come to no result."""

    exit_code = COULD_NOT_LOOK


class _Commands(click.Group):
    """A group that turns errors into one clear line."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _printable_errors():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with speaking(), _printable_errors():
            try:
                with torch_needed("this command"):
                    return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
                raise  # who reads has seen enough of a broken pipe; click ends quietly
            except (TrajkitError, OSError) as error:
                kind = _CouldNotLook if ctx.invoked_subcommand in EXAMINING else click.ClickException
                raise kind(_line_of(error)) from error
            except (Exception, KeyboardInterrupt) as error:
                if ctx.invoked_subcommand not in EXAMINING:
                    raise
                interrupted = isinstance(error, (KeyboardInterrupt, click.Abort))
                for line in ["", "Aborted!"] if interrupted else traceback.format_exc().splitlines():
                    echo(line, err=True)
                ctx.exit(COULD_NOT_LOOK)


def _line_of(error: TrajkitError | OSError) -> str:
    """Return what an error says; one of the operating system names the file, and what is safe."""
    if isinstance(error, TrajkitError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; nothing recorded is lost"


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Make the messages of click's errors `printable`: they name arguments."""
    try:
        yield
    except getattr(click.exceptions, "NoArgsIsHelpError", ()):  # its message is the help
        raise
    except click.ClickException as error:
        vars(error)["message"] = printable(error.message)  # final to a type checker alone
        raise


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
