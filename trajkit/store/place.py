"""Where a run lies: in a directory, or under a prefix of an object store. What the archive asks of either."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import InputError, named_type
from .disk import SoundFile
from .objects import Bytes, LocalObjects
from .remote import SCHEMES, RemoteObjects

PathLike = str | os.PathLike[str]


class Lock(Protocol):
    """Held from its construction until `release`, or until it is lost."""

    def release(self) -> object:
        """Let the next one in."""

    @property
    def held(self) -> bool:
        """Whether this process holds it, as far as it knows."""

    @property
    def confirmed(self) -> bool:
        """Whether it holds it still, asked where it is kept."""


class Objects(Protocol):
    """Named bytes: created once, replaced as a whole, and safe when asked. Picklable; threads may share one."""

    @property
    def root(self) -> Path | str:
        """The directory, absolute, or the URL."""

    @property
    def files(self) -> Path:
        """The directory below which `sound_file` has files, by key."""

    @property
    def above(self) -> list[str]:
        """The folders above the root as prefixes for `sync_names`, the nearest first."""

    @property
    def at_a_time(self) -> int:
        """How many requests are worth making side by side."""

    def owned_by(self, owner: str) -> Objects:
        """The same objects, with temporary files of another owner."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object, or in its place something that is none and no folder."""

    def size(self, key: str) -> int | None:
        """Length in bytes, None where there is no such object."""

    def read(self, key: str) -> bytes:
        """All bytes of an object; raises `FileNotFoundError`."""

    def digest(self, key: str) -> str:
        """Hash of an object's content."""

    def sound_file(self, key: str, length: int, hash: str) -> SoundFile:  # noqa: A002
        """A file that holds an object; raises `DamagedObjectError` unless it has this length and hash."""

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted; none where there is no such prefix."""

    def lengths(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys of all objects under a prefix, at any depth, and their lengths in bytes."""

    def create(self, key: str, *parts: Bytes) -> None:
        """Write a new object; raises `FileExistsError` rather than touch an old one."""

    def create_atomically(self, key: str, data: Bytes) -> None:
        """As `create`, and the object is never seen half written; its name is safe on return."""

    def replace(self, contents: Mapping[str, Bytes]) -> None:
        """Exchange objects atomically, in their order: a reader sees the old bytes of each or the new ones."""

    def stage(self, contents: Mapping[str, Bytes]) -> None:
        """Say what is to be created atomically or replaced soon, so that it becomes safe with the next `sync_names`."""

    def put(self, key: str, *parts: Bytes) -> None:
        """Write an object, by one of several helpers that may do the same; it is safe after `sync`."""

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects under a prefix."""

    def move(self, key: str, target: str) -> None:
        """Give what has this key, if anything has, another key that is free."""

    def make_room(self, prefix: str) -> None:
        """Make ready for `put` of objects under a prefix."""

    def ready_temporary(self) -> None:
        """Make ready for `put`."""

    def clear_temporary(self) -> None:
        """Delete what an earlier owner of the same name left half written, and let no `put` of its come after."""

    def sync(self, keys: Iterable[str]) -> None:
        """Make objects that were `put` safe."""

    def sync_names(self, *also: str) -> None:
        """Make what was created or replaced so far safe, by its name, and names under the prefixes `also`."""

    def lock(self, name: str, what: str) -> Lock:
        """A lock that nobody else has; raises `RunLockedError` naming who holds `what`."""

    def is_locked(self, name: str) -> bool:
        """Whether somebody holds the lock."""


def is_url(place: PathLike) -> bool:
    """Whether a place is in an object store, such as ``s3://bucket/runs/first``."""
    return isinstance(place, str) and "://" in place


def require_place(place: object) -> None:
    """Raise `InputError` for what is no path and no URL."""
    if not isinstance(place, str | os.PathLike) or isinstance(os.fspath(place), bytes):
        raise InputError(
            f"the place of a run is {named_type(place)}, expected a path or a URL; pass the path of the run"
        )


def objects_at(place: PathLike, fsync: bool = True, owner: str | None = None) -> Objects:
    """Return the objects of the run at a path or URL; raise `InputError` for a URL of another kind, and for no place.

    fsync: bring every write to the disk; an object store does so always.
    """
    require_place(place)
    if is_url(place):
        return RemoteObjects(str(place))
    scheme, found, rest = os.fspath(place).partition(":/")
    if found and scheme in SCHEMES:
        raise InputError(f"{place}: a path, expected {scheme}://{rest}; write two slashes, and pass it as a str")
    return LocalObjects(place, fsync, owner)
