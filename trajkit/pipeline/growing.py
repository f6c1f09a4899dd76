"""Fits of runs that grow: a fit takes the epochs recorded since, without reading the old ones again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decomposition import Decomposition
from ..errors import DamagedRunError, InputError, RunNotFoundError
from ..kernels.affine import References
from ..kernels.clustering import checked_cut, setting_of
from ..replay import OnlineDecomposition
from ..run import PathLike, Run, as_run, open_run
from ..store.fits import FitWriter
from ..store.writer import is_being_written
from .fitting import PROBE_BYTES, Fitted, Progress, Resources, fit, save
from .sampling import Chosen, candidates_of, pca_of, require_finite
from .scheduling import Scheduler, bytes_of, scheduler_of
from .tasks import BlockTask, ExtendBlock, FitBlock

if TYPE_CHECKING:
    from .scheduling import Choice

NOT_KEPT = {"references": "weight", "weighting": None, "members": None}
"""Settings that a fit whose references are single weights has without keeping them."""

EXTENDING_BUFFERS = 5
"""The values that are read, and twice their motion in float64."""


def update(
    run: Run | PathLike,
    name: str,
    progress: Progress | None = None,
    *,
    memory: int | str | None = None,
    scheduler: Choice | Scheduler = None,
    results: PathLike | None = None,
) -> Decomposition:
    """Take the epochs recorded since into a saved fit; the references stay, modes and all else may change.

    The result is that of a fit of all these epochs with the same references, to rounding. A fit that was made with
    `updatable` reads the new epochs alone; another one reads all epochs this once, and the new ones from then on.

    run: a `Run`, or the path of one; a `Run` has the epochs that it had when it was opened.
    progress, memory, scheduler, results: as for `fit`.

    The fit is replaced as a whole. Raises as `fit` does, and `UnknownNameError` where the run has no such fit.
    """
    run = as_run(run, results)
    previous = run.fit(name)
    if isinstance(previous, OnlineDecomposition):
        raise InputError(
            f"{run.path}: fit '{name}' is an online one, expected one of `trajkit.fit` without online=True;"
            " it follows later epochs without an update"
        )
    fitted_rows = run.rows_of(previous.epochs)
    sound = run.rows_of(None)
    further = sound[run.epochs[sound] > previous.epochs[-1]]
    if further.size == 0:
        return previous
    if not np.isfinite(previous.reference).all():
        raise DamagedRunError(
            f"{run.path}: fit '{name}' has references that are not finite, expected those that it was fitted to;"
            " fit anew"
        )
    functional = previous.functional
    members = run.columns(functional.index, further)
    require_finite(run, functional.index, np.isfinite(members))
    values = functional.values(members)
    if not np.isfinite(values).all():
        raise InputError(
            f"{run.path}: the references of fit '{name}' have moved beyond what float32 holds, by how they"
            f" moved up to epoch {previous.epochs[-1]}; fit anew"
        )
    references = References(np.concatenate([previous.reference, values]))
    rows = np.concatenate([fitted_rows, further])
    before = previous.stored.shape
    shape = replace(before, n_epochs=rows.size, updatable=True)
    with scheduler_of(scheduler) as chosen:
        resources = Resources(chosen, bytes_of(memory), "cpu")
        n_read, buffers = (further.size, EXTENDING_BUFFERS) if before.updatable else (rows.size, 1)
        plan = resources.plan(run, shape, n_read, buffers, PROBE_BYTES * run.probe_index.size * rows.size)
        pca = pca_of(run, candidates_of(run, rows), functional.n_modes)
        with FitWriter(previous.stored.objects, name, shape, previous.stored) as writer:
            task: BlockTask
            if before.updatable:
                old = References(previous.reference)
                task = ExtendBlock(run, further, references, writer.blocks, plan, previous.stored, old)
            else:
                task = FitBlock(run, rows, references, writer.blocks, plan, resources.device)
            known = Chosen(functional, references.trajectories, previous.curve, pca)
            fitted = Fitted(rows, known, previous.sample_index, dict(previous.settings))
            save(run, writer, task, chosen, progress, fitted)
    return run.fit(name)


def follow(
    path: PathLike,
    name: str = "followed",
    warmup: int = 20,
    interval_s: float = 5.0,
    *,
    progress: Progress | None = None,
    memory: int | str | None = None,
    scheduler: Choice | Scheduler = None,
    results: PathLike | None = None,
    **settings: Any,
) -> Iterator[Decomposition]:
    """Fit a run while a training records it: once after `warmup` epochs, then `update` whenever there are more.

    Yields each fit, the last one when nobody records any more. Started again, it goes on with the fit `name`.

    interval_s: seconds between two looks at the run.
    progress, memory, scheduler, results: as for `fit`.
    settings: of the first `fit`, `modes` and the like; `device`, too, is for that one, updates are made on the host.

    Raises `RunNotFoundError` where nobody has recorded or is recording a run, `InputError` where the run has a fit
    `name` with other settings; otherwise as `fit` and `update` do.
    """
    if not 0 < interval_s < threading.TIMEOUT_MAX or warmup < 2:
        raise InputError(
            f"warmup is {warmup}, interval_s {interval_s}, expected at least 2 and more than 0; correct it"
        )
    with scheduler_of(scheduler) as chosen:
        last: Decomposition | None = None
        while True:
            recording = is_being_written(path)  # asked first: no epoch comes between this and the look at the run
            try:
                run = open_run(path, results)
            except RunNotFoundError:
                if not recording:
                    raise
            else:
                if name in run.fits:
                    known = run.fit(name)
                    if last is None:
                        _require_settings(known, settings)
                    if np.any(run.epochs[run.rows_of(None)] > known.epochs[-1]):
                        last = update(run, name, progress, memory=memory, scheduler=chosen)
                        yield last
                    elif last is None and not recording:
                        yield known
                elif len(run.epochs) >= warmup or not recording:
                    settings["updatable"] = True
                    last = fit(run, name=name, progress=progress, memory=memory, scheduler=chosen, **settings)
                    yield last
            if not recording:
                return
            time.sleep(interval_s)


def _require_settings(known: Decomposition, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` where a fit was made with other settings than these."""
    for key, value in settings.items():
        if value is None:
            continue
        found, wanted = known.settings.get(key, NOT_KEPT.get(key, value)), value
        if key == "modes":
            wanted = setting_of(checked_cut(value, key))
        elif key == "sample_index":
            same = np.array_equal(np.unique(np.asarray(value)), known.sample_index)
            found, wanted = "of these weights" if same else "of others", "of these weights"
        if found != wanted:
            raise InputError(
                f"{known.run.path}: fit '{known.name}' has {key} {found}, not {wanted}, and keeps its settings;"
                " choose another name or leave that out"
            )
