"""Weights as safetensors: one file, or a folder as Hugging Face has it, streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from numpy.typing import NDArray

from ..errors import InputError, PathExistsError
from ..layout import ITEMSIZE, TensorEntry
from ..tensors import TensorValues, in_original_dtype
from ..weights import Source
from .placing import made, names_in, new_files, require_free_file

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

SUFFIX = ".safetensors"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

SHARD_BYTES = 5 * 10**9
"""Of a file in a folder, if nothing else is asked for."""

Entries = tuple[TensorEntry, ...]


def write_safetensors(source: Source, target: Path, overwrite: bool, shard_bytes: int | None) -> None:
    """Write a file where the name of `target` ends in ``.safetensors``, else a folder; see `write_checkpoint`.

    The format has no ties: an alias is written as a tensor of its own, since `load_state_dict` asks for it. The
    library of Hugging Face leaves aliases out, and ties them again where it finds both and they are equal.
    """
    if target.suffix != SUFFIX:
        _write_folder(source, target, overwrite, split(source.run.layout.tensors, shard_bytes or SHARD_BYTES))
        return
    require_free_file(target, overwrite)
    tensors = source.run.layout.tensors
    if shard_bytes is not None and len(split(tensors, shard_bytes)) > 1:
        raise InputError(
            f"{target}: the tensors have {sum(map(_bytes, tensors))} bytes, a file is to have {shard_bytes} at most"
            " (--max-shard-size); name a folder"
        )
    with new_files(target.parent) as open_aside, open_aside(target.name) as file:
        _write_file(file, tensors, source.values, source.origin)


def _write_folder(source: Source, folder: Path, overwrite: bool, shards: Sequence[Entries]) -> None:
    """``model.safetensors``, or numbered files and their index; what else is in the folder stays as it is."""
    old = [name for name in names_in(folder) if NAMES.fullmatch(name)]
    if old and not overwrite:
        raise PathExistsError(f"{folder / old[0]}: exists already; choose another folder or overwrite it (--force)")
    names = [f"model-{number:05}-of-{len(shards):05}{SUFFIX}" for number in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else [ONE_FILE]
    values = source.values  # one for all files: a slab may reach from one to the next
    with made(folder), new_files(folder, old) as open_aside:
        for name, entries in zip(names, shards, strict=True):
            with open_aside(name) as file:
                _write_file(file, entries, values, source.origin)
        if len(names) > 1:
            with open_aside(INDEX) as file:
                file.write(_index(dict(zip(names, shards, strict=True))))


def split(tensors: Sequence[TensorEntry], shard_bytes: int) -> list[Entries]:
    """The tensors in their order, in groups of at most so many bytes; a larger tensor is a group of its own."""
    groups: list[list[TensorEntry]] = []
    filled = 0
    for entry in tensors:
        if not groups or filled + _bytes(entry) > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += _bytes(entry)
    return [tuple(group) for group in groups]


def _index(files: Mapping[str, Entries]) -> bytes:
    weight_map = {name: file for file, entries in files.items() for entry in entries for name in entry.names}
    total = sum(_bytes(entry) for entries in files.values() for entry in entries)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _write_file(file: IO[bytes], entries: Sequence[TensorEntry], values: TensorValues, origin: dict[str, str]) -> None:
    """The safetensors format: length of the header, header in JSON, then the tensors without gaps.

    Wide dtypes come first, so that every tensor is aligned. They are filled in the order of the vector, each piece
    under all names of its tensor, so that nothing is read twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **origin}}
    places: dict[TensorEntry, list[int]] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: -ITEMSIZE[entry.dtype]):
        for name in entry.names:
            begin, end = end, end + entry.size * ITEMSIZE[entry.dtype]
            dtype = SAFETENSORS_DTYPE[entry.dtype]
            header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
            places.setdefault(entry, []).append(begin)
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    origin_of_data = file.write(len(encoded).to_bytes(8, "little") + encoded)
    for entry in entries:
        written = 0
        for piece in values.pieces(entry):
            content = _original_bytes(piece, entry.dtype)
            for place in places[entry]:
                file.seek(origin_of_data + place + written)
                file.write(content)
            written += content.nbytes


def _original_bytes(values: NDArray[Any], dtype: str) -> memoryview:
    content: memoryview = in_original_dtype(values, dtype).view(torch.uint8).numpy().data
    return content


def _bytes(entry: TensorEntry) -> int:
    """Of a tensor under all its names."""
    return entry.size * ITEMSIZE[entry.dtype] * len(entry.names)
