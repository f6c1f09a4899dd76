"""Fits by device. Without a GPU, CuPy is played by `Gpu`, which puts all work off until a stream is synchronised."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import correlated
from test_fused import assert_same

from trajkit import device as device_module
from trajkit.device import CudaDevice, Device, HostDevice, Read, open_device
from trajkit.errors import InputError, MemoryBudgetError
from trajkit.kernels.affine import BlockFit, References, fit_block
from trajkit.kernels.fused import fit_block_fused

Array = np.ndarray[Any, Any]
SPLITS = {
    "one piece": [1500],
    "one column": [1],
    "two pieces": [600, 900],
    "equal pieces and a narrower one": [400, 400, 400, 400, 7],
    "wider and wider": [1, 2, 50, 1300],
    "narrower and narrower": [1300, 50, 2, 1],
    "wider than a part": [2500, 3000, 100],
}


def pieces_of(widths: list[int], start: int = 10) -> list[slice]:
    """Neighbouring slices, the first one not at 0."""
    bounds = np.cumsum([start, *widths]).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def reader(trajectories: Array) -> Read:
    """Reads from an (E, N) array, and insists on where it reads to."""

    def read(piece: slice, out: Array) -> None:
        assert out.shape == (len(trajectories), piece.stop - piece.start)
        assert out.dtype == np.float32
        assert out.flags.c_contiguous
        out[...] = trajectories[:, piece]

    return read


def assert_fits(device: Device, widths: list[int], m: int, every: bool, trajectories: Array | None = None) -> None:
    """The device gives, in the order of the pieces, what the array version gives for them."""
    if trajectories is None:
        trajectories = correlated(9, 10 + sum(widths))
    references, pieces = References(correlated(9, m, seed=1)), pieces_of(widths)
    found = list(device.fit_pieces(reader(trajectories), pieces, references, every))
    assert [piece for piece, _ in found] == pieces
    for piece, fitted in found:
        assert_same(fitted, fit_block(trajectories[:, piece], references, every), trajectories[:, piece])


# --- The host


@pytest.mark.parametrize("every", [False, True], ids=["the mode's correlation", "every correlation"])
@pytest.mark.parametrize("widths", SPLITS.values(), ids=SPLITS.keys())
def test_the_host_gives_what_its_kernel_gives(widths: list[int], every: bool) -> None:
    trajectories, pieces = correlated(9, 10 + sum(widths)), pieces_of(widths)
    references = References(correlated(9, 4, seed=1))
    found = list(open_device("cpu").fit_pieces(reader(trajectories), pieces, references, every))
    assert [piece for piece, _ in found] == pieces
    for piece, fitted in found:
        expected = fit_block_fused(trajectories[:, piece], references, every)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(fitted, name), value)


def test_the_host_reads_into_one_buffer() -> None:
    trajectories, buffers = correlated(9, 400), []

    def read(piece: slice, out: Array) -> None:
        buffers.append(out)
        out[...] = trajectories[:, piece]

    device = HostDevice()
    list(device.fit_pieces(read, pieces_of([100, 100, 30]), References(trajectories[:, :3]), False))
    assert device.buffers == 1
    assert all(np.shares_memory(buffers[0], other) for other in buffers)


@pytest.mark.parametrize("device", [HostDevice(), CudaDevice(0)], ids=["cpu", "cuda"])
def test_no_pieces_are_no_work(device: Device) -> None:
    assert list(device.fit_pieces(reader(correlated(9, 1)), [], References(correlated(9, 2)), False)) == []


# --- Opening


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "cuda:1 ", None, 0])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"expected 'cpu', 'cuda' or 'cuda:1'; choose one$"):
        open_device(name)


def test_missing_cupy_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match=r"^device 'cuda': cupy is not installed; pip install 'trajkit\[gpu\]'$"):
        open_device("cuda")


def test_cupy_that_does_not_load_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('''\\n=====\\nlibcudart.so.13 is missing\\n''')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(InputError, match=r"^device 'cuda': cupy is installed, but cannot be loaded; .* says why$"):
        open_device("cuda")


def test_a_machine_without_a_gpu_is_named_with_the_reason(gpu: Gpu) -> None:
    gpu.count = 0
    with pytest.raises(InputError, match=r"^device 'cuda': no CUDA device is visible \(cudaErrorNoDevice: none\); use"):
        open_device("cuda")


def test_a_gpu_that_does_not_exist_is_refused(gpu: Gpu) -> None:
    gpu.count = 2
    assert open_device("cuda:1").name == "cuda:1"
    with pytest.raises(InputError, match=r"^device 'cuda:2': expected a number below 2, .*; use cuda:1$"):
        open_device("cuda:2")


def test_a_device_is_one_object_so_that_it_can_keep_its_memory(gpu: Gpu) -> None:
    assert gpu.count == 2
    assert open_device("cuda") is open_device("cuda:0")
    assert open_device("cuda").name == "cuda:0"
    assert open_device("cuda").buffers == 2


# --- CUDA


class Gpu:
    """CuPy, as far as `trajkit.device` uses it, on NumPy: what a stream is given to do waits for its `synchronize`.

    Memory is filled with NaN until then. Host memory is held weakly and looked at only when the work is done, as a GPU
    does, so that memory freed or filled anew too early shows. What CuPy refuses is refused here.
    """

    def __init__(self) -> None:
        self.count = 2
        self.devices = [0]
        self.streams: list[Stream] = []
        self.given_back: list[Stream] = []
        self.current = [Stream(self, 0)]
        self.used = self.most_used = 0
        self.limit = 1 << 40
        self.pinned = 0
        self.pinned_limit = 1 << 40

    def module(self) -> ModuleType:
        """To stand in for `cupy`."""
        cupy: Any = ModuleType("cupy")
        cupy.ndarray = type("ndarray", (), {})  # array-api-compat asks whether arrays are of this type
        cupy.empty = lambda shape, dtype: DeviceArray.new(self, np.empty(shape, dtype))
        cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=self.free_all_blocks)
        cupy.cuda = SimpleNamespace(
            Device=lambda number: CurrentDevice(self, number),
            Stream=self.stream,
            PinnedMemory=lambda size: PinnedMemory(self, size),
            PinnedMemoryPointer=PinnedMemoryPointer,
            runtime=SimpleNamespace(getDeviceCount=self.device_count, CUDARuntimeError=CUDARuntimeError),
        )
        return cupy  # type: ignore[no-any-return]

    def device_count(self) -> int:
        if not self.count:
            raise CUDARuntimeError("cudaErrorNoDevice: none\nand more")
        return self.count

    def stream(self, non_blocking: bool = False) -> Stream:
        assert non_blocking, "the default stream would wait for this one"
        self.streams.append(Stream(self, self.devices[-1]))
        return self.streams[-1]

    def free_all_blocks(self, stream: Stream) -> None:
        assert stream.device == self.devices[-1], "CuPy frees in the pool of the current device"
        assert not stream.waiting
        self.given_back.append(stream)

    @property
    def busy(self) -> int:
        """How many streams have work to do."""
        return sum(bool(stream.waiting) for stream in self.streams)


class CUDARuntimeError(RuntimeError):
    pass


class CurrentDevice:
    def __init__(self, gpu: Gpu, number: int) -> None:
        self.gpu, self.number = gpu, number

    def __enter__(self) -> None:
        self.gpu.devices.append(self.number)

    def __exit__(self, *details: object) -> None:
        assert self.gpu.devices.pop() == self.number


class Stream:
    def __init__(self, gpu: Gpu, device: int) -> None:
        self.gpu, self.device = gpu, device
        self.waiting: list[Callable[[], None]] = []
        self.fails: Exception | None = None

    def __enter__(self) -> None:
        assert self.gpu.devices[-1] == self.device, "the stream is of another device than the current one"
        self.gpu.current.append(self)

    def __exit__(self, *details: object) -> None:
        assert self.gpu.current.pop() is self

    def synchronize(self) -> None:
        if self.fails:
            raise self.fails
        while self.waiting:
            self.waiting.pop(0)()


class PinnedMemory:
    def __init__(self, gpu: Gpu, size: int) -> None:
        self.gpu, self.size = gpu, 0
        if gpu.pinned + size > gpu.pinned_limit:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.size = size
        gpu.pinned += size

    def __del__(self) -> None:
        self.gpu.pinned -= self.size


class PinnedMemoryPointer(bytearray):
    def __init__(self, memory: PinnedMemory, offset: int) -> None:
        super().__init__(b"\xff" * (memory.size - offset))
        self.memory = memory


class DeviceArray:
    """An array of a stream's memory; its values come when the stream is synchronised."""

    def __init__(self, gpu: Gpu, memory: Array, base: DeviceArray | None = None) -> None:
        self.gpu, self.memory, self.base = gpu, memory, base
        self.stream: Stream = base.stream if base else gpu.current[-1]

    @classmethod
    def new(cls, gpu: Gpu, memory: Array) -> DeviceArray:
        memory = np.array(memory, order="C")
        if gpu.used + memory.nbytes > gpu.limit:
            raise MemoryError(f"Out of memory allocating {memory.nbytes:,} bytes\n(and more)")
        gpu.used += memory.nbytes
        gpu.most_used = max(gpu.most_used, gpu.used)
        memory.fill(np.nan if memory.dtype.kind == "f" else 0)
        made = cls(gpu, memory)
        weakref.finalize(made, made._free, gpu, memory.nbytes)
        return made

    @staticmethod
    def _free(gpu: Gpu, n_bytes: int) -> None:
        gpu.used -= n_bytes

    def put_off(self, work: Callable[[], None]) -> None:
        assert self.gpu.current[-1] is self.stream, "another stream uses this memory"
        self.stream.waiting.append(work)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.memory.shape
        return shape

    @property
    def dtype(self) -> Any:
        return self.memory.dtype

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self.gpu, self.memory[key], self.base or self)

    def reshape(self, *shape: int) -> DeviceArray:
        memory = self.memory.reshape(*shape)
        assert np.shares_memory(memory, self.memory)
        return DeviceArray(self.gpu, memory, self.base or self)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Namespace

    def __add__(self, other: DeviceArray) -> DeviceArray:
        return later(np.add, self, other)

    def __sub__(self, other: DeviceArray) -> DeviceArray:
        return later(np.subtract, self, other)

    def __mul__(self, other: DeviceArray) -> DeviceArray:
        return later(np.multiply, self, other)

    def __matmul__(self, other: DeviceArray) -> DeviceArray:
        return later(np.matmul, self, other)

    def set(self, values: Array) -> None:
        assert values.dtype == self.dtype
        assert values.shape == self.shape
        assert values.flags.c_contiguous
        assert self.memory.flags.c_contiguous
        here, there = self.memory, borrowed(values)
        self.put_off(lambda: np.copyto(here, there()))

    def get(self, out: Array, blocking: bool = True) -> None:
        assert out.dtype == self.dtype
        assert out.shape == self.shape
        assert out.flags.c_contiguous
        assert self.memory.flags.c_contiguous
        assert isinstance(root(out), PinnedMemoryPointer), "the copy would not be asynchronous"
        here, there = self.memory, borrowed(out)
        self.put_off(lambda: np.copyto(there(), here))
        if blocking:
            self.stream.synchronize()


def later(operation: Callable[..., Array], *operands: DeviceArray) -> DeviceArray:
    """The result of an operation, which its stream computes when it comes to it."""
    arrays = [operand.memory for operand in operands]
    with np.errstate(all="ignore"):
        result = DeviceArray.new(operands[0].gpu, operation(*arrays))

    def work() -> None:
        with np.errstate(all="ignore"):
            np.copyto(result_memory, operation(*arrays))

    result_memory = result.memory
    for operand in operands:
        operand.put_off(lambda: None)
    result.put_off(work)
    return result


class Namespace:
    """What `array_namespace` gives for a `DeviceArray`."""

    float64, uint16 = np.float64, np.uint16

    @staticmethod
    def astype(x: DeviceArray, dtype: Any) -> DeviceArray:
        return later(lambda values: values.astype(dtype), x)

    @staticmethod
    def mean(x: DeviceArray, axis: int) -> DeviceArray:
        return later(lambda values: values.mean(axis=axis), x)

    @staticmethod
    def sum(x: DeviceArray, axis: int) -> DeviceArray:
        return later(lambda values: values.sum(axis=axis), x)

    @staticmethod
    def abs(x: DeviceArray) -> DeviceArray:
        return later(np.abs, x)

    @staticmethod
    def argmax(x: DeviceArray, axis: int) -> DeviceArray:
        return later(lambda values: values.argmax(axis=axis), x)

    @staticmethod
    def take_along_axis(x: DeviceArray, indices: DeviceArray, axis: int) -> DeviceArray:
        return later(lambda values, index: np.take_along_axis(values, index, axis=axis), x, indices)


def root(array: Array) -> Any:
    """What holds the memory of an array."""
    holder: Any = array
    while getattr(holder, "base", None) is not None:
        holder = holder.base
    return holder


def borrowed(array: Array) -> Callable[[], Array]:
    """The array again, if its memory still lives. Ordinary memory is copied into the driver's own at once."""
    holder = root(array)
    if not isinstance(holder, PinnedMemoryPointer):
        copied = array.copy()
        return lambda: copied
    offset = array.ctypes.data - np.frombuffer(holder, np.uint8).ctypes.data
    shape, dtype, alive = array.shape, array.dtype, weakref.ref(holder)

    def again() -> Array:
        memory = alive()
        assert memory is not None, "host memory was freed under a running copy"
        return np.ndarray(shape, dtype, buffer=memory, offset=offset)

    return again


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """In place of CuPy and its first two devices; a part is 1024 columns, so that pieces have several."""
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "cupy", gpu.module())
    monkeypatch.setattr(device_module, "SCRATCH_BYTES", 1)
    return gpu


@pytest.mark.parametrize("every", [False, True], ids=["the mode's correlation", "every correlation"])
@pytest.mark.parametrize("m", [1, 10], ids=["one reference", "ten references"])
@pytest.mark.parametrize("widths", SPLITS.values(), ids=SPLITS.keys())
def test_the_gpu_gives_what_the_host_gives(gpu: Gpu, widths: list[int], m: int, every: bool) -> None:
    assert_fits(open_device("cuda"), widths, m, every)
    assert gpu.busy == 0


def test_another_gpu_than_the_current_one(gpu: Gpu) -> None:
    assert_fits(open_device("cuda:1"), [300, 300, 200], 3, False)
    assert {stream.device for stream in gpu.streams} == {1}
    assert gpu.devices == [0]


@pytest.mark.usefixtures("gpu")
def test_values_that_are_not_finite_show_on_the_gpu_as_on_the_host() -> None:
    trajectories = correlated(9, 310)
    trajectories[:, 13], trajectories[4, 20], trajectories[2, 21] = 0.1, np.nan, np.inf
    ((_, fitted),) = open_device("cuda").fit_pieces(
        reader(trajectories), pieces_of([300]), References(correlated(9, 3, seed=1)), False
    )
    assert np.flatnonzero(~np.isfinite(fitted.variation)).tolist() == [10, 11]
    assert (fitted.mode[3], fitted.scale[3], fitted.mean[3]) == (0, 0, np.float32(0.1))


def test_a_piece_is_read_while_the_last_one_is_computed(gpu: Gpu) -> None:
    trajectories, busy = correlated(9, 500), []

    def read(piece: slice, out: Array) -> None:
        busy.append(gpu.busy)
        out[...] = trajectories[:, piece]

    list(CudaDevice(0).fit_pieces(read, pieces_of([100, 100, 100, 50]), References(trajectories[:, :3]), False))
    assert all(busy[1:])
    assert len(gpu.streams) == 2


def test_a_fit_stays_as_it_was_when_the_next_ones_come(gpu: Gpu) -> None:
    assert gpu.streams == []
    trajectories = correlated(9, 500)
    kept: list[tuple[BlockFit, dict[str, Array]]] = []
    references = References(trajectories[:, :3])
    for _, fitted in CudaDevice(0).fit_pieces(reader(trajectories), pieces_of([100] * 4), references, True):
        kept.append((fitted, {name: value.copy() for name, value in vars(fitted).items()}))
    for fitted, copied in kept:
        for name, value in copied.items():
            np.testing.assert_array_equal(getattr(fitted, name), value)


def test_the_caller_keeps_its_own_device_and_stream(gpu: Gpu) -> None:
    trajectories = correlated(9, 500)
    null = gpu.current[0]

    def read(piece: slice, out: Array) -> None:
        assert (gpu.devices, gpu.current) == ([0], [null])
        out[...] = trajectories[:, piece]

    for _ in CudaDevice(1).fit_pieces(read, pieces_of([100, 100, 100]), References(trajectories[:, :3]), False):
        assert (gpu.devices, gpu.current) == ([0], [null])


@pytest.mark.parametrize("after", [0, 1, 2, 3], ids=lambda count: f"after {count} fits")
def test_a_caller_that_stops_leaves_nothing_running(gpu: Gpu, after: int) -> None:
    trajectories = correlated(9, 500)
    references = References(trajectories[:, :3])
    fits = CudaDevice(0).fit_pieces(reader(trajectories), pieces_of([100] * 4), references, False)
    for _ in range(after):
        next(fits)
    fits.close()  # type: ignore[attr-defined]
    assert gpu.busy == 0
    assert gpu.current == gpu.current[:1]


@pytest.mark.parametrize("good", [0, 1, 2, 3], ids=lambda count: f"after {count} pieces")
def test_a_read_that_fails_leaves_nothing_running(gpu: Gpu, good: int) -> None:
    trajectories = correlated(9, 500)
    calls: list[slice] = []

    def read(piece: slice, out: Array) -> None:
        if len(calls) == good:
            raise OSError("the disk is gone")
        calls.append(piece)
        out[...] = trajectories[:, piece]

    references, pieces = References(trajectories[:, :3]), pieces_of([100] * 4)
    device = CudaDevice(0)
    with pytest.raises(OSError, match="the disk is gone"):
        list(device.fit_pieces(read, pieces, references, False))
    assert gpu.busy == 0
    again = list(device.fit_pieces(reader(trajectories), pieces, references, False))
    assert_same(again[-1][1], fit_block(trajectories[:, pieces[-1]], references), trajectories)


def test_one_stream_that_fails_does_not_leave_the_other_one_running(gpu: Gpu) -> None:
    trajectories = correlated(9, 500)
    fits = CudaDevice(0).fit_pieces(reader(trajectories), pieces_of([100] * 4), References(trajectories[:, :3]), False)
    next(fits)
    broken, other = gpu.streams[1], gpu.streams[0]
    broken.fails = CUDARuntimeError("cudaErrorIllegalAddress")
    with pytest.raises(CUDARuntimeError):
        list(fits)
    assert not other.waiting


def test_memory_is_kept_for_the_next_call_and_freed_with_the_references(gpu: Gpu) -> None:
    trajectories, device = correlated(9, 3000), CudaDevice(0)
    references = References(trajectories[:, :3])

    def fit(references: References, widths: list[int], every: bool = False) -> None:
        for piece, fitted in device.fit_pieces(reader(trajectories), pieces_of(widths), references, every):
            assert_same(fitted, fit_block(trajectories[:, piece], references, every), trajectories[:, piece])

    fit(references, [900, 900, 100])
    taken = gpu.used, gpu.pinned
    assert min(taken) > 0
    fit(references, [900, 800])
    fit(references, [20, 10, 30, 40])
    assert len(gpu.streams) == 2
    assert (gpu.used, gpu.pinned) == taken
    fit(references, [1500, 900])  # wider than what is kept, which is given back
    fit(references, [900, 900], every=True)
    assert len(gpu.streams) == 6
    assert set(gpu.given_back) == set(gpu.streams[:4])
    del references
    assert set(gpu.given_back) == set(gpu.streams)
    assert (gpu.used, gpu.pinned) == (0, 0)


@pytest.mark.parametrize("every", [False, True], ids=["the mode's correlation", "every correlation"])
@pytest.mark.parametrize("m", [1, 10, 40], ids=lambda m: f"{m} references")
@pytest.mark.parametrize("scratch_bytes", [1, 1 << 20, 1 << 30], ids=["least scratch", "some scratch", "one part"])
def test_memory_stays_within_what_is_stated(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, m: int, every: bool, scratch_bytes: int
) -> None:
    monkeypatch.setattr(device_module, "SCRATCH_BYTES", scratch_bytes)
    device = CudaDevice(0)
    assert_fits(device, [4000, 4000, 500], m, every)
    assert gpu.most_used <= device.device_bytes(9, m, 4000)


@pytest.mark.parametrize("what", ["limit", "pinned_limit"])
def test_too_little_memory_is_named_with_what_is_needed(gpu: Gpu, what: str) -> None:
    setattr(gpu, what, 100_000)
    trajectories = correlated(9, 2000)
    with pytest.raises(MemoryBudgetError, match=r"^device 'cuda:0': pieces of 1900 weights at 9 epochs .*; give less"):
        list(CudaDevice(0).fit_pieces(reader(trajectories), pieces_of([1900]), References(trajectories[:, :3]), True))
    assert gpu.busy == 0


# --- CUDA as it is


def test_a_gpu_of_this_machine_gives_what_the_host_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        device = open_device("cuda")
    except InputError as error:
        pytest.skip(str(error))
    for m in (1, 10):
        for every in (False, True):
            for widths in SPLITS.values():
                assert_fits(device, widths, m, every)
    monkeypatch.setattr(device_module, "SCRATCH_BYTES", 1)
    assert_fits(device, [5000, 3000, 4000], 10, True)
