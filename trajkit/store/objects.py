"""Objects on a local disk: named bytes, created once, replaced atomically, and on the platter when asked."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from .format import TEMPORARY

Bytes = bytes | memoryview

# Some file systems (exFAT, a few network mounts) have no hard links; there the writer's lock alone is the fence.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalObjects:
    """The objects under one directory, by keys such as ``weights/c/12/0``.

    With `fsync`, every write that returned has reached the disk, names of new files included once `sync_names` has
    returned. All writes of the library pass through these few methods.
    """

    def __init__(self, root: Path, fsync: bool = True) -> None:
        self.root = root
        self.fsync = fsync
        self._unsynced: set[Path] = set()

    def path(self, key: str) -> Path:
        """The file that holds an object."""
        return self.root / key

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self.path(key).is_file()

    def size(self, key: str) -> int | None:
        """Length in bytes, None where there is no such object."""
        try:
            return os.stat(self.path(key)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return self.path(key).read_bytes()

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted; none where there is no such prefix."""
        try:
            return sorted(os.listdir(self.path(prefix)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys of all objects under a prefix, at any depth."""
        for folder, _, files in os.walk(self.path(prefix)):
            for name in files:
                yield Path(folder, name).relative_to(self.root).as_posix()

    def create(self, key: str, data: Bytes) -> None:
        """Write a new object; raises `FileExistsError` rather than touch an old one."""
        target = self._ready(key)
        self._write(target, data)
        self._unsynced.add(target.parent)

    def create_atomically(self, key: str, data: Bytes) -> None:
        """As `create`, and the object is never seen half written."""
        target = self._ready(key)
        temporary = self._temporary(data)
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._unsynced.add(target.parent)
        self.sync_names()

    def replace(self, key: str, data: Bytes) -> None:
        """Exchange an object atomically: a reader sees the old bytes or the new ones."""
        target = self._ready(key)
        os.replace(self._temporary(data), target)
        self._unsynced.add(target.parent)

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        self.path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects under a prefix, and its folders as far as they are empty."""
        for folder, _, files in os.walk(self.path(prefix), topdown=False):
            for name in files:
                os.unlink(Path(folder, name))
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def sync_names(self) -> None:
        """Bring the names of files created or replaced so far to the disk."""
        folders, self._unsynced = self._unsynced, set()
        if not self.fsync:
            return
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            if not folder.exists():  # what was created there has been cleared since
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _ready(self, key: str) -> Path:
        target = self.path(key)
        folder = target.parent
        while not folder.is_dir():
            self._unsynced.add(folder.parent)
            folder = folder.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _temporary(self, data: Bytes) -> Path:
        path = self._ready(f"{TEMPORARY}/{uuid.uuid4().hex}")
        self._write(path, data)
        return path

    def _write(self, path: Path, data: Bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if self.fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
