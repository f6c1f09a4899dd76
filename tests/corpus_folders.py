"""The corpus of malicious checkpoint folders: indexes of shards, and what torch.distributed.checkpoint writes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hostile import (
    DEEP,
    TRAVERSAL,
    Case,
    Payload,
    Tamper,
    a_socket,
    called,
    marker,
    one,
    opcodes,
    replaced,
    safetensors,
    saved,
    sharing_tuples,
    text,
    zipped,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from trajkit.documents import VALUES_LIMIT

# --- Indexes

INDEX = "model.safetensors.index.json"


def a_shard(*names: str) -> Tamper:
    """A file with a tensor of four values under each name."""
    header = {name: one([4], [16 * position, 16 * position + 16]) for position, name in enumerate(names)}
    return safetensors(header, bytes(16 * len(names)))


def sharded(weight_map: Any, shards: dict[str, Tamper] | None = None) -> Tamper:
    """A folder with an index, or any bytes in its place, and shards; by default one, `s`, with the tensor w."""

    def make(path: Path) -> None:
        path.mkdir()
        content = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        (path / INDEX).write_bytes(content)
        for name, shard in ({"s": a_shard("w")} if shards is None else shards).items():
            shard(path / name)
        (path.parent / "outside").mkdir(exist_ok=True)

    return make


def link(target: str) -> Tamper:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def with_beside(key: str, make: Tamper) -> Tamper:
    """A sound folder with something beside or in the place of its index."""

    def tamper(path: Path) -> None:
        sharded({"w": "s"})(path)
        replaced(key, make)(path)

    return tamper


INDEXES = [
    *(Case(f"an index names a shard by {name[:40]!r}", sharded({"w": name})) for name in (*TRAVERSAL, "", ".", "./s")),
    Case("an index names a shard by an absolute path", lambda path: sharded({"w": str(path / "s")})(path)),
    Case("an index names a shard that leads outside", sharded({"w": "s"}, {"s": link("../outside/secret")})),
    Case("an index names a shard that leads to one inside", sharded({"w": "s"}, {"t": a_shard("w"), "s": link("t")})),
    Case("an index names a shard that leads to itself", sharded({"w": "s"}, {"s": link("s")})),
    Case("an index names a shard that leads to no blob", sharded({"w": "s"}, {"s": link("../../blobs/" + "0" * 64)})),
    Case("an index names a shard that is a pipe", sharded({"w": "s"}, {"s": os.mkfifo})),
    Case("an index names a shard that is a socket", sharded({"w": "s"}, {"s": a_socket})),
    Case("an index names a shard that is a folder", sharded({"w": "s"}, {"s": Path.mkdir})),
    Case("an index names a shard that is empty", sharded({"w": "s"}, {"s": Path.touch})),
    Case("an index names a shard that is missing", sharded({"w": "s"}, {})),
    Case("an index names itself", sharded({"w": INDEX})),
    Case("an index names another index", sharded({"w": "t"}, {"t": lambda path: path.write_text('{"weight_map":{}}')})),
    Case("an index names a tensor that its shard has not", sharded({"w": "s", "v": "s"})),
    Case("an index names a tensor that another shard has", sharded({"w": "t"}, {"s": a_shard("w"), "t": a_shard("v")})),
    Case("an index does not name a tensor of its shard", sharded({"w": "s"}, {"s": a_shard("w", "v")})),
    Case("an index names a tensor twice", sharded(b'{"weight_map": {"w": "s", "w": "s"}}')),
    Case(
        "two shards have the same tensor, the index says which",
        sharded({"w": "s", "v": "t"}, {"s": a_shard("w"), "t": a_shard("w", "v")}),
    ),
    Case("an index names shards that hold code", sharded({"w": "s"}, {"s": saved(lambda evil: {"w": evil})})),
    Case("an index names a shard by a number", sharded({"w": 1})),
    Case("an index names a shard by a list", sharded({"w": ["s"]})),
    Case("an index has a list for a map", sharded(["s"])),
    Case("an index has no map", sharded(b"{}")),
    Case("an index has an empty map", sharded({})),
    Case("an index is nested 100,000 levels deep", sharded(b'{"weight_map": ' + DEEP + b"}")),
    Case(
        "an index has a million values too many", sharded(b'{"weight_map": {}, "x": [' + b"0," * VALUES_LIMIT + b"0]}")
    ),
    Case("an index is cut short", sharded(b'{"weight_map": {"w": "s"')),
    Case("an index holds NaN", sharded(b'{"weight_map": {"w": "s"}, "x": NaN}')),
    Case("an index is an array", sharded(b"[]")),
    Case("an index names 100,000 shards", sharded({f"w{number}": f"s{number}" for number in range(100_000)})),
    Case("an index is a link to the outside", with_beside(INDEX, link("../outside/secret"))),
    Case("an index is a pipe", with_beside(INDEX, os.mkfifo)),
    Case("an index is a folder", with_beside(INDEX, Path.mkdir)),
    Case(
        "the model beside an index is a link to the outside",
        with_beside("model.safetensors", link("../outside/secret")),
    ),
    Case("a model is a link to endless zeros", with_beside("model.safetensors", link("/dev/zero"))),
    Case("a model beside an index is a pipe", with_beside("model.safetensors", os.mkfifo)),
    Case("the state of a trainer is a link", with_beside("trainer_state.json", link("../outside/secret"))),
    Case("the state of a trainer is a pipe", with_beside("trainer_state.json", os.mkfifo)),
    Case(
        "the state of a trainer is nested 100,000 levels deep",
        with_beside("trainer_state.json", lambda path: path.write_bytes(DEEP)),
    ),
    Case(
        "the state of a trainer has a step of a million digits",
        with_beside("trainer_state.json", lambda path: path.write_bytes(b'{"global_step": ' + b"1" * 10**6 + b"}")),
    ),
]

# --- torch.distributed.checkpoint

W = MetadataIndex("model.w", (0, 0))


def spread(change: Callable[[Metadata], object] = lambda _: None) -> Tamper:
    """A folder with two tensors (4, 3), whose metadata says something else."""

    def make(path: Path) -> None:
        tensors = {"w": torch.zeros(4, 3), "v": torch.zeros(4, 3)}
        dcp.save({"model": tensors, "epoch": 0}, checkpoint_id=path, no_dist=True)
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return make


def place(**lies: Any) -> Tamper:
    """The metadata says something else of where w stands."""
    return spread(lambda metadata: [object.__setattr__(metadata.storage_data[W], *lie) for lie in lies.items()])


def shape(size: Any, *chunks: tuple[Any, Any]) -> Tamper:
    """The metadata says something else of the shape of w, and of its parts: offsets and sizes."""

    def change(metadata: Metadata) -> None:
        tensor: Any = metadata.state_dict_metadata["model.w"]
        tensor.size = size
        tensor.chunks = [ChunkStorageMetadata(*chunk) for chunk in chunks or [((0, 0), size)]]
        for offsets, _ in chunks:
            metadata.storage_data[MetadataIndex("model.w", offsets)] = metadata.storage_data[W]

    return spread(change)


def property_of_w(name: str, value: Any) -> Tamper:
    """The metadata says something else of what kind w is."""
    return spread(lambda metadata: setattr(metadata.state_dict_metadata["model.w"].properties, name, value))


def metadata_is(pickled: bytes | Callable[[Path], bytes]) -> Tamper:
    """A sound folder with another pickle for its metadata."""

    def make(path: Path) -> None:
        spread()(path)
        (path / ".metadata").write_bytes(pickled if isinstance(pickled, bytes) else pickled(path))

    return make


def with_payload(where: Callable[[Metadata, Payload], object]) -> Tamper:
    """The metadata holds code somewhere."""

    def make(path: Path) -> None:
        spread(lambda metadata: where(metadata, Payload(marker(path))))(path)

    return make


def part_is(make_part: Tamper) -> Tamper:
    """The file of parts holds one other thing, and the metadata knows how long it is."""

    def make(path: Path) -> None:
        part = path.with_name("part")
        make_part(part)
        content = part.read_bytes()
        part.unlink()

        def change(metadata: Metadata) -> None:
            for info in metadata.storage_data.values():
                info.offset, info.length = 0, len(content)
            metadata.storage_data = {W: metadata.storage_data[W]}
            metadata.state_dict_metadata = {"model.w": metadata.state_dict_metadata["model.w"]}

        spread(change)(path)
        (path / "__0_0.distcp").write_bytes(content)

    return make


def parts_are(key: str, make: Tamper) -> Tamper:
    """A sound folder in which a file is something else."""

    def tamper(path: Path) -> None:
        spread()(path)
        replaced(key, make)(path)

    return tamper


def moved_out(path: Path) -> None:
    """A sound folder whose parts lie outside, with a link to there."""
    spread()(path)
    target = path.parent / "outside" / "parts"
    shutil.move(path / "__0_0.distcp", target)
    (path / "__0_0.distcp").symlink_to(target)


def planned(path: Any, name: str = "model.w") -> Tamper:
    """The metadata says something else of where in the nested dicts a tensor was."""
    return spread(lambda metadata: metadata.planner_data.update({name: path}))


DISTRIBUTED = [
    Case("distributed metadata is code alone", metadata_is(called("os", "mkdir"))),
    Case("distributed metadata is code by a late protocol", metadata_is(lambda p: pickle.dumps(Payload(marker(p)), 5))),
    *(
        Case(f"distributed metadata calls {'.'.join(names)}", metadata_is(called(*names)))
        for names in (
            ("builtins", "eval"),
            ("builtins", "__import__"),
            ("builtins", "getattr"),
            ("torch", "load"),
            ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
            ("torch.distributed.checkpoint", "load"),
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
        )
    ),
    Case(
        "distributed metadata holds code in its plan",
        with_payload(lambda found, evil: found.planner_data.update(x=evil)),
    ),
    Case(
        "distributed metadata has code for a plan",
        with_payload(lambda found, evil: setattr(found, "planner_data", evil)),
    ),
    Case(
        "distributed metadata has code for a tensor",
        with_payload(lambda found, evil: found.state_dict_metadata.update({"model.w": evil})),
    ),
    Case(
        "distributed metadata has code for a key",
        with_payload(lambda found, evil: found.storage_data.update({evil: 1})),
    ),
    Case(
        "distributed metadata has code for a place",
        with_payload(lambda found, evil: found.storage_data.update({W: evil})),
    ),
    Case(
        "distributed metadata sets the state of a class",
        metadata_is(opcodes(b"ctorch\nSize\n}", text("__new__"), b"cos\nmkdir\nsb")),
    ),
    Case("distributed metadata is empty", metadata_is(b"")),
    Case("distributed metadata is no pickle", metadata_is(DEEP)),
    Case("distributed metadata is cut short", metadata_is(opcodes(b"}")[:-1])),
    Case("distributed metadata is a number", metadata_is(pickle.dumps(3))),
    Case("distributed metadata is a dict", metadata_is(pickle.dumps({"state_dict_metadata": {}}))),
    Case(
        "distributed metadata has a name that takes days to hash", metadata_is(opcodes(b"}", sharing_tuples(60), b"Ns"))
    ),
    Case("distributed metadata has a memo of 2**31 places", metadata_is(opcodes(b"]r\xff\xff\xff\x7f"))),
    Case("distributed metadata has 17 MB", metadata_is(opcodes(text("x" * (17 << 20))))),
    Case("distributed metadata is nested 100,000 levels deep", metadata_is(opcodes(b"]" * 100_000 + b"a" * 99_999))),
    Case("distributed metadata is a link to the outside", parts_are(".metadata", link("../outside/secret"))),
    Case("distributed metadata is a pipe", parts_are(".metadata", os.mkfifo)),
    Case("distributed metadata is a folder", parts_are(".metadata", Path.mkdir)),
    Case("distributed parts are a pipe", parts_are("__0_0.distcp", os.mkfifo)),
    Case("distributed parts are a folder", parts_are("__0_0.distcp", Path.mkdir)),
    Case("distributed parts are empty", parts_are("__0_0.distcp", Path.touch)),
    Case("distributed parts are zeros", parts_are("__0_0.distcp", lambda path: path.write_bytes(bytes(10**5)))),
    Case("distributed parts are a link to the outside", moved_out),
    *(
        Case(f"distributed parts are at {str(name)[:40]!r}", place(relative_path=name))
        for name in (*TRAVERSAL, "", ".", None, 1)
    ),
    Case("a part is beyond its file", place(offset=10**9)),
    Case("a part is before its file", place(offset=-1)),
    Case("a part begins inside another", place(offset=7)),
    Case("a part has 2**62 bytes", place(length=2**62)),
    Case("a part has no bytes", place(length=0)),
    Case("a part has fewer bytes than its tensor", place(length=40)),
    Case("a part has a byte too few", place(length=1200)),
    Case("a part begins at a text", place(offset="0")),
    Case("a part begins at true", place(offset=True)),
    Case("a part is compressed", place(transform_descriptors=["zstd"])),
    Case(
        "all parts are the same megabyte",
        spread(lambda found: [vars(info).update(offset=0, length=1500) for info in found.storage_data.values()]),
    ),
    Case("a distributed tensor has 2**60 values", shape((2**30, 2**30))),
    Case("a distributed tensor has lengths whose product overflows", shape((2**40, 2**40))),
    Case("a distributed tensor has a length below zero", shape((-4, -3))),
    Case("a distributed tensor has a length of text", shape(("4", 3))),
    Case("a distributed tensor has 65 dimensions", shape((1,) * 65)),
    Case("a distributed tensor has none and 2**62 values", shape((0, 2**62))),
    Case("a distributed tensor is larger than its part", shape((8, 3), ((0, 0), (4, 3)))),
    Case("a distributed tensor is smaller than its part", shape((2, 3), ((0, 0), (4, 3)))),
    Case("a distributed tensor has no parts", spread(lambda f: f.state_dict_metadata["model.w"].chunks.clear())),
    Case("a distributed tensor has parts that overlap", shape((8, 3), ((0, 0), (4, 3)), ((0, 0), (4, 3)))),
    Case("a distributed tensor has a part beyond it", shape((8, 3), ((0, 0), (4, 3)), ((6, 0), (4, 3)))),
    Case("a distributed tensor has a part of other dimensions", shape((12,), ((0,), (4, 3)))),
    Case("a distributed tensor has another shape in its part", shape((3, 4), ((0, 0), (3, 4)))),
    Case("a distributed tensor has another dtype in its part", property_of_w("dtype", torch.int32)),
    Case("a distributed tensor has a dtype that is none", property_of_w("dtype", torch.Size([1]))),
    Case("a distributed tensor is complex", property_of_w("dtype", torch.complex64)),
    Case("a part is code", part_is(saved(lambda evil: evil))),
    Case("a part is code in a list", part_is(saved(lambda evil: [torch.zeros(4, 3), evil]))),
    Case("a part calls os.mkdir", part_is(zipped(called("os", "mkdir")))),
    Case("a part is a number", part_is(saved(lambda _: 3))),
    Case("a part is a dict of tensors", part_is(saved(lambda _: {"w": torch.zeros(4, 3)}))),
    Case("a part is one value expanded", part_is(saved(lambda _: torch.zeros(1).expand(4, 3)))),
    Case("a part is sparse", part_is(saved(lambda _: torch.zeros(4, 3).to_sparse()))),
    Case(
        "a part is of legacy format", part_is(saved(lambda _: torch.zeros(4, 3), _use_new_zipfile_serialization=False))
    ),
    Case("a distributed plan is 100 levels deep", planned(("a",) * 100)),
    Case("a distributed plan is empty", planned(())),
    Case("a distributed plan is a text", planned("model")),
    Case("a distributed plan puts two tensors at one place", planned(("model", "v"))),
    Case("a distributed plan puts a tensor under a tensor", planned(("model", "v", "w"))),
    Case("a distributed plan has a list for a key", planned(("model", ["w"]))),
    Case("a distributed plan is none", spread(lambda found: setattr(found, "planner_data", None))),
    Case("distributed metadata has names that are paths", planned(("model", "../../outside/secret"))),
    Case("distributed metadata has a name that is no text", spread(lambda f: f.state_dict_metadata.update({1: None}))),
]

FOLDERS = [*INDEXES, *DISTRIBUTED]

HARMLESS_FOLDERS = {
    "two shards have the same tensor, the index says which",
    "the state of a trainer is nested 100,000 levels deep",
    "the state of a trainer has a step of a million digits",
    "distributed metadata has names that are paths",
    "a part is one value expanded",
}
"""What may be recorded: it does no harm."""
