"""Out-of-core fits of recorded runs: by threads, or by the workers of a Dask cluster."""

from .fitting import fit
from .growing import follow, update

__all__ = ["fit", "follow", "update"]
