"""Evaluation of recorded and modelled weights by the user's own function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from ..decomposition import Decomposition
from ..errors import InputError
from ..run import PathLike, Run, as_run
from ..store.evaluations import EvaluatedEpoch, Evaluation, save_evaluation
from ..weights import fit_of, warn_of_uncovered

StateDict = dict[str, Any]
Score = float | Mapping[str, float]


def evaluate(
    run: Run | PathLike,
    function: Callable[[StateDict], Score],
    fit: str | Decomposition | None = None,
    epochs: Iterable[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    results: PathLike | None = None,
) -> Evaluation:
    """Call `function` with the recorded state dict of each epoch, and with the one modelled by `fit`; keep the table.

    function: state dict -> a number, shown as ``score``, or name -> number.
    fit: a saved fit, or its name; without, only the recorded weights are evaluated.
    epochs: labels, all recorded ones by default.
    progress: called with the number of calls done and to do.
    results: as for `open_run`: a folder in which the evaluation is kept, and fits are looked for, beside the run.

    The evaluation is saved in the run, beside earlier ones; where that cannot be written, a warning says so.
    Raises `UnknownNameError` for an epoch or fit that does not exist, `InputError` where the function returns
    something else, or the fit is of another run; what the function raises passes through. Gives a
    `trajkit.TrajkitWarning` for epochs that the fit was not made for.
    """
    if not callable(function):
        raise InputError(f"function is {function!r:.80}, expected one that takes a state dict; pass a function")
    run = as_run(run, results)
    decomposition = None if fit is None else fit_of(run, fit)
    labels = run.epochs[run.rows_of(epochs)].tolist()
    if not labels:
        raise InputError(f"{run.path}: no epochs to evaluate, expected at least one; name some")
    if decomposition is not None:
        warn_of_uncovered(decomposition, labels)
    total = len(labels) * (1 if decomposition is None else 2)
    table: list[EvaluatedEpoch] = []
    done = 0

    def scored(state_dict: StateDict, which: str) -> dict[str, float]:
        nonlocal done
        try:
            score = _named(function(state_dict))
        except Exception as error:
            error.add_note(f"while evaluating the {which} weights of epoch {epoch}")
            raise
        done += 1
        if progress is not None:
            progress(done, total)
        return score

    modelled_ones = None if decomposition is None else decomposition.state_dicts(labels)
    for epoch in labels:
        recorded = scored(run.state_dict(epoch), "recorded")
        modelled = None if modelled_ones is None else scored(next(modelled_ones), "modelled")
        table.append(EvaluatedEpoch(epoch, recorded, modelled))
    evaluation = Evaluation(
        function=f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}",
        fit=None if decomposition is None else decomposition.name,
        evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"),
        epochs=tuple(table),
        origin=run.archive.lineage.origin_of(labels),
    )
    try:
        with run.results.saving() as objects:
            save_evaluation(objects, evaluation)
    except OSError as error:
        warnings.warn(f"the evaluation is not kept in the run: {error}", RuntimeWarning, stacklevel=2)
    return evaluation


def _named(score: Score) -> dict[str, float]:
    try:
        if isinstance(score, Mapping):
            return {str(name): float(value) for name, value in score.items()}
        return {"score": float(score)}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the evaluation function returned {score!r}, expected a number or a dict of numbers; return one of these"
        ) from error
