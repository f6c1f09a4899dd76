"""What a recording will take, before it is begun or from what it took so far."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..layout import ITEMSIZE, ParameterLayout
from ..sizes import size
from .commit import CommitRecord, LostRecord
from .expected import parts_of_row, row_bytes
from .format import PROBE_INDEX, PROBE_SIZE, all_arrays
from .place import PathLike, is_url


@dataclass(frozen=True)
class Forecast:
    """What the objects of `epochs` epochs take, `recorded` of which are there, in `recorded_bytes`.

    epoch_bytes: of an epoch on average, as recorded; before the first one, what it takes unless it can be packed.
    once_bytes: what only the first epoch has, where that is to come.
    packable: whether zstd may make it less, which the first epoch decides: weights have 16 bits.
    epoch_s: seconds that writing an epoch took on average, without the wait for the disk; None before the first one.
    free_bytes: what is left on the disk, None in an object store or where no place was named.
    """

    n_weights: int
    epochs: int
    recorded: int
    epoch_bytes: int
    recorded_bytes: int
    once_bytes: int
    packable: bool
    epoch_s: float | None
    free_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Of all epochs."""
        return self.recorded_bytes + self.missing_bytes

    @property
    def missing_bytes(self) -> int:
        """Of the epochs that are not recorded yet."""
        return (self.epochs - self.recorded) * self.epoch_bytes + self.once_bytes

    @property
    def has_room(self) -> bool:
        """Whether the disk has room for the epochs that are missing, as far as that is known."""
        return self.free_bytes is None or self.missing_bytes <= self.free_bytes

    def __str__(self) -> str:
        most = "at most " if self.packable else ""
        time = "" if self.epoch_s is None else f" and {self.epoch_s:.2g} s"
        text = f"{self.n_weights:,} weights: {most}{size(self.epoch_bytes)}{time} an epoch"
        text += f", {most}{size(self.total_bytes)} for {self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        if self.recorded:
            text += f", of which {self.recorded} are there"
        if self.free_bytes is None:
            return text
        return f"{text}; {'' if self.has_room else 'only '}{size(self.free_bytes)} are free"


def forecast(
    layout: ParameterLayout,
    epochs: int,
    place: PathLike | None = None,
    records: Sequence[CommitRecord] = (),
    steps: bool = False,
) -> Forecast:
    """What a recording of `epochs` epochs of a layout takes, at a path or URL, where `records` are there.

    Before the first epoch: with `steps` or without. Raises `InputError` for fewer epochs than are recorded.
    """
    if epochs < len(records):
        raise InputError(f"{epochs} epochs are planned, {len(records)} are recorded already; plan for all of them")
    known = [record for record in records if not isinstance(record, LostRecord)]
    recorded_bytes = sum(record.size for record in known)
    documents = all_arrays(layout, min(PROBE_SIZE, layout.n_weights), zstd=False, steps=steps)
    once_bytes = row_bytes(parts_of_row(documents, 0)) - row_bytes(parts_of_row(documents, 1))
    return Forecast(
        n_weights=layout.n_weights,
        epochs=epochs,
        recorded=len(records),
        epoch_bytes=sum(map(_row_size, known)) // len(known) if known else row_bytes(parts_of_row(documents, 1)),
        recorded_bytes=recorded_bytes,
        once_bytes=0 if records else once_bytes,
        packable=not known and any(ITEMSIZE[entry.dtype] == 2 for entry in layout.weights),
        epoch_s=sum(record.seconds for record in known) / len(known) if known else None,
        free_bytes=None if place is None else _free_bytes(place),
    )


def _row_size(record: CommitRecord) -> int:
    """Bytes of the objects of an epoch, without those that only the first one has."""
    return sum(stored.length for key, stored in record.objects.items() if not key.startswith(f"{PROBE_INDEX}/"))


def _free_bytes(place: PathLike) -> int | None:
    """What is left on the disk where a run is or will be; None in an object store, or where the disk does not say."""
    if is_url(place):
        return None
    path = Path(place).absolute()
    try:
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    except OSError:
        return None
