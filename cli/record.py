"""`trajkit record`"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trajkit

from .options import json_option, quiet_option, run_argument
from .output import echo, echo_json, progress, talk

if TYPE_CHECKING:
    from trajkit.checkpoints.importing import Imported

COMMAND = "trajkit.command"

WATCHING = {"pattern", "until", "idle", "interval"}
SELECTING = {"key", "include", "exclude", "trainable_only"}
NUMBERING = {"label", "epoch", "first_epoch"}
GIVEN_ONLY = {"epoch", "first_epoch"}
READING = {"nonfinite", "no_fsync", "dry_run", *NUMBERING, *SELECTING}


class _Record(click.Command):
    """A command that leaves all that stands after ``--`` to be run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the command off the arguments."""
        if "--" in args:
            cut = args.index("--")
            ctx.meta[COMMAND] = args[cut + 1 :]
            args = args[:cut]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The three ways."""
        return ["[OPTIONS] RUN (CHECKPOINT… | --watch DIR | -- COMMAND…)"]


class _Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Seconds, from 90, 90s, 10m or 2h."""

    name = "time"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse one option's value."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value))
        if found is None:
            self.fail(f"{value!r} is no time; write 90s, 10m or 2h", param, ctx)
        return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


class _Pattern(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A regular expression with a group."""

    name = "regex"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check one option's value."""
        try:
            n_groups = re.compile(value).groups
        except re.error as error:
            self.fail(f"{value!r} is no regular expression ({error})", param, ctx)
        if n_groups == 0:
            self.fail(f"{value!r} has no group; write one around the number, such as 'epoch_([0-9]+)'", param, ctx)
        return value


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators, the first on top."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command(cls=_Record)
@run_argument
@click.argument("checkpoints", metavar="[CHECKPOINT…]", nargs=-1, type=click.Path(path_type=Path))
@_options(
    click.option(
        "--label", metavar="REGEX", type=_Pattern(), help="Regular expression in the names; its group 1 is the epoch."
    ),
    click.option("--epoch", metavar="N", type=int, help="Epoch of the one checkpoint."),
    click.option(
        "--first-epoch",
        metavar="N",
        type=int,
        help="Number of the first checkpoint; the others follow in natural order of their names.",
    ),
    click.option("--dry-run", is_flag=True, help="List of which checkpoint becomes which epoch; nothing is written."),
)
@_options(
    click.option(
        "--watch", metavar="DIR", type=click.Path(path_type=Path), help="Folder into which a training writes."
    ),
    click.option(
        "--pattern", help="Pattern of names in DIR, such as 'epoch*.pt'.  [default: all that may be checkpoints]"
    ),
    click.option(
        "--until", metavar="EPOCH", type=int, help="Epoch that ends the watch, unless from a best or last file."
    ),
    click.option(
        "--idle", metavar="TIME", type=_Duration(), help="Time without a change that ends the watch: 90s, 10m or 2h."
    ),
    click.option(
        "--interval",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Seconds between two looks.",
    ),
)
@_options(
    click.option("--key", help="Where the weights are in a file (model, nets.generator), or which model of a folder."),
    click.option("--include", multiple=True, metavar="PATTERN", help="Only tensors of such names, as 'layer*.weight'."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="No tensors of such names."),
    click.option("--trainable-only", is_flag=True, help="No buffers, and nothing that is known to be frozen."),
)
@click.option(
    "--nonfinite", type=click.Choice(["raise", "record"]), default="raise", help="What to do with NaN weights."
)
@click.option(
    "--no-fsync", is_flag=True, help="Do not wait for the disk: faster, safe from kills, not from power cuts."
)
@quiet_option
@json_option
@click.pass_context
def record(
    ctx: click.Context,
    /,
    run: str | Path,
    checkpoints: tuple[Path, ...],
    watch: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Record into RUN, which is made if there is none: checkpoints that are there, those that a training writes into
    a folder, or a training itself.

    Checkpoints are .safetensors, .pt, .pth, .pth.tar, .bin and .ckpt files, and folders or indexes of Hugging Face,
    Accelerate and torch.distributed.checkpoint. The epoch is the number after a word such as epoch, step or checkpoint
    in the name, or else what the file says, or else the one number in the name. Which checkpoint becomes which epoch is
    shown before anything is written, and where that is not clear nothing is. A checkpoint whose epoch is recorded
    already has to be the same, so the same command again brings in what is new. An epoch that `trajkit repair` has
    marked as bad is healed by its checkpoint.

    With --watch, a checkpoint is recorded when it is whole, until Ctrl-C, --until or --idle; the exit code is 0, or 1
    where one could not be recorded. A COMMAND finds the run in TRAJKIT_RUN, where trajkit.Recorder(model) looks for it;
    its exit code is given back.

    \b
    Example:
      trajkit record runs/mnist checkpoints/epoch*.pt
      trajkit record runs/mnist --watch checkpoints --idle 10m
      trajkit record runs/mnist -- python train.py
    """
    command: list[str] | None = ctx.meta.get(COMMAND)
    _require_one_way(_given(ctx), checkpoints, watch, command)
    if not quiet:
        talk(logging.getLogger("trajkit"))
    if command is not None:
        _launch(ctx, run, command, quiet, as_json)
    elif watch is not None:
        _watch(ctx, run, watch, quiet, as_json, options)
    else:
        _require_one_epoch(checkpoints, options)
        _import(run, checkpoints, quiet, as_json, options)


def _require_one_epoch(checkpoints: Sequence[Path], options: dict[str, Any]) -> None:
    """Raise a usage error unless at most one option numbers the checkpoints, and --epoch only one of them."""
    given = [f"--{name.replace('_', '-')}" for name in sorted(NUMBERING) if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other; give one")
    if options["epoch"] is not None and len(checkpoints) > 1:
        raise click.UsageError(f"--epoch is for one checkpoint, found {len(checkpoints)}; use --label or --first-epoch")


def _require_one_way(
    given: set[str], checkpoints: Sequence[Path], watch: Path | None, command: Sequence[str] | None
) -> None:
    """Raise a usage error unless exactly one way is asked for, with its own options."""
    ways = {"checkpoints": bool(checkpoints), "--watch": watch is not None, "a command after --": command is not None}
    asked = [way for way, is_asked in ways.items() if is_asked]
    if not asked:
        raise click.UsageError(
            "nothing to record; give checkpoints, or --watch DIR, or -- and the command of a training"
        )
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)} exclude each other; give one")
    if command is not None and not command:
        raise click.UsageError("nothing stands after --; give the command of a training, such as python train.py")
    if command is not None and (others := given & (READING | WATCHING)):
        raise click.UsageError(f"a command records by its own settings; leave out {_spelled(others)}")
    if watch is None and (others := given & WATCHING):
        raise click.UsageError(f"{_spelled(others)} goes with --watch; leave it out")
    if watch is not None and (others := given & GIVEN_ONLY):
        raise click.UsageError(f"--watch takes the numbers in the names; leave out {_spelled(others)}")
    if watch is not None and "dry_run" in given:
        raise click.UsageError("--dry-run goes with checkpoints that are there; leave it out")


def _spelled(options: set[str]) -> str:
    return f"--{min(options).replace('_', '-')}"


def _given(ctx: click.Context) -> set[str]:
    """Names of the options on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in ctx.params if ctx.get_parameter_source(name) is source}


def _import(run: str | Path, checkpoints: Sequence[Path], quiet: bool, as_json: bool, options: dict[str, Any]) -> None:
    """Record what is there."""
    with progress("looking" if options["dry_run"] else "recording", quiet) as report:
        done = 0

        def one(_imported: object) -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(done, len(checkpoints))

        imported = trajkit.import_checkpoints(
            run,
            checkpoints,
            first_epoch=options["first_epoch"],
            fsync=not options["no_fsync"],
            nonfinite=options["nonfinite"],
            progress=one,
            select=_selection(options),
            label=options["label"],
            epochs=options["epoch"],
            dry_run=options["dry_run"],
        )
    if as_json:
        told = {"dry_run": True} if options["dry_run"] else {}
        echo_json({"run": str(run), **told, "files": [_plain(item) for item in imported]})
    else:
        echo(_counted(run, imported, "would be " if options["dry_run"] else ""))


def _watch(
    ctx: click.Context, run: str | Path, folder: Path, quiet: bool, as_json: bool, options: dict[str, Any]
) -> None:
    """Record what comes; the exit code is 1 where something could not be recorded."""
    from trajkit.checkpoints.watching import Watch  # imports torch, which takes seconds

    watch = Watch(
        run,
        folder,
        **{name: options[name] for name in ("pattern", "until", "label")},
        idle_s=options["idle"],
        interval_s=options["interval"],
        fsync=not options["no_fsync"],
        nonfinite=options["nonfinite"],
        select=_selection(options),
    )
    imported = []
    with _ended_by_signals():
        for item in watch.follow():
            imported.append(item)
            if not quiet:
                echo(f"epoch {item.epoch}: {item.path} {'recorded' if item.new else 'healed it'}", err=True)
    left = watch.unrecorded | watch.unfinished()
    if as_json:
        unrecorded = [{"path": str(path), "why": why} for path, why in left.items()]
        echo_json({"run": str(run), "files": [_plain(item) for item in imported], "unrecorded": unrecorded})
    else:
        echo(_counted(run, imported))
    for path, why in watch.unfinished().items():
        echo(f"{path} is not recorded: {why}", err=True)
    if watch.ignored and not (imported or left or quiet):
        echo(
            f"{folder}: {len(watch.ignored)} files were left alone, such as {watch.ignored[0].name};"
            " choose checkpoints by --pattern",
            err=True,
        )
    ctx.exit(1 if left else 0)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C, or a plain kill, is how one ends a watch, and no failure."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        echo(err=True)  # the terminal has written ^C
    finally:
        signal.signal(signal.SIGTERM, before)


def _launch(ctx: click.Context, run: str | Path, command: Sequence[str], quiet: bool, as_json: bool) -> None:
    """Run a training; what is said goes to stderr, since stdout is the training's."""
    from trajkit.training.launching import launch  # imports zarr, which --help does not need

    launched = launch(run, command)
    if launched.refused is not None:
        echo(f"Error: {launched.refused}", err=True)
    elif as_json:
        echo_json({"run": str(run), "epochs": launched.epochs, "exit_code": launched.exit_code})
    elif not launched.epochs:
        echo(f"{run}: no epoch recorded; does the training use trajkit.Recorder(model)?", err=True)
    elif not quiet:
        first, last = launched.epochs[0], launched.epochs[-1]
        echo(f"{run}: {len(launched.epochs)} epochs recorded ({first} to {last})", err=True)
    ctx.exit(launched.exit_code)


def _selection(options: dict[str, Any]) -> Any:
    from trajkit.checkpoints.selecting import Selection  # imports torch, which takes seconds

    return Selection(**{name: options[name] for name in SELECTING})


def _plain(item: Imported) -> dict[str, Any]:
    return {**vars(item), "path": str(item.path)}


def _counted(run: str | Path, imported: Sequence[Imported], would_be: str = "") -> str:
    new, healed, lost = (sum(getattr(item, what) for item in imported) for what in ("new", "healed", "lost"))
    same = len(imported) - new - healed - lost
    return (
        f"{run}: {new} epochs {would_be}recorded"
        + (f", {healed} {would_be}healed" if healed else "")
        + (f", {lost} damaged beyond healing" if lost else "")
        + (f", {same} were there already, with the same values" if same else "")
    )
