"""Following a folder while a training writes checkpoints into it, and recording each of them when it is whole."""

from __future__ import annotations

import fnmatch
import logging
import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..run import NonFinite, PathLike, RunWriter
from .folders import FILE_SUFFIXES
from .importing import Imported, Importer
from .naming import epoch_in_name, natural
from .reading import open_checkpoint
from .selecting import EVERYTHING, Selection
from .stored import Checkpoint

logger = logging.getLogger("trajkit")

# What is taken for a checkpoint without a pattern: files of these names, and folders with such files in them.
FILES = tuple(f"*{suffix}" for suffix in FILE_SUFFIXES)
IN_FOLDERS = ("*.safetensors", "*.bin", "*.index.json", "*.distcp", ".metadata", "pytorch_model_fsdp_*")

# Names of what is being written, and of what is not meant for others.
UNFINISHED = (".*", "*.tmp", "*.tmp.*", "*.part", "*.partial", "*.incomplete", "*.lock", "*~", "tmp-*", "tmp_*")

PATIENCE_S = 60.0
"""How long a checkpoint that is not whole, and does not grow, holds up those after it."""


@dataclass
class _Candidate:
    """What is known of a file or folder: what it looked like at the last look, since when, and what came of it."""

    path: Path
    looks: Hashable
    since: float
    settled: bool = False
    checkpoint: Checkpoint | None = None
    problem: str | None = None
    done: bool = False

    @property
    def epoch(self) -> int | None:
        """By its name, or else by what it says; None while that is not known."""
        epoch = epoch_in_name(self.path)
        return self.checkpoint.epoch if epoch is None and self.checkpoint is not None else epoch


@dataclass
class Watch:
    """Records the checkpoints that a training writes into a folder, in the order of their numbers.

    A checkpoint is read when it has not grown from one look to the next, and can be read as a whole. One that is not
    whole holds up those with higher numbers, for a minute after it grew last.

    pattern: of the names, as in a shell, also such as ``*/model.safetensors``; by default what has the usual suffixes,
    and folders with such files. until: ends when this epoch, or a later one, is recorded. idle_s: ends when nothing has
    changed for so long.

    unrecorded: path -> why it could not be recorded, as far as known.
    """

    run: PathLike
    folder: Path
    pattern: str | None = None
    until: int | None = None
    idle_s: float | None = None
    interval_s: float = 1.0
    fsync: bool = True
    nonfinite: NonFinite = "raise"
    select: Selection = EVERYTHING
    unrecorded: dict[Path, str] = field(default_factory=dict)
    _candidates: dict[Path, _Candidate] = field(default_factory=dict)
    _recorded: tuple[int, ...] = ()
    _changed: float = 0.0

    def follow(self) -> Iterator[Imported]:
        """Record what is there and what comes, each when it was recorded or healed, until the end that was set.

        Raises `InputError` where the folder does not exist or the pattern is none. A checkpoint that does not fit the
        run, or comes after one with a higher number was recorded, is told and left out.
        """
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder, expected one to watch; make it, or check the name")
        _require_pattern(self.pattern)
        with RunWriter(self.run, fsync=self.fsync, nonfinite=self.nonfinite) as writer:
            importer = Importer(writer, self.select)
            self._recorded, self._changed = writer.epochs, time.monotonic()
            while not self._has_reached():
                self._look()
                yield from self._record(importer, PATIENCE_S)
                if self.idle_s is not None and time.monotonic() - self._changed >= self.idle_s:
                    yield from self._record(importer, 0)
                    break
                if not self._has_reached():
                    time.sleep(self.interval_s)

    def unfinished(self) -> dict[Path, str]:
        """Path -> what is wrong, of those that were not whole, or not looked at, when the watch ended."""
        return {
            item.path: item.problem or "was still being written, or had just come"
            for item in self._candidates.values()
            if self._is_missing(item)
        }

    def _is_missing(self, item: _Candidate) -> bool:
        """Whether it is a checkpoint, as far as one knows, of an epoch that is not recorded, nor told about."""
        return not item.done and item.epoch is not None and item.epoch not in self._recorded

    def _has_reached(self) -> bool:
        return self.until is not None and bool(self._recorded) and self._recorded[-1] >= self.until

    def _look(self) -> None:
        """See what is there, and open what has not changed since the last look."""
        now = time.monotonic()
        found = {path: looks for path in self._paths() if (looks := _looks_of(path)) is not None}
        for path in [path for path in self._candidates if path not in found]:
            gone = self._candidates.pop(path)
            if self._is_missing(gone):
                self._tell(path, "was removed before it was recorded")
        for path, looks in found.items():
            known = self._candidates.get(path)
            if known is None or known.looks != looks:
                self._candidates[path] = _Candidate(path, looks, now)
                self._changed = now
            elif not known.settled:
                known.settled = True
                self._open(known)

    def _open(self, candidate: _Candidate) -> None:
        try:
            candidate.checkpoint = open_checkpoint(candidate.path, self.select.key)
        except InputError as error:
            candidate.problem = str(error)
            return
        if candidate.epoch is None:
            candidate.done = True
            logger.info("%s: left out, its name has no number and it says no epoch or step", candidate.path)

    def _record(self, importer: Importer, patience_s: float) -> Iterator[Imported]:
        """Record what can be recorded next, up to the first that is worth waiting for."""
        waiting = [(item.epoch, item) for item in self._candidates.values() if not item.done]
        known = [(epoch, item) for epoch, item in waiting if epoch is not None]
        for epoch, item in sorted(known, key=lambda pair: (pair[0], pair[1].checkpoint is None, natural(pair[1].path))):
            if self._has_reached():
                return
            if item.checkpoint is None:
                # One that comes too late, or beside one of the same epoch that is whole, is worth no waiting.
                if time.monotonic() - item.since < patience_s and epoch > max(self._recorded, default=epoch - 1):
                    return
                continue
            recorded = self._record_one(importer, epoch, item, item.checkpoint)
            self._recorded = importer.writer.epochs
            if recorded is not None and (recorded.new or recorded.healed):
                self._changed = time.monotonic()
                yield recorded

    def _record_one(self, importer: Importer, epoch: int, item: _Candidate, checkpoint: Checkpoint) -> Imported | None:
        item.done, item.checkpoint = True, None
        if epoch not in self._recorded and epoch < max(self._recorded, default=epoch):
            last = self._recorded[-1]
            self._tell(item.path, f"epoch {epoch} came when epoch {last} was recorded already, and is left out")
            return None
        try:
            recorded = importer.record(item.path, epoch, checkpoint)
        except InputError as error:
            if _looks_of(item.path) == item.looks:
                self._tell(item.path, str(error))
            else:  # it was written anew meanwhile: the next look sees it again
                item.done = False
            return None
        self.unrecorded.pop(item.path, None)
        return recorded

    def _tell(self, path: Path, why: str) -> None:
        self.unrecorded[path] = why
        logger.warning(why if why.startswith(str(path)) else f"{path}: {why}")

    def _paths(self) -> list[Path]:
        """The files and folders that may be checkpoints."""
        try:
            paths = list(self.folder.glob(self.pattern) if self.pattern else self.folder.iterdir())
        except OSError:  # the folder itself is being replaced
            return []
        return [
            path
            for path in paths
            if not any(_matches(part, UNFINISHED) for part in path.relative_to(self.folder).parts)
            and not Path(self.run).absolute().is_relative_to(path.absolute())
            and (self.pattern is not None or _may_be_checkpoint(path))
        ]


def _require_pattern(pattern: str | None) -> None:
    """Raise `InputError` for a pattern that leads out of the folder, or nowhere."""
    if pattern is not None and (not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts):
        raise InputError(f"pattern is {pattern!r}, expected one of names in the folder; write one such as 'epoch*.pt'")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _may_be_checkpoint(path: Path) -> bool:
    if _matches(path.name, FILES):
        return True
    try:
        return path.is_dir() and any(_matches(name, IN_FOLDERS) for name in os.listdir(path))
    except OSError:
        return False


def _looks_of(path: Path) -> Hashable:
    """Changes whenever a file or folder is written to, as far as it shows from outside; None where there is none."""
    try:
        inside = sorted(os.path.join(at, name) for at, _, names in os.walk(path) for name in names)
        found = [(str(path), path.stat()), *((name, os.lstat(name)) for name in inside)]
    except OSError:
        return None
    return tuple((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found)
