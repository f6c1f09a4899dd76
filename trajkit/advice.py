"""Warnings: what was asked for is done, and a sentence says why it is likely not what was meant."""

from __future__ import annotations

import sys
import warnings


class TrajkitWarning(UserWarning):
    """Something was done as asked, and the result is likely not what was meant."""


def warn(message: str) -> None:
    """Give a `TrajkitWarning` at the line outside of trajkit that made the call."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith("trajkit."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, TrajkitWarning, stacklevel=level)
