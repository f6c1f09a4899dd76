"""From a memory budget to the work that fits in it, decided before any work begins."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from .errors import MemoryBudgetError

READ_BYTES = 24 << 20
"""Trajectories that a worker reads at a time: enough for the calls to cost little."""

STEP = 1024
RESULT_COLUMN_BYTES = 60
"""Per column of a block: mode, scale, mean, correlation, variation, and its tensor while they are summed up."""

KERNEL_COLUMN_BYTES = 120
"""Per column that is read: sums over the epochs and what solving needs, in float64."""

KERNEL_PRODUCT_BYTES = 48
"""Per column that is read and mode, where every correlation is kept."""

DEFAULT_SHARE = 0.25
"""Of the memory that is free."""


@dataclass(frozen=True)
class BlockWork:
    """What a fit has to do, as far as it decides the memory needed."""

    n_epochs: int
    n_modes: int
    n_weights: int
    block: int
    """Columns of a block, whose results are written whole."""
    whole_blocks: bool
    """Whether reading part of a chunk costs as much as all of it: coded chunks."""
    every: bool
    """Whether the correlations with every reference are kept."""
    step1_bytes: int
    """What Step 1 needs, before the blocks."""
    buffers: int = 1
    """How many times a worker holds, in float32, the piece that it is at."""


@dataclass(frozen=True)
class BlockPlan:
    """How many blocks at a time, and how many columns of a block are read at a time; bytes beyond those in use now."""

    workers: int
    width: int
    planned_bytes: int
    budget_bytes: int

    def pieces(self, block: slice) -> list[slice]:
        """The columns of a block, as many at a time as the plan allows."""
        return [
            slice(start, min(start + self.width, block.stop)) for start in range(block.start, block.stop, self.width)
        ]


def free_bytes() -> int:
    """Memory that is free on this machine, in bytes."""
    return int(psutil.virtual_memory().available)


def plan_blocks(work: BlockWork, workers: int, budget_bytes: int | None = None, at_least_workers: int = 1) -> BlockPlan:
    """A plan that stays within the budget, a quarter of the free memory by default; first less is read at a time, down
    to 8192 columns, then by fewer workers.

    Raises `MemoryBudgetError`, naming what is needed and what is given, where `at_least_workers` that read as little as
    possible at a time need more.
    """
    budget = int(DEFAULT_SHARE * free_bytes()) if budget_bytes is None else int(budget_bytes)
    n = min(work.block, work.n_weights)
    best = n if work.whole_blocks else READ_BYTES // (4 * work.n_epochs)
    width = min(n, max(STEP, best // STEP * STEP))
    while True:
        planned = max(work.step1_bytes, workers * _worker_bytes(work, n, width))
        if planned <= budget:
            return BlockPlan(workers, width, planned, budget)
        if width > 8 * STEP:
            width = _halved(width)
        elif workers > at_least_workers:
            workers -= 1
        elif width > STEP:
            width = _halved(width)
        else:
            break
    what = "to cluster the samples takes" if planned == work.step1_bytes else "to fit blocks of weights takes"
    cure = "ask for fewer samples" if planned == work.step1_bytes else "fit fewer epochs or with fewer workers"
    raise MemoryBudgetError(
        f"{what} {_size(planned)}, the budget is {_size(budget)}; give more memory (--memory) or {cure}"
    )


def _worker_bytes(work: BlockWork, n: int, width: int) -> int:
    modes = work.n_modes if work.every else 0
    reading = width * (4 * work.n_epochs * work.buffers + KERNEL_COLUMN_BYTES + KERNEL_PRODUCT_BYTES * modes)
    return reading + n * (RESULT_COLUMN_BYTES + 4 * modes)


def _halved(width: int) -> int:
    return max(STEP, width // 2 // STEP * STEP)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 1 << 20 else f"{n_bytes} bytes"
