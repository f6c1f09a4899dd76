"""The ledger of results: which fits and evaluations were saved, so that one whose folder is gone is noticed.

Deleting the folder of a fit is a documented way to remove it, so a missing one is worth a note and no damage. An entry
is a small document, ``epoch/results/<kind>/<name>.json``. Nothing else depends on it: it is written when the result is
there already, without a wait for the disk, and one that is lost only keeps `verify` silent.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime

from .format import EVALUATIONS, FITS, LEDGER
from .place import Objects

SUFFIX = ".json"


def note_result(objects: Objects, kind: str, name: str) -> None:
    """Enter a result that was saved: kind is ``fits`` or ``evaluations``."""
    entry = {"saved_at": datetime.now(UTC).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # the result is safe without it
        objects.replace({ledger_key(kind, name): json.dumps(entry).encode()})


def missing_results(objects: Objects) -> Iterator[tuple[str, str]]:
    """Yield kind and name of the results that were saved and of which nothing is left."""
    for kind in (FITS, EVALUATIONS):
        entered = objects.names(f"{LEDGER}/{kind}")
        there = set(objects.names(kind)) if entered else set()
        for entry in entered:
            name = entry.removesuffix(SUFFIX)
            if entry.endswith(SUFFIX) and name not in there:
                yield kind, name


def ledger_key(kind: str, name: str) -> str:
    """Return the object that enters a result."""
    return f"{LEDGER}/{kind}/{name}{SUFFIX}"
