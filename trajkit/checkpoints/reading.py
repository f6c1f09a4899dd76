"""Opening checkpoints of any format, told by their content, never running code from them."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .files import open_file
from .folders import is_index, open_folder, open_index
from .stored import Checkpoint


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint in a file or a folder; its tensors are read when they are asked for.

    key: where the weights are among the other things in a file, such as ``model`` or ``nets.generator``, or which model
    of a folder of several, such as ``model_1``.

    Raises `InputError` naming the file where it is of no format that is known, is damaged, holds no tensors, or could
    run code.
    """
    try:
        if path.is_dir():
            return open_folder(path, key)
        return open_index(path, key) if is_index(path) else open_file(path, key)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint; check it") from error
