"""Whether this process was forked off one that had imported trajkit, as a data loader's workers are.

Thread pools of Rust libraries do not live on in a forked child: a call that needs one would wait for ever.
"""

from __future__ import annotations

import os

_forked = False


def in_forked_child() -> bool:
    """Whether this process is such a child."""
    return _forked


def _remember() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember)
