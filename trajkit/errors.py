"""What goes wrong, by kind. Every error is a `TrajkitError` and also the builtin one would expect.

A message says where, what was expected, what was found and the cure, in one line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager


class TrajkitError(Exception):
    """Base of every error that trajkit raises on purpose."""


class InputError(TrajkitError, ValueError):
    """An argument, a model or a file is not what the call can work with."""


class UnknownNameError(TrajkitError, LookupError):
    """A run has no such epoch, tensor, fit or evaluation."""


class TornFileError(InputError):
    """The values of a checkpoint cannot be read: it ends too early, fails a checksum, or was changed meanwhile."""


class LayoutError(InputError):
    """Tensors do not match the layout of the run they are meant for."""


class RunNotFoundError(TrajkitError, FileNotFoundError):
    """There is no run at the path, or no epoch was committed to it yet."""


class PathExistsError(TrajkitError, FileExistsError):
    """Something is in the way, and trajkit never overwrites unasked."""


class RunLockedError(TrajkitError, BlockingIOError):
    """Another writer holds the run."""


class DamagedRunError(TrajkitError, OSError):
    """A stored object is missing, has another length, or does not decode."""


class UnsupportedFormatError(TrajkitError, OSError):
    """The archive was written in a format that this version does not read."""


class StorageError(TrajkitError, OSError):
    """An object store does not answer, or refuses."""


class MemoryBudgetError(TrajkitError, MemoryError):
    """The work needs more memory than it may use."""


class ClusterError(TrajkitError, RuntimeError):
    """The workers of a cluster could not be reached, or died at the work."""


class MissingDependencyError(TrajkitError, ImportError):
    """A package that the work needs is not installed."""


@contextmanager
def torch_needed(what: str) -> Iterator[None]:
    """Raise `MissingDependencyError` where what is done inside cannot import PyTorch."""
    try:
        yield
    except ImportError as error:
        is_torch = error.name.partition(".")[0] == "torch" if error.name else "torch" in str(error)
        if isinstance(error, TrajkitError) or not is_torch:
            raise
        raise MissingDependencyError(
            f"{what} needs PyTorch, which cannot be imported ({error}); install the build that suits the machine:"
            " pip install torch"
        ) from error


def named_type(value: object) -> str:
    """Return how an error names what was given instead of something else: ``None``, or by its type."""
    return "None" if value is None else f"of type {type(value).__name__}"


def listed(names: Collection[str], most: int = 4) -> str:
    """Return names as a message lists them: quoted, and those beyond the first `most` counted."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Say where it was that an input could not be worked with."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from error
