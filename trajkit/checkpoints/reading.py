"""Checkpoint files as named tensors, told by their content, never running code from them."""

from __future__ import annotations

import pickle
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..vector import identity
from .pickles import require_bounded

ZIP_START = b"PK\x03\x04"

# A tensor takes about 100 bytes of a header. The library itself would read 100 MB, in seconds and half a gigabyte.
HEADER_LIMIT = 16 << 20

# How many tensors may share a byte of a file without being tied: views of each other, such as transposed ones.
OVERLAP_LIMIT = 8

# Where trainers keep the weights among the other things in a checkpoint.
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "module", "weights")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a ``.safetensors`` or ``.pt`` file, mapped from disk where the format allows.

    Raises `InputError` naming the file where it is neither, is damaged, holds no tensors, or could run code.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # to open a pipe waits for ever
            raise InputError(f"{path}: a pipe, socket or device, expected a checkpoint file; check the name")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint file; check it") from error
    # Safetensors first: the length of its header may begin with the byte that begins a pickle.
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and header_bytes <= status.st_size - 8:
        return _read_safetensors(path, header_bytes)
    zipped = start[:4] == ZIP_START
    if zipped or start[:1] == b"\x80":
        return _read_torch(path, zipped)
    raise InputError(
        f"{path}: expected a .safetensors or .pt checkpoint, found {status.st_size} bytes of something else;"
        " check the name, or write it again"
    )


def _read_safetensors(path: Path, header_bytes: int) -> dict[str, Tensor]:
    if header_bytes > HEADER_LIMIT:
        raise InputError(
            f"{path}: a safetensors header of {header_bytes} bytes, at most {HEADER_LIMIT} are read; write it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error}); write it again") from error


def _read_torch(path: Path, zipped: bool) -> dict[str, Tensor]:
    try:
        require_bounded(path, zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: what matters raises
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and loading it could run code; save the model's state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file can raise anything in there
        cure = "save its state_dict()" if "TorchScript" in str(error) else "write it again"
        raise InputError(f"{path}: no checkpoint of tensors ({_first_line(error)}); {cure}") from error
    tensors = _state_dict_in(loaded)
    if tensors is None:
        found = f"a dict with {', '.join(map(str, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise InputError(
            f"{path}: expected a state dict of named tensors, alone or under {', '.join(NESTED_UNDER)},"
            f" found {found[:200]}; save model.state_dict()"
        )
    _require_held(path, tensors)
    return tensors


def _require_held(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where tensors, or all together, claim more values than the file holds."""
    held: dict[int, int] = {}
    asked: dict[Any, int] = {}
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
            continue  # refused later, by what they are
        n_bytes, storage = tensor.numel() * tensor.itemsize, tensor.untyped_storage()
        if n_bytes > storage.nbytes():
            raise InputError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}, the file holds"
                f" {storage.nbytes()} bytes of it; save a contiguous copy"
            )
        held[storage.data_ptr()] = storage.nbytes()
        asked[identity(name, tensor)] = n_bytes
    if sum(asked.values()) > OVERLAP_LIMIT * sum(held.values()):
        raise InputError(
            f"{path}: the tensors have {sum(asked.values())} bytes, the file holds {sum(held.values())} that they"
            " share; save contiguous copies"
        )


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
