"""The names of a snapshot in the cache of the Hugging Face hub, whose folder is called by a commit hash.

The cache has ``models--<owner>--<name>/snapshots/<hash>``, and for each revision that was asked for by a name a file
``refs/<name>`` that holds the hash: ``refs/step1000``, ``refs/main``.
"""

from __future__ import annotations

import os
import re
import stat
from itertools import islice
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_REFS = 100_000
"""Number of names that are looked at; a repository has one for each revision that was fetched."""
LONGEST_NAME = 1024
"""Characters of the names of one snapshot together."""

PULL_REQUEST = "pr/"
"""Begin of the name of a revision whose number is that of a proposed change."""


class Refs:
    """The refs of the caches that were asked for, each read once."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, list[str]]] = {}

    def named(self, path: Path) -> Path:
        """Return a path, absolute, with the names of its refs in place of the commit hash of a snapshot."""
        parts = Path(os.path.abspath(path)).parts
        for position, part in enumerate(parts[1:], start=1):
            if parts[position - 1] == "snapshots" and COMMIT.fullmatch(part):
                refs = Path(*parts[: position - 1], "refs")
                names = self._all(refs).get(part, [])
                names = [
                    name for name in names if re.search("[0-9]", name)
                ] or names  # not main, where there is another
                if names:
                    return Path(*parts[:position], " ".join(names).replace("/", " "), *parts[position + 1 :])
        return Path(*parts)

    def _all(self, refs: Path) -> dict[str, list[str]]:
        """Return commit hash -> the names of its refs, sorted."""
        if refs not in self._names:
            found: dict[str, list[str]] = {}
            for file in _files(refs):
                commit = _content(file)
                name = file.relative_to(refs).as_posix()
                if commit is not None and not name.startswith(PULL_REQUEST):
                    found.setdefault(commit, []).append(name)
            self._names[refs] = {commit: sorted(names) for commit, names in found.items()}
        return self._names[refs]


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder, without following a link."""
    found = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return list(islice(found, MOST_REFS))


def _content(file: Path) -> str | None:
    """Return the commit hash in a ref, None where it holds something else."""
    try:
        status = os.lstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > 64:
            return None
        text = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if COMMIT.fullmatch(text) else None
