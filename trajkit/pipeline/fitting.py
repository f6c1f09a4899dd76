"""Out-of-core fit: clusters from the probe, then one pass over the archive, block by block."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..blocks import BlockPlan, BlockWork, plan_blocks
from ..decomposition import Decomposition
from ..device import open_device
from ..errors import InputError, PathExistsError, RunLockedError, named_type
from ..kernels.affine import References
from ..kernels.clustering import Cut, DistanceCut, checked_cut, clustering_bytes, setting_of
from ..kernels.curve import MOST_HELD_OUT, MOST_MEMBERS
from ..kernels.fused import N_TOTALS
from ..kernels.lines import Kind, ReferenceChoice, Weighting
from ..kernels.running import checked_candidates, checked_decay
from ..kernels.sampling import Sampling
from ..run import PathLike, Run, as_run
from ..store.fit_shape import FitShape
from ..store.fits import FitWriter
from ..store.format import WEIGHTS, result_rule
from .sampling import Chosen, SampleChoice, choose
from .scheduling import Scheduler, bytes_of, scheduler_of
from .tasks import BlockSummary, BlockTask, FitBlock

if TYPE_CHECKING:
    from .scheduling import Choice

Progress = Callable[[int, int], None]

PROBE_BYTES = 5
"""Per weight of the probe and epoch: its value, and whether it is finite."""

SAMPLE_BYTES = 40
"""Per sample and epoch: the recorded value, and those that the correlations are made of, in float64."""

GRAMS = 3
"""Matrices of products of epochs, or of members, where references are made of many."""

MEMBER_BYTES = 48
"""Per candidate and epoch, where references are made of many or M is chosen: recorded values, directions in float64."""


def fit(
    run: Run | PathLike,
    modes: Cut = 10,
    samples: int = 1000,
    sampling: Sampling = "balanced",
    seed: int = 0,
    epochs: Iterable[int] | None = None,
    sample_index: ArrayLike | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    *,
    references: Kind = "weight",
    weighting: Weighting | None = None,
    members: float | None = None,
    updatable: bool = False,
    online: bool = False,
    reassign: bool | int = False,
    decay: float = 1.0,
    memory: int | str | None = None,
    scheduler: Choice | Scheduler = None,
    device: str = "cpu",
    results: PathLike | None = None,
) -> Decomposition:
    """Fit CMD to a run and save the fit inside it (Brokman et al. 2024, section 3.1).

    run: a `Run`, or the path of one.
    modes: M, or a `trajkit.DistanceCut` of the cluster tree. Fewer modes are fitted where the sample has fewer
        clusters. ``"auto"``: of 1 to 30, the M that explains most of the variance of held-out weights of the probe,
        less 0.025 % a mode. ``"95%"`` or the like: the fewest modes, up to 300, that explain this share of it.
    samples: K, how many weights the clusters are found on; all of them if the model has fewer.
    sampling: ``"balanced"`` (half spread equally over tensors, half by their size), ``"uniform"``, or ``"variance"``
        (probability ∝ exp(standard deviation over time), among the probe). Samples come from the run's probe where
        that holds enough of each tensor, so that they cost no pass over the archive; from all weights otherwise.
    seed: of the sampling.
    epochs: labels of the recorded epochs to fit, all by default.
    sample_index: (K,) indices of the weights to use as the sample; `samples`, `sampling` and `seed` do not apply then.
    name: of the fit in the run; ``modes10``, ``principal10``, ``online10``, ``auto`` or the like by default, numbered
        where that exists.
    progress: called with the number of weights done and N.
    references: what the trajectory is that a mode's weights are fitted to. ``"weight"``, the paper's: that weight of
        the sample which stands best for its cluster, with all its noise. ``"centroid"``: the mean of the probe's
        weights that correlate with it most, each centred, divided by its standard deviation σ and turned by its sign.
        ``"principal"``: the first principal trajectory of the mode's probe weights, over which modes and trajectories
        are found anew in a few rounds (k-lines); it explains more of the variance at the same M. The latter two stay
        fixed linear functionals of the probe's weights, and cost no pass over the archive.
    weighting: what each probe weight counts for there. ``"equal"``, the default of centroids: the same, but for those
        that hardly move. ``"variance"``, the default of principal trajectories: σ² times the number of weights that it
        stands for, so that what is minimised is the error of the weights.
    members: of at most which share of the weights these references are made, such as 0.05; of all in the probe by
        default. Fewer have to be known to know the references, and explain a little less.
    updatable: keep 4·M + 8 bytes a weight more, so that `update` need not read the old epochs.
    online: take the epochs for the warm-up of online CMD: the weights modelled at a later epoch follow from all epochs
        up to that one, with the references of the warm-up.
    reassign: online, a weight's mode is the one of its two best references of the warm-up that it correlates with most
        so far, or of so many; instead of the best one of the warm-up. That keeps what `updatable` does.
    decay: online, an epoch after the warm-up counts for so many times what the next one does.
    memory: bytes, or a text such as ``"2GiB"``, that the work may use beyond what the process has in use; a quarter of
        what is free by default. On a cluster, of each worker process; half of its limit by default.
    scheduler: ``"threads"`` (as many as cores, or dask's setting ``num_workers``), ``"synchronous"`` (a single one),
        the address of a Dask cluster, or a `distributed.Client`; by default the client that is active, threads without
        one, and within a task of a Dask worker that task's thread. All give the same bits.
    device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, which agrees with ``"cpu"`` to rounding in float64.
    results: as for `open_run`: a folder in which the fit is kept beside a run that can only be read.

    Raises `InputError` for settings that cannot be met or weights that are not finite, `PathExistsError` where a fit of
    that name exists, `DamagedRunError` where the archive is damaged, `MemoryBudgetError` where the budget does not do,
    `ClusterError` for a cluster that cannot be reached. A fit that is interrupted leaves nothing behind.
    """
    if not isinstance(run, Run | str | os.PathLike):
        raise InputError(
            f"run is {named_type(run)}, expected a Run or its path; a matrix of trajectories in memory,"
            " (weights, epochs), is fitted by trajkit.CMD().fit(X)"
        )
    run = as_run(run, results)
    modes = checked_cut(modes, "modes")
    rows = run.rows_of(epochs)
    if rows.size < 2:
        raise InputError(f"{run.path}: {rows.size} epochs to fit, a correlation needs at least 2; record or name more")
    choice = SampleChoice(samples, sampling, seed, sample_index)
    wanted = ReferenceChoice(references, weighting, members)
    settings = {"modes": setting_of(modes), **choice.settings, **wanted.settings}
    candidates, decay = checked_candidates(reassign), checked_decay(decay)
    updatable = bool(updatable)  # as the fit keeps it, which could not be read again with a 1
    if online:
        settings["online"] = True
    elif candidates > 1 or decay != 1:
        raise InputError("reassign and decay are for online fits, others fit all epochs at once; leave them out")
    if candidates > 1:
        settings["reassign"], updatable = candidates, True
    if decay != 1:
        settings["decay"] = decay
    with scheduler_of(scheduler) as chosen_scheduler:
        resources = Resources(chosen_scheduler, bytes_of(memory), device)
        n_samples = choice.count(run)
        most_modes = min(n_samples, modes if isinstance(modes, int) else 1)
        most_members = 0 if references == "weight" else run.probe_index.size
        n = run.layout.n_weights
        tried = min(run.probe_index.size, MOST_MEMBERS + MOST_HELD_OUT) if isinstance(modes, str) else 0
        resources.plan_fit(run, FitShape(n, rows.size, most_modes, n_samples, updatable, most_members), tried)
        with _hashing_ahead(run, rows) if chosen_scheduler.shares_memory else contextlib.nullcontext():
            sample = choice.draw(run, rows)
            chosen = choose(run, rows, sample, modes, wanted)
        n_members = 0 if references == "weight" else chosen.functional.index.size
        shape = FitShape(n, rows.size, chosen.functional.n_modes, sample.size, updatable, n_members)
        plan = resources.plan_fit(run, shape, tried)
        with _writer_for(run, default_name(modes, online, references), name, shape) as writer:
            task = FitBlock(run, rows, References(chosen.trajectories), writer.blocks, plan, device)
            save(run, writer, task, resources.scheduler, progress, Fitted(rows, chosen, sample, settings))
    return run.fit(writer.name)


@dataclass(frozen=True)
class Resources:
    """What a fit may use."""

    scheduler: Scheduler
    memory_bytes: int | None
    device: str

    def plan_fit(self, run: Run, shape: FitShape, tried: int) -> BlockPlan:
        """How the blocks of a fit are read, whose M is chosen by so many weights; raises `MemoryBudgetError`."""
        n_probe = run.probe_index.size
        members = max(n_probe if shape.n_members else 0, tried)
        per_epoch = PROBE_BYTES * n_probe + SAMPLE_BYTES * shape.n_samples + MEMBER_BYTES * members
        step1 = clustering_bytes(shape.n_samples) + shape.n_epochs * per_epoch
        if shape.n_members:
            step1 += GRAMS * 8 * min(shape.n_epochs, n_probe) ** 2
        return self.plan(run, shape, shape.n_epochs, open_device(self.device).buffers, step1)

    def plan(self, run: Run, shape: FitShape, n_epochs: int, buffers: int, step1_bytes: int = 0) -> BlockPlan:
        """How blocks are read of which so many epochs are wanted."""
        n = shape.n_weights
        work = BlockWork(
            n_epochs=n_epochs,
            n_modes=shape.n_modes,
            n_weights=n,
            block=result_rule(n).chunk,
            whole_blocks=run.archive.reading != "raw",
            every=shape.updatable,
            step1_bytes=step1_bytes,
            buffers=buffers,
        )
        limit = self.scheduler.memory_bytes
        budget = self.memory_bytes or (limit and limit // 2)
        workers = min(self.scheduler.workers, len(result_rule(n).objects()))
        return plan_blocks(work, workers, budget, at_least_workers=1 if self.scheduler.shares_memory else workers)


@dataclass(frozen=True)
class Fitted:
    """What a fit is of: the rows of its epochs, its references and the sample they are from, and its settings."""

    rows: NDArray[np.int64]
    chosen: Chosen
    sample_index: NDArray[np.int64]
    settings: dict[str, Any]


def save(
    run: Run,
    writer: FitWriter,
    task: BlockTask,
    scheduler: Scheduler,
    progress: Progress | None,
    fitted: Fitted,
) -> None:
    """Do all blocks by a task and commit what they give."""
    n, functional = run.layout.n_weights, fitted.chosen.functional
    done = 0

    def report(summary: BlockSummary) -> None:
        nonlocal done
        done += int(summary.modes[:, 0].sum())
        if progress is not None:
            progress(done, n)

    summaries = scheduler.limited_to(task.plan.workers).map(task, result_rule(n).objects(), report)
    epochs = run.epochs[fitted.rows].tolist()
    origin = run.archive.lineage.origin_of(epochs)
    attributes = {
        "trajkit": version("trajkit"),
        "fitted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": fitted.settings,
        "epochs": epochs,
        "layout": run.layout.digest,
        **({} if origin is None else {"of": origin.to_json()}),
        **_quality(run, summaries, functional.n_modes),
        **_pca(fitted.chosen),
        **({"curve": [list(point) for point in fitted.chosen.curve]} if fitted.chosen.curve else {}),
    }
    stored = {key: item for summary in summaries for key, item in summary.stored.items()}
    writer.commit(stored, task.references.trajectories, functional, fitted.sample_index, attributes)


def _pca(chosen: Chosen) -> dict[str, Any]:
    return {} if chosen.pca is None else {"pca": list(chosen.pca.explained), "pca_components": chosen.pca.components}


def _quality(run: Run, summaries: Sequence[BlockSummary], n_modes: int) -> dict[str, Any]:
    tensors = np.zeros((len(run.layout.weights), N_TOTALS))
    modes = np.zeros((n_modes, N_TOTALS))
    for summary in summaries:
        modes += summary.modes
        for tensor, totals in summary.tensors.items():
            tensors[tensor] += totals

    def plain(row: NDArray[np.float64]) -> list[float]:
        return [int(row[0]), *row[1:].tolist()]

    names = [entry.name for entry in run.layout.weights]
    return {
        "tensors": {name: plain(row) for name, row in zip(names, tensors, strict=True)},
        "modes": [plain(row) for row in modes],
    }


@contextlib.contextmanager
def _hashing_ahead(run: Run, rows: NDArray[np.int64]) -> Iterator[None]:
    """Meanwhile, let another thread hash what the first block will read."""
    enough = threading.Event()

    def hash_rows() -> None:
        for row in rows:
            if not enough.is_set():
                with contextlib.suppress(OSError):  # the block will meet it again
                    run.archive.check(WEIGHTS, np.array([row]), (0, 1))

    with ThreadPoolExecutor(1) as beside:
        beside.submit(hash_rows)
        try:
            yield
        finally:
            enough.set()


def default_name(modes: Cut, online: bool, references: Kind = "weight") -> str:
    """What a fit is called by default, where that is free."""
    parts = ["online"] if online else []
    if references != "weight":
        parts.append(references)
    if isinstance(modes, str):
        return "-".join([*parts, "auto" if modes == "auto" else f"explained{modes.removesuffix('%')}"])
    if isinstance(modes, DistanceCut):
        return "-".join([*parts, f"cut{modes.divisor:g}"]).replace("+", "")
    return f"{'-'.join(parts) or 'modes'}{modes}"


def _writer_for(run: Run, base: str, name: str | None, shape: FitShape) -> FitWriter:
    """The writer of the fit by its name, or by the first that is free of `base`, `base`-2, … and not being written."""
    taken = run.fits
    with run.results.saving() as objects:
        if name is not None:
            return FitWriter(objects, name, shape)
        for number in itertools.count(1):
            free = base if number == 1 else f"{base}-{number}"
            if free not in taken:
                with contextlib.suppress(PathExistsError, RunLockedError):
                    return FitWriter(objects, free, shape)
    raise AssertionError("count() does not end")
