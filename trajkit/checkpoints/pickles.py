"""The pickles in a checkpoint, read as descriptions: whatever they name or call, nothing is looked up, nothing runs.

A pickle says which functions to call with what. Here each of them stands for itself: a `Node` with the name of what
would be called, its arguments and its state. What is on no list of names is refused all the same, as
`torch.load(weights_only=True)` does. Sizes are bounded before anything is built: a tuple that holds another one twice,
that holds another one twice, … 40 deep, is a name in a dict that takes days to hash. PyTorch writes no such things.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch

from ..layout import MOST_DIMENSIONS

PICKLE_LIMIT = 16 << 20
"""Bytes; a tensor takes about 150."""

OPCODES_LIMIT = 1 << 20
"""A tensor takes about 30, those of an optimizer too; a chunk of a distributed checkpoint about 60."""

WRITTEN_OUT_LIMIT = 1 << 20
"""Values in a tuple, with all that it holds written out."""

LEGACY_PICKLES = 5
"""What a file that is no zip begins with: a magic number, a version, the system, the content, the keys of storages."""

MARK = 0


class Node:
    """What a pickle would have made by calling something: its name, the arguments, and the state set afterwards."""

    called: ClassVar[str] = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> Self:
        """What a call makes, and what makes an object without a call."""
        node = super().__new__(cls)
        node.arguments, node.state = arguments, None
        return node

    def __init__(self, *_: Any, **__: Any) -> None:
        """Made already; this takes the arguments once more and leaves them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of the state, where that is a dict as of a dataclass; None where there is no such."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def __setitem__(self, _: Any, __: Any) -> None:
        """What a pickle puts into objects of other classes is of no use here."""

    def append(self, _: Any) -> None:
        """As `__setitem__`."""

    def extend(self, _: Any) -> None:
        """As `__setitem__`."""


def describe(pickled: bytes, allowed: Callable[[str], bool]) -> Any:
    """What a pickle holds: plain values, and a `Node` for everything else.

    `allowed` says of a name, such as ``torch.Size``, whether a pickle may have it. Raises `pickle.UnpicklingError`
    where it has another one, `ValueError` where it is beyond a bound, and whatever a damaged pickle can raise.
    """
    _require_small(io.BytesIO(pickled))
    return _Describing(pickled, allowed).load()


class _Describing(pickle.Unpickler):
    """Finds no object outside the pickle: each name becomes a class of its own, which does not outlive the reading."""

    def __init__(self, pickled: bytes, allowed: Callable[[str], bool]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._allowed = allowed
        self._classes: dict[str, type] = {"collections.OrderedDict": OrderedDict}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        called = f"{module}.{name}"
        if called not in self._classes:
            if not self._allowed(called):
                raise pickle.UnpicklingError(f"{called[:80]} is not on the list")
            self._classes[called] = type("Named", (Node,), {"called": called})
        return self._classes[called]

    def persistent_load(self, pid: Any) -> Any:
        return Reference(pid)


class Reference:
    """What a pickle says of something that is kept outside it: a storage."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a reference has no state")


def spelled(dtype: Any) -> str:
    """The name of a dtype, which a pickle has as a name."""
    module, _, name = str(getattr(dtype, "called", "")).rpartition(".")
    if module != "torch" or not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("a dtype that is none")
    return str(getattr(torch, name)).removeprefix("torch.")


def naturals(values: Any) -> tuple[int, ...]:
    """A tuple of integers from zero on; a `torch.Size` is one, too."""
    if isinstance(values, Node) and values.called == "torch.Size" and len(values.arguments) == 1:
        values = values.arguments[0]
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise ValueError(f"a shape that is none, or has more than {MOST_DIMENSIONS} dimensions")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError("a length, stride or offset is no integer from zero on")
    return tuple(values)


def require_bounded_legacy(path: Path) -> None:
    """Raise `ValueError` where a file that is no zip would take far more memory or time than its size says."""
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            if file.peek(1):
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
            if not 0 <= int(argument or 0) <= OPCODES_LIMIT:  # the unpickler keeps them in an array
                raise ValueError(f"a pickle with a memo of {argument} places")
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
