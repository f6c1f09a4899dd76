"""Commands that Ctrl-C reaches, also where these tests run with SIGINT ignored, as in the background of a script."""

from __future__ import annotations

import sys
from collections.abc import Sequence

WITH_DEFAULT_HANDLER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def interruptible(command: Sequence[object]) -> list[str]:
    """The command, in the same process, once SIGINT has its default handler: children inherit that it is ignored."""
    return [sys.executable, "-c", WITH_DEFAULT_HANDLER, *map(str, command)]
