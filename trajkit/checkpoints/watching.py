"""Following a folder while a training writes checkpoints into it, and recording each of them when it is whole."""

from __future__ import annotations

import fnmatch
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, TornFileError
from ..run import NonFinite, PathLike, RunWriter
from ..store.sources import Look
from .asked import require_pattern
from .comparing import RecordedEpochs
from .folders import FILE_SUFFIXES
from .importing import Imported, Importer, require_same, state_of
from .labels import Evidence, Label
from .looks import look_at
from .naming import is_copy, natural, stands_for
from .reading import open_checkpoint
from .refs import Refs
from .selecting import EVERYTHING, Selection
from .series import Series
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
    """What is known of a file or folder: its look when it was last looked at, since when, and what came of it.

    whole: whether it could be opened, and be read as far as it was. evidence: of its epoch, once it could be opened.
    problem: why it is not whole.
    """

    path: Path
    look: Look
    since: float
    settled: bool = False
    whole: bool = False
    evidence: Evidence | None = None
    checkpoint: Checkpoint | None = None
    problem: str | None = None
    done: bool = False

    @property
    def copy(self) -> bool:
        """Whether its name says best or last."""
        return is_copy(stands_for(self.path).name)


@dataclass
class Watch:
    """Records the checkpoints that a training writes into a folder, in the order of their labels.

    A checkpoint is read when it has not grown from one look to the next, and can be read as a whole. One that is not
    whole holds up those with higher numbers, for a minute after it grew last.

    pattern: of the names, as in a shell, also such as ``*/model.safetensors``; by default what has the usual suffixes,
    and folders with such files. until: ends when this epoch, or a later one, is recorded from a file that is no best or
    last one. idle_s: ends when nothing has changed for this many seconds. label: a regular expression whose group 1 is
    the epoch.

    unrecorded: path -> why it could not be recorded, as far as known. ignored: the files that were not taken for
    checkpoints at the last look.
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
    label: str | None = None
    unrecorded: dict[Path, str] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)
    _candidates: dict[Path, _Candidate] = field(default_factory=dict)
    _series: Series = field(default_factory=Series)
    _recorded: tuple[int, ...] = ()
    _changed: float = 0.0
    _reached: bool = False

    def follow(self) -> Iterator[Imported]:
        """Record what is there and what comes, each when it was recorded or healed, until the end that was set.

        Raises `InputError` where the folder does not exist, or the pattern or the label is none. A checkpoint that does
        not fit the run, differs from what is recorded, or comes after one with a higher number was recorded, is told
        and left out.
        """
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder, expected one to watch; make it, or check the name")
        _require_pattern(self.pattern)
        pattern = require_pattern(self.label)
        with RunWriter(self.run, fsync=self.fsync, nonfinite=self.nonfinite) as writer:
            importer = Importer(writer, self.select, RecordedEpochs(self.run, self.select))
            self._series = Series(pattern, importer.recorded.next_epoch)
            self._recorded, self._changed = writer.epochs, time.monotonic()
            self._reached = self.until is not None and self.until <= max(self._recorded, default=self.until - 1)
            while not self._reached:
                self._look(importer.recorded)
                yield from self._record(importer, PATIENCE_S)
                if self.idle_s is not None and time.monotonic() - self._changed >= self.idle_s:
                    yield from self._record(importer, 0)
                    break
                if not self._reached:
                    time.sleep(self.interval_s)

    def unfinished(self) -> dict[Path, str]:
        """Path -> what is wrong, of those that were not whole, or not looked at, when the watch ended."""
        return {
            item.path: item.problem or "was still being written, or had just come"
            for item in self._candidates.values()
            if self._is_missing(item)
        }

    def _is_missing(self, item: _Candidate) -> bool:
        """Return whether it is a checkpoint, as far as one knows, that is neither recorded nor told about."""
        if item.done or (item.copy and item.problem is None):
            return False
        if item.evidence is not None and not item.whole:  # it could be opened, and not be read
            return True
        epoch = self._epoch(item)
        return item.copy if epoch is None else epoch not in self._recorded

    def _epoch(self, item: _Candidate) -> int | None:
        """Return the label of a checkpoint, or the one that it has by its name; None where neither is known."""
        if item.evidence is None:
            return self._series.expected(item.path)
        try:
            label = self._series.label(item.evidence)
        except InputError as error:
            item.done = True
            self._tell(item.path, str(error))
            return None
        return None if label is None else label.epoch

    def _look(self, recorded: RecordedEpochs) -> None:
        """See what is there, and open what has not changed since the last look, those with numbers first."""
        now = time.monotonic()
        found = {path: look for path in self._paths() if (look := look_at(path)) is not None}
        for path in [path for path in self._candidates if path not in found]:
            gone = self._candidates.pop(path)
            if self._is_missing(gone):
                self._tell(path, "was removed before it was recorded")
        settled: list[_Candidate] = []
        for path, look in found.items():
            known = self._candidates.get(path)
            if known is None or known.look != look:
                self._candidates[path] = _Candidate(path, look, now)
                self._changed = now
            elif not known.settled:
                known.settled = True
                settled.append(known)
        for item in sorted(settled, key=lambda item: (self._series.expected(item.path) is None, natural(item.path))):
            self._open(item, recorded)

    def _open(self, item: _Candidate, recorded: RecordedEpochs) -> None:
        """Open a checkpoint, unless it was recorded as it is, and find its label."""
        try:
            said = recorded.said(item.look)
            if said is None:
                item.checkpoint = open_checkpoint(item.path, self.select.key)
                said = item.checkpoint.said
            item.evidence, item.whole = Evidence.of(item.path, Refs().named(item.path), said), True
        except InputError as error:
            item.problem = str(error)
            return
        if self._label(item) is None:
            item.done, item.checkpoint = True, None

    def _label(self, item: _Candidate) -> Label | None:
        """Return the label of a checkpoint that was opened; tell why it is left out where it has none."""
        assert item.evidence is not None
        try:
            label = self._series.label(item.evidence)
        except InputError as error:
            self._tell(item.path, str(error))
            return None
        if label is None and (why := self._series.why_not(item.evidence)) is not None and not item.copy:
            self._tell(item.path, why)
        elif label is None:
            logger.info("%s: left out, its name has no number that counts, and it says no epoch or step", item.path)
        return label

    def _record(self, importer: Importer, patience_s: float) -> Iterator[Imported]:
        """Record what can be recorded next, up to the first that is worth waiting for."""
        waiting = [(self._epoch(item), item) for item in self._candidates.values() if not item.done]
        known = [(epoch, item) for epoch, item in waiting if epoch is not None]
        for epoch, item in sorted(
            known, key=lambda pair: (pair[0], pair[1].copy, not pair[1].whole, natural(pair[1].path))
        ):
            if self._reached:
                return
            if item.whole and item.evidence is not None:
                recorded = self._record_one(importer, item, self._series.label(item.evidence))
                self._recorded = importer.writer.epochs
                if recorded is not None and recorded.writes:
                    self._changed = time.monotonic()
                    yield recorded
            if not item.whole and self._is_worth_waiting(epoch, item, patience_s):
                return

    def _is_worth_waiting(self, epoch: int, item: _Candidate, patience_s: float) -> bool:
        """Return whether a checkpoint that is not whole holds up those after it; a late one or a copy does not."""
        is_next = not item.copy and epoch > max(self._recorded, default=epoch - 1)
        return is_next and time.monotonic() - item.since < patience_s

    def _record_one(self, importer: Importer, item: _Candidate, label: Label | None) -> Imported | None:
        """Record, heal or compare a checkpoint; None where that could not be done, or it is a copy."""
        checkpoint = item.checkpoint
        item.done, item.checkpoint = True, None
        if label is None or (item.copy and importer.recorded.is_sound(label.epoch)):
            return None
        if label.epoch not in self._recorded and label.epoch < max(self._recorded, default=label.epoch):
            self._tell_late(item, label.epoch)
            return None
        try:
            done = self._import(importer, item, label, checkpoint)
        except InputError as error:
            self._fail(item, error)
            return None
        self._reached = self._reached or (self.until is not None and not item.copy and label.epoch >= self.until)
        self.unrecorded.pop(item.path, None)
        return done

    def _import(self, importer: Importer, item: _Candidate, label: Label, checkpoint: Checkpoint | None) -> Imported:
        done, recorded = state_of(item.path, label, importer.recorded), importer.recorded
        if done.writes or not (done.lost or recorded.is_unchanged(done.epoch, item.look)):
            checkpoint = checkpoint or open_checkpoint(item.path, self.select.key)
            if done.writes:
                importer.record(done, checkpoint, item.look)
            else:
                importer.keep(done, item.look, require_same(done, checkpoint, recorded, self.select))
        return done

    def _fail(self, item: _Candidate, error: InputError) -> None:
        """Wait for a checkpoint whose values cannot be read, or that is written anew, and tell what else is wrong."""
        if look_at(item.path) != item.look:  # the next look sees it again
            item.done = False
        elif isinstance(error, TornFileError):
            item.done, item.whole, item.problem = False, False, str(error)
        else:
            self._tell(item.path, str(error))

    def _tell_late(self, item: _Candidate, epoch: int) -> None:
        why = f"epoch {epoch} came when epoch {self._recorded[-1]} was recorded already, and is left out"
        if item.copy:
            logger.info("%s: %s", item.path, why)
        else:
            self._tell(item.path, why)

    def _tell(self, path: Path, why: str) -> None:
        self.unrecorded[path] = why
        logger.warning(why if why.startswith(str(path)) else f"{path}: {why}")

    def _paths(self) -> list[Path]:
        """The files and folders that may be checkpoints."""
        try:
            paths = list(self.folder.glob(self.pattern) if self.pattern else self.folder.iterdir())
        except OSError:  # the folder itself is being replaced
            return []
        paths = [
            path
            for path in paths
            if not any(_matches(part, UNFINISHED) for part in path.relative_to(self.folder).parts)
            and not Path(self.run).absolute().is_relative_to(path.absolute())
        ]
        found = [path for path in paths if self.pattern is not None or _may_be_checkpoint(path)]
        self.ignored = sorted(set(paths) - set(found))
        return found


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
