"""Is every stored object what it was when it was committed? `verify` looks at everything and changes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..errors import InputError
from .archive import row_of
from .damage import Damage
from .examination import Examination, Progress
from .examine_results import examine_results
from .examine_run import examine
from .format import FITS
from .place import PathLike, objects_at
from .results import results_beside

Level = Literal["fast", "sampled", "full"]

SAMPLED_SHARE = 0.1
"""Of the objects between the first and the last epoch, that `sampled` hashes."""


@dataclass(frozen=True)
class Verification:
    """What `verify` has found. `leftovers` are keys of an interrupted recording or fit: harmless. `notes` are of
    results: those that were made by older versions, and those whose folders were removed.
    """

    run: Path | str
    level: Level
    epochs: int
    bad_epochs: tuple[int, ...]
    objects: int
    hashed: int
    hashed_bytes: int
    elapsed_s: float
    damages: tuple[Damage, ...]
    leftovers: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def verify(
    place: PathLike, level: Level = "sampled", progress: Progress | None = None, results: PathLike | None = None
) -> Verification:
    """Look for damage in the run at a path or URL: missing, truncated, flipped, swapped or emptied objects.

    level: ``"fast"`` reads all metadata and looks at the length of every object, ``"sampled"`` hashes those of the
        first and the last epoch and a tenth of the others too, ``"full"`` hashes everything.
    progress: called with the bytes hashed and to hash.
    results: as for `open_run`: a folder with fits and evaluations beside the run, which are verified as well.

    A run may be verified while it is recorded. Raises `RunNotFoundError` where there is no run.
    """
    if level not in get_args(Level):
        raise InputError(f"level is {level!r}, expected one of {', '.join(get_args(Level))}; choose one")
    began = time.perf_counter()
    objects = objects_at(place)
    examination = examine(objects, alone=False)
    examined = [examination, *_examined_beside(examination, results)]
    chosen = [_chosen(each, level) for each in examined]
    for each, keys in zip(examined, chosen, strict=True):
        each.hash(keys, progress)
    return Verification(
        run=objects.root,
        level=level,
        epochs=len(examination.records),
        bad_epochs=examination.bad_epochs,
        objects=sum(len(each.committed) for each in examined),
        hashed=sum(map(len, chosen)),
        hashed_bytes=sum(
            each.committed[key].length for each, keys in zip(examined, chosen, strict=True) for key in keys
        ),
        elapsed_s=time.perf_counter() - began,
        damages=tuple(damage for each in examined for damage in each.damages),
        leftovers=tuple(key for each in examined for key in each.leftovers),
        notes=tuple(note for each in examined for note in each.notes),
    )


def _examined_beside(run: Examination, folder: PathLike | None) -> list[Examination]:
    """Return the examination of the results that a folder beside a run has of it; nothing where there is none."""
    if folder is None or run.lineage is None:
        return []
    found = Examination(results_beside(folder, run.objects, run.lineage), layout=run.layout, lineage=run.lineage)
    examine_results(found)
    found.compare_lengths(dict(found.objects.lengths("")))
    found.forget_outdated()
    return [found]


def _chosen(examination: Examination, level: Level) -> list[str]:
    """The objects to hash at a level."""
    sound = examination.undamaged()
    if level == "full":
        return sound
    if level == "fast":
        return []
    chance = np.random.default_rng().random(len(sound))
    ends = {0, len(examination.records) - 1, None}
    return [
        key
        for key, drawn in zip(sound, chance, strict=True)
        if drawn < SAMPLED_SHARE or key.startswith(f"{FITS}/") or row_of(key) in ends
    ]
