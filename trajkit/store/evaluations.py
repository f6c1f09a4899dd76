"""Saved evaluations, ``evaluations/<n>``: one group each, whose attribute holds the whole table and its hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..documents import require_fields, require_kind
from ..errors import DamagedRunError
from .format import EVALUATIONS, METADATA, group_document, read_metrics, spell_metrics
from .ledger import ledger_entry
from .origin import Lineage, Origin
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
    """What a function said of a run's weights: a row for each epoch. `fit` is None for recorded weights alone.

    `origin` says what was evaluated, and `number` by which number it was saved; None in evaluations of older versions.
    """

    function: str
    fit: str | None
    evaluated_at: str
    epochs: tuple[EvaluatedEpoch, ...]
    origin: Origin | None = None
    number: str | None = field(default=None, compare=False)

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
        fields = {"function": self.function, "fit": self.fit, "evaluated_at": self.evaluated_at, "epochs": epochs}
        return fields if self.origin is None else {**fields, "of": self.origin.to_json()}

    @classmethod
    def from_json(cls, fields: Any) -> Evaluation:
        """The inverse of `to_json`; raises `ValueError` for fields that are missing or no such values."""
        require_fields(fields, {"function": str, "fit": str | None, "evaluated_at": str, "epochs": list})
        epochs = tuple(map(_epoch, fields["epochs"]))
        origin = Origin.from_json(fields["of"]) if "of" in fields else None
        number = require_kind(fields.get("number"), str | None, "'number'")
        return cls(fields["function"], fields["fit"], fields["evaluated_at"], epochs, origin, number)


def save_evaluation(objects: Objects, evaluation: Evaluation) -> None:
    """Keep an evaluation beside the earlier ones; it exists whole or not at all."""
    if not objects.exists(f"{EVALUATIONS}/{METADATA}"):
        write_documents(objects, {EVALUATIONS: group_document()})
    number = len(evaluation_numbers(objects))
    objects.sync_names("", EVALUATIONS)  # one who was killed may have made the folders
    while True:
        name = f"{number:04d}"
        content = {**evaluation.to_json(), "number": name}
        group = encoded(sealed_group(EVALUATION_ATTRIBUTE, "evaluation", content), EVALUATIONS)
        objects.replace(dict([ledger_entry(EVALUATIONS, name)]))
        try:
            objects.create_atomically(f"{EVALUATIONS}/{name}/{METADATA}", group)
            return
        except FileExistsError:
            number += 1


def read_evaluation(objects: Objects, number: str, lineage: Lineage) -> Evaluation:
    """Read an evaluation by the name of its group.

    Raises `DamagedRunError` where it is damaged, or was not made of this run.
    """
    key = f"{EVALUATIONS}/{number}/{METADATA}"
    try:
        evaluation = Evaluation.from_json(unsealed(read_document(objects, key), EVALUATION_ATTRIBUTE, "evaluation"))
        if evaluation.origin is not None:
            lineage.require(evaluation.origin, (row.epoch for row in evaluation.epochs))
        return evaluation
    except ValueError as error:
        raise DamagedRunError(f"{objects.root}: {key} holds no evaluation ({error}); remove its folder") from error


def evaluation_numbers(objects: Objects) -> list[str]:
    """Names of the groups of the evaluations that exist, rising."""
    return [name for name in objects.names(EVALUATIONS) if objects.exists(f"{EVALUATIONS}/{name}/{METADATA}")]


def _epoch(stored: Any) -> EvaluatedEpoch:
    row = require_fields(stored, {"epoch": int, "recorded": dict, "modelled": dict | None})
    modelled = None if row["modelled"] is None else read_metrics(row["modelled"])
    return EvaluatedEpoch(row["epoch"], read_metrics(row["recorded"]), modelled)
