"""What safety costs: recording with fsync against without, and verifying against reading."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measure import in_turn, table
from synthetic import layout_of

import trajkit

SIZES = (100_000, 1_333_770, 11_000_000)
N_EPOCHS = 12
PIECE_BYTES = 1 << 20


def recording(folder: Path, rounds: int = 5) -> list[str]:
    """Runs of several sizes recorded in turn with fsync and without, each epoch timed; without Python's own work."""
    lines = [
        "| weights | MB an epoch | n | without fsync, median ms | with fsync, median ms | throughput kept |",
        "|---|---|---|---|---|---|",
    ]
    for n_weights in SIZES:
        layout = layout_of(n_weights)
        weights = np.random.default_rng(0).standard_normal(n_weights, dtype=np.float32)
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                writers = {fsync: trajkit.RunWriter(Path(place) / str(fsync), fsync=fsync) for fsync in taken}
                for epoch in range(N_EPOCHS):
                    weights[epoch::N_EPOCHS] += np.float32(0.001)
                    for fsync, writer in writers.items():
                        began = time.perf_counter()
                        writer.append(layout, epoch, weights, {})
                        if epoch:  # the first makes the run
                            taken[fsync].append(time.perf_counter() - began)
                for writer in writers.values():
                    writer.close()
        without, synced = (statistics.median(taken[fsync]) for fsync in (False, True))
        lines.append(
            f"| {n_weights:,} | {4 * n_weights / 1e6:.1f} | {len(taken[True])} | {1e3 * without:.1f} |"
            f" {1e3 * synced:.1f} | {100 * without / synced:.0f} % |"
        )
    return ["## What fsync costs a recording", "", *lines]


def verifying(path: Path, rounds: int = 5) -> list[str]:
    """`verify` in full against reading the same files, each by as many threads as there are cores."""
    files = [str(file) for file in path.rglob("*") if file.is_file() and "/c/" in str(file)]
    n_bytes = sum(os.path.getsize(file) for file in files)

    def read(file: str) -> None:
        piece = bytearray(PIECE_BYTES)
        descriptor = os.open(file, os.O_RDONLY)
        while os.readv(descriptor, [piece]):
            pass
        os.close(descriptor)

    def read_all() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read, files))

    def forget() -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # only what is on the disk can be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    actions = {
        "bare read of the files": read_all,
        "verify --full": lambda: trajkit.verify(path, "full"),
        "verify": lambda: trajkit.verify(path),
        "verify --fast": lambda: trajkit.verify(path, "fast"),
    }
    return [
        f"## Verifying {n_bytes / 1e9:.2f} GB in {len(files)} objects",
        "",
        "From the disk:",
        "",
        *table(in_turn(rounds, actions, before=forget), "bare read of the files"),
        "",
        "From the page cache:",
        "",
        *table(in_turn(rounds, actions), "bare read of the files"),
    ]


def integrity(cache: Path, large: Path) -> list[str]:
    """Both tables."""
    folder = cache / "recording"
    folder.mkdir(exist_ok=True)
    try:
        return [*recording(folder), "", *verifying(large)]
    finally:
        shutil.rmtree(folder)
