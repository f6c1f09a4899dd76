"""What commands print: the result on stdout, as a table or as JSON; progress and warnings on stderr.

All that a command prints passes `echo`, so that no character of a name is a command to the terminal.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trajkit.advice import TrajkitWarning
from trajkit.sizes import size as size

Report = Callable[[int, int], None]

NOTHING = "–"
"""Cell of a table that has no value."""


def printable(text: str) -> str:
    """Return text as one line: control, bidirectional and other invisible characters as escapes such as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def echo(line: str = "", err: bool = False) -> None:
    """Print one line on stdout or stderr, `printable`; characters that the stream cannot show become escapes, too."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=err)


def echo_json(document: Any, indent: int | None = 2) -> None:
    """Print a document as standard JSON, on one line without `indent`; numbers that are not finite become strings."""
    text = json.dumps(_finite(document), indent=indent, allow_nan=False, ensure_ascii=True)
    click.echo(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves in names


def echo_table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others, numbers, to the right."""
    lines = [[printable(cell) for cell in line] for line in ([header] if header else []) + [*rows]]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padding = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        first, *others = (f"{space}{cell}" for cell, space in zip(line, ["", *padding[1:]], strict=True))
        echo("  ".join([first + padding[0], *others]).rstrip())


def number(value: float | None) -> str:
    """Return a number with four significant digits, a dash for none."""
    return NOTHING if value is None else f"{value:.4g}"


def talk(logger: logging.Logger) -> None:
    """Show all that the library logs, on stderr, until the command ends."""
    logger.setLevel(logging.INFO)


@contextmanager
def speaking() -> Iterator[None]:
    """Show warnings, and what the library logs from WARNING on, as lines on stderr; leave no handler behind."""
    logger, handler = logging.getLogger("trajkit"), _Talk()
    level = logger.level
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            echo(f"Warning: {message}", err=True)

    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TrajkitWarning)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        echo(record.getMessage(), err=True)


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
            echo(f"{what}: {done} of {total}", err=True)

    return report


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
