"""What a CUDA device makes of a fit: the same answer, how fast, and in how much of its memory.

    python benchmarks/gpu.py [RUN] [--write]

Correctness against the float64 oracle of the tests; the kernel, the copies to the device and the two together, on
synthetic trajectories in memory; with a RUN, `trajkit.fit` of it on the device against the processor, in turn. Medians
of 7 rounds and their spread. Prints Markdown; `--write` puts it into benchmarks/RESULTS-gpu.md. Where there is no
device it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from fit import fit_and_remove
from measure import ROUNDS, in_turn
from numpy.typing import NDArray

import trajkit
from trajkit.blocks import READ_BYTES
from trajkit.device import CudaDevice, Device, HostDevice, Sizes, open_device
from trajkit.errors import InputError
from trajkit.kernels.affine import BlockFit, References, block_sums, joined

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle
from conftest import correlated

RESULTS = Path(__file__).with_name("RESULTS-gpu.md")
MODES = 10
COPIED_BYTES = 256 << 20

Trajectories = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    try:
        device = open_device("cuda")
    except InputError as error:
        print(f"nothing to measure: {error}")
        return
    assert isinstance(device, CudaDevice)
    lines = [
        "# Results of the benchmarks on a GPU",
        "",
        "Written by `python benchmarks/gpu.py RUN --write`; ratios matter, seconds depend on the machine.",
        "",
        f"{machine()}, {ROUNDS} rounds.",
        *parity(device),
        *kernel(),
        *copies(),
        *from_memory(device),
        *(end_to_end(arguments.run) if arguments.run else []),
    ]
    if arguments.write:
        RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def machine() -> str:
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"].decode()
    versions = f"CuPy {cupy.__version__}, CUDA runtime {runtime.runtimeGetVersion()}"
    return f"{name}, {versions}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def pieces_of(n_epochs: int, n: int) -> list[slice]:
    """As many columns at a time as `trajkit.fit` reads."""
    bounds = [*range(0, n, READ_BYTES // (4 * n_epochs)), n]
    return [slice(*pair) for pair in pairwise(bounds)]


def fit_all(device: Device, trajectories: Trajectories, references: References) -> BlockFit:
    def read(piece: slice, out: Trajectories) -> None:
        out[...] = trajectories[:, piece]

    pieces = pieces_of(*trajectories.shape)
    return joined([fitted for _, fitted in device.fit_pieces(read, pieces, references, False)])


def parity(device: Device) -> list[str]:
    """How far processor and device are from the oracle, over weights decided by more than 1e-6."""
    lines = [
        "",
        "## The same answer",
        "",
        f"Against a float64 oracle, {MODES} modes, 100,000 synthetic weights; modes where the two best correlations"
        " differ by more than 1e-6.",
        "",
        "| E | on | modes wrong | error of scale, σ_w/σ_r | of the correlation | of the modelled trajectory, σ_w |",
        "|---|---|---|---|---|---|",
    ]
    for n_epochs in (5, 40, 200):
        trajectories = correlated(n_epochs, 100_000, seed=n_epochs)
        expected = oracle.fit(trajectories, np.arange(MODES))
        w = trajectories.astype(np.float64)
        r = w[:, :MODES]
        spread = np.where((w != w[0]).any(0), w.std(0), 1.0)
        for on in (HostDevice(), device):
            found = fit_all(on, trajectories, References(trajectories[:, :MODES]))
            same = found.mode == expected.mode
            wrong = int((~same & (expected.margin > 1e-6)).sum())
            scale = np.abs(found.scale - expected.scale) / (spread / spread[:MODES][found.mode])
            centred = (r - r.mean(0))[:, found.mode]
            modelled = np.abs(found.mean + found.scale.astype(np.float64) * centred - expected.modelled) / spread
            correlation = np.abs(found.correlation - expected.correlation)
            errors = (values[..., same].max() for values in (scale, correlation, modelled))
            lines.append(f"| {n_epochs} | {on.name} | {wrong} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    return lines


def kernel() -> list[str]:
    """The float64 sums of blocks that are on the device already, a part at a time, as `CudaDevice` works."""
    import cupy

    lines = [
        "",
        "## The kernel",
        "",
        f"{COPIED_BYTES >> 20} MiB of float32 on the device, {MODES} modes.",
        "",
        "| E | columns at a time | median ms | spread ms | GB/s of float32 |",
        "|---|---|---|---|---|",
    ]
    for n_epochs in (40, 100):
        n = COPIED_BYTES // (4 * n_epochs)
        parts = Sizes(n_epochs, MODES, n, every=False).parts(n)
        unit_reference = References(correlated(n_epochs, MODES)).unit
        with cupy.cuda.Stream(non_blocking=True) as stream:
            block = cupy.asarray(np.random.default_rng(0).standard_normal((n_epochs, n), np.float32))
            unit = cupy.asarray(unit_reference)

            def work(block: Any = block, unit: Any = unit, parts: list[slice] = parts) -> None:
                for part in parts:
                    block_sums(block[:, part], unit)

            taken = on_device(work, stream)
        lines.append(f"| {n_epochs} | {parts[0].stop:,} | {milliseconds(taken)} | {rate(4 * n_epochs * n, taken)} |")
    return lines


def copies() -> list[str]:
    """Between page-locked or ordinary host memory and the device."""
    import cupy
    import cupyx

    locked = cupyx.zeros_pinned(COPIED_BYTES // 4, np.float32)
    ordinary = np.zeros(COPIED_BYTES // 4, np.float32)
    lines = [
        "",
        "## Copies",
        "",
        f"{COPIED_BYTES >> 20} MiB.",
        "",
        "| what | median ms | spread ms | GB/s |",
        "|---|---|---|---|",
    ]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        there = cupy.zeros(COPIED_BYTES // 4, np.float32)
        for name, work in {
            "page-locked to device": lambda: there.set(locked),
            "ordinary to device": lambda: there.set(ordinary),
            "device to page-locked": lambda: there.get(out=locked, blocking=False),
        }.items():
            taken = on_device(work, stream)
            lines.append(f"| {name} | {milliseconds(taken)} | {rate(COPIED_BYTES, taken)} |")
    return lines


def from_memory(device: CudaDevice) -> list[str]:
    """Whole fits of trajectories in memory, one thread, and the device memory they take."""
    import cupy

    n_epochs, n = 40, 2_000_000
    trajectories = np.tile(correlated(n_epochs, n // 20), 20)
    references = References(trajectories[:, :MODES])
    host = HostDevice()
    seconds = in_turn(
        ROUNDS,
        {
            "cpu": lambda: fit_all(host, trajectories, references),
            "cuda": lambda: fit_all(device, trajectories, references),
        },
    )
    lines = [
        "",
        "## From memory, read, copied and fitted by one thread",
        "",
        f"{n:,} weights, {n_epochs} epochs, {MODES} modes, pieces of {READ_BYTES >> 20} MiB.",
        "",
        "| on | median ms | spread ms | GB/s of float32 |",
        "|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        lines.append(f"| {name} | {milliseconds(taken)} | {rate(trajectories.nbytes, taken)} |")
    pieces = pieces_of(n_epochs, n)
    planned = device.device_bytes(n_epochs, MODES, pieces[0].stop)
    fresh = References(references.trajectories)  # its memory is not there yet
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before, most = pool.total_bytes(), 0

    def read(piece: slice, out: Trajectories) -> None:
        out[...] = trajectories[:, piece]

    for _ in device.fit_pieces(read, pieces, fresh, False):
        most = max(most, pool.total_bytes() - before)  # the pool gives nothing back while a fit goes on
    return [
        *lines,
        "",
        f"Device memory: {planned / 2**20:.1f} MiB planned at most, {most / 2**20:.1f} MiB taken from the device"
        " (without the CUDA context and cuBLAS).",
    ]


def end_to_end(path: str) -> list[str]:
    """`trajkit.fit`, everything included, with the threads that it takes by default."""
    run = trajkit.open_run(path)
    n_epochs, n_weights = run.weights.shape
    seconds = in_turn(
        ROUNDS,
        {
            "cpu": lambda: fit_and_remove(Path(path), device="cpu"),
            "cuda": lambda: fit_and_remove(Path(path), device="cuda"),
        },
    )
    lines = [
        "",
        "## `trajkit.fit` of a run",
        "",
        f"{n_weights:,} weights, {n_epochs} epochs, {MODES} modes, {run.weights.nbytes / 1e9:.2f} GB of float32.",
        "",
        "| device | median ms | spread ms | GB/s of float32 |",
        "|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        lines.append(f"| {name} | {milliseconds(taken)} | {rate(run.weights.nbytes, taken)} |")
    return lines


def on_device(work: Callable[[], object], stream: Any) -> list[float]:
    """Seconds on the stream, which is the current one, after one round that does not count."""
    import cupy

    seconds = []
    for number in range(ROUNDS + 1):
        began, ended = cupy.cuda.Event(), cupy.cuda.Event()
        began.record(stream)
        work()
        ended.record(stream)
        ended.synchronize()
        if number:
            seconds.append(cupy.cuda.get_elapsed_time(began, ended) / 1000)
    return seconds


def milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.2f} | {min(seconds) * 1000:.2f} to {max(seconds) * 1000:.2f}"


def rate(n_bytes: int, seconds: list[float]) -> str:
    return f"{n_bytes / statistics.median(seconds) / 1e9:.1f}"


if __name__ == "__main__":
    main()
