"""Online CMD's numbers of a model's weights, on the devices where the weights are, updated in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..kernels.functionals import Functional
from ..kernels.running import MOST, UNIT, ReferenceMoments, RunningBlock, Step
from ..layout import TensorEntry
from .members import Members
from .threads import each

HOST_PIECE = 1 << 19
"""Weights that a thread handles at a time."""

SMALL = 1 << 14
"""Fewer are not worth a thread of their own."""

START_PIECE = 1 << 17
"""Weights that are brought over from the warm-up's fit at a time."""

DEVICE_PIECE = 1 << 22
"""Weights that a device handles at a time: its temporaries are a few times as many floats."""

Tensors = Mapping[str, Tensor]
Source = Callable[[TensorEntry, slice], RunningBlock]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shelf:
    """The numbers of the tensors that are on one device, one tensor after the other; shapes as in `RunningBlock`."""

    starts: Mapping[str, int]
    mean: Tensor
    rest: Tensor
    products: Tensor
    mode: Tensor

    def part(self, columns: slice) -> Shelf:
        """Some of the weights, in the same memory."""
        return Shelf({}, self.mean[columns], self.rest[columns], self.products[:, columns], self.mode[:, columns])

    @property
    def block(self) -> RunningBlock:
        """The same memory as arrays; of a shelf on the host."""
        return RunningBlock(self.mean.numpy(), self.rest.numpy(), self.products.numpy(), self.mode.numpy())


class ModelMoments:
    """What online CMD keeps of the tensors of `entries` after the warm-up: 6 bytes a weight, and 5 a candidate."""

    def __init__(
        self,
        entries: Sequence[TensorEntry],
        functional: Functional,
        references: ReferenceMoments,
        shelves: Mapping[torch.device, Shelf],
    ) -> None:
        self.entries = entries
        self.references = references
        self.functional = functional
        self.shelves = shelves
        self._members = Members(entries, functional.index)
        self._blocks = [(shelf, shelf.block) for device, shelf in shelves.items() if device.type == "cpu"]
        self._parts: dict[tuple[str, int, int], RunningBlock] = {}

    def __reduce__(self) -> Any:
        # Made anew: in a copy, the arrays that stand for the tensors on the host would have memory of their own.
        return ModelMoments, (self.entries, self.functional, self.references, self.shelves)

    @classmethod
    def of(
        cls,
        entries: Sequence[TensorEntry],
        tensors: Tensors,
        functional: Functional,
        references: ReferenceMoments,
        source: Source,
    ) -> ModelMoments:
        """`source` gives what is kept at the end of the warm-up of some weights of a tensor."""
        by_device: dict[torch.device, list[TensorEntry]] = {}
        for entry in entries:
            if entry.size:
                by_device.setdefault(tensors[entry.name].device, []).append(entry)
        shelves = {device: _filled(here, device, source) for device, here in by_device.items()}
        return cls(entries, functional, references, shelves)

    def state(self) -> dict[str, Any]:
        """What `from_state` brings back, as plain values and tensors, which are not copied."""
        references, functional = self.references, self.functional
        members = (functional.index, functional.mode, functional.origin, functional.coefficient)
        return {
            "members": [torch.from_numpy(values) for values in members],
            "count": references.count,
            "decay": references.decay,
            "references": torch.from_numpy(np.stack([references.mean, references.power, references.values])),
            "shelves": [{**vars(shelf), "starts": dict(shelf.starts)} for shelf in self.shelves.values()],
        }

    @classmethod
    def from_state(cls, entries: Sequence[TensorEntry], tensors: Tensors, state: Mapping[str, Any]) -> ModelMoments:
        """On the devices where the tensors are now."""
        shelves = [Shelf(**shelf) for shelf in state["shelves"]]

        def source(entry: TensorEntry, columns: slice) -> RunningBlock:
            shelf = next(shelf for shelf in shelves if entry.name in shelf.starts)
            start = shelf.starts[entry.name]
            return _brought(shelf.part(slice(start + columns.start, start + columns.stop))).block

        mean, power, values = state["references"].numpy()
        references = ReferenceMoments(state["count"], mean.copy(), power.copy(), state["decay"])
        references.values = values.copy()
        functional = Functional(mean.size, *(member.numpy().copy() for member in state["members"]))
        return cls.of(entries, tensors, functional, references, source)

    def require_devices(self, tensors: Tensors) -> None:
        """Raise `InputError` naming a tensor that is on another device than its numbers."""
        for device, shelf in self.shelves.items():
            for name in shelf.starts:
                if tensors[name].device != device:
                    raise InputError(
                        f"'{name}' has moved to {tensors[name].device}, online CMD has its numbers on {device};"
                        " take the state_dict(), make a new one with the model that has moved, and load it"
                    )

    def take(self, tensors: Tensors) -> str | None:
        """Take one more epoch of the tensors; the name of one that is not finite, where there is any.

        Its numbers, and those of others, are no good then.
        """
        step = self.references.take(self.values(tensors))

        def host(name: str, view: Tensor, block: RunningBlock) -> str | None:
            return None if block.take(_flat(view).numpy(), step) else name

        def elsewhere(name: str, view: Tensor, shelf: Shelf) -> str | None:
            return None if take_tensor(_flat(view), shelf, step) else name

        found = [*self._on_devices(tensors, elsewhere), *self._on_host(tensors, host)]
        return next((name for name in found if name is not None), None)

    def write(self, tensors: Tensors) -> None:
        """Write the modelled weights to tensors of these names, in their dtypes."""
        references = self.references

        def host(_: str, view: Tensor, block: RunningBlock) -> None:
            plain = view.dtype == torch.float32 and view.is_contiguous()
            values = view.reshape(-1) if plain else torch.empty(view.numel())
            block.modelled(references, values.numpy())
            if not plain:
                view.copy_(values.view(view.shape))

        def elsewhere(_: str, view: Tensor, shelf: Shelf) -> None:
            view.copy_(modelled_tensor(shelf, references).view(view.shape))

        self._on_devices(tensors, elsewhere)
        self._on_host(tensors, host)

    def values(self, tensors: Tensors) -> NDArray[np.float32]:
        """(M,) values of the references."""
        values: NDArray[np.float32] = self.functional.values(self._members.values(tensors)[None])[0]
        return values

    def host_blocks(self) -> Iterator[tuple[TensorEntry, RunningBlock]]:
        """What is kept of each tensor, on the host."""
        for device, shelf in self.shelves.items():
            for entry in self.entries:
                if entry.name in shelf.starts:
                    start = shelf.starts[entry.name]
                    part = shelf.part(slice(start, start + entry.size))
                    yield entry, (part if device.type == "cpu" else _brought(part)).block

    def _block(self, name: str, first: int, last: int) -> RunningBlock:
        """What is kept of some weights of a tensor on the host; the arrays are made once."""
        key = name, first, last
        if key not in self._parts:
            shelf, block = next((shelf, block) for shelf, block in self._blocks if name in shelf.starts)
            start = shelf.starts[name]
            self._parts[key] = block.part(slice(start + first, start + last))
        return self._parts[key]

    def _on_devices(self, tensors: Tensors, do: Callable[[str, Tensor, Shelf], Result]) -> list[Result]:
        """What a function says of each piece that is not on the host."""
        return [
            do(name, view, shelf.part(slice(start + columns.start, start + columns.stop)))
            for device, shelf in self.shelves.items()
            if device.type != "cpu"
            for name, start in shelf.starts.items()
            for columns, view in pieces_of(tensors[name].detach(), DEVICE_PIECE)
        ]

    def _on_host(self, tensors: Tensors, do: Callable[[str, Tensor, RunningBlock], Result]) -> list[Result]:
        """What a function says of each piece on the host, by as many threads as torch has; the largest ones first."""
        jobs = [
            (name, view, self._block(name, columns.start, columns.stop))
            for shelf, _ in self._blocks
            for name in shelf.starts
            for columns, view in pieces_of(tensors[name].detach(), HOST_PIECE)
        ]
        jobs.sort(key=lambda job: -job[1].numel())
        worth = sum(view.numel() >= SMALL for _, view, _ in jobs)
        return each(lambda job: do(*job), jobs, most=worth)


def pieces_of(tensor: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of a tensor that follow each other in C order, of about `size` values, and the values' places.

    Of one that is not contiguous they are rows of it, which may be more.
    """
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), size):
            view = flat[start : start + size]
            yield slice(start, start + view.numel()), view
        return
    row = tensor[0].numel()
    rows = max(size // row, 1)
    for first in range(0, len(tensor), rows):
        view = tensor[first : first + rows]
        yield slice(first * row, first * row + view.numel()), view


def take_tensor(weights: Tensor, shelf: Shelf, step: Step) -> bool:
    """`RunningBlock.take` by the operations of torch, for any device; the same bits."""
    mean, share = shelf.mean, float(step.share)
    gain = torch.from_numpy(step.gain).to(mean.device)
    below = shelf.rest.to(torch.float32) * (mean * float(UNIT))
    moved = (weights - mean) - below
    for mode, product in zip(shelf.mode, shelf.products, strict=True):
        product.mul_(float(step.fade)).add_(moved * gain[mode.to(torch.int64)])
    more = below + moved * share
    new = mean + more
    back = new - mean
    lost = (mean - (new - back)) + (more - back)
    unit = new * float(UNIT)
    steps = torch.where(unit != 0, lost / unit, torch.zeros_like(lost)).round_().clamp_(-float(MOST), float(MOST))
    shelf.rest.copy_(steps)
    mean.copy_(new)
    return bool(torch.isfinite(moved).all())


def modelled_tensor(shelf: Shelf, references: ReferenceMoments) -> Tensor:
    """(n,) `RunningBlock.modelled` by the operations of torch, for any device; the same bits."""
    reach = torch.from_numpy(references.reach).to(shelf.mean.device)
    mode, products = _chosen(shelf, references)
    below = shelf.rest.to(torch.float32) * (shelf.mean * float(UNIT))
    return shelf.mean + (below + products * reach[mode])


def _chosen(shelf: Shelf, references: ReferenceMoments) -> tuple[Tensor, Tensor]:
    """(n,) modes as indices, and the products with their references."""
    if len(shelf.mode) == 1:
        return shelf.mode[0].to(torch.int64), shelf.products[0]
    mode = shelf.mode.to(torch.int64)
    per_length = torch.from_numpy(references.per_length).to(shelf.mean.device)
    best = (shelf.products.abs() * per_length[mode]).argmax(dim=0)[None]
    return mode.gather(0, best)[0], shelf.products.gather(0, best)[0]


def _filled(entries: Sequence[TensorEntry], device: torch.device, source: Source) -> Shelf:
    starts, size = {}, 0
    for entry in entries:
        starts[entry.name] = size
        size += entry.size
    shelf = _empty_like(source(entries[0], slice(0, 1)), starts, size, device)
    for entry in entries:
        start = starts[entry.name]
        for first in range(0, entry.size, START_PIECE):
            columns = slice(first, min(first + START_PIECE, entry.size))
            block = source(entry, columns)
            part = shelf.part(slice(start + columns.start, start + columns.stop))
            for name, values in vars(block).items():
                getattr(part, name).copy_(torch.from_numpy(values))
    return shelf


def _empty_like(block: RunningBlock, starts: Mapping[str, int], size: int, device: torch.device) -> Shelf:
    def room(values: NDArray[Any]) -> Tensor:
        return torch.empty(*values.shape[:-1], size, dtype=torch.from_numpy(values[..., :0]).dtype, device=device)

    return Shelf(starts, room(block.mean), room(block.rest), room(block.products), room(block.mode))


def _brought(shelf: Shelf) -> Shelf:
    return Shelf({}, shelf.mean.cpu(), shelf.rest.cpu(), shelf.products.cpu(), shelf.mode.cpu())


def _flat(view: Tensor) -> Tensor:
    """The values of a view in C order, float32; the same memory where they are that already."""
    return view if view.dim() == 1 and view.dtype == torch.float32 else view.reshape(-1).to(torch.float32)
