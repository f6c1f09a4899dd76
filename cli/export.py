"""`trajkit export`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trajkit

from .options import EpochRange, fit_option, json_option, results_option, run_argument
from .output import echo, echo_json, size

if TYPE_CHECKING:
    from trajkit.averages import Average


class Averaged(EpochRange):
    """``last:10``, or epochs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text of ``last:10``, a list of epochs otherwise."""
        return value if str(value).startswith("last:") else super().convert(value, param, ctx)


@click.command()
@run_argument
@click.option("--epoch", type=int, help="A recorded epoch, up to which is averaged.  [default: the last one]")
@fit_option
@click.option(
    "--average",
    metavar="EPOCHS",
    type=Averaged(),
    help="The average of the last:10 recorded epochs, or of 3,5,7 or 10:40 (40 not included); all weigh the same.",
)
@click.option(
    "--ema",
    type=float,
    metavar="DECAY",
    help="Decay, per recorded epoch, of an exponential moving average of all epochs up to --epoch, such as 0.9.",
)
@click.option(
    "--ema-half-life",
    type=float,
    metavar="EPOCHS",
    help="Half-life of such an average, in recorded epochs, such as 5.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["safetensors", "pt", "dcp"]),
    help="[default: what the name ends in, .safetensors or .pt]",
)
@click.option("-o", "--output", metavar="OUT", required=True, help="File or folder to write.")
@click.option("--max-shard-size", metavar="BYTES", help="Of a file in a safetensors folder.  [default: 5GB]")
@click.option("--force", is_flag=True, help="Overwrite the checkpoint if it exists.")
@results_option
@json_option
def export(
    run: str | Path,
    epoch: int | None,
    fit_name: str | None,
    average: Any,
    ema: float | None,
    ema_half_life: float | None,
    format_name: Any,
    output: str,
    max_shard_size: str | None,
    force: bool,
    results: str | None,
    as_json: bool,
) -> None:
    """Write weights of RUN as a checkpoint: of an epoch as recorded, modelled by a fit, or an average of epochs.

    A safetensors OUT is a file if its name ends in .safetensors, else a folder as Hugging Face has it; put config.json
    there, and from_pretrained loads it. A pt OUT is a file, a dcp OUT a folder of torch.distributed.checkpoint.

    \b
    Examples:
      trajkit export data/digits --epoch 39 -o epoch39.pt
      trajkit export data/digits --average last:10 --format safetensors -o swa/
      trajkit export data/digits --ema-half-life 5 -o ema.pt
    """
    if None not in (ema, ema_half_life):
        raise click.UsageError("--ema and --ema-half-life exclude each other; give one")
    is_ema = ema is not None or ema_half_life is not None
    if (fit_name is not None) + (average is not None) + is_ema > 1:
        raise click.UsageError("--fit, --average and --ema exclude each other; give one")
    opened = trajkit.open_run(run, results)
    averaged = None
    if average is not None or is_ema:
        averaged = opened.average(average, ema, up_to=epoch, ema_half_life=ema_half_life)
    if epoch is None:
        epoch = averaged.epochs[-1] if averaged else opened.last_epoch
    written = trajkit.write_checkpoint(
        opened,
        epoch,
        output,
        fit=fit_name,
        overwrite=force,
        average=average,
        ema=ema,
        ema_half_life=ema_half_life,
        format=format_name,
        max_shard_size=max_shard_size,
    )
    if averaged is not None:
        _warn(averaged)
    n_bytes = sum(file.stat().st_size for file in ([written] if written.is_file() else written.iterdir()))
    if as_json:
        epochs = {"averaged": list(averaged.epochs), "left_out": list(averaged.left_out)} if averaged else {}
        chosen = {"epoch": epoch, "fit": fit_name, "ema": averaged.decay if averaged else None, **epochs}
        if ema_half_life is not None:
            chosen["ema_half_life"] = ema_half_life
        if fit_name is not None:
            chosen["fit_covers_epoch"] = opened.fit(fit_name).covers(epoch)
        echo_json({"run": str(run), **chosen, "output": str(written), "bytes": n_bytes})
    else:
        source = "recorded" if fit_name is None else f"modelled by '{fit_name}'"
        echo(f"{written}: {averaged or f'epoch {epoch} {source}'}, {size(n_bytes)}")


def _warn(averaged: Average) -> None:
    if averaged.left_out:
        echo(f"Warning: epoch {', '.join(map(str, averaged.left_out))} is marked as bad and left out", err=True)
    if averaged.has_batch_statistics:
        echo(
            f"Warning: the statistics of BatchNorm are those of epoch {averaged.epochs[-1]}, not of the averaged"
            " weights; estimate them again, with torch.optim.swa_utils.update_bn",
            err=True,
        )
