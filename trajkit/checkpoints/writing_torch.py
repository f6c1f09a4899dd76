"""Weights as a ``.pt`` file: `torch.save` of a state dict."""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights import Source
from .placing import new_files, require_free_file


def write_pt(source: Source, target: Path, overwrite: bool) -> None:
    """Write a state dict, in memory once, whose tied tensors share memory; see `write_checkpoint`."""
    require_free_file(target, overwrite)
    with new_files(target.parent) as open_aside, open_aside(target.name) as file:
        state = source.state_dict()
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise uncovered(error) from None


def uncovered(error: BaseException) -> BaseException:
    """What went wrong first: a full disk or a Ctrl-C, which PyTorch covers with an error that its zip is incomplete."""
    first: BaseException | None = error
    while first is not None and isinstance(first, Exception) and not isinstance(first, OSError):
        first = first.__context__
    return first or error
