"""The ledger of results: which fits and evaluations were saved, so that one whose folder is gone is noticed.

Deleting the folder of a fit is a documented way to remove it, so a missing one is worth a note and is no damage. An
entry is a small document, ``epoch/results/<kind>/<name>.json``, which follows from the kind and the name of the result.
It is written before the result exists, so that none is missing after a crash.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..digest import canonical_json
from .format import EVALUATIONS, FITS, LEDGER
from .place import Objects

SUFFIX = ".json"


def ledger_entry(kind: str, name: str) -> tuple[str, bytes]:
    """Return the object that enters a result, of kind ``fits`` or ``evaluations``, and its content."""
    return f"{LEDGER}/{kind}/{name}{SUFFIX}", canonical_json({"kind": kind, "name": name})


def missing_results(objects: Objects) -> Iterator[tuple[str, str]]:
    """Yield kind and name of the results that were entered and of which nothing is there."""
    for kind in (FITS, EVALUATIONS):
        entered = objects.names(f"{LEDGER}/{kind}")
        there = set(objects.names(kind)) if entered else set()
        for entry in entered:
            name = entry.removesuffix(SUFFIX)
            if entry.endswith(SUFFIX) and name not in there:
                yield kind, name
