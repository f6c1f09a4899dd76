"""Is the content of a recorded run what a training leaves behind? Damage of the archive itself is another question."""

from .checking import check

__all__ = ["check"]
