"""Recorded or modelled weights as checkpoint files, written to the side and renamed when whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..decomposition import Decomposition
from ..errors import InputError, PathExistsError
from ..layout import ITEMSIZE, TensorEntry
from ..run import PathLike, Run, load_weights, open_run
from ..store.format import WEIGHTS

SAFETENSORS_DTYPE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}

# Values held at a time while a tensor is streamed: 16 MiB of float32.
SLAB = 4 << 20


def write_checkpoint(
    run: Run | PathLike, epoch: int, path: PathLike, fit: str | None = None, overwrite: bool = False
) -> Path:
    """Write the weights of an epoch, as recorded or as modelled by a saved `fit`, with the buffers recorded then.

    ``.safetensors`` is streamed tensor by tensor, ``.pt`` holds the model in memory once. Names, shapes and dtypes are
    the original ones; tied tensors stand under each of their names. The file appears whole or not at all.

    Raises `InputError` for another suffix, `PathExistsError` where the file exists and `overwrite` is False,
    `UnknownNameError` for an epoch or fit that does not exist.
    """
    run = run if isinstance(run, Run) else open_run(run)
    target = Path(path)
    row = run.row_of(epoch)
    decomposition = None if fit is None else run.fit(fit)
    if target.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{target}: expected a name that ends in .safetensors or .pt; choose one of these")
    if target.is_dir():
        raise InputError(f"{target}: a folder, expected a file to write; choose another name")
    if target.exists() and not overwrite:
        raise PathExistsError(f"{target}: exists already; choose another name or overwrite it (--force)")
    with _replacing(target) as file:
        if target.suffix == ".pt":
            torch.save(load_weights(run, epoch, fit), file)
        else:
            _write_safetensors(file, run, epoch, fit, _values_of(run, epoch, row, decomposition))
    return target


Values = Callable[[TensorEntry], Iterator[NDArray[Any]]]


def _values_of(run: Run, epoch: int, row: int, decomposition: Decomposition | None) -> Values:
    """How to get a tensor's stored values, piece by piece; small tensors come out of one slab of the vector."""
    buffers = run.stored_buffers(epoch)

    @lru_cache(maxsize=1)
    def slab(number: int) -> NDArray[Any]:
        start, stop = number * SLAB, min((number + 1) * SLAB, run.layout.n_weights)
        if decomposition is None:
            return np.asarray(run.archive.read(WEIGHTS, [row], (start, stop))[0])
        return np.asarray(decomposition.modelled([epoch], start, stop)[0])

    def values(entry: TensorEntry) -> Iterator[NDArray[Any]]:
        if entry.kind == "buffer":
            yield buffers[entry.name].ravel()
            return
        for number in range(entry.offset // SLAB, -(-entry.stop // SLAB)):
            origin = number * SLAB
            yield slab(number)[max(entry.offset - origin, 0) : entry.stop - origin]

    return values


def _write_safetensors(file: IO[bytes], run: Run, epoch: int, fit: str | None, values: Values) -> None:
    """The safetensors format: length of the header, header in JSON, then the tensors without gaps.

    Wide dtypes come first, so that every tensor is aligned. The format has no ties: an alias is written again.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "epoch": str(epoch), **({"fit": fit} if fit else {})}}
    entries = sorted(run.layout.tensors, key=lambda entry: -ITEMSIZE[entry.dtype])
    end = 0
    for entry in entries:
        for name in entry.names:
            begin, end = end, end + entry.size * ITEMSIZE[entry.dtype]
            dtype = SAFETENSORS_DTYPE[entry.dtype]
            header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for entry in entries:
        for _ in entry.names:
            for piece in values(entry):
                file.write(_original_bytes(piece, entry.dtype))


def _original_bytes(values: NDArray[Any], dtype: str) -> memoryview:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    return tensor.view(torch.uint8).numpy().data


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` when the block ends well, and leaves no trace otherwise."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        file = temporary.open("xb")
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
