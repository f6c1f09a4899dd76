"""The pickles in a ``.pt`` file, looked at before PyTorch loads them.

`torch.load(weights_only=True)` sees to it that none of them runs code. It does not see to its memory and its time: it
inflates a member of the archive to whatever size it claims, and a tuple that holds another one twice, that holds
another one twice, … 40 deep, is a name in a dict that takes days to hash. PyTorch itself writes no such things.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

PICKLE_LIMIT = 16 << 20
"""Bytes; a tensor takes about 150."""

OPCODES_LIMIT = 1 << 20
"""A tensor takes about 30, those of an optimizer too."""

WRITTEN_OUT_LIMIT = 1 << 20
"""Values in a tuple, with all that it holds written out."""

LEGACY_PICKLES = 5
"""What a file that is no zip begins with: a magic number, a version, the system, the content, the keys of storages."""

MARK = 0


def require_bounded(path: Path, zipped: bool) -> None:
    """Raise `ValueError` where a ``.pt`` file would take far more memory or time than its size says."""
    if not zipped:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                if file.peek(1):
                    _require_small(file)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"'{packed[0][:80]}' is compressed, PyTorch stores it as it is")
        for member in members:
            if member.filename.endswith(".pkl") and member.file_size > PICKLE_LIMIT:
                raise ValueError(f"a pickle of {member.file_size} bytes, at most {PICKLE_LIMIT} are read")
            if member.filename.endswith(".pkl"):
                with archive.open(member) as file:
                    _require_small(file)


def _require_small(file: IO[bytes]) -> None:
    """Follow one pickle, keeping only how many values each thing on its stack holds."""
    begin = file.tell()
    stack: list[int] = []
    memo: dict[Any, int] = {}
    for n_opcodes, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if n_opcodes > OPCODES_LIMIT or file.tell() - begin > PICKLE_LIMIT:
            raise ValueError(f"a pickle of more than {PICKLE_LIMIT} bytes or {OPCODES_LIMIT} opcodes")
        if opcode.name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[argument])
        else:
            _follow(opcode, stack)
            if stack and stack[-1] > WRITTEN_OUT_LIMIT:
                raise ValueError(f"a pickle with more than {WRITTEN_OUT_LIMIT} values in one")


def _follow(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    taken = [kind for kind in opcode.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]
    n_values = 1
    if pickletools.markobject in opcode.stack_before:
        while (values := stack.pop()) != MARK:
            n_values += values
    for _ in taken:
        n_values += stack.pop()
    stack.extend(MARK if kind is pickletools.markobject else n_values for kind in opcode.stack_after)
