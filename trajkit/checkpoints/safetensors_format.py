"""``.safetensors``: the length of a header, a header in JSON, then the tensors without gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any

from ..documents import parse, require_fields, require_kind
from ..errors import InputError
from ..layout import ITEMSIZE, MOST_DIMENSIONS
from .naming import EPOCH, GLOBAL_STEP, number_in, said_in
from .stored import Checkpoint, PlainTensor, StoredFile
from .writing_safetensors import SAFETENSORS_DTYPE

# A tensor takes about 100 bytes of a header. The library itself would read 100 MB, in seconds and half a gigabyte.
HEADER_LIMIT = 16 << 20

FIELDS: Mapping[str, type | UnionType] = {"dtype": str, "shape": list, "data_offsets": list}

DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_DTYPE.items()}
# Of a value, also in the dtypes of the format that no layout has.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
BITS |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
BITS |= {theirs: 8 * ITEMSIZE[ours] for theirs, ours in DTYPES.items()}


def is_safetensors(start: bytes, n_bytes: int) -> bool:
    """Whether a file of a length that begins with these 9 bytes is of this format, and as long as its header at least.

    Asked first of all formats: the length of a header may begin with the byte that begins a pickle.
    """
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= n_bytes - 8


def open_safetensors(file: StoredFile) -> Checkpoint:
    """The tensors in the order of the file; raises `InputError` where it is damaged."""
    n_header = int.from_bytes(file.read(0, 8), "little")
    if n_header > HEADER_LIMIT:
        raise InputError(
            f"{file.path}: a safetensors header of {n_header} bytes, at most {HEADER_LIMIT} are read; write it again"
        )
    try:
        header = require_kind(parse(file.read(8, n_header)), dict, "the header")
        metadata = require_kind(header.pop("__metadata__", {}), dict, "__metadata__")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than texts")
        tensors = _tensors(file, header, 8 + n_header)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file.path}: damaged safetensors file ({error}); write it again") from error
    own = said_in(metadata)
    return Checkpoint(file.path, tensors, number_in(metadata, *EPOCH), number_in(metadata, GLOBAL_STEP), own)


def _tensors(file: StoredFile, header: dict[str, Any], begin: int) -> dict[str, PlainTensor]:
    """The tensors that a header places; raises `ValueError` unless they fill the file exactly."""
    places = {name: _place(name, item) for name, item in header.items()}
    tensors: dict[str, PlainTensor] = {}
    end = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"'{name:.80}' begins at byte {start}, the tensor before ends at {end}")
        end = stop
        item = header[name]
        dtype = DTYPES.get(item["dtype"])
        refused = f"is {item['dtype']}, expected one of {', '.join(DTYPES)}; convert it or leave it out"
        tensors[name] = PlainTensor(
            shape=tuple(item["shape"]),
            dtype=dtype or item["dtype"],
            tie=(file.path, name),
            refused=None if dtype else refused,
            file=file,
            begin=begin + start,
        )
    if begin + end != file.size:
        raise ValueError(f"the tensors have {end} bytes, the file has {file.size - begin} for them")
    return tensors


def _place(name: str, item: Any) -> tuple[int, int]:
    """From which byte to which a tensor stands, counted from the end of the header."""
    try:
        require_fields(item, FIELDS)
        shape, (start, stop), dtype = item["shape"], item["data_offsets"], item["dtype"]
        for number in (*shape, start, stop):
            if require_kind(number, int, "a length or an offset") < 0:
                raise ValueError(f"{number} is no length or offset")
        if len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"{len(shape)} dimensions, at most {MOST_DIMENSIONS} are read")
        if dtype not in BITS:
            raise ValueError(f"dtype {dtype:.20} is unknown")
        if math.prod(shape) * BITS[dtype] != 8 * (stop - start):
            raise ValueError(f"{stop - start} bytes are not those of its shape and dtype")
    except ValueError as error:
        raise ValueError(f"'{name:.80}': {error}") from error
    return start, stop
