"""The fits and evaluations of a run: those that are saved in it, and those that are kept in a folder beside it.

A run may be one that can only be read, such as a read-only mount or a public bucket. Its results are then kept in
``<folder>/<name of the run>-<8 digits of its identity>``, so that several runs can share a folder. What is there has
the paths that it would have in the run.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import DamagedRunError, InputError, StorageError, UnknownNameError
from ..layout import ParameterLayout
from .evaluations import Evaluation, evaluation_numbers, read_evaluation
from .fits import StoredFit, fit_exists, fit_names, open_fit
from .origin import SHOWN, Lineage
from .place import Objects, PathLike, objects_at

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What a file system says where nothing may be written."""


@dataclass(frozen=True)
class Results:
    """Where the results of a run are: in the run itself, and in a folder beside it where one is given."""

    run: Objects
    beside: Objects | None
    layout: ParameterLayout
    lineage: Lineage

    @contextmanager
    def saving(self) -> Iterator[Objects]:
        """Give the place where new results are saved; raise `StorageError` with the cure where it is read-only."""
        place = self.beside or self.run
        try:
            yield place
        except OSError as error:
            if not isinstance(error, StorageError) and error.errno not in READ_ONLY:
                raise
            reason = error if isinstance(error, StorageError) else f"{place.root}: {error.strerror}"
            raise StorageError(
                f"{reason}; results can be kept elsewhere: results=FOLDER, --results FOLDER or TRAJKIT_RESULTS"
            ) from error

    @property
    def places(self) -> tuple[Objects, ...]:
        """Where results are read; of two of one name, the one in the first place is meant."""
        return (self.run,) if self.beside is None else (self.beside, self.run)

    @property
    def fit_names(self) -> tuple[str, ...]:
        """Names of the saved fits, in order."""
        return tuple(sorted({name for place in self.places for name in fit_names(place)}))

    def fit(self, name: str) -> StoredFit:
        """Open a saved fit.

        Raises `UnknownNameError` naming those that exist, `DamagedRunError` for one that is damaged, or was made of
        another run or of other weights than the run has.
        """
        for place in self.places:
            if fit_exists(place, name):
                return open_fit(place, name, self.layout, self.lineage)
        known = ", ".join(self.fit_names) or "none"
        raise UnknownNameError(f"{self.run.root}: no fit '{name}'; the run has {known}")

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The saved evaluations, those in the run first, each oldest first; raises as `fit` does."""
        found = []
        for _, evaluation in self.looked_at_evaluations():
            if isinstance(evaluation, DamagedRunError):
                raise evaluation
            found.append(evaluation)
        return tuple(found)

    def looked_at_evaluations(self) -> Iterator[tuple[str, Evaluation | DamagedRunError]]:
        """Yield the number of each saved evaluation, and the evaluation, or the error with which it is refused."""
        for place in reversed(self.places):
            for number in evaluation_numbers(place):
                try:
                    yield number, read_evaluation(place, number, self.lineage)
                except DamagedRunError as error:
                    yield number, error


def results_beside(folder: PathLike, run: Objects, lineage: Lineage) -> Objects:
    """Return where in a folder, or under a URL, the results of a run are kept.

    Raises `InputError` where nothing is known of the run's identity.
    """
    if lineage.identity is None:
        raise InputError(
            f"{run.root}: the first commit records are lost, and the identity of the run with them, expected one that"
            " names its results beside it; restore a record from a copy, or save results in the run"
        )
    own = f"{PurePosixPath(str(run.root)).name}-{lineage.identity[:SHOWN]}"
    return objects_at(f"{str(folder).rstrip('/')}/{own}")
