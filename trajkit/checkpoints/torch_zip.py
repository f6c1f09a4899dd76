"""What `torch.save` writes: a zip with a pickle that says where each tensor stands, and the storages beside it.

The pickle is read as a description (`pickles.py`) and the storages by their offsets, so that nothing is loaded before
it is asked for. As with `torch.load(weights_only=True)`, a pickle with names that are on no list is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..vector import refusal
from . import pickles
from .pickles import Node, Reference, describe, naturals, spelled
from .stored import Kept, PlainTensor, StoredFile, StoredTensor, first_line

ZIP_START = b"PK\x03\x04"
LOCAL_HEADER = 30
"""Bytes of what stands before each member of a zip, without its name."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

# The names that PyTorch takes for safe, and some more that trainers keep beside the weights. None is looked up.
ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter|defaultdict)|_codecs\.encode|argparse\.Namespace|pathlib\.PosixPath"
    r"|builtins\.(bytearray|bool|bytes|complex|dict|float|frozenset|int|list|set|str|tuple)"
    r"|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)"
    r"|(lightning|lightning_fabric|pytorch_lightning)\.(\w+\.)*AttributeDict"
    r"|torch\.(Size|Tensor|device|strided|sparse_\w+|(u?int|b?float|bool|complex|half|double|long|short|q)\w*|per_\w+)"
    r"|torch\.serialization\._get_layout|torch\.nn\.parameter\.(Parameter|Buffer)|torch\._tensor\._rebuild_from_type_v2"
    r"|torch(\.cuda|\.sparse|\.cuda\.sparse|\.storage)?\.([A-Z][A-Za-z0-9]*(Storage|Tensor))"
    r"|torch\._utils\._rebuild_\w+"
)

# Why what these functions make is no tensor of dense values, and what helps.
REFUSED = {
    "_rebuild_sparse": "is sparse, expected a dense real tensor with values; make it dense",
    "_rebuild_qtensor": "is quantised, expected a dense real tensor with values; record the model before quantisation",
    "_rebuild_nested": "is a nested tensor, expected a dense real tensor with values; record its parts",
    "_rebuild_meta": "is on the meta device, expected a dense real tensor with values; load the weights first",
    "_rebuild": "is a tensor of another kind, expected a dense real tensor with values; save a plain copy",
}

LAZY = "is a view with a lazy sign or conjugate, expected a dense real tensor with values; save a clone()"


def is_allowed(called: str) -> bool:
    """Whether a pickle may have this name: it is on the list, or on that of `torch.serialization.add_safe_globals`."""
    return bool(ALLOWED.fullmatch(called)) or called in {
        item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
        for item in torch.serialization.get_safe_globals()
    }


class TorchZip:
    """A zip of `torch.save`, from byte `begin` of a file on; `tree` is what was saved, with `Node` for tensors.

    Raises `InputError` where it is damaged, or holds what could run code.
    """

    def __init__(self, file: StoredFile, begin: int = 0, length: int | None = None) -> None:
        self.file = file
        self.tree: Any = None
        self._kept = Kept()
        length = file.size - begin if length is None else length
        try:
            self._begin, self._end = begin, begin + length
            self._members = _members(file, begin, length)
            self._root = self._only_root()
            self.tree = describe(self._pickle(), is_allowed)
        except InputError:
            raise
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{file.path}: holds more than tensors, and loading it could run code ({first_line(error)});"
                " save the model's state_dict() alone"
            ) from error
        except Exception as error:  # a damaged file can raise anything in there
            cure = "save its state_dict()" if "TorchScript" in str(error) else "write it again"
            raise InputError(f"{file.path}: no checkpoint of tensors ({first_line(error)}); {cure}") from error

    def tensor(self, value: Any) -> StoredTensor | None:
        """The tensor that a part of the tree stands for, None where it is none."""
        if not isinstance(value, Node) or not value.called.startswith(("torch._utils._rebuild", "torch._tensor.")):
            return None
        try:
            return self._tensor(value)
        except Exception as error:  # arguments can be anything
            raise InputError(f"{self.file.path}: a tensor is damaged ({first_line(error)}); write it again") from error

    def _only_root(self) -> str:
        """The folder of the zip that everything stands in."""
        roots = [name.removesuffix("/data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} of data.pkl in the zip, PyTorch writes one")
        if f"{roots[0]}/constants.pkl" in self._members:
            raise ValueError("a TorchScript archive")
        if f"{roots[0]}/byteorder" in self._members:
            where, n_bytes = self._place(f"{roots[0]}/byteorder")
            if self.file.read(where, min(n_bytes, 9)) != b"little":
                raise ValueError("its numbers are not little-endian")
        return roots[0]

    def _pickle(self) -> bytes:
        where, n_bytes = self._place(f"{self._root}/data.pkl")
        if n_bytes > pickles.PICKLE_LIMIT:
            raise ValueError(f"a pickle of {n_bytes} bytes, at most {pickles.PICKLE_LIMIT} are read")
        return self.file.read(where, n_bytes)

    def _place(self, name: str) -> tuple[int, int]:
        """From which byte of the file on a member stands, and its length."""
        member = self._members[name]
        header = self.file.read(self._begin + member.header_offset, LOCAL_HEADER)
        if header[:4] != ZIP_START:
            raise ValueError(f"'{name:.80}' is not where the zip says")
        skipped = LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        where = self._begin + member.header_offset + skipped
        if where + member.file_size > self._end:
            raise ValueError(f"'{name:.80}' ends beyond the file")
        return where, member.file_size

    def _tensor(self, node: Node, depth: int = 4) -> StoredTensor:
        name, arguments = node.called.rpartition(".")[2], node.arguments
        if depth and name == "_rebuild_from_type_v2":
            made_by, kind, inner = arguments[:3]
            if kind.called in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
                return self._tensor(made_by(*inner), depth - 1)
        if depth and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return replace(self._tensor(arguments[0], depth - 1), trainable=bool(arguments[1]))
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            metadata = arguments[6] if len(arguments) > 6 else None
            return self._strided(*arguments[:4], dtype=None, metadata=metadata)
        if name == "_rebuild_tensor_v3":
            metadata = arguments[7] if len(arguments) > 7 else None
            return self._strided(*arguments[:4], dtype=spelled(arguments[6]), metadata=metadata)
        refused = next(why for begin, why in REFUSED.items() if name.startswith(begin) or begin == "_rebuild")
        return _Absent(shape=(0,), dtype="float32", tie=id(node), refused=refused)

    def _strided(
        self, storage: Any, offset: Any, lengths: Any, strides: Any, *, dtype: str | None, metadata: Any
    ) -> StoredTensor:
        kind, key, n_stored = _storage(storage)
        dtype = dtype or STORAGES.get(kind)
        if dtype is None:
            raise ValueError(f"a storage of kind {kind:.40}")
        shape, steps = naturals(lengths), naturals(strides)
        (first,) = naturals((offset,))
        if len(shape) != len(steps):
            raise ValueError(f"{len(shape)} lengths and {len(steps)} strides")
        if f"{self._root}/data/{key}" not in self._members:  # a key is a name in the zip, no path
            raise ValueError(f"storage '{key:.40}' is missing")
        begin, n_bytes = self._place(f"{self._root}/data/{key}")
        itemsize = getattr(torch, dtype).itemsize
        n_values, size = n_bytes // itemsize, math.prod(shape)
        last = first + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
        if n_stored * (itemsize if kind in STORAGES else 1) > n_bytes or (size and last >= n_values):
            raise ValueError(f"shape {shape} and strides {steps} from value {first} on, its storage has {n_values}")
        plain = _InZip(
            shape=shape,
            dtype=dtype,
            tie=(self.file.path, begin, first, shape, steps, dtype) if size else object(),
            refused=LAZY if metadata else refusal(torch.empty(0, dtype=getattr(torch, dtype))),
            file=self.file,
            begin=begin + first * itemsize,
            held=(begin, n_bytes),
        )
        if _is_contiguous(shape, steps):
            return plain
        return _Turned(**vars(plain), steps=steps, span=last - first + 1, kept=self._kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class _InZip(PlainTensor):
    """A contiguous tensor; `held` is the place and the length of its storage."""

    held: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Turned(_InZip):
    """A tensor whose values do not stand in order, such as a transposed one: its part of a storage is read at once."""

    steps: tuple[int, ...]
    span: int
    kept: Kept

    def values(self, start: int, stop: int) -> Tensor:
        """Read from the file, put in order."""
        return self.kept.piece(self, start, stop, self._whole)

    def _whole(self) -> Tensor:
        return PlainTensor.values(self, 0, self.span).as_strided(self.shape, self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Absent(StoredTensor):
    """Something that is called a tensor and cannot be recorded."""

    def values(self, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Never asked for."""
        raise InputError(f"a tensor {self.refused}")


def held_by(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor, int, int, int]]:
    """Name, tensor and its bytes; its storage, and the bytes of that."""
    for name, tensor in tensors.items():
        if isinstance(tensor, _InZip):
            yield name, tensor, tensor.size * getattr(torch, tensor.dtype).itemsize, *tensor.held


def _members(file: StoredFile, begin: int, length: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    with zipfile.ZipFile(_Window(file, begin, length)) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"'{member.filename:.80}' is compressed, PyTorch stores it as it is")
            if member.filename in members:
                raise ValueError(f"'{member.filename:.80}' is in the zip twice")
            members[member.filename] = member
    return members


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: StoredFile, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("before the begin")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._file.read_into(view, self._begin + self._at)
        self._at += len(view)
        return len(view)


def _storage(reference: Any) -> tuple[str, str, int]:
    """Kind, key and number of values that a reference to a storage names."""
    if not isinstance(reference, Reference) or not isinstance(reference.pid, tuple) or len(reference.pid) != 5:
        raise ValueError("a tensor without a storage")
    _, kind, key, _, n_stored = reference.pid
    if not isinstance(key, str):
        raise ValueError("a storage whose key is no text")
    (n_values,) = naturals((n_stored,))
    return str(getattr(kind, "called", kind)).rpartition(".")[2], key, n_values


def _is_contiguous(shape: tuple[int, ...], steps: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = 1
    for length, step in zip(reversed(shape), reversed(steps), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
