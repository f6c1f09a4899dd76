"""The examination of the results of a run, its fits and evaluations, in the run itself or in a folder beside it."""

from __future__ import annotations

from ..errors import DamagedRunError, StorageError, TrajkitError
from ..layout import ParameterLayout
from .damage import Damage
from .evaluations import read_evaluation
from .examination import Examination, document_damage, fit_damage, read_node, reason_of
from .fits import open_fit
from .format import EVALUATIONS, FITS, LEDGER, METADATA, group_document
from .ledger import ledger_entry, missing_results
from .origin import Lineage
from .root import read_small

NO_ORIGIN = "its origin is not recorded, it was made by an older version"


def examine_results(found: Examination) -> None:
    """Examine the fits, the evaluations and the ledger that lie beside the examined run, or in its place."""
    assert found.layout is not None, "it says what results there can be"
    assert found.lineage is not None, "it is what results are compared with"
    _expect_fits(found, found.layout, found.lineage)
    _read_evaluations(found, found.lineage)
    for kind, name in missing_results(found.objects):
        found.notes.append(f"{kind}/{name} is gone: its folder was removed, or saving it was interrupted")


def _expect_fits(found: Examination, layout: ParameterLayout, lineage: Lineage) -> None:
    """The objects of each fit, and which were abandoned: those that neither exist nor are being written."""
    for name in found.objects.names(FITS):
        if name == METADATA:
            continue
        aside = f"{FITS}/{name}"
        key = f"{aside}/{METADATA}"
        busy = found.objects.is_locked(f"fit-{name}")  # asked first: it may be finished between the two looks
        if not found.objects.exists(key):
            if busy:
                continue
            found.abandoned.add(aside)
            tables = [f"{aside}/{version}/mode/objects.json" for version in found.objects.names(aside)]
            if any(found.objects.exists(table) for table in tables):
                what = "is missing: the fit was interrupted at its very end, or it is lost"
                found.damages.append(fit_damage(key, what))
            continue
        try:
            fit = open_fit(found.objects, name, layout, lineage)
            if fit.saved_as != name:
                found.damages.append(_renamed(key, f"fit '{name}': object ", f"fit '{fit.saved_as:.100}'"))
                continue
            table = fit.committed()
        except StorageError:
            raise
        except TrajkitError as error:
            found.damages.append(fit_damage(key, reason_of(found.objects, key, error)))
            continue
        if fit.origin is None:
            found.notes.append(f"fit '{name}': {NO_ORIGIN}")
        else:
            _require_entry(found, FITS, name)
        found.fits[aside] = fit
        found.committed |= table
        documents = {fit.group: group_document(), aside: fit.group_document()}
        documents |= {f"{fit.group}/{array}": document for array, document in fit.documents.items()}
        for path, document in documents.items():
            stored = read_node(found.objects, path)
            found.damages += document_damage(found.objects, path, stored, document, None, aside)


def _read_evaluations(found: Examination, lineage: Lineage) -> None:
    for number in found.objects.names(EVALUATIONS):
        if number == METADATA:
            continue
        key = f"{EVALUATIONS}/{number}/{METADATA}"
        try:
            evaluation = read_evaluation(found.objects, number, lineage)
            if evaluation.origin is None:
                found.notes.append(f"evaluation {number}: {NO_ORIGIN}")
            else:
                _require_entry(found, EVALUATIONS, number)
            if evaluation.number not in (None, number):
                found.damages.append(_renamed(key, "", f"evaluation {evaluation.number:.100}"))
        except DamagedRunError as error:
            cure = "evaluate again, or trajkit repair"
            found.damages.append(
                Damage(key, reason_of(found.objects, key, error), "", cure, aside=f"{EVALUATIONS}/{number}")
            )


def _require_entry(found: Examination, kind: str, name: str) -> None:
    """Add a note where the ledger does not enter a result, and a damage where it says something else."""
    key, content = ledger_entry(kind, name)
    if not found.objects.exists(key):
        found.notes.append(f"{kind}/{name} is not entered in {LEDGER}")
        return
    try:
        if read_small(found.objects, key) != content:
            raise ValueError("another content")
    except (ValueError, DamagedRunError) as error:
        found.damages.append(Damage(key, f"does not enter {kind}/{name} ({reason_of(found.objects, key, error)})"))


def _renamed(key: str, place: str, what: str) -> Damage:
    """Return the finding that a result stands under another name than its own; a repair leaves it where it is."""
    return Damage(key, f"holds {what}: its folder was renamed or exchanged", place, "give the folder its name again")
