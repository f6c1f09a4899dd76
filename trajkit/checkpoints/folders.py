"""Checkpoint folders: those of Hugging Face's Trainer and of Accelerate, and index files of sharded checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..documents import parse, require_fields, require_kind, require_size
from ..errors import InputError
from .distributed import METADATA, open_distributed
from .files import open_file
from .naming import GLOBAL_STEP, natural, number_in, said_in
from .safetensors_format import is_safetensors
from .stored import Checkpoint, StoredFile, StoredTensor, inside

INDEX = ".index.json"

# In the order in which the libraries look for them.
WEIGHTS_NAMES = ("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model")
SUFFIXES = (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")

# Of files that are checkpoints of their own, for hints only: what a file is, its content says.
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".pt.tar", ".ckpt.tar")

TRAINER_STATE = "trainer_state.json"


def open_folder(folder: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint in a folder; its first model where there are several, unless `key` names another: ``model_1``.

    Raises `InputError` where the folder holds none, or a damaged one.
    """
    if (folder / METADATA).exists():
        return open_distributed(folder, key)
    path = None if key is None else _named(folder, key)
    if path is not None:
        key = None
    else:
        path = _named(folder)
    if path is None:
        raise InputError(
            f"{folder}: a folder without a checkpoint, expected model.safetensors, pytorch_model.bin, an index of such"
            f" or {METADATA} in it{_hint(folder)}"
        )
    if path.is_dir():
        found = open_distributed(path, key)
    elif path.name.endswith(INDEX):
        found = open_index(path, key)
    else:
        found = open_file(path, key)
    return _dated(replace(found, path=folder), folder)


def open_index(path: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint that is spread over several files beside an index, which says which tensor is in which.

    Raises `InputError` where the index is damaged, or does not fit the files.
    """
    if key is not None:
        raise InputError(f"{path}: the tensors of an index stand under no key; leave out --key")
    index = StoredFile(path)
    try:
        require_size(index.size)
        document = require_fields(parse(index.read(0, index.size)), {"weight_map": dict})
        weight_map = {name: require_kind(shard, str, f"'{name:.80}'") for name, shard in document["weight_map"].items()}
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no index of a sharded checkpoint ({error}); write it again") from error
    tensors: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = open_file(inside(path.parent, name))
        for held, tensor in shard.tensors.items():
            if held not in weight_map:
                raise InputError(f"{shard.path}: holds '{held}', which {path.name} does not name; write it again")
            if weight_map[held] == name:
                tensors[held] = tensor
    for tensor_name, name in weight_map.items():
        if tensor_name not in tensors:
            raise InputError(f"{path}: names '{tensor_name}' in {name}, which does not hold it; write it again")
    if not tensors:
        raise InputError(f"{path}: names no tensors, expected some; write it again")
    return _dated(Checkpoint(path, tensors), path.parent)


def is_index(path: Path) -> bool:
    """Whether a file begins like an index."""
    file = StoredFile(path)
    start = file.read(0, min(file.size, 64))
    return not is_safetensors(start, file.size) and start.lstrip()[:1] == b"{"


def _named(folder: Path, key: str | None = None) -> Path | None:
    """The file or folder with the weights of a model, or of the first one; None where there is none."""
    for name in _names(key):
        if "/" not in name and "\0" not in name and (folder / name).exists():
            return inside(folder, name)
    return None


def _names(key: str | None) -> Iterator[str]:
    for name in WEIGHTS_NAMES if key is None else (key, f"pytorch_{key}"):
        yield from (f"{name}{suffix}" for suffix in SUFFIXES)
    yield "pytorch_model_fsdp_0" if key is None else key.replace("model", "pytorch_model_fsdp", 1)


def _dated(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """With the step that the Trainer of Hugging Face says in a folder, where it says one that can be read."""
    if not (folder / TRAINER_STATE).exists():
        return checkpoint
    file = StoredFile(inside(folder, TRAINER_STATE))
    try:
        require_size(file.size)
        step = number_in(parse(file.read(0, file.size)), GLOBAL_STEP)
    except InputError:
        raise
    except ValueError:
        return checkpoint
    if step is None:
        return checkpoint
    own = replace(checkpoint.own, step=said_in({GLOBAL_STEP: step}).step)
    return replace(checkpoint, epoch=step if checkpoint.epoch is None else checkpoint.epoch, step=step, own=own)


def _hint(folder: Path) -> str:
    seen = (path for path in folder.iterdir() if path.is_dir() or path.name.endswith(FILE_SUFFIXES))
    inner = sorted(seen, key=natural)
    return f"; it holds such as {inner[0].name}, give these one by one" if inner else "; check the name"
