"""Faults on purpose: a watched disk that knows every state a kill or a power cut could leave, and calls that fail.

The library changes a disk through the functions of `os` that are named in `CHANGES`. Here they are intercepted: `Disk`
keeps a model of a folder beside the real one, in which a name and a content are durable only once they were synced, as
POSIX has it, and `Failing` lets one of the calls fail.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

CHANGES = ("open", "write", "pwrite", "ftruncate", "fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir")
NEED_ROOM = ("open", "write", "pwrite", "ftruncate", "fsync", "link", "replace", "mkdir")
"""Those that a full disk may refuse; it lets files be deleted."""

When = Literal["before", "half", "after"]
Tree = dict[str, bytes | None]
"""A folder at rest: path -> content of each file, None for a folder."""


class Crash(BaseException):
    """The process dies here: nothing of the library handles it."""


@dataclass(frozen=True)
class Call:
    """A call of a function of `os` that may change the disk, not done yet."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    original: Callable[..., Any]

    def do(self) -> Any:
        """Do it."""
        return self.original(*self.arguments, **self.options)

    def do_half(self) -> None:
        """Write the first half; a call of another kind is done as a whole or not at all."""
        if self.name in ("write", "pwrite"):
            descriptor, data, *place = self.arguments
            self.original(descriptor, bytes(data)[: len(data) // 2], *place)

    @property
    def changes(self) -> bool:
        """Whether it changes the disk, or what is durable of it."""
        return self.name != "open" or bool(self.arguments[1] & (os.O_CREAT | os.O_TRUNC))


class Interception:
    """A context manager that hands the calls that concern a folder to `handle`, which does them or fails."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self._ours: set[int] = set()
        self._patch = pytest.MonkeyPatch()

    def handle(self, call: Call) -> Any:
        raise NotImplementedError

    def __enter__(self) -> Any:
        for name in CHANGES:
            self._patch.setattr(os, name, self._intercepted(name, getattr(os, name)))
        self._patch.setattr(os, "close", self._closing(os.close))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _intercepted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            if not self._concerns(arguments[0]):
                return original(*arguments, **options)
            result = self.handle(Call(name, arguments, options, original))
            if name == "open":
                self._ours.add(result)
            return result

        return function

    def _closing(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def close(descriptor: int) -> None:
            self._ours.discard(descriptor)  # its number may be given to a file elsewhere
            original(descriptor)

        return close

    def _concerns(self, target: Any) -> bool:
        if isinstance(target, int):
            return target in self._ours
        path = os.path.abspath(os.fsdecode(target))
        return path == self.root or path.startswith(self.root + os.sep)


# --- A disk that is watched


@dataclass(eq=False)
class File:
    content: bytes = b""
    durable: bytes | None = None
    """Its content when it was last synced."""

    def left_by_a_power_cut(self, rng: np.random.Generator | None) -> bytes:
        """What may be there: what was synced at the worst, else cut short, zeroed in part or as a whole, or whole."""
        worst = self.durable or b""
        if rng is None or self.durable == self.content:
            return worst
        content, half = self.content, len(self.content) // 2
        whole_length = [bytes(len(content)), content[:half] + bytes(len(content) - half)]
        return [worst, content[:half], content, *whole_length][rng.integers(5)]


@dataclass(eq=False)
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    earlier: dict[str, list[File | Folder | None]] = field(default_factory=dict)
    """What a name stood for since it was last synced, without what it stands for now."""

    def put(self, name: str, node: File | Folder | None) -> None:
        self.earlier.setdefault(name, []).append(self.names.pop(name, None))
        if node is not None:
            self.names[name] = node

    def sync(self) -> None:
        self.durable, self.earlier = dict(self.names), {}

    def left_by_a_power_cut(self, rng: np.random.Generator | None) -> Iterator[tuple[str, File | Folder]]:
        """The names that may be there: those that were synced at the worst, else any state of each since."""
        for name in sorted(self.durable.keys() | self.earlier.keys()):
            node = self.durable.get(name)
            if rng is not None and name in self.earlier:
                possible = [*self.earlier[name], self.names.get(name)]
                node = possible[rng.integers(len(possible))]
            if node is not None:
                yield name, node


@dataclass(frozen=True)
class Moment:
    """The disk after an operation: what a reader or the next writer may find if the process dies right there."""

    after: str
    acknowledged: int
    """How much had been acknowledged by then."""
    killed: Tree
    """What is there when the process is killed."""
    power_cut: tuple[Tree, ...]
    """What may be there when the power goes off; the worst case first."""


class Disk(Interception):
    """Watches a folder. What is in it when the watch begins is durable.

    `moments` has the state after each operation since, and half through each write. With `power_cuts`, it has the worst
    state after a power cut at each, and one that chance decides at every third. Nothing waits for the real disk.
    """

    def __init__(self, root: Path, power_cuts: bool = False, seed: int = 0) -> None:
        super().__init__(root)
        self.acknowledged = 0
        self._power_cuts = power_cuts
        self._rng = np.random.default_rng(seed)
        self._one_at_a_time = threading.RLock()
        self._top = _stored(root)
        self._open: dict[int, tuple[File | Folder, int]] = {}
        self.moments: list[Moment] = []
        self._note("nothing")

    def acknowledge(self) -> None:
        """What was under way has been promised to the caller."""
        with self._one_at_a_time:
            self.acknowledged += 1
            self._note("the acknowledgement")

    def now(self) -> Tree:
        """What is in the folder."""
        return _tree(self._top, lambda folder: folder.names.items(), lambda file: file.content)

    def after_power_cut(self, rng: np.random.Generator | None = None) -> Tree:
        """What is in the folder after a power cut: the worst case, or a case that `rng` chooses."""
        return _tree(
            self._top, lambda folder: folder.left_by_a_power_cut(rng), lambda file: file.left_by_a_power_cut(rng)
        )

    def handle(self, call: Call) -> Any:
        with self._one_at_a_time:
            result = None if call.name == "fsync" else call.do()
            self._follow(call, result)
            return result

    def _follow(self, call: Call, result: Any) -> None:
        arguments, label = call.arguments, ""
        match call.name:
            case "open":
                label = self._follow_open(arguments[0], arguments[1], result)
            case "write" | "pwrite":
                label = self._follow_write(arguments[0], bytes(arguments[1])[:result], *arguments[2:])
            case "ftruncate":
                file = self._open[arguments[0]][0]
                assert isinstance(file, File)
                file.content = file.content[: arguments[1]].ljust(arguments[1], b"\0")
            case "fsync":
                node = self._open[arguments[0]][0]
                if isinstance(node, Folder):
                    node.sync()
                else:
                    node.durable = node.content
            case "link" | "replace" | "rename":
                (source, name), (target, new_name) = self._place(arguments[0]), self._place(arguments[1])
                node, label = source.names[name], self._key(arguments[1])
                if call.name != "link":
                    source.put(name, None)
                target.put(new_name, node)
            case "unlink" | "rmdir":
                folder, name = self._place(arguments[0])
                folder.put(name, None)
                label = self._key(arguments[0])
            case "mkdir":
                folder, name = self._place(arguments[0])
                folder.put(name, Folder())
                label = self._key(arguments[0])
        if call.changes:
            self._note(f"{call.name} {label}".strip())

    def _follow_open(self, path: Any, flags: int, descriptor: int) -> str:
        node: File | Folder | None
        if os.path.abspath(path) == self.root:
            node = self._top
        else:
            folder, name = self._place(path)
            node = folder.names.get(name)
            if node is None:
                node = File()
                folder.put(name, node)
            elif flags & os.O_TRUNC and isinstance(node, File):
                node.content = b""
        self._open[descriptor] = node, 0
        return self._key(path)

    def _follow_write(self, descriptor: int, data: bytes, place: int | None = None) -> str:
        file, position = self._open[descriptor]
        assert isinstance(file, File)
        start = position if place is None else place
        before = file.content.ljust(start, b"\0")
        for part in (data[: len(data) // 2], data):
            file.content = before[:start] + part + before[start + len(part) :]
            if part is not data:
                self._note(f"half a write of {len(data)} bytes")
        if place is None:
            self._open[descriptor] = file, start + len(data)
        return f"of {len(data)} bytes"

    def _note(self, after: str) -> None:
        chances = [None] if len(self.moments) % 3 else [None, self._rng]
        cuts = [self.after_power_cut(chance) for chance in chances] if self._power_cuts else []
        self.moments.append(Moment(after, self.acknowledged, self.now(), tuple(cuts)))

    def _key(self, path: Any) -> str:
        return os.path.relpath(os.path.abspath(path), self.root)

    def _place(self, path: Any) -> tuple[Folder, str]:
        *parents, name = Path(self._key(path)).parts
        folder = self._top
        for parent in parents:
            inner = folder.names[parent]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name


def _stored(path: Path) -> Folder:
    """The model of a folder that has reached the disk."""
    names: dict[str, File | Folder] = {}
    for entry in path.iterdir():
        if entry.is_dir():
            names[entry.name] = _stored(entry)
        else:
            names[entry.name] = File(entry.read_bytes(), entry.read_bytes())
    return Folder(names, dict(names))


def _tree(
    top: Folder,
    names_of: Callable[[Folder], Any],
    content_of: Callable[[File], bytes],
) -> Tree:
    tree: Tree = {}

    def walk(folder: Folder, prefix: str) -> None:
        for name, node in names_of(folder):
            if isinstance(node, Folder):
                tree[prefix + name] = None
                walk(node, f"{prefix}{name}/")
            else:
                tree[prefix + name] = content_of(node)

    walk(top, "")
    return tree


def tree_of(folder: Path) -> Tree:
    """What is in a real folder."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes() for path in paths}


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder that holds a tree."""
    os.makedirs(folder)
    for path, content in tree.items():
        if content is None:
            os.makedirs(folder / path, exist_ok=True)
        else:
            (folder / path).write_bytes(content)


# --- A disk that fails


class Failing(Interception):
    """Lets the `at`-th operation below a folder fail: before it is done, half through it, or after it.

    at: from 1 on; `calls` counts them, so that a run with `at` beyond all tells how many there are.
    error: what is raised. A `Crash` is raised by all later operations, too, since a dead process does nothing more.
    stays: whether later operations that need room fail, too, as on a full disk.
    only: names of the operations that count and fail.
    """

    def __init__(
        self,
        root: Path,
        at: int,
        error: Callable[[], BaseException] = Crash,
        when: When = "before",
        stays: bool = False,
        only: tuple[str, ...] = CHANGES,
    ) -> None:
        super().__init__(root)
        self.calls = 0
        self._at, self._error, self._when = at, error, when
        self._later = CHANGES if isinstance(error(), Crash) else NEED_ROOM if stays else ()
        self._only = only

    @property
    def failed(self) -> bool:
        """Whether an operation has failed."""
        return self.calls >= self._at

    def handle(self, call: Call) -> Any:
        if not call.changes:
            return call.do()
        if self.failed and call.name in self._later:
            raise self._error()
        if call.name in self._only:
            self.calls += 1
            if self.calls == self._at:
                if self._when == "half":
                    call.do_half()
                elif self._when == "after":
                    call.do()
                raise self._error()
        return call.do()


@contextlib.contextmanager
def not_waiting_for_the_disk() -> Iterator[None]:
    """Let `os.fsync` do nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
