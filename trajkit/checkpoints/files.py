"""Single checkpoint files, told by their content."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from . import torch_legacy, torch_zip
from .nested import checkpoint_in, require_held
from .safetensors_format import is_safetensors, open_safetensors
from .stored import Checkpoint, StoredFile


def open_file(path: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint in a ``.safetensors`` file, or in one that `torch.save` wrote; see `open_checkpoint`."""
    file = StoredFile(path)
    start = file.read(0, min(file.size, 9))
    if is_safetensors(start, file.size):
        if key is not None:
            raise InputError(f"{path}: the tensors of a safetensors file stand under no key; leave out --key")
        return open_safetensors(file)
    if start[:4] == torch_zip.ZIP_START:
        opened = torch_zip.TorchZip(file)
        checkpoint = checkpoint_in(path, opened.tree, opened.tensor, key)
        require_held(path, torch_zip.held_by(checkpoint.tensors))
        return checkpoint
    if start[:1] == b"\x80":
        checkpoint = checkpoint_in(path, torch_legacy.load_legacy(path), torch_legacy.as_tensor, key)
        require_held(path, torch_legacy.held_by(checkpoint.tensors))
        return checkpoint
    raise InputError(
        f"{path}: expected a .safetensors or .pt checkpoint, found {file.size} bytes of something else;"
        " check the name, or write it again"
    )
