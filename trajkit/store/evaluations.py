"""Saved evaluations, ``evaluations/<n>``: one group each, whose attribute holds the whole table and its hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..documents import require_fields
from ..errors import DamagedRunError
from .format import EVALUATIONS, METADATA, group_document, read_metrics, spell_metrics
from .place import Objects
from .root import encoded, read_document, sealed_group, unsealed, write_documents

EVALUATION_ATTRIBUTE = "trajkit_evaluation"


@dataclass(frozen=True)
class EvaluatedEpoch:
    """Metrics of the recorded weights at one epoch, and of the modelled ones where a fit was evaluated."""

    epoch: int
    recorded: Mapping[str, float]
    modelled: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a function said of a run's weights: a row for each epoch. `fit` is None for recorded weights alone."""

    function: str
    fit: str | None
    evaluated_at: str
    epochs: tuple[EvaluatedEpoch, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with NaN and infinities as strings."""
        epochs = [
            {
                "epoch": row.epoch,
                "recorded": spell_metrics(row.recorded),
                "modelled": None if row.modelled is None else spell_metrics(row.modelled),
            }
            for row in self.epochs
        ]
        return {**vars(self), "epochs": epochs}

    @classmethod
    def from_json(cls, fields: Any) -> Evaluation:
        """The inverse of `to_json`; raises `ValueError` for fields that are missing or no such values."""
        require_fields(fields, {"function": str, "fit": str | None, "evaluated_at": str, "epochs": list})
        return cls(fields["function"], fields["fit"], fields["evaluated_at"], tuple(map(_epoch, fields["epochs"])))


def save_evaluation(objects: Objects, evaluation: Evaluation) -> None:
    """Keep an evaluation beside the earlier ones; it exists whole or not at all."""
    if not objects.exists(f"{EVALUATIONS}/{METADATA}"):
        write_documents(objects, {EVALUATIONS: group_document()})
    group = encoded(sealed_group(EVALUATION_ATTRIBUTE, "evaluation", evaluation.to_json()), EVALUATIONS)
    number = len(_numbers(objects))
    objects.sync_names("", EVALUATIONS)  # one who was killed may have made the folders
    while True:
        try:
            objects.create_atomically(f"{EVALUATIONS}/{number:04d}/{METADATA}", group)
            return
        except FileExistsError:
            number += 1


def read_evaluations(objects: Objects) -> tuple[Evaluation, ...]:
    """All evaluations, oldest first."""
    return tuple(read_evaluation(objects, number) for number in _numbers(objects))


def read_evaluation(objects: Objects, number: str) -> Evaluation:
    """An evaluation by the name of its group; raises `DamagedRunError`."""
    key = f"{EVALUATIONS}/{number}/{METADATA}"
    try:
        return Evaluation.from_json(unsealed(read_document(objects, key), EVALUATION_ATTRIBUTE, "evaluation"))
    except ValueError as error:
        raise DamagedRunError(f"{objects.root}: {key} holds no evaluation ({error}); remove its folder") from error


def _epoch(stored: Any) -> EvaluatedEpoch:
    row = require_fields(stored, {"epoch": int, "recorded": dict, "modelled": dict | None})
    modelled = None if row["modelled"] is None else read_metrics(row["modelled"])
    return EvaluatedEpoch(row["epoch"], read_metrics(row["recorded"]), modelled)


def _numbers(objects: Objects) -> list[str]:
    return [name for name in objects.names(EVALUATIONS) if objects.exists(f"{EVALUATIONS}/{name}/{METADATA}")]
