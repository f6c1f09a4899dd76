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
from .examination import Examination, Progress, examine
from .format import FITS
from .place import PathLike, objects_at

Level = Literal["fast", "sampled", "full"]

SAMPLED_SHARE = 0.1
"""Of the objects between the first and the last epoch, that `sampled` hashes."""


@dataclass(frozen=True)
class Verification:
    """What `verify` has found. `leftovers` are keys of an interrupted recording or fit: harmless."""

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

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def verify(place: PathLike, level: Level = "sampled", progress: Progress | None = None) -> Verification:
    """Look for damage in the run at a path or URL: missing, truncated, flipped, swapped or emptied objects.

    level: ``"fast"`` reads all metadata and looks at the length of every object, ``"sampled"`` hashes those of the
        first and the last epoch and a tenth of the others too, ``"full"`` hashes everything.
    progress: called with the bytes hashed and to hash.

    A run may be verified while it is recorded. Raises `RunNotFoundError` where there is no run.
    """
    if level not in get_args(Level):
        raise InputError(f"level is {level!r}, expected one of {', '.join(get_args(Level))}; choose one")
    began = time.perf_counter()
    objects = objects_at(place)
    examination = examine(objects, alone=False)
    chosen = _chosen(examination, level)
    examination.hash(chosen, progress)
    return Verification(
        run=objects.root,
        level=level,
        epochs=len(examination.records),
        bad_epochs=examination.bad_epochs,
        objects=len(examination.committed),
        hashed=len(chosen),
        hashed_bytes=sum(examination.committed[key].length for key in chosen),
        elapsed_s=time.perf_counter() - began,
        damages=tuple(examination.damages),
        leftovers=tuple(examination.leftovers),
    )


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
