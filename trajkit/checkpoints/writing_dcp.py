"""Weights as a folder of `torch.distributed.checkpoint`, written by that library."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..errors import PathExistsError
from ..weights import Source
from .placing import names_in, new_folder
from .writing_torch import uncovered

METADATA = ".metadata"
SUFFIX = ".distcp"


def write_dcp(source: Source, folder: Path, overwrite: bool) -> None:
    """Write a state dict, in memory once, by a single process without a process group; see `write_checkpoint`.

    A folder is replaced as a whole, and only one that holds nothing but such a checkpoint.
    """
    # These take a second, which the other formats need not wait for.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    names = names_in(folder)
    others = [name for name in names if name != METADATA and not name.endswith(SUFFIX)]
    if others or (names and not overwrite):
        cure = "choose another folder" if others else "choose another folder or overwrite it (--force)"
        raise PathExistsError(f"{folder}: holds {(others or names)[0]} already; {cure}")
    with new_folder(folder) as aside, warnings.catch_warnings():
        state = source.state_dict()
        warnings.simplefilter("ignore")  # that there is no process group: there is one process
        try:
            save(state, storage_writer=FileSystemWriter(aside), no_dist=True)
        except CheckpointException as error:  # no Exception
            raise uncovered(next(iter(error.failures.values()))[0]) from None
