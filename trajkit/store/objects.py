"""Objects on a local disk: named bytes, created once, replaced atomically, and on the platter when asked."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..digest import digest_of_file
from ..errors import DamagedRunError
from .disk import SoundFile, begin_writing_out, fsync, identity_of
from .format import LOCKS, TEMPORARY
from .lock import WriterLock, is_locked

Bytes = bytes | memoryview

# Some file systems (exFAT, a few network mounts) have no hard links; there the writer's lock alone is the fence.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

DAMAGED_DISK = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN)
"""What a file system says of a file that it cannot give back."""


class DamagedObjectError(DamagedRunError):
    """An object is not what was committed; who knows what it holds says so in its own words."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"object {key} {what}")
        self.key = key
        self.what = what


class LocalObjects:
    """The objects under one directory, by keys such as ``weights/c/12/0``. See `trajkit.store.place.Objects`.

    With `fsync`, what was created and replaced has reached the disk, by its name, once `sync_names` has returned.
    All access of the library passes through these few methods. None follows a symbolic link below the root:
    in the archive of a stranger it could lead anywhere.
    """

    at_a_time = 1

    def __init__(self, root: str | os.PathLike[str], fsync: bool = True, owner: str | None = None) -> None:
        self.root = Path(os.path.abspath(root))  # a training may change its directory
        self.fsync = fsync
        owner = owner or uuid.uuid4().hex
        self._temporary_folder = f"{TEMPORARY}/{owner}"
        self._owner = owner
        self._unsynced: set[Path] = set()
        self._unsynced_lock = threading.Lock()
        self._staged: dict[str, tuple[Path, Bytes]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalObjects, (self.root, self.fsync, self._owner)

    def owned_by(self, owner: str) -> LocalObjects:
        """The same objects, with temporary files of another owner."""
        return LocalObjects(self.root, self.fsync, owner)

    @property
    def above(self) -> list[str]:
        """The folders above the root as prefixes for `sync_names`, the nearest first."""
        return [str(folder) for folder in self.root.parents]

    @property
    def files(self) -> Path:
        """The directory below which `sound_file` has files, by key."""
        return self.root

    def path(self, key: str) -> Path:
        """The file that holds an object; raises `DamagedRunError` where a symbolic link or a device is on the way."""
        here = str(self.root)  # not a Path: this is asked for every object that is read
        for part in key.split("/"):
            here = os.path.join(here, part)
            try:
                mode = os.lstat(here).st_mode
            except (FileNotFoundError, NotADirectoryError):
                break
            if stat.S_ISLNK(mode):
                raise DamagedRunError(f"{here}: a symbolic link inside a run, expected none; put the data in its place")
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a pipe waits for ever
                raise DamagedRunError(f"{here}: a pipe, socket or device inside a run, expected a file; remove it")
        return self.root / key

    def _name(self, key: str) -> Path:
        """Where an object has its name, whatever stands there."""
        folder, _, name = key.rpartition("/")
        return (self.path(folder) if folder else self.root) / name

    def exists(self, key: str) -> bool:
        """Whether there is such an object, or in its place a link or a device, which whoever reads it is told of."""
        try:
            return not stat.S_ISDIR(os.lstat(self._name(key)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def size(self, key: str) -> int | None:
        """Length in bytes, None where there is no such object."""
        found = _status(self.path(key))
        return None if found is None else found.st_size

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return self.path(key).read_bytes()

    def digest(self, key: str) -> str:
        """Hash of an object's content."""
        return digest_of_file(self.path(key))

    def sound_file(self, key: str, length: int, hash: str) -> SoundFile:  # noqa: A002 (as it is called everywhere else)
        """The file that holds an object; raises `DamagedObjectError` unless it has this length and hash."""
        path = self.path(key)
        found = _status(path)  # before it is hashed: a change from here on makes it another file
        if found is None or found.st_size != length:
            raise wrong_length(key, None if found is None else found.st_size, length)
        try:
            content = self.digest(key)
        except FileNotFoundError as error:
            raise DamagedObjectError(key, "is missing") from error
        require_content(key, content, hash)
        return SoundFile(str(path), identity_of(found))

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted; none where there is no such prefix."""
        try:
            return sorted(os.listdir(self.path(prefix)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def lengths(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys of all objects under a prefix, at any depth, and their lengths in bytes."""
        for folder, files in _folders(self.path(prefix)):
            for name in files:
                with contextlib.suppress(FileNotFoundError):  # another process at work
                    yield Path(folder, name).relative_to(self.root).as_posix(), os.lstat(Path(folder, name)).st_size

    def create(self, key: str, *parts: Bytes) -> None:
        """Write a new object; raises `FileExistsError` rather than touch an old one."""
        target = self.ready(key)
        self._remember(target, target.parent)
        self._write(target, *parts)

    def create_atomically(self, key: str, data: Bytes) -> None:
        """As `create`, and the object is never seen half written; its name has reached the disk on return."""
        target = self.ready(key)
        temporary = self._ready_to_appear({key: data})[key]
        try:
            if not _link(temporary, target):
                if target.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._remember(target.parent)
        self.sync_names()

    def replace(self, contents: Mapping[str, Bytes]) -> None:
        """Exchange objects atomically, in their order: a reader sees the old bytes of each or the new ones."""
        targets = {key: self.ready(key) for key in contents}
        temporary = self._ready_to_appear(contents)
        for key, target in targets.items():
            os.replace(temporary[key], target)
            self._remember(target.parent)

    def stage(self, contents: Mapping[str, Bytes]) -> None:
        """Write what is to be created atomically or replaced soon: it reaches the disk with the next `sync_names`.

        So it waits for the disk together with what comes before it, and not once more by itself.
        """
        for key, data in contents.items():
            path = self._temporary(data)
            self._remember(path)
            self._staged[key] = path, data

    def put(self, key: str, *parts: Bytes) -> None:
        """As `replace`, into a folder that exists, and only until `clear_temporary`: `FileNotFoundError` after it.

        So a helper that nobody waits for any more cannot write into what was cleared. It is on the disk after `sync`.
        """
        temporary = self.path(f"{self._temporary_folder}/{uuid.uuid4().hex}")
        self._write(temporary, *parts)
        target = self.path(key)
        os.replace(temporary, target)
        self._remember(target.parent)

    def delete(self, key: str) -> None:
        """Delete an object if it exists; raises `DamagedRunError` where there is a folder in its place."""
        target = self.path(key)
        _require_no_folder(target)
        target.unlink(missing_ok=True)

    def move(self, key: str, target: str) -> None:
        """Give what has this key, if anything has, another key that is free; folders that become empty go.

        A folder, a link or a device that stands in the place of an object is moved, too.
        """
        old = self._name(key)
        if not os.path.lexists(old):
            return
        new = self.ready(target)
        self._remember(old.parent, new.parent)
        if stat.S_ISREG(os.lstat(old).st_mode) and _link(old, new):
            self.sync_names()  # it has both names on the disk before it loses one
            os.unlink(old)
            self._remember(old.parent)
        else:
            os.rename(old, new)
        for above in old.parents:
            if above == self.root or os.listdir(above):
                return
            with contextlib.suppress(OSError):  # somebody is writing there
                os.rmdir(above)
                self._remember(above.parent)

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects under a prefix, and its folders as far as they are empty."""
        for folder, files in reversed(_folders(self.path(prefix))):
            for name in files:
                os.unlink(Path(folder, name))
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def ready_temporary(self) -> None:
        """Make the folder that `put` needs."""
        self.ready(f"{self._temporary_folder}/any")

    def clear_temporary(self) -> None:
        """Delete what an earlier owner of the same name left half written, and let no `put` of its come after."""
        self._staged.clear()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.rename(self.path(self._temporary_folder), self.path(f"{self._temporary_folder}~{uuid.uuid4().hex}"))
        for name in self.names(TEMPORARY):
            if name.startswith(f"{self._owner}~"):  # also of one who was killed right here; no owner's name has a ~
                self.delete_tree(f"{TEMPORARY}/{name}")

    def make_room(self, prefix: str) -> None:
        """Make the folder that `put` needs for objects under a prefix."""
        self.ready(f"{prefix}/0")

    def lock(self, name: str, what: str) -> WriterLock:
        """A lock that nobody else has; raises `RunLockedError` naming who holds `what`."""
        return WriterLock(self.ready(f"{LOCKS}/{name}"), f"{self.root}: {what}")

    def is_locked(self, name: str) -> bool:
        """Whether somebody holds the lock."""
        return is_locked(self.path(f"{LOCKS}/{name}"))

    def ready(self, key: str) -> Path:
        """The file for an object to be written, with its folders made; their names are synced with the others.

        Raises `DamagedRunError` where a file stands in the place of a folder, or a folder in that of the file.
        """
        target = self.path(key)
        _require_no_folder(target)
        folder = target.parent
        while not folder.is_dir():
            self._remember(folder.parent)
            folder = folder.parent
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DamagedRunError(f"{folder}: a file, expected a folder or nothing; remove it") from error
        return target

    def sync(self, keys: Iterable[str]) -> None:
        """Bring objects that were `put` to the disk."""
        self._sync([self.path(key) for key in keys])

    def sync_names(self, *also: str) -> None:
        """Bring what was created or replaced so far to the disk, by its name, and names under the prefixes `also`."""
        with self._unsynced_lock:
            paths, self._unsynced = self._unsynced | {self.root / prefix for prefix in also}, set()
        try:  # without what was cleared since, or is above the root and not ours to open
            self._sync([path for path in paths if os.access(path, os.R_OK)])
        except OSError:
            self._remember(*paths)  # whoever tries again means these, too
            raise

    def _remember(self, *paths: Path) -> None:
        with self._unsynced_lock:
            self._unsynced.update(paths)

    def _sync(self, paths: Iterable[Path]) -> None:
        """Bring files and folders to the disk, inner ones first: what is written out already takes no time."""
        if self.fsync:
            for path in sorted(paths, key=lambda path: (-len(path.parts), path)):
                fsync(path)

    def _ready_to_appear(self, contents: Mapping[str, Bytes]) -> dict[str, Path]:
        """Temporary files with these contents, by key, staged before or new; they have reached the disk."""
        temporary: dict[str, Path] = {}
        late: list[Path] = []
        for key, data in contents.items():
            path, staged = self._staged.pop(key, (None, None))
            if path is None or staged != data:
                path = self._temporary(data)
                late.append(path)
            elif path in self._unsynced:
                late.append(path)
            temporary[key] = path
        self._sync(late)
        return temporary

    def _temporary(self, data: Bytes) -> Path:
        path = self.ready(f"{self._temporary_folder}/{uuid.uuid4().hex}")
        self._write(path, data)
        return path

    def _write(self, path: Path, *parts: Bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(descriptor, view) :]
            if self.fsync:
                begin_writing_out(descriptor)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    """Return what is known of a file, None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _link(file: Path, name: Path) -> bool:
    """Give a file a second name; False where its file system has no such thing."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return False
    return True


def require_length(key: str, found: int | None, committed: int) -> None:
    """Raise `DamagedObjectError` unless an object is there and has the length that was committed."""
    if found != committed:
        raise wrong_length(key, found, committed)


def wrong_length(key: str, found: int | None, committed: int) -> DamagedObjectError:
    """Return the error of an object that is missing, or has another length than the one that was committed."""
    state = "missing" if found is None else f"{found} bytes long"
    return DamagedObjectError(key, f"is {state}, {committed} bytes were committed")


def require_content(key: str, found: str, committed: str) -> None:
    """Raise `DamagedObjectError` unless an object has the hash that was committed."""
    if found != committed:
        raise DamagedObjectError(key, "does not have the content that was committed")


def _folders(top: Path) -> list[tuple[str, list[str]]]:
    """Every folder from `top` down, upper ones first, with the names in it that are no folders, links among them.

    Unlike `os.walk` it does not recurse: a stranger's folders may be nested deeper than Python's stack.
    """
    found: list[tuple[str, list[str]]] = []
    waiting = [str(top)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as scan:
                entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in scan}
        except OSError:  # not there, not ours to look into, or gone meanwhile
            continue
        found.append((here, [name for name, is_folder in entries.items() if not is_folder]))
        waiting += [os.path.join(here, name) for name, is_folder in entries.items() if is_folder]
    return found


def _require_no_folder(target: Path) -> None:
    if target.is_dir():
        raise DamagedRunError(f"{target}: a folder, expected a file or nothing; remove it")
