"""Out-of-core fit: clusters from the probe, then one pass over the archive, block by block."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from dask import config as dask_config
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from dask.system import CPU_COUNT
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from .decomposition import Decomposition
from .errors import InputError, PathExistsError, RunLockedError
from .kernels.affine import References
from .kernels.clustering import Cut, DistanceCut, checked_cut, choose_references, cluster
from .kernels.correlation import correlation_matrix
from .kernels.fused import fit_block_fused
from .kernels.sampling import (
    SAMPLINGS,
    Sampling,
    balanced_counts,
    candidates_suffice,
    checked_sample,
    draw,
    draw_by_variance,
    uniform_counts,
)
from .run import PathLike, Run, open_run
from .store.fits import FitWriter, Stored
from .store.format import PROBE, WEIGHTS, result_rule

Progress = Callable[[int, int], None]


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
) -> Decomposition:
    """Fit CMD to a run and save the fit inside it (Brokman et al. 2024, section 3.1).

    run: a `Run`, or the path of one.
    modes: M, or a `DistanceCut` of the cluster tree. Fewer modes are fitted where the sample has fewer clusters.
    samples: K, how many weights the clusters are found on; all of them if the model has fewer.
    sampling: ``"balanced"`` (half spread equally over tensors, half by their size), ``"uniform"``, or ``"variance"``
        (probability ∝ exp(standard deviation over time), among the probe). Samples come from the run's probe where
        that holds enough of each tensor, so that they cost no pass over the archive; from all weights otherwise.
    seed: of the sampling.
    epochs: labels of the recorded epochs to fit, all by default.
    sample_index: (K,) indices of the weights to use as the sample; `samples`, `sampling` and `seed` do not apply then.
    name: of the fit in the run; ``modes10`` or the like by default, numbered where that exists.
    progress: called with the number of weights done and N.

    Raises `InputError` for settings that cannot be met or weights that are not finite, `PathExistsError` where a fit of
    that name exists, `DamagedRunError` where the archive is damaged. A fit that is interrupted leaves nothing behind.
    """
    run = run if isinstance(run, Run) else open_run(run)
    modes = checked_cut(modes, "modes")
    rows = run.rows_of(epochs)
    if rows.size < 2:
        raise InputError(f"{run.path}: {rows.size} epochs to fit, a correlation needs at least 2; record or name more")
    settings: dict[str, Any] = {"modes": vars(modes) if isinstance(modes, DistanceCut) else modes}
    if sample_index is None:
        sample = _sample(run, rows, samples, sampling, seed)
        settings |= {"samples": int(samples), "sampling": sampling, "seed": int(seed)}
    else:
        sample = checked_sample(sample_index, run.layout.n_weights)
    trajectories = run.columns(sample, rows)
    _require_finite(run, sample, np.isfinite(trajectories))
    magnitude = np.abs(correlation_matrix(trajectories))
    chosen = choose_references(magnitude, cluster(magnitude, modes))
    references = References(trajectories[:, chosen])
    job = _Job(run, rows, references)
    with _writer_for(run, modes, name) as writer:
        summaries = _over_blocks(job, writer, progress)
        attributes = {
            "trajkit": version("trajkit"),
            "fitted_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "epochs": run.epochs[rows].tolist(),
            "layout": run.layout.digest,
            **_quality(run, summaries, chosen.size),
        }
        stored = {key: item for summary in summaries for key, item in summary.stored.items()}
        writer.commit(stored, references.trajectories, sample[chosen], sample, attributes)
    return run.fit(writer.name)


@dataclass(frozen=True)
class _Job:
    """What every block's task needs."""

    run: Run
    rows: NDArray[np.int64]
    references: References


@dataclass(frozen=True)
class _BlockSummary:
    """What comes back from a block: the objects it stored and, per tensor and per mode, size and variations."""

    stored: Stored
    tensors: Mapping[int, NDArray[np.float64]]
    modes: NDArray[np.float64]


def _over_blocks(job: _Job, writer: FitWriter, progress: Progress | None) -> list[_BlockSummary]:
    """Fit all column blocks, as many at a time as there are cores, or dask's setting ``num_workers``."""
    n = job.run.layout.n_weights
    blocks = result_rule(n).objects()
    fit_one = delayed(partial(_fit_one, job, writer))  # bound, or dask would walk through all that a run holds
    tasks = [fit_one(block.start, block.stop) for block in blocks]
    done = 0

    def report(_key: Any, summary: Any, *_rest: Any) -> None:
        nonlocal done
        if progress is not None and isinstance(summary, _BlockSummary):
            done += int(summary.modes[:, 0].sum())
            progress(done, n)

    workers = dask_config.get("num_workers", None) or CPU_COUNT
    # The pool is ours so that leaving it, on Ctrl-C too, waits for the blocks under way: they would write on otherwise.
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1, user_api="blas"), Callback(posttask=report):
        return list(compute(*tasks, scheduler="threads", pool=pool))


def _fit_one(job: _Job, writer: FitWriter, start: int, stop: int) -> _BlockSummary:
    block = job.run.archive.read(WEIGHTS, job.rows, (start, stop))
    fitted = fit_block_fused(block, job.references)
    finite = np.isfinite(fitted.variation) & np.isfinite(fitted.scale)
    if not finite.all():
        bad = int(np.argmin(finite))
        _require_finite(job.run, np.array([start + bad]), np.isfinite(block[:, bad : bad + 1]))
        raise InputError(
            f"{job.run.path}: '{job.run.layout.weight_at(start + bad)}' moves so far beyond its reference that float32"
            " cannot hold its scale; name other weights with sample_index="
        )
    results = {"mode": fitted.mode, "scale": fitted.scale, "mean": fitted.mean, "correlation": fitted.correlation}
    stored = writer.write_block(start, results)
    sums = np.stack([np.ones(stop - start), fitted.variation, fitted.explained])
    n_modes = job.references.trajectories.shape[1]
    modes = np.stack([np.bincount(fitted.mode, row, n_modes).astype(np.float64) for row in sums], axis=1)
    bounds = np.clip(job.run.layout.weight_bounds, start, stop) - start
    inside = np.flatnonzero(np.diff(bounds))
    totals = np.add.reduceat(sums, bounds[inside], axis=1).T
    return _BlockSummary(stored, dict(zip(inside.tolist(), totals, strict=True)), modes)


def _quality(run: Run, summaries: list[_BlockSummary], n_modes: int) -> dict[str, Any]:
    tensors = np.zeros((len(run.layout.weights), 3))
    modes = np.zeros((n_modes, 3))
    for summary in summaries:
        modes += summary.modes
        for tensor, totals in summary.tensors.items():
            tensors[tensor] += totals

    def plain(row: NDArray[np.float64]) -> list[float]:
        return [int(row[0]), float(row[1]), float(row[2])]

    names = [entry.name for entry in run.layout.weights]
    return {
        "tensors": {name: plain(row) for name, row in zip(names, tensors, strict=True)},
        "modes": [plain(row) for row in modes],
    }


def _sample(run: Run, rows: NDArray[np.int64], samples: int, sampling: Sampling, seed: int) -> NDArray[np.int64]:
    """(K,) rising indices, from the probe where it suffices."""
    if sampling not in SAMPLINGS:
        raise InputError(f"sampling is {sampling!r}, expected one of {', '.join(SAMPLINGS)}; choose one")
    for what, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
            raise InputError(f"{what} is {value!r}, expected an integer of at least {least}; choose one")
    rng = np.random.default_rng(seed)
    bounds, probe = run.layout.weight_bounds, run.probe_index
    sizes = np.diff(bounds)
    if sampling == "variance":
        if samples > probe.size and probe.size < run.layout.n_weights:
            raise InputError(
                f"samples is {samples}, variance sampling chooses among the run's {probe.size} probe weights;"
                " ask for fewer or use balanced sampling"
            )
        values = run.archive.read(PROBE, rows, (0, probe.size))
        _require_finite(run, probe, np.isfinite(values))
        spread = values.std(axis=0, dtype=np.float64)
        layer = np.searchsorted(bounds, probe, side="right") - 1
        represents = (sizes / np.maximum(np.bincount(layer, minlength=sizes.size), 1))[layer]
        return draw_by_variance(spread, samples, probe, rng, represents)
    counts = balanced_counts(sizes, samples) if sampling == "balanced" else uniform_counts(sizes, samples, rng)
    return draw(counts, bounds, rng, probe if candidates_suffice(counts, bounds, probe) else None)


def _require_finite(run: Run, index: NDArray[np.int64], finite: NDArray[np.bool_]) -> None:
    """Raise `InputError` naming the first weight of `index` (k,) that is not finite in `finite` (e, k)."""
    if finite.all():
        return
    name = run.layout.weight_at(int(index[np.argmin(finite.all(axis=0))]))
    raise InputError(
        f"{run.path}: '{name}' is not finite at some of the epochs to fit, expected finite weights;"
        " leave those epochs out with epochs="
    )


def _writer_for(run: Run, modes: Cut, name: str | None) -> FitWriter:
    """The writer of the fit by its name, or by the first default name that is free and that nobody else is writing."""
    objects, n_weights = run.archive.objects, run.layout.n_weights
    if name is not None:
        return FitWriter(objects, name, n_weights)
    base = f"cut{modes.divisor:g}".replace("+", "") if isinstance(modes, DistanceCut) else f"modes{modes}"
    for number in itertools.count(1):
        with contextlib.suppress(PathExistsError, RunLockedError):
            return FitWriter(objects, base if number == 1 else f"{base}-{number}", n_weights)
    raise AssertionError("count() does not end")
