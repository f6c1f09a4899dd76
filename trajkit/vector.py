"""Between named PyTorch tensors and the flat vectors of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import InputError, LayoutError
from .layout import ParameterLayout, TensorEntry, require_floating

# How BatchNorm's statistics are told from weights in a checkpoint file, which does not say what is a parameter.
BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")

# Parts of names that wrappers add: DataParallel and its kin, torch.compile, activation checkpointing, FSDP and Opacus.
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_module")

EXTRA_STATE = "_extra_state"
"""Last part of the name under which a state dict holds what `torch.nn.Module.get_extra_state` gives."""

SPREAD = "is a DTensor, spread over processes; gather it with full_tensor()"

Vectors = tuple[NDArray[np.float32], dict[str, NDArray[Any]]]


def layout_of(tensors: Mapping[str, Tensor], parameters: Mapping[str, bool] | None = None) -> ParameterLayout:
    """Return the layout of named tensors: floating parameters are weights, everything else are buffers.

    parameters: Name -> whether it is trained. Without, as with checkpoint files, every floating tensor is a weight that
        is not BatchNorm's by its name.

    Tensors that share memory are tied: the first name holds the values, the others are its aliases. A tensor that is
    spread over processes has the shape of the whole. Raises `LayoutError` naming a tensor that cannot be recorded.
    """
    tied: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        _require_recordable(name, tensor)
        tied.setdefault(identity(name, tensor), []).append(name)

    def entry(names: list[str]) -> TensorEntry:
        name, tensor = names[0], tensors[names[0]]
        if parameters is None:
            listed, trainable = name.rpartition(".")[2] not in BUFFER_NAMES, True
        else:  # a buffer that is tied to a parameter is trained with it
            listed = any(name in parameters for name in names)
            trainable = any(parameters.get(name, False) for name in names)
        return TensorEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=_dtype(tensor),
            kind="weight" if listed and tensor.is_floating_point() else "buffer",
            trainable=trainable,
            aliases=tuple(names[1:]),
        )

    entries = [entry(names) for names in tied.values()]
    require_floating([found for found in entries if parameters is not None and found.name in parameters])
    return ParameterLayout.of(entries)


def flatten(layout: ParameterLayout, tensors: Mapping[str, Tensor]) -> Vectors:
    """Copies of the tensors as flat vectors on the host: weights (N,), and buffers, stored dtype -> (size,).

    Raises `InputError` for float64 weights that float32 cannot hold exactly, `LayoutError` for a tensor that is spread
    over processes.
    """
    weights = np.empty(layout.n_weights, dtype=np.float32)
    buffers = {dtype: np.empty(size, dtype=dtype) for dtype, size in layout.buffer_sizes.items()}
    for entry in layout.tensors:
        if is_spread(tensors[entry.name]):
            raise LayoutError(f"'{entry.name}' {SPREAD}")
        place(entry, tensors[entry.name], weights if entry.kind == "weight" else buffers.get(entry.vector))
    return weights, buffers


def place(entry: TensorEntry, tensor: Tensor, vector: NDArray[Any] | None) -> None:
    """Copy a tensor to its place in its vector, (size,), which may be None where the tensor has no values.

    Raises `InputError` for float64 weights that float32 cannot hold exactly.
    """
    tensor = tensor.detach()
    if entry.kind == "weight" and entry.dtype == "float64":
        require_exact(entry.name, tensor)
    if entry.size and vector is not None:
        torch.from_numpy(vector[entry.offset : entry.stop]).view(entry.shape).copy_(tensor)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over several processes, as FSDP2 and tensor parallelism leave it."""
    return hasattr(tensor, "placements")


def identity(name: str, tensor: Tensor) -> Any:
    """Return what is equal for tensors that are the same view of the same memory."""
    if tensor.numel() == 0:
        return name
    if is_spread(tensor):  # its part here may be empty, and every process has to find the same ones
        return id(tensor)
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass that has no memory of its own
        pointer = 0
    if pointer == 0:
        return id(tensor)
    return tensor.device, pointer, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_recordable(name: str, tensor: Tensor) -> None:
    refused = refusal(tensor)
    if refused is not None:
        raise LayoutError(f"'{name}' {refused}")


def refusal(tensor: Tensor) -> str | None:
    """Why a tensor cannot be recorded, as it is said after its name; None where it can."""
    for found, refused, cure in (
        ("is not initialised yet", is_lazy(tensor), "run one forward pass first"),
        ("is a nested tensor", tensor.is_nested, "record its parts as tensors of their own"),
        ("is on the meta device and has no values", tensor.is_meta, "load the weights first"),
        ("is quantised", tensor.is_quantized, "record the model before quantisation"),
        (f"is {tensor.layout}", tensor.layout != torch.strided, "make it dense"),
        ("has no memory, which was freed", _is_freed(tensor), "record while its values are there"),
        ("is complex", tensor.is_complex(), "record torch.view_as_real of it"),
    ):
        if refused:
            return f"{found}, expected a dense real tensor with values; {cure}"
    return None


def _is_freed(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor was given back, as FSDP does it: to read it ends the process."""
    if is_lazy(tensor) or tensor.is_meta or is_spread(tensor) or tensor.numel() == 0:
        return False
    try:
        return tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # of a layout, a class or a device that has no plain memory
        return False


def require_exact(name: str, tensor: Tensor) -> None:
    """Raise `InputError` for float64 weights that float32 cannot hold."""
    exact = (tensor.float().double() == tensor) | tensor.isnan()
    if not bool(exact.all()):
        raise InputError(
            f"'{name}' is float64 with values that float32 cannot hold, weights are recorded as float32;"
            " train in float32 or record a copy, model.float()"
        )
