"""What `torch.save` wrote before it wrote zips: pickles, and the storages after them, loaded as a whole."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..vector import SPREAD, identity, is_spread, refusal
from .pickles import require_bounded_legacy
from .stored import LoadedTensor, StoredTensor, first_line


def load_legacy(path: Path) -> Any:
    """What was saved; raises `InputError` where it is damaged, or holds what could run code."""
    try:
        require_bounded_legacy(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols: what matters raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and loading it could run code; save the model's state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file can raise anything in there
        raise InputError(f"{path}: no checkpoint of tensors ({first_line(error)}); write it again") from error


def as_tensor(value: Any) -> LoadedTensor | None:
    """The tensor that a part of what was saved is, None where it is none."""
    if not isinstance(value, Tensor):
        return None
    refused = refusal(value) or (SPREAD if is_spread(value) else None)
    return LoadedTensor(
        shape=() if value.is_nested else tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        tie=object() if refused or value.numel() == 0 else identity("", value),
        trainable=value.requires_grad if isinstance(value, nn.Parameter) else None,
        refused=refused,
        tensor=value,
    )


def held_by(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor, int, int, int]]:
    """Name, tensor and its bytes; its storage, and the bytes of that."""
    for name, stored in tensors.items():
        if isinstance(stored, LoadedTensor) and stored.refused is None:
            storage = stored.tensor.untyped_storage()
            yield name, stored, stored.tensor.nbytes, storage.data_ptr(), storage.nbytes()
