"""Archives and checkpoint files as an attacker would make them, and a watch over what reading them does.

Each is built by code from a sound one, and hashed again where hashes would give it away. `watched` fails a test whose
reading runs code, touches a file outside the archive, takes more than a gigabyte or does not come to an end.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import site
import socket
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import correlated
from google_crc32c import value as crc32c

from trajkit import ParameterLayout, RunWriter, evaluate, fit
from trajkit.digest import canonical_json, digest
from trajkit.layout import TensorEntry
from trajkit.store.format import all_arrays

Tamper = Callable[[Path], object]
N_EPOCHS = 4
GIB = 1 << 30
DEEP = b"[" * 100_000 + b"]" * 100_000


@dataclass(frozen=True)
class Case:
    """A malicious input: what it is, in a sentence, and how to make it."""

    sentence: str
    make: Tamper
    base: str = "plain"


# --- The watch

EXECUTING = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen")
EXECUTING += ("socket.connect", "ctypes.dlopen", "code.__new__")
TOUCHING = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link")
TOUCHING += ("os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree", "tempfile.mkdtemp")
_events: list[tuple[str, Any]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and (event in EXECUTING or event in TOUCHING):
        _events.append((event, arguments[0] if arguments else None))


@cache
def _start_listening() -> None:
    sys.addaudithook(_listen)


@contextmanager
def watched(inside: Iterable[Path], outside: Path) -> Iterator[None]:
    """Fails where the block runs code, touches files but those `inside`, changes `outside`, or takes 1 GiB or 30 s."""
    global _events
    _start_listening()
    before = _contents(outside)
    with _at_most_one_gib_more(), _at_most_30_seconds():
        _events = seen = []
        try:
            yield
        finally:
            _events = None
    assert _contents(outside) == before, "what lies outside was changed"
    executed = [event for event, _ in seen if event in EXECUTING]
    assert not executed, executed
    touched = {os.path.abspath(os.fspath(path)) for _, path in seen if isinstance(path, str | bytes | os.PathLike)}
    synced = {str(place.parent) for place in inside}  # for the name of a checkpoint that is written beside the run
    elsewhere = [path for path in touched - synced if not path.startswith((*map(str, inside), *_own_places()))]
    assert not elsewhere, elsewhere


MOST_CPU_S = 1.0 if "TRAJKIT_STRICT_TIME" in os.environ else 10.0
"""A quiet machine needs a second at most, which `make soak` asks for; other work on the machine slows all down."""


@contextmanager
def in_a_second(what: str, looks: int = 1) -> Iterator[None]:
    """Fails where the block takes more than its share of CPU time, of all threads together, for each look at a run."""
    began = time.process_time()
    yield
    assert time.process_time() - began <= looks * MOST_CPU_S, what


@cache
def _own_places() -> tuple[str, ...]:
    """Where Python and its libraries are, and what the system says of itself."""
    repository = Path(__file__).parents[1]
    places = [sys.prefix, sys.base_prefix, *site.getsitepackages(), str(repository), "/proc/", "/sys/", "/dev/null"]
    return tuple({str(place) for place in places} | {os.path.realpath(place) for place in places})


@contextmanager
def _at_most_one_gib_more() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def _at_most_30_seconds() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError("it does not come to an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


# --- Sound archives to begin with

LAYOUT = ParameterLayout.of(
    [
        TensorEntry(name="w", shape=(20, 15), dtype="float32", kind="weight"),
        TensorEntry(name="mean", shape=(3,), dtype="float32", kind="buffer"),
        TensorEntry(name="count", shape=(), dtype="int64", kind="buffer"),
    ]
)


def plain(path: Path) -> None:
    """Four epochs of 300 weights with buffers, a fit that can be updated, an evaluation."""
    with RunWriter(path, fsync=False) as writer:
        for epoch, weights in enumerate(correlated(N_EPOCHS, 300)):
            buffers = {"float32": np.zeros(3, np.float32), "int64": np.array([epoch])}
            writer.append(LAYOUT, epoch, weights, buffers, {"loss": 0.5})
    fit(path, modes=2, samples=20, name="a", updatable=True)
    evaluate(path, lambda state: float(state["w"].sum()), epochs=[0])


def _of_one_tensor(n: int, packed: bool, path: Path) -> None:
    layout = ParameterLayout.of([TensorEntry(name="w", shape=(n,), dtype="float32", kind="weight")])
    values = np.zeros(n, np.float32) if packed else np.random.default_rng(0).normal(size=n).astype(np.float32)
    with RunWriter(path, fsync=False) as writer:
        for epoch in range(2):
            writer.append(layout, epoch, values, {})


BASES: dict[str, Tamper] = {
    "plain": plain,
    "packed": partial(_of_one_tensor, 1000, True),
    "packed shards": partial(_of_one_tensor, 140_000, True),
    "shards": partial(_of_one_tensor, 140_000, False),
}


# --- Forging


def written(key: str, content: bytes) -> Tamper:
    """Puts a file in the place of another."""

    def tamper(root: Path) -> None:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(content)

    return tamper


def edited(key: str, change: Callable[[Any], Any]) -> Tamper:
    """Changes a JSON document; a change that returns something puts that in its place."""

    def tamper(root: Path) -> None:
        document = json.loads((root / key).read_bytes())
        changed = change(document)
        (root / key).write_text(json.dumps(document if changed is None else changed))

    return tamper


def records_forged(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes every commit record, and gives each its hash and that of its predecessor again."""
    previous = None
    for path in sorted((root / "epoch/commits").iterdir()):
        record = json.loads(path.read_bytes())["record"]
        record["previous"] = previous
        change(record)
        previous = digest(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
        path.write_text(json.dumps({"blake3": previous, "record": record}))


def record(**lies: Any) -> Tamper:
    """The last commit record says something else, and is hashed again."""

    def change(found: dict[str, Any]) -> None:
        if found["row"] == N_EPOCHS - 1:
            found |= lies

    return lambda root: records_forged(root, change)


def objects_of_record(change: Callable[[dict[str, Any]], object]) -> Tamper:
    """The last commit record names other objects."""
    return lambda root: records_forged(
        root, lambda found: change(found["objects"]) if found["row"] == N_EPOCHS - 1 else None
    )


def content(key: str, data: Callable[[bytes], bytes]) -> Tamper:
    """An object has another content, and its commit record knows."""

    def tamper(root: Path) -> None:
        changed = data((root / key).read_bytes())
        (root / key).write_bytes(changed)

        def know(found: dict[str, Any]) -> None:
            if key in found["objects"]:
                found["objects"][key] = [len(changed), digest(changed)]

        records_forged(root, know)

    return tamper


def layout(change: Callable[[list[dict[str, Any]]], object]) -> Tamper:
    """The run has another layout, with its hash in every record, and arrays as it asks for where one can say which."""

    def tamper(root: Path) -> None:
        document = json.loads((root / "zarr.json").read_bytes())
        tensors = document["attributes"]["trajkit"]["layout"]
        change(tensors)
        (root / "zarr.json").write_text(json.dumps(document))
        identity = [
            {key: item[key] for key in item if key != "trainable"} for item in tensors if isinstance(item, dict)
        ]
        hashed = digest(canonical_json(identity))
        records_forged(root, lambda found: found.update(layout=hashed))
        try:
            arrays = all_arrays(ParameterLayout.from_json(tensors), 300, zstd=False)
        except ValueError:
            return
        for path, array in arrays.items():
            (root / path).mkdir(parents=True, exist_ok=True)
            (root / path / "zarr.json").write_text(json.dumps(array))

    return tamper


def first_tensor(**lies: Any) -> Tamper:
    """The layout says something else of its first tensor."""
    return layout(lambda tensors: tensors[0].update(lies))


def fit_attributes(**lies: Any) -> Tamper:
    """The fit says something else of itself, and is hashed again."""
    return edited("fits/a/zarr.json", lambda document: _forge(document, "fit", lambda found: found.update(lies)))


def fit_table(change: Callable[[dict[str, Any]], Any]) -> Tamper:
    """The table of the fit's objects says something else, and the fit knows its hash."""

    def tamper(root: Path) -> None:
        path = root / "fits/a/0/mode/objects.json"
        table = json.loads(path.read_bytes())
        changed = change(table)
        data = changed if isinstance(changed, bytes) else json.dumps(table).encode()
        path.write_bytes(data)
        fit_attributes(objects=digest(data))(root)

    return tamper


def fit_content(array: str, data: Callable[[bytes], bytes]) -> Tamper:
    """An array of the fit has another content, and its table knows."""

    def tamper(root: Path) -> None:
        key = next(path for path in (root / "fits/a/0" / array / "c").rglob("*") if path.is_file())
        changed = data(key.read_bytes())
        key.write_bytes(changed)
        fit_table(lambda table: table.update({str(key.relative_to(root)): [len(changed), digest(changed)]}))(root)

    return tamper


def evaluation(change: Callable[[dict[str, Any]], object]) -> Tamper:
    """The evaluation says something else, and is hashed again."""
    return edited("evaluations/0000/zarr.json", lambda document: _forge(document, "evaluation", change))


def marked(name: str, **lies: Any) -> Tamper:
    """A mark says that an epoch is damaged."""
    mark = {"row": 1, "epoch": 1, "what": "nothing", "layout": None} | lies
    return written(f"epoch/bad/{name}.json", json.dumps(mark).encode())


def _forge(document: dict[str, Any], what: str, change: Callable[[dict[str, Any]], object]) -> None:
    saved = document["attributes"][f"trajkit_{what}"]
    change(saved[what])
    saved["blake3"] = digest(json.dumps(saved[what], sort_keys=True, separators=(",", ":")).encode())


def linked(key: str) -> Tamper:
    """Moves a part of the archive out of it and leaves a symbolic link to there."""

    def tamper(root: Path) -> None:
        target = root.parent / "outside" / "moved"
        if (root / key).exists():
            shutil.move(root / key, target)
        else:
            (target / "writer").mkdir(parents=True)
            (target / "writer/precious").write_text("mine")
            (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).symlink_to(target)

    return tamper


def replaced(key: str, make: Tamper) -> Tamper:
    """Puts something that is no file in the place of a part of the archive."""

    def tamper(root: Path) -> None:
        target = root / key
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make(target)

    return tamper


def a_socket(path: Path) -> None:
    """A socket; its name may be longer than the system lets one bind."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def very_deep(path: Path) -> None:
    """Folders in folders, further down than a path can say."""
    path.mkdir(parents=True)
    here = os.open(path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)


def with_crc(data: bytes) -> bytes:
    """A chunk as it is stored."""
    return data + struct.pack("<I", crc32c(data))


def zstd_bomb(n_blocks: int, declared: int | None = None) -> bytes:
    """A frame of blocks that each become 128 KiB."""
    begin = b"\x28\xb5\x2f\xfd" + (b"\x00\x38" if declared is None else b"\xc0\x58" + struct.pack("<Q", declared))
    blocks = [((number == n_blocks - 1) | 1 << 1 | 131_072 << 3).to_bytes(3, "little") for number in range(n_blocks)]
    return begin + b"".join(block + b"\0" for block in blocks)


def in_shard(chunk: bytes) -> Callable[[bytes], bytes]:
    """A shard of two chunks with this content."""
    index = struct.pack("<4Q", 0, len(chunk), 0, len(chunk))
    return lambda _: chunk + with_crc(index)


def shard_index(*entries: int) -> Callable[[bytes], bytes]:
    """A shard of two chunks whose index says where they are: offset, length, offset, length."""
    return lambda data: data[:-36] + with_crc(struct.pack("<4Q", *entries))


# --- Checkpoint files


class Payload:
    """Makes a folder when it is unpickled by someone careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def marker(path: Path) -> Path:
    """What a payload would make."""
    return path.parent / "outside" / "executed"


def saved(content: Callable[[Payload], Any], **options: Any) -> Tamper:
    """A file of `torch.save` with a payload somewhere in it."""
    return lambda path: torch.save(content(Payload(marker(path))), path, **options)


LEGACY = {"_use_new_zipfile_serialization": False}


def zipped(
    pickled: bytes | Callable[[Path], bytes],
    storages: dict[str, bytes] | None = None,
    compress: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
) -> Tamper:
    """A zip as PyTorch writes it around a pickle of our own."""

    def make(path: Path) -> None:
        data = pickled if isinstance(pickled, bytes) else pickled(path)
        with zipfile.ZipFile(path, "w", compress) as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/byteorder", b"little")
            for key, values in (storages or {}).items():
                archive.writestr(f"archive/data/{key}", values)
            archive.writestr("archive/version", b"3\n")
            for name, values in (more or {}).items():
                archive.writestr(name, values)

    return make


def opcodes(*parts: bytes) -> bytes:
    """A pickle of these opcodes."""
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    """Pushes a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    """Pushes an integer."""
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def numbers(values: tuple[int, ...]) -> bytes:
    """Pushes a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    n_stored: int = 4,
    offset: int = 0,
    kind: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """Pushes a tensor that claims a shape, strides and the size of its storage."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(n_stored) + b"tQ"
    arguments = (
        storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(*values: bytes) -> bytes:
    """A pickle of a dict: "w0", "w1", … -> the values."""
    items = [text(f"w{position}") + value for position, value in enumerate(values)]
    return opcodes(b"}(", *items, b"u")


def claiming(*tensors: bytes) -> Tamper:
    """A zip with one storage of four floats, and tensors that claim anything of it."""
    return zipped(state_dict(*tensors), {"0": bytes(16)})


def called(*names: str, arguments: bytes | None = None) -> Callable[[Path], bytes]:
    """A pickle that calls a function with the marker's path."""
    return lambda path: state_dict(
        f"c{names[0]}\n{names[1]}\n".encode() + (arguments or text(str(marker(path))) + b"\x85") + b"R"
    )


def sharing_tuples(levels: int) -> bytes:
    """Pushes a tuple that holds another twice, that holds another twice, …"""
    return b")q\x00" + b"h\x00\x86q\x00" * levels


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Tamper:
    """A safetensors file with any header."""

    def make(path: Path) -> None:
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)

    return make


def one(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def a_tar(path: Path) -> None:
    """A checkpoint of the time before pickles, whose name begins like one."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="latin-1") as archive:
        for name in ("\x80storages", "storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(marker(path)))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def legacy_storage(n_claimed: int) -> Tamper:
    """A legacy file whose storage claims to be large."""

    def make(path: Path) -> None:
        torch.save({"w": torch.zeros(4)}, path, **LEGACY)
        data = path.read_bytes()
        path.write_bytes(data.replace(b"K\x04", number(n_claimed)))

    return make


TRAVERSAL = ("../../outside/secret", "/etc/passwd", "..", "a/../../b", "nul\0byte", "C:\\x", "\n\x1b[2J", "x" * 5000)
ROOT = "zarr.json"
RECORD = f"epoch/commits/{N_EPOCHS - 1:08d}.json"
PARTS = (
    ROOT,
    "weights",
    "weights/zarr.json",
    "weights/c",
    "weights/c/1",
    "weights/c/1/0",
    "probe_index/c/0",
    "epoch",
    "epoch/commits",
    RECORD,
    "epoch/tmp",
    "epoch/locks",
    "epoch/locks/writer",
    "buffers",
    "buffers/int64/c/1/0",
    "fits",
    "fits/a",
    "fits/a/zarr.json",
    "fits/a/0/mode/objects.json",
    "fits/a/0/scale/c/0",
    "evaluations",
    "evaluations/0000/zarr.json",
)
WHOLE_TENSOR = one([4], [0, 16])
