"""A fit against bare reading of the same archive, and against the official code's way, with the weights in memory."""

from __future__ import annotations

import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import dask
import distributed
import numpy as np
import official
import zarr
from measure import ROUNDS, Seconds, in_turn, table
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import trajkit
from trajkit.blocks import READ_BYTES
from trajkit.kernels.affine import References, empty_fit, fit_block
from trajkit.kernels.fused import fit_block_fused
from trajkit.store.format import WEIGHTS, result_rule

BY_ZARR = "zarr-python with zarrs, the whole array"
WHOLE = "`run.weights[:]`, objects known to be sound"
WHOLE_CHECKED = "`open_run(path).weights[:]`, every object hashed first"
BARE = "bare read, block by block, objects known to be sound"
BARE_CHECKED = "bare read, block by block, every object hashed first"
FIT = "`trajkit.fit(run)`, objects known to be sound"
FIT_CHECKED = "`trajkit.fit(path)`, everything included"
OFFICIAL = "the official code's way, weights already in memory"


def fit_and_remove(run: trajkit.Run | Path, **settings: object) -> None:
    fitted = trajkit.fit(run, name="benchmark", **settings)  # type: ignore[arg-type]
    shutil.rmtree(fitted.run.path / "fits" / "benchmark")


def kinds(path: Path) -> list[str]:
    """What a fit takes with references of one weight and of many."""
    lines = ["## A fit with references of many weights, 1,333,770 weights × 40 epochs", ""]
    for modes in (2, 5, 10, 30):
        actions = {
            f"`fit(path, modes={modes}, references={kind!r})`": partial(
                fit_and_remove, path, modes=modes, references=kind
            )
            for kind in ("weight", "centroid", "principal")
        }
        lines += [*table(in_turn(2 * ROUNDS, actions), next(iter(actions))), ""]
    return lines


def bare_read(run: trajkit.Run) -> None:
    """All trajectories through the reader of a fit, on two threads into memory that is used again."""
    n_epochs, n_weights = run.weights.shape
    rows = np.arange(n_epochs)
    width = min(131072, READ_BYTES // (4 * n_epochs))
    pieces = [
        (start, min(start + width, block.stop))
        for block in result_rule(n_weights).objects()
        for start in range(block.start, block.stop, width)
    ]

    def read(mine: list[tuple[int, int]]) -> None:
        memory = np.empty(n_epochs * width, np.float32)
        for start, stop in mine:
            run.archive.read(WEIGHTS, rows, (start, stop), memory[: n_epochs * (stop - start)].reshape(n_epochs, -1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, (pieces[0::2], pieces[1::2])))


def against_reading(path: Path, rounds: int, official_too: bool) -> list[str]:
    run = trajkit.open_run(path)
    n_epochs, n_weights = run.weights.shape
    _ = run.weights[:]

    def by_zarr() -> None:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            _ = zarr.open_array(path / "weights", mode="r")[:]

    actions = {
        BARE: lambda: bare_read(run),
        BARE_CHECKED: lambda: bare_read(trajkit.open_run(path)),
        BY_ZARR: by_zarr,
        WHOLE: lambda: run.weights[:],
        WHOLE_CHECKED: lambda: trajkit.open_run(path).weights[:],
        FIT: lambda: fit_and_remove(run),
        FIT_CHECKED: lambda: fit_and_remove(path),
    }
    seconds = in_turn(rounds, actions)
    if official_too:
        seconds |= _official(run, rounds)
    gigabytes = run.weights.nbytes / 1e9
    return [
        f"## Fit of {n_weights:,} weights, {n_epochs} epochs, 10 modes: {gigabytes:.2f} GB, read {run.archive.reading}",
        "",
        *table(seconds, BARE_CHECKED),
        "",
        *_ratios(seconds),
    ]


def _official(run: trajkit.Run, rounds: int) -> dict[str, list[float]]:
    """Once for a large run, which takes a minute; the weights lie as the official code wants them."""
    sample = trajkit.fit(run, name="benchmark").sample_index
    shutil.rmtree(run.path / "fits" / "benchmark")
    weights: NDArray[np.float32] = np.empty(run.weights.shape[::-1], np.float32)
    for start in range(0, len(weights), 1 << 20):
        weights[start : start + (1 << 20)] = run.weights[:, start : start + (1 << 20)].T
    once = weights.nbytes > 1e9
    return in_turn(1 if once else rounds, {OFFICIAL: lambda: official.fit(weights, 10, sample)}, warm=not once)


def _ratios(seconds: Seconds) -> list[str]:
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    lines = [
        f"- A fit of a freshly opened run takes {median[FIT_CHECKED] / median[BARE_CHECKED]:.2f} × what the same reader"
        f" takes to read and check the archive, {median[FIT_CHECKED] / median[WHOLE_CHECKED]:.2f} × `weights[:]` of it,"
        f" {median[FIT_CHECKED] / median[BY_ZARR]:.2f} × what zarr-python with zarrs takes to read it unchecked.",
        f"- Where the objects are known to be sound: {median[FIT] / median[BARE]:.2f} × the bare read,"
        f" {median[FIT] / median[WHOLE]:.2f} × `weights[:]`, {median[FIT] / median[BY_ZARR]:.2f} × zarr-python with"
        " zarrs.",
    ]
    if OFFICIAL in median:
        lines.append(
            f"- A fit of a freshly opened run is {median[OFFICIAL] / median[FIT_CHECKED]:.1f} times as fast as the"
            f" official code's way, which is not charged for reading; {median[OFFICIAL] / median[FIT]:.1f} times where"
            " the objects are known to be sound."
        )
    return lines


def kernels() -> list[str]:
    rng = np.random.default_rng(0)
    lines = ["## The block kernel alone: 131,072 weights a block, 10 modes, 2 threads", ""]
    lines += ["| epochs | kernel | n | median GB/s of float32 | spread |", "|---|---|---|---|---|"]
    with ThreadPoolExecutor(2) as pool, threadpool_limits(1, user_api="blas"):
        for n_epochs in (40, 100, 200):
            blocks = [rng.normal(size=(n_epochs, 131072)).astype(np.float32) for _ in range(4)] * 4
            rooms = [empty_fit(None, 131072, np.dtype(np.float32)) for _ in blocks]
            references = References(blocks[0][:, :10].copy())
            kernels = {
                "compiled": lambda block, room: fit_block_fused(block, references, out=room),  # noqa: B023
                "array namespace": lambda block, _room: fit_block(block, references),  # noqa: B023
            }
            for name, kernel in kernels.items():
                taken = in_turn(ROUNDS, {name: lambda: list(pool.map(kernel, blocks, rooms))})[name]  # noqa: B023
                rates = sorted(sum(block.nbytes for block in blocks) / 1e9 / second for second in taken)
                lines.append(
                    f"| {n_epochs} | {name} | {len(rates)} | {statistics.median(rates):.2f} |"
                    f" {rates[0]:.2f} to {rates[-1]:.2f} |"
                )
    return lines


def workers(path: Path) -> list[str]:
    run = trajkit.open_run(path)
    n_epochs, n_weights = run.weights.shape
    _ = bare_read(run)

    def threads(count: int) -> None:
        with dask.config.set(num_workers=count):
            fit_and_remove(run, scheduler="threads")

    def cluster(count: int) -> distributed.Client:
        return distributed.Client(
            distributed.LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=":0"),
            set_as_default=False,
        )

    with cluster(1) as one, cluster(2) as two:
        seconds = in_turn(
            3,
            {
                "1 thread": lambda: threads(1),
                "2 threads": lambda: threads(2),
                "Dask, 1 process": lambda: fit_and_remove(run, scheduler=one),
                "Dask, 2 processes": lambda: fit_and_remove(run, scheduler=two),
            },
        )
    return [
        f"## One and two workers: {n_weights:,} weights, {n_epochs} epochs, objects known to be sound",
        "",
        *table(seconds, "1 thread"),
    ]


def reconstruct(path: Path) -> list[str]:
    run = trajkit.open_run(path)
    epoch = int(run.epochs[-1])
    trajkit.fit(run, name="benchmark")
    folder = run.path.parent / "reconstructed"
    folder.mkdir(exist_ok=True)
    values = run.weights[-1]

    def bare() -> None:
        with (folder / "bare").open("wb") as file:
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

    seconds = in_turn(
        ROUNDS,
        {
            "bare writing of the vector, with fsync": bare,
            "`write_checkpoint` of the recorded epoch": lambda: trajkit.write_checkpoint(
                run, epoch, folder / "recorded.safetensors", overwrite=True
            ),
            "`write_checkpoint` of the modelled epoch": lambda: trajkit.write_checkpoint(
                run, epoch, folder / "modelled.safetensors", fit="benchmark", overwrite=True
            ),
        },
    )
    shutil.rmtree(folder)
    shutil.rmtree(run.path / "fits" / "benchmark")
    return [
        f"## Reconstruct: {values.size:,} weights into a safetensors file",
        "",
        *table(seconds, "bare writing of the vector, with fsync"),
    ]
