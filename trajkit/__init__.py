"""trajkit: the trajectory of a training, recorded, decomposed into modes, and given back.

>>> import trajkit
>>> run = trajkit.open_run("data/digits")
>>> fit = trajkit.fit(run, modes=10)
>>> model.load_state_dict(fit.state_dict(epoch=39))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import torch_needed

if TYPE_CHECKING:
    from .checkpoints.importing import import_checkpoints
    from .checkpoints.writing import write_checkpoint
    from .decomposition import Decomposition
    from .errors import TrajkitError
    from .estimator import CMD
    from .health import check
    from .layout import ParameterLayout
    from .pipeline import fit, follow, update
    from .run import Run, RunWriter, open_run
    from .store.repair import repair
    from .store.verify import verify
    from .training.embedded import EmbeddedCMD
    from .training.evaluate import evaluate
    from .training.online import OnlineCMD
    from .training.recorder import Recorder
    from .weights import load_weights

# Loaded when first asked for: torch, zarr and scikit-learn take seconds to import, and nobody needs them all.
_HOMES = {
    "CMD": "estimator",
    "Decomposition": "decomposition",
    "DistanceCut": "kernels.clustering",  # found, but not among the twenty names that are listed
    "EmbeddedCMD": "training.embedded",
    "OnlineCMD": "training.online",
    "ParameterLayout": "layout",
    "Recorder": "training.recorder",
    "Run": "run",
    "RunWriter": "run",
    "TrajkitError": "errors",
    "TrajkitWarning": "advice",  # found, as a filter of warnings needs it, and not listed either
    "check": "health",
    "evaluate": "training.evaluate",
    "fit": "pipeline",
    "follow": "pipeline",
    "import_checkpoints": "checkpoints.importing",
    "load_weights": "weights",
    "open_run": "run",
    "repair": "store.repair",
    "update": "pipeline",
    "verify": "store.verify",
    "write_checkpoint": "checkpoints.writing",
}

__all__ = [
    "CMD",
    "Decomposition",
    "EmbeddedCMD",
    "OnlineCMD",
    "ParameterLayout",
    "Recorder",
    "Run",
    "RunWriter",
    "TrajkitError",
    "check",
    "evaluate",
    "fit",
    "follow",
    "import_checkpoints",
    "load_weights",
    "open_run",
    "repair",
    "update",
    "verify",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trajkit' has no attribute '{name}'")
    with torch_needed(f"trajkit.{name}"):
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
