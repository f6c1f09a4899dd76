"""A checkpoint as it lies on the disk: named tensors that are read when they are asked for, piece by piece."""

from __future__ import annotations

import math
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, UnknownNameError
from .naming import GLOBAL_STEP, NOTHING_SAID, Said, said_in


class StoredFile:
    """A file of a checkpoint, read by offsets: mapped, its pages would count as memory, and a training that writes it
    anew would kill the reader.

    Raises `InputError` where it cannot be read, or is no longer what it was at first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # to open a pipe waits for ever
            raise InputError(f"{path}: a pipe, socket or device, expected a checkpoint file; check the name")
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """The bytes from an offset on."""
        data = bytearray(n_bytes)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset on."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(buffer):
                    n_read = os.preadv(descriptor, [buffer[done:]], offset + done)
                    if n_read == 0:
                        raise InputError(
                            f"{self.path}: ends at byte {offset + done}, more was expected; write it again"
                        )
                    done += n_read
                same = _identity(os.fstat(descriptor)) == self._identity
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(error) from error
        if not same:
            raise InputError(f"{self.path}: was changed while it was read; record it again when it is whole")

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be read ({error.strerror}), expected a checkpoint file; check it")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor(ABC):
    """One tensor of a checkpoint.

    `dtype` is the name that PyTorch gives it. Tensors of equal `tie` are the same view of the same memory. `trainable`
    is None where the file does not say. `refused` says, after the name, why the tensor cannot be recorded,
    None where it can.
    """

    shape: tuple[int, ...]
    dtype: str
    tie: Hashable
    trainable: bool | None = None
    refused: str | None = None

    @property
    def size(self) -> int:
        """Number of values; a 0-d tensor has one."""
        return math.prod(self.shape)

    @abstractmethod
    def values(self, start: int, stop: int) -> Tensor:
        """(stop - start,) values of the flattened tensor, in its dtype, not to be written to."""

    def read(self) -> Tensor:
        """The whole tensor, in its own memory."""
        return self.values(0, self.size).clone().view(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainTensor(StoredTensor):
    """A tensor whose values stand one after the other in a file, from byte `begin` on."""

    file: StoredFile
    begin: int

    def values(self, start: int, stop: int) -> Tensor:
        """Read from the file."""
        dtype = getattr(torch, self.dtype)
        found = torch.empty(stop - start, dtype=dtype)
        if stop > start:
            self.file.read_into(found.view(torch.uint8).numpy().data, self.begin + start * dtype.itemsize)
        return found


class Kept:
    """The one tensor that was read as a whole last, for those who ask for it piece by piece."""

    def __init__(self) -> None:
        self._whose: object = None
        self._flat: Tensor | None = None

    def piece(self, tensor: StoredTensor, start: int, stop: int, read: Callable[[], Tensor]) -> Tensor:
        """Values of a tensor that `read` gives as a whole, in its shape; it is let go with its last value."""
        if self._whose is not tensor or self._flat is None:
            self._whose = self._flat = None
            self._flat, self._whose = read().reshape(-1), tensor
        found = self._flat[start:stop]
        if stop == tensor.size:
            self._whose = self._flat = None
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedTensor(StoredTensor):
    """A tensor that is in memory already."""

    tensor: Tensor

    def values(self, start: int, stop: int) -> Tensor:
        """A view where the tensor is contiguous."""
        return self.tensor.detach().reshape(-1)[start:stop]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and what it says of itself, None where it does not.

    epoch: that, or else the step or iteration. step: the training's global step. own: the two apart.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    epoch: int | None = None
    step: int | None = None
    own: Said = NOTHING_SAID

    @property
    def said(self) -> Said:
        """The epoch and the step that it says; where the format does not tell them apart, the number is an epoch."""
        return said_in({"epoch": self.epoch, GLOBAL_STEP: self.step}) if self.own == NOTHING_SAID else self.own

    def read(self, name: str) -> Tensor:
        """One tensor; raises `UnknownNameError` where there is none of this name."""
        if name not in self.tensors:
            raise UnknownNameError(f"{self.path}: no tensor '{name}'; it has {', '.join(list(self.tensors)[:8])}, …")
        return self.tensors[name].read()


LONGEST_NAME = 255
"""Bytes, of a file's name."""

HUB_BLOB = re.compile(r"(?:\.\./){2,8}blobs/[0-9a-f]{40,64}")


def inside(folder: Path, name: str) -> Path:
    """A file of a folder, by a name that may come from a stranger.

    Raises `InputError` for a name that is a path, and for a symbolic link, which may lead anywhere; links within the
    cache of the Hugging Face hub, from a snapshot to its blobs, lead nowhere else.
    """
    path = folder / name
    plain = (
        name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME and not any(letter in name for letter in "/\\")
    )
    if not plain or name in ("", ".", ".."):
        raise InputError(f"{folder}: {name[:80]!r} is no name of a file in this folder; write the checkpoint again")
    if path.is_symlink() and not _leads_to_blob(path):
        raise InputError(f"{path}: a symbolic link, expected a file; give a folder that holds the files themselves")
    return path


def _leads_to_blob(path: Path) -> bool:
    link = os.readlink(path)
    levels = link.count("../")
    if not HUB_BLOB.fullmatch(link) or len(path.absolute().parents) <= levels:
        return False
    return path.absolute().parents[levels - 1].name == "snapshots" and not (path.parent / link).is_symlink()


def first_line(error: BaseException) -> str:
    """What an error of others says, as part of a line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
