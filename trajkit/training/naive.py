"""Two ways to embed CMD in a training that should not help, to compare with (Brokman et al. 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import InputError
from .embedded import EmbeddedCMD
from .online import OnlineCMD


class OverwritingCMD:
    """Overwrites all weights by the modelled ones, at every `every`-th epoch after the warm-up.

    It is used as `EmbeddedCMD` is; `settings` are those of `OnlineCMD`.
    """

    def __init__(self, model: nn.Module, every: int = 20, **settings: Any) -> None:
        if isinstance(every, bool) or not hasattr(every, "__index__") or every < 1:
            raise InputError(f"every is {every!r}, expected an integer of at least 1; use 20")
        self.online = OnlineCMD(model, **settings)
        self.every = int(every)
        self._model = model

    def step(self) -> None:
        """Take an epoch that was trained, and overwrite the weights where it is time."""
        self.online.update_parameters(self._model)
        if self.online.n_updates > self.online.warmup and self.online.n_updates % self.every == 0:
            self.online.write(self.online.tensors_of(self._model))

    def state_dict(self) -> dict[str, Any]:
        """As `OnlineCMD.state_dict`."""
        return self.online.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `OnlineCMD.load_state_dict`."""
        self.online.load_state_dict(state_dict)


class ReferencesOnly(EmbeddedCMD):
    """Embeds all weights but the references when the warm-up ends: from there on only these are trained.

    `settings` are those of `OnlineCMD`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **settings: Any) -> None:
        super().__init__(model, optimizer, **settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"references_only": True}

    def _is_window(self, n_updates: int) -> bool:
        return n_updates == self.online.warmup

    def _limit(self, changes: NDArray[np.float32]) -> int:
        return int(np.isfinite(changes).sum())
