"""Where trajectories are fitted: on this machine's processor, or on a CUDA device. The only module that knows CuPy.

A device gets the columns of a run piece by piece from a function that reads them, and gives the fits in the same order.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from typing import Any, ClassVar, Protocol

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import DTypeLike, NDArray

from .errors import InputError, MemoryBudgetError
from .kernels.affine import BlockFit, BlockSums, References, block_sums, joined, solve
from .kernels.fused import fit_block_fused
from .scratch import scratch

Read = Callable[[slice, NDArray[np.float32]], None]
"""Fills a C-contiguous (E, width) array with the columns of a slice, which has a start and a stop."""

Room = Callable[[slice], BlockFit | None]
"""Arrays that take the fit of a piece, or None for new ones."""

SLOTS = 2
"""Pieces on their way through a CUDA device: one is read while the other is copied and fitted."""

SCRATCH_BYTES = 128 << 20
"""Device memory for the float64 intermediates of a slot; at least for `PART_STEP` columns."""

PART_STEP = 1024
ROUNDING_BYTES = 64 << 10
"""CuPy's pool hands out multiples of 512 bytes; a slot has less than a hundred arrays."""


def new_room(_piece: slice) -> None:
    """Let a fit have arrays of its own."""


class Device(Protocol):
    """Fits pieces of a run; several threads may use one at a time, each with buffers of its own."""

    @property
    def name(self) -> str:
        """As `open_device` takes it."""

    @property
    def buffers(self) -> int:
        """How many host buffers (E, widest piece) of float32 a call of `fit_pieces` holds at a time."""

    def fit_pieces(
        self, read: Read, pieces: Sequence[slice], references: References, every: bool, room: Room = new_room
    ) -> Generator[tuple[slice, BlockFit]]:
        """Read and fit the pieces, each of one column at least, to (E, M) references; as `affine.fit_block` does.

        The fits come in the order of the pieces, in the room that they are given, and stay as they are; without
        `every`, that room has none for all correlations. What `read` raises passes through.
        """


def open_device(name: str) -> Device:
    """The device called ``cpu``, ``cuda`` (the first one) or ``cuda:1``; cheap, and one object for each device.

    Raises `InputError` for other names, and where CuPy or the device is missing.
    """
    found = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"device is {name!r}, expected 'cpu', 'cuda' or 'cuda:1'; choose one")
    if name == "cpu":
        return HostDevice()
    number, count = int(found[1] or 0), _device_count(name)
    if number >= count:
        raise InputError(
            f"device {name!r}: expected a number below {count}, as many CUDA devices are visible; use cuda:{count - 1}"
        )
    return _cuda_device(number)


class HostDevice:
    """This machine's processor, by the compiled kernel."""

    name: ClassVar[str] = "cpu"
    buffers: ClassVar[int] = 1

    def fit_pieces(
        self, read: Read, pieces: Sequence[slice], references: References, every: bool, room: Room = new_room
    ) -> Generator[tuple[slice, BlockFit]]:
        """See `Device`."""
        n_epochs = len(references.trajectories)
        memory = scratch("trajectories", n_epochs * max(map(_width, pieces), default=0), np.float32)
        for piece in pieces:
            block = _of_width(memory, n_epochs, _width(piece))
            read(piece, block)
            yield piece, fit_block_fused(block, references, every, room(piece))


class CudaDevice:
    """A CUDA device, counted from 0, by CuPy ≥ 13 and the array-namespace kernel in float64.

    Each call of `fit_pieces` has two slots, with a stream, page-locked host memory and device memory each. What is read
    into one is copied and fitted while the next piece is read into the other. Modes, scales and correlations agree with
    the processor's to rounding, not to the bit: the matrix product may sum in another order for another width.

    To lock host memory and to take device memory are slow calls, so the slots are kept for further calls with the same
    references object, and freed with that.
    """

    buffers: ClassVar[int] = SLOTS

    def __init__(self, number: int) -> None:
        self.number = number
        self._kept: dict[int, list[_Slot]] = {}

    @property
    def name(self) -> str:
        """``cuda:`` and the number."""
        return f"cuda:{self.number}"

    def device_bytes(self, n_epochs: int, n_modes: int, widest: int) -> int:
        """Most device memory that a call of `fit_pieces` takes, for pieces of up to `widest` columns.

        The CUDA context and cuBLAS, a few hundred MB, come on top.
        """
        return SLOTS * Sizes(n_epochs, n_modes, widest, every=True).device_bytes

    def fit_pieces(
        self, read: Read, pieces: Sequence[slice], references: References, every: bool, room: Room = new_room
    ) -> Generator[tuple[slice, BlockFit]]:
        """See `Device`. Raises `MemoryBudgetError` where memory of the device, or page-locked memory, runs out."""
        if not pieces:
            return
        n_epochs, n_modes = references.trajectories.shape
        sizes = Sizes(n_epochs, n_modes, max(map(_width, pieces)), every)
        waiting: deque[tuple[slice, _Slot]] = deque()
        # No `with` of a stream or a device may be open at a yield: CuPy keeps both by thread, for the caller too.
        with ExitStack() as stack:
            slots = [stack.enter_context(self._slot(sizes, references)) for _ in pieces[:SLOTS]]
            for piece, slot in zip(pieces, cycle(slots), strict=False):
                if len(waiting) == len(slots):
                    done, ready = waiting.popleft()  # the slot that comes round again
                    yield done, _placed(ready.fit(references), room(done))
                read(piece, slot.host_block(_width(piece)))
                with self._memory_for(sizes):
                    slot.launch(_width(piece))
                waiting.append((piece, slot))
            for piece, slot in waiting:
                yield piece, _placed(slot.fit(references), room(piece))

    @contextmanager
    def _slot(self, sizes: Sizes, references: References) -> Iterator[_Slot]:
        """One that was kept, or a new one. Nothing runs in it any more when it is kept again."""
        key = id(references)
        if key not in self._kept:
            weakref.finalize(references, self._free, key).atexit = False
        kept = self._kept.setdefault(key, [])
        slot = self._taken(kept, sizes)
        if slot is None:
            with self._memory_for(sizes):
                slot = _Slot(self.number, sizes, references.unit)
        try:
            yield slot
        finally:
            slot.synchronize()
            kept.append(slot)

    def _taken(self, kept: list[_Slot], sizes: Sizes) -> _Slot | None:
        while True:
            try:
                slot = kept.pop()  # not asked before whether there is one: another thread may be faster
            except IndexError:
                return None
            if slot.sizes.hold(sizes):
                return slot
            slot.close()

    def _free(self, key: int) -> None:
        for slot in self._kept.pop(key, []):
            slot.close()

    @contextmanager
    def _memory_for(self, sizes: Sizes) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise MemoryBudgetError(
                f"device {self.name!r}: pieces of {sizes.widest} weights at {sizes.n_epochs} epochs take"
                f" {SLOTS * sizes.device_bytes / 2**20:.0f} MiB of it and {SLOTS * sizes.host_bytes / 2**20:.0f} MiB of"
                f" page-locked memory for each thread, but {_first_line(error)}; give less --memory, use fewer threads"
                " or use --device cpu"
            ) from error


@dataclass(frozen=True)
class Sizes:
    """What the memory of a slot is made for."""

    n_epochs: int
    n_modes: int
    widest: int
    """Columns of the widest piece."""
    every: bool

    @property
    def part(self) -> int:
        """Columns of a piece that are fitted at a time: few enough for the scratch memory."""
        fitting = SCRATCH_BYTES // self._scratch_bytes_per_column // PART_STEP * PART_STEP
        return min(self.widest, max(PART_STEP, fitting))

    @property
    def scratch_bytes(self) -> int:
        """Of float64 intermediates and results on the device."""
        return self.part * self._scratch_bytes_per_column + ROUNDING_BYTES

    @property
    def device_bytes(self) -> int:
        """All that a slot takes on the device."""
        return 4 * self.n_epochs * self.widest + 8 * self.n_modes * self.n_epochs + self.scratch_bytes + ROUNDING_BYTES

    @property
    def host_bytes(self) -> int:
        """All that a slot takes of the host: what is read, and the sums that come back."""
        return (4 * self.n_epochs + 18 + 8 * self.n_products) * self.widest

    @property
    def n_products(self) -> int:
        """How many of the products with the M references come back."""
        return self.n_modes if self.every else 1

    @property
    def _scratch_bytes_per_column(self) -> int:
        # `block_sums` holds two (E, n) and two (M, n) at a time. Cut from one piece of memory that holds three and two,
        # no order of wide and narrow parts has ever needed more in a simulation of CuPy's pool, which cuts best-fit.
        return 8 * (3 * self.n_epochs + 2 * self.n_modes + 16)

    def hold(self, other: Sizes) -> bool:
        """Whether a slot of these sizes does for the other ones."""
        return replace(other, widest=self.widest) == self and other.widest <= self.widest

    def parts(self, width: int) -> list[slice]:
        """The parts of a piece."""
        return [slice(start, min(start + self.part, width)) for start in range(0, width, self.part)]


class _Slot:
    """A stream and the memory that pieces pass through, one after the other. The stream keeps the order it is given.

    Its own methods wait for nothing but `synchronize`, `fit` and `close`. All device memory is from the stream's own
    arena of CuPy's pool, so that what is freed is not used by another stream while this one still works on it.
    """

    def __init__(self, number: int, sizes: Sizes, unit: NDArray[np.float64]) -> None:
        cupy = _cupy()
        self.sizes = sizes
        self._width = 0
        self._device = cupy.cuda.Device(number)
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._host = _page_locked(sizes.n_epochs * sizes.widest, np.float32)
            self._sums = BlockSums(
                mean=_page_locked(sizes.widest, np.float64),
                variation=_page_locked(sizes.widest, np.float64),
                mode=_page_locked(sizes.widest, np.uint16),
                products=_page_locked(sizes.n_products * sizes.widest, np.float64),
            )
            with self._stream:
                self._block = cupy.empty(sizes.n_epochs * sizes.widest, np.float32)
                self._unit = cupy.empty(unit.shape, np.float64)
                cupy.empty(sizes.scratch_bytes, np.uint8)  # freed at once: the pool cuts the intermediates from it
                self._unit.set(unit)

    def host_block(self, width: int) -> NDArray[np.float32]:
        """(E, width) page-locked memory to read a piece into; the slot must be idle."""
        block: NDArray[np.float32] = _of_width(self._host, self.sizes.n_epochs, width)
        return block

    def launch(self, width: int) -> None:
        """Have the piece that was read copied to the device, fitted, and its sums copied back; returns before."""
        self._width = width
        with self._device, self._stream:
            block = _of_width(self._block, self.sizes.n_epochs, width)
            block.set(self.host_block(width))
            for part in self.sizes.parts(width):
                self._launch_part(block[:, part], self._sums_of(part))

    def _launch_part(self, block: Any, there: BlockSums) -> None:
        # A function of its own: a part's sums are freed before the next part needs the memory.
        sums = _sums_to_return(block, self._unit, self.sizes.every)
        for name, values in sums.items():
            values.get(out=getattr(there, name), blocking=False)

    def fit(self, references: References) -> BlockFit:
        """The fit of the piece that was launched last, once its sums are here."""
        self.synchronize()
        fits = []
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the variation
            for part in self.sizes.parts(self._width):
                sums = self._sums_of(part)
                # these two become part of the result, and the next piece's sums will come to the same place
                sums = replace(sums, mean=sums.mean.copy(), variation=sums.variation.copy())
                fits.append(solve(references, sums, np.dtype(np.float32), self.sizes.every))
        return joined(fits)

    def synchronize(self) -> None:
        """Wait for all that was launched: until then the device reads and writes the host's memory."""
        self._stream.synchronize()

    def close(self) -> None:
        """Give the memory back, to other streams and other libraries too."""
        self.synchronize()
        del self._block, self._unit, self._host, self._sums
        with self._device:
            _cupy().get_default_memory_pool().free_all_blocks(stream=self._stream)

    def _sums_of(self, part: slice) -> BlockSums:
        """Where the sums of a part of the piece come to: (n,) and C-contiguous (n_products, n)."""
        rows = self.sizes.n_products
        products = self._sums.products[rows * part.start : rows * part.stop]
        return BlockSums(
            self._sums.mean[part],
            self._sums.variation[part],
            self._sums.mode[part],
            products.reshape(rows, part.stop - part.start),
        )


def _sums_to_return(piece: Any, unit: Any, every: bool) -> dict[str, Any]:
    """`block_sums` by name, in the dtypes and shapes in which they leave the device: with the mode's product alone."""
    xp = array_namespace(piece)
    mean, variation, mode, products = block_sums(piece, unit)
    if not every and products.shape[0] > 1:
        products = xp.take_along_axis(products, mode[None, :], axis=0)
    return {"mean": mean, "variation": variation, "mode": xp.astype(mode, xp.uint16), "products": products}


def _placed(fit: BlockFit, room: BlockFit | None) -> BlockFit:
    if room is None:
        return fit
    room.take(fit)
    return room


def _width(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _of_width(memory: Any, n_epochs: int, width: int) -> Any:
    """A C-contiguous (E, width) view of flat memory."""
    return memory[: n_epochs * width].reshape(n_epochs, width)


def _page_locked(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """(size,) host memory for asynchronous copies; not from CuPy's pool, which rounds up to powers of two."""
    cuda = _cupy().cuda
    try:
        memory = cuda.PinnedMemory(size * np.dtype(dtype).itemsize)
    except cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(_first_line(error)) from error
    return np.ndarray(size, dtype, buffer=cuda.PinnedMemoryPointer(memory, 0))


@cache
def _cuda_device(number: int) -> CudaDevice:
    return CudaDevice(number)


def _device_count(name: str) -> int:
    """How many CUDA devices this process sees, one at least. CuPy imports without any."""
    try:
        count = int(_cupy().cuda.runtime.getDeviceCount())
        found = f"{count} devices"
    except RuntimeError as error:  # CUDARuntimeError is one: no driver, an old one, no device, or a forked process
        count, found = 0, _first_line(error)
    if not count:
        raise InputError(f"device {name!r}: no CUDA device is visible ({found}); use --device cpu")
    return count


def _cupy() -> Any:
    """The module; imported late, since it takes a second and few fits need it."""
    try:
        import cupy
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise InputError("device 'cuda': cupy is not installed; pip install 'trajkit[gpu]'") from error
        raise InputError(
            "device 'cuda': cupy is installed, but cannot be loaded; python -c 'import cupy' says why"
        ) from error
    return cupy


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
