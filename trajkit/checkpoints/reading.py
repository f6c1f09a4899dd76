"""Checkpoint files as named tensors, told by their content, never running code from them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

# Where trainers keep the weights among the other things in a checkpoint.
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "module", "weights")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a ``.safetensors`` or ``.pt`` file, mapped from disk where the format allows.

    Raises `InputError` naming the file where it is neither, is damaged, holds no tensors, or could run code.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint file; check it") from error
    # Safetensors first: the length of its header may begin with the byte that begins a pickle.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return _read_torch(path)
    raise InputError(
        f"{path}: expected a .safetensors or .pt checkpoint, found {size} bytes of something else;"
        " check the name, or write it again"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error}); write it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: what matters raises
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and loading it could run code; save the model's state_dict() alone"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, RecursionError) as error:
        cure = "save its state_dict()" if "TorchScript" in str(error) else "write it again"
        raise InputError(f"{path}: no checkpoint of tensors ({_first_line(error)}); {cure}") from error
    tensors = _state_dict_in(loaded)
    if tensors is None:
        found = f"a dict with {', '.join(map(str, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise InputError(
            f"{path}: expected a state dict of named tensors, alone or under {', '.join(NESTED_UNDER)},"
            f" found {found[:200]}; save model.state_dict()"
        )
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}, the file holds"
                f" {tensor.untyped_storage().nbytes()} bytes of it; save a contiguous copy"
            )
    return tensors


def _state_dict_in(loaded: Any, depth: int = 3) -> dict[str, Tensor] | None:
    if not isinstance(loaded, Mapping) or depth == 0:
        return None
    if loaded and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()):
        return dict(loaded)
    for key in NESTED_UNDER:
        nested = _state_dict_in(loaded.get(key), depth - 1)
        if nested is not None:
            return nested
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
