"""What commands print: the result on stdout, as a table or as JSON; progress on stderr."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trajkit.sizes import size as size

Report = Callable[[int, int], None]


def echo_json(document: Any, indent: int | None = 2) -> None:
    """Print a document as standard JSON, on one line without `indent`; numbers that are not finite become strings."""
    click.echo(json.dumps(_finite(document), indent=indent, allow_nan=False))


def echo_table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others, numbers, to the right."""
    lines = [*([header] if header else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        click.echo("  ".join(cells).rstrip())


def number(value: float | None) -> str:
    """A number with four significant digits, a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def talk(logger: logging.Logger) -> None:
    """Show what the library has to say, on stderr, until the command ends."""
    handler, level = _Talk(), logger.level
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(end)


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Report | None]:
    """A callback for done and total: a bar on a terminal, a line for each tenth elsewhere, None when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
    else:
        yield _lines(what)


def _lines(what: str) -> Report:
    last_tenth = 0

    def report(done: int, total: int) -> None:
        nonlocal last_tenth
        tenth = 10 * done // total
        if tenth > last_tenth:
            last_tenth = tenth
            click.echo(f"{what}: {done} of {total}", err=True)

    return report


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
