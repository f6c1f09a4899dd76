"""Folders of `torch.distributed.checkpoint`.

``.metadata`` is a pickle that says where each part of each tensor stands; ``__<rank>_<n>.distcp`` hold the parts, each
as `torch.save` writes it.

The pickle is read as a description, see `pickles.py`: none of the classes it names is looked up.
"""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..vector import refusal
from . import pickles
from .naming import EPOCH
from .nested import checkpoint_in
from .pickles import Node, describe, naturals, spelled
from .stored import Checkpoint, Kept, StoredFile, StoredTensor, first_line, inside
from .torch_zip import TorchZip

METADATA = ".metadata"

CLASSES = "torch.distributed.checkpoint.metadata."
ALLOWED = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|StorageMeta|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo|collections\.OrderedDict|builtins\.getattr"
    r"|torch\.(Size|strided|(u?int|b?float|bool|complex)\w*)|torch\.serialization\._get_layout"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)

NUMBER_BYTES = 1 << 14
"""At most, of a number that is kept beside the tensors."""

MOST_LEVELS = 32


@dataclass(frozen=True)
class _Part:
    """A part of a tensor: where it begins in it, its shape, and where it stands."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: StoredFile
    begin: int
    length: int

    def open(self, dtype: str) -> StoredTensor:
        """The part as a tensor; raises `InputError` where it is another one than the metadata says."""
        opened = TorchZip(self.file, self.begin, self.length)
        found = opened.tensor(opened.tree)
        if found is None or found.refused is not None or (found.shape, found.dtype) != (self.sizes, dtype):
            said = "no tensor" if found is None else f"a tensor {found.shape} of {found.dtype}"
            raise InputError(
                f"{self.file.path}: {said} at byte {self.begin}, {METADATA} says {self.sizes} of {dtype}; save it again"
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Distributed(StoredTensor):
    """A tensor in parts; one of several parts is put together as a whole."""

    parts: tuple[_Part, ...]
    kept: Kept

    def values(self, start: int, stop: int) -> Tensor:
        """Read from the files."""
        if len(self.parts) == 1:
            return self.parts[0].open(self.dtype).values(start, stop)
        return self.kept.piece(self, start, stop, self._whole)

    def _whole(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        missing = torch.ones(self.shape, dtype=torch.bool)
        for part in self.parts:
            place = tuple(slice(begin, begin + size) for begin, size in zip(part.offsets, part.sizes, strict=True))
            whole[place] = part.open(self.dtype).read()
            missing[place] = False
        if bool(missing.any()):
            raise InputError(f"{self.parts[0].file.path}: the parts of a tensor overlap; save it again")
        return whole


def open_distributed(folder: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint in a folder; raises `InputError` where it is damaged or incomplete."""
    file = StoredFile(inside(folder, METADATA))
    if file.size > pickles.PICKLE_LIMIT:
        raise InputError(f"{file.path}: {file.size} bytes, at most {pickles.PICKLE_LIMIT} are read; save less in one")
    try:
        tree = _Tree(folder, describe(file.read(0, file.size), lambda called: bool(ALLOWED.fullmatch(called)))).tree
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file.path}: holds more than the places of tensors, and loading it could run code ({first_line(error)});"
            " save it again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{file.path}: damaged metadata ({first_line(error)}); save it again") from error
    return checkpoint_in(folder, tree, lambda value: value if isinstance(value, StoredTensor) else None, key)


class _Tree:
    """What was saved as nested dicts, made again from the metadata: tensors, numbers, and None for all else."""

    def __init__(self, folder: Path, metadata: Any) -> None:
        self._folder = folder
        self._files: dict[str, StoredFile] = {}
        self._kept = Kept()
        self.tree: dict[Any, Any] = {}
        _require_node(metadata, "Metadata")
        self._places = self._placed(_require_dict(metadata.field("storage_data")))
        paths = metadata.field("planner_data")
        for name, what in _require_dict(metadata.field("state_dict_metadata")).items():
            if not isinstance(name, str):
                raise ValueError("a name that is no text")
            path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
            self._put(path, self._value(name, path, what))

    def _placed(self, storage_data: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
        """Name and offsets of a part -> file, first byte and length."""
        places = {}
        for index, info in storage_data.items():
            offsets, name = index.field("offset"), info.field("relative_path")
            begin, length = naturals((info.field("offset"), info.field("length")))
            if info.field("transform_descriptors"):
                raise ValueError(f"'{index.field('fqn')}' is transformed, such as compressed; save it as it is")
            if not isinstance(name, str):
                raise ValueError("the name of a file is no text")
            if name not in self._files:
                self._files[name] = StoredFile(inside(self._folder, name))
            if begin + length > self._files[name].size:
                raise ValueError(f"'{index.field('fqn')}' ends beyond {name:.80}")
            places[index.field("fqn"), None if offsets is None else naturals(offsets)] = (name, begin, length)
        if sum(length for _, _, length in places.values()) > sum(file.size for file in self._files.values()):
            raise ValueError("the parts have more bytes than the files")
        return places

    def _value(self, name: str, path: Any, what: Any) -> Any:
        if isinstance(what, Node) and what.called == f"{CLASSES}TensorStorageMetadata":
            return self._tensor(name, what)
        _require_node(what, "BytesStorageMetadata")
        if isinstance(path, tuple) and len(path) == 1 and path[0] in EPOCH:
            file, begin, length = self._places[name, None]
            if length <= NUMBER_BYTES:
                return TorchZip(self._files[file], begin, length).tree
        return None

    def _tensor(self, name: str, what: Node) -> _Distributed:
        shape = naturals(what.field("size"))
        properties = what.field("properties").state
        dtype = spelled(properties[0])
        itemsize = getattr(torch, dtype).itemsize
        parts = []
        for chunk in what.field("chunks"):
            _require_node(chunk, "ChunkStorageMetadata")
            offsets, sizes = naturals(chunk.field("offsets")), naturals(chunk.field("sizes"))
            fits = len(offsets) == len(sizes) == len(shape)
            if not fits or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"'{name:.80}' has a part {sizes} at {offsets}, its shape is {shape}")
            file, begin, length = self._places[name, offsets]
            if math.prod(sizes) * itemsize > length:
                raise ValueError(f"'{name:.80}' has a part {sizes}, {length} bytes are kept of it")
            parts.append(_Part(offsets, sizes, self._files[file], begin, length))
        if sum(math.prod(part.sizes) for part in parts) != math.prod(shape) or not parts:
            raise ValueError(f"'{name:.80}' has parts that do not make up its shape {shape}")
        return _Distributed(
            shape=shape,
            dtype=dtype,
            tie=(self._folder, name),
            parts=tuple(parts),
            kept=self._kept,
            refused=refusal(torch.empty(0, dtype=getattr(torch, dtype))),
        )

    def _put(self, path: Any, value: Any) -> None:
        if not isinstance(path, tuple) or not 0 < len(path) <= MOST_LEVELS:
            raise ValueError("the place of a value is none")
        place = self.tree
        for key in path[:-1]:
            place = _require_dict(place.setdefault(key, {}))
        if path[-1] in place:
            raise ValueError("two values at the same place")
        place[path[-1]] = value


def _require_node(value: Any, name: str) -> None:
    if not isinstance(value, Node) or value.called != f"{CLASSES}{name}":
        raise ValueError(f"a {type(value).__name__} in the place of {name}")


def _require_dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} in the place of a dict")
    return value
