"""The one truth on the order of the flat vector: which value of which tensor stands where.

Weights are concatenated in the model's own order into one float32 vector of N values. Buffers (BatchNorm
statistics, counters, masks) are kept exactly, in one vector per stored dtype. A tied tensor stands once and lists
its other names as aliases.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .digest import canonical_json, digest
from .documents import require_fields, require_kind, shown
from .errors import LayoutError, UnknownNameError, listed

Kind = Literal["weight", "buffer"]

# Original dtype -> the NumPy dtype it is stored in. float16 and bfloat16 are exact in float32, and Zarr 3.1 has no
# bfloat16. Weights are always float32; only buffers use the other rows.
STORED_DTYPE: Mapping[str, str] = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
}
# What NumPy can shape, and more values than any disk holds; a product of lengths can overflow 64 bits.
MOST_DIMENSIONS = 64
MOST_VALUES = 2**48
FLOATING = ("float16", "bfloat16", "float32", "float64")
ITEMSIZE: Mapping[str, int] = {name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in STORED_DTYPE}

STUB = (0,)
"""Shape of a parameter whose values ZeRO-3 keeps elsewhere."""

CONSOLIDATE = (
    "record what DeepSpeed's zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save, writes with all values"
)

STORED_FIELDS: Mapping[str, type] = {
    "name": str,
    "shape": list,
    "dtype": str,
    "kind": str,
    "offset": int,
    "trainable": bool,
    "aliases": list,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor and its place: values ``offset : offset + size`` of its vector, in C order.

    `offset` is given by `ParameterLayout.of`. `trainable` is what held when the run began; it is not part of the
    identity of a layout, since layers are frozen and thawed during a training.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    offset: int = 0
    trainable: bool = field(default=True, compare=False)
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of values; a 0-d tensor has one."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Where the next tensor of the vector begins."""
        return self.offset + self.size

    @property
    def vector(self) -> str:
        """The vector it stands in: ``"weights"``, or the stored dtype of a buffer."""
        return "weights" if self.kind == "weight" else STORED_DTYPE[self.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class ParameterLayout:
    """Order, shapes and dtypes of all recorded tensors; equal layouts have equal `digest`s."""

    tensors: tuple[TensorEntry, ...]

    @classmethod
    def of(cls, tensors: Iterable[TensorEntry]) -> ParameterLayout:
        """Give each tensor its place, in the order given.

        Raises `LayoutError` for a dtype or a shape that cannot be recorded, a name used twice or that is no text, or a
        model without weights.
        """
        ends: dict[str, int] = {}
        entries: list[TensorEntry] = []
        seen: set[str] = set()
        for tensor in tensors:
            recordable = FLOATING if tensor.kind == "weight" else tuple(STORED_DTYPE)
            if tensor.dtype not in recordable:
                raise LayoutError(
                    f"'{tensor.name}' is {tensor.dtype}, a {tensor.kind} can be recorded as {', '.join(recordable)};"
                    " convert it or leave it out"
                )
            _require_possible_shape(tensor)
            for name in tensor.names:
                if not _is_text(name):
                    raise LayoutError(f"{name!r} is no text, expected a name that UTF-8 can spell; rename the tensor")
                if name in seen:
                    raise LayoutError(f"'{name}' appears twice, tensor names must be unique; rename one")
                seen.add(name)
            placed = replace(tensor, offset=ends.get(tensor.vector, 0))
            ends[placed.vector] = placed.stop
            entries.append(placed)
        if ends.get("weights", 0) == 0:
            raise LayoutError(_without_weights(entries))
        return cls(tuple(entries))

    @cached_property
    def weights(self) -> tuple[TensorEntry, ...]:
        """The tensors of the flat weight vector, in its order."""
        return tuple(entry for entry in self.tensors if entry.kind == "weight")

    @cached_property
    def buffers(self) -> tuple[TensorEntry, ...]:
        """The other tensors, in the model's order."""
        return tuple(entry for entry in self.tensors if entry.kind == "buffer")

    @cached_property
    def stubs(self) -> tuple[str, ...]:
        """Names of the trainable weights of shape (0,), beside others that have values.

        DeepSpeed's ZeRO-3 leaves such stubs in a model, and in its state dict, for parameters that are spread over
        processes: their values are elsewhere.
        """
        return tuple(entry.name for entry in self.weights if entry.trainable and entry.shape == STUB)

    @cached_property
    def n_weights(self) -> int:
        """N, the length of the flat weight vector."""
        return max(entry.stop for entry in self.weights)

    @cached_property
    def buffer_sizes(self) -> dict[str, int]:
        """Stored dtype -> number of buffer values kept in it; dtypes without a value are left out."""
        sizes: dict[str, int] = {}
        for entry in self.buffers:
            sizes[entry.vector] = max(entry.stop, sizes.get(entry.vector, 0))
        return {dtype: size for dtype, size in sizes.items() if size}

    @cached_property
    def _by_name(self) -> dict[str, TensorEntry]:
        return {name: entry for entry in self.tensors for name in entry.names}

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(list(self._by_name)[:8])
            raise UnknownNameError(f"no tensor '{name}' in the layout; it has {known}, …") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def names(self) -> Iterator[str]:
        """All names, aliases included."""
        return iter(self._by_name)

    def weight_at(self, index: int) -> str:
        """The name of the tensor that holds weight `index` of the flat vector."""
        stops = [entry.stop for entry in self.weights]
        return self.weights[int(np.searchsorted(stops, index, side="right"))].name

    @cached_property
    def weight_bounds(self) -> NDArray[np.int64]:
        """(L + 1,) boundaries of the L weight tensors in the flat vector."""
        return np.array([0, *(entry.stop for entry in self.weights)], dtype=np.int64)

    def split(self, vector: NDArray[Any], entries: Iterable[TensorEntry]) -> dict[str, NDArray[Any]]:
        """Views of `vector` (n,) under the name of each entry, in its shape."""
        return {entry.name: vector[entry.offset : entry.stop].reshape(entry.shape) for entry in entries}

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, the form in which a run keeps its layout."""
        return [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "kind": entry.kind,
                "offset": entry.offset,
                "trainable": entry.trainable,
                "aliases": list(entry.aliases),
            }
            for entry in self.tensors
        ]

    @classmethod
    def from_json(cls, document: Any) -> ParameterLayout:
        """Read `to_json`'s form; raises `LayoutError` if it is none, or its offsets do not follow from the shapes."""
        try:
            items = [require_fields(item, STORED_FIELDS) for item in require_kind(document, list, "the layout")]
            layout = cls.of(_entry(item) for item in items)
            if [entry.offset for entry in layout.tensors] != [item["offset"] for item in items]:
                raise ValueError("the offsets do not follow from the shapes")
        except ValueError as error:
            raise LayoutError(
                f"the stored layout is not a layout ({error}); the run is damaged, restore its zarr.json from a copy"
            ) from error
        return layout

    @cached_property
    def digest(self) -> str:
        """Hash of the layout, 64 hexadecimal digits."""
        identity = [{key: item[key] for key in item if key != "trainable"} for item in self.to_json()]
        return digest(canonical_json(identity))


def stub_warning(layout: ParameterLayout) -> str | None:
    """Return one line on the stubs of a layout, see `ParameterLayout.stubs`; None where it has none."""
    if not layout.stubs:
        return None
    has = "has" if len(layout.stubs) == 1 else "have"
    return (
        f"{listed(layout.stubs)} {has} shape (0,) and no values, as DeepSpeed's ZeRO-3 leaves parameters that it keeps"
        f" elsewhere; {CONSOLIDATE}"
    )


def require_same_layout(found: ParameterLayout, expected: ParameterLayout, where: str) -> None:
    """Raise `LayoutError` naming tensors of `found` that differ from the run's `expected` layout."""
    if found == expected:
        return
    cure = "record into a new run"
    if differ := differing_names(found.names(), expected):
        raise LayoutError(f"{where}: {differ}; {cure}")
    for entry in found.tensors:
        there = expected[entry.name]
        for what, mine, theirs in (
            ("shape", entry.shape, there.shape),
            ("dtype", entry.dtype, there.dtype),
            ("kind", entry.kind, there.kind),
            ("names", sorted(entry.names), sorted(there.names)),
        ):
            if mine != theirs:
                raise LayoutError(f"{where}: '{entry.name}' has {what} {mine}, the run has {theirs}; {cure}")
    first = next(mine.name for mine, theirs in zip(found.tensors, expected.tensors, strict=True) if mine != theirs)
    raise LayoutError(f"{where}: the tensors are in another order than in the run, from '{first}' on; {cure}")


def differing_names(found: Iterable[str], expected: ParameterLayout) -> str:
    """Return what is missing and what is new among names of tensors, as a message says it; "" where nothing is."""
    here = dict.fromkeys(found)
    missing = [name for name in expected.names() if name not in here]
    new = [name for name in here if name not in expected]
    said = []
    if missing:
        said.append(f"'{missing[0]}' is missing, the run has it{_and_others(missing)}")
    if new:
        said.append(f"'{new[0]}' is new, the run does not have it{_and_others(new)}")
    return ", and ".join(said)


def _and_others(names: list[str]) -> str:
    return f" ({len(names)} are: also {listed(names[1:], 3)})" if len(names) > 1 else ""


def require_floating(parameters: Collection[TensorEntry]) -> None:
    """Raise `LayoutError` where there are parameters and none is of a floating dtype: training changes none of them."""
    if parameters and not any(entry.dtype in FLOATING for entry in parameters):
        first = next(iter(parameters))
        raise LayoutError(
            f"the model has no weights: '{first.name}' is {first.dtype}, and no parameter is of a floating dtype;"
            " record the model before it is quantised, or a dequantised copy"
        )


def _without_weights(entries: list[TensorEntry]) -> str:
    """Return the message on a model whose weights have no values."""
    if any(entry.kind == "weight" and entry.shape == STUB for entry in entries):
        return (
            "the model has no weights: all of them have shape (0,), as DeepSpeed's ZeRO-3 leaves parameters that it"
            f" keeps elsewhere; {CONSOLIDATE}"
        )
    return "the model has no weights, expected at least one parameter; nothing to record"


def _entry(item: Mapping[str, Any]) -> TensorEntry:
    """A tensor from the fields that are stored of it; raises `ValueError` for values that no tensor has."""
    if item["kind"] not in ("weight", "buffer"):
        raise ValueError(f"a tensor is {shown(item['kind'])}, neither weight nor buffer")
    return TensorEntry(
        name=item["name"],
        shape=tuple(_natural(length) for length in item["shape"]),
        dtype=item["dtype"],
        kind=item["kind"],
        trainable=item["trainable"],
        aliases=tuple(require_kind(alias, str, "an alias") for alias in item["aliases"]),
    )


def _natural(value: Any) -> int:
    if require_kind(value, int, "a length") < 0:
        raise ValueError(f"{value} is no length")
    return int(value)


def _require_possible_shape(tensor: TensorEntry) -> None:
    if len(tensor.shape) > MOST_DIMENSIONS:
        raise LayoutError(
            f"'{tensor.name}' has {len(tensor.shape)} dimensions, at most {MOST_DIMENSIONS} can be recorded; reshape it"
        )
    if math.prod(max(length, 1) for length in tensor.shape) > MOST_VALUES:
        raise LayoutError(
            f"'{tensor.name}' has shape {tensor.shape}, at most {MOST_VALUES} values can be recorded; split it"
        )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
