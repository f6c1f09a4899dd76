"""What a health check says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "duplicate",
    "missing",
    "order",
    "outlier",
    "constant",
    "still",
    "exploding",
    "nonfinite",
    "unjudged",
    "jump",
    "empty",
]

NAMED = 6
"""Epochs or tensors that a text names, at most."""


@dataclass(frozen=True)
class Finding:
    """Something about the content of a run. `text` says in one line where it is, what it is and what to do."""

    kind: Kind
    epochs: tuple[int, ...]
    """The labels concerned, of epochs that are missing too; empty where it is all of them."""
    tensors: tuple[str, ...]
    """The tensors concerned; empty where it is the epochs as a whole."""
    text: str
    suspicious: bool = True
    """Whether it is a finding, and no note."""


@dataclass(frozen=True)
class HealthReport:
    """What was found in the content of a run."""

    path: Path | str
    epochs: tuple[int, ...]
    """The labels that were checked, rising."""
    findings: tuple[Finding, ...]
    """What is suspicious."""
    notes: tuple[Finding, ...]
    """What is worth to know, and happens in healthy trainings."""
    unchanged: tuple[float, ...] | None
    """Share of the weights, in [0, 1], that have the bits of the epoch before, from the second epoch on; None where
    the weights were not read."""

    @property
    def healthy(self) -> bool:
        """Whether nothing is suspicious."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        shares = None if self.unchanged is None else dict(zip(map(str, self.epochs[1:]), self.unchanged, strict=True))
        return {
            "run": str(self.path),
            "healthy": self.healthy,
            "epochs": list(self.epochs),
            "findings": [_plain(finding) for finding in self.findings],
            "notes": [_plain(finding) for finding in self.notes],
            "unchanged": shares,
        }


def name_epochs(epochs: Sequence[int]) -> str:
    """``epoch 3``, ``epochs 3 and 7``, ``epochs 3, 4, 5, … and 80 (14 of them)``."""
    return f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {_listed(list(map(str, epochs)))}"


def name_tensors(names: Iterable[str]) -> str:
    """``'a'``, ``'a' and 'b'``, …"""
    return _listed([f"'{name}'" for name in names])


def _listed(words: list[str]) -> str:
    count = len(words)
    if count == 1:
        return words[0]
    if count > NAMED:
        return f"{', '.join(words[: NAMED - 1])}, … and {words[-1]} ({count} of them)"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _plain(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in asdict(finding).items() if key != "suspicious"}
