"""Inputs that hypothesis makes of sound ones: whatever it comes up with, only errors of ours.

TRAJKIT_FUZZ_EXAMPLES multiplies how many; the examples are the same in every run.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickletools
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import RECORD, ROOT, plain, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from trajkit import ParameterLayout, RunWriter, TrajkitError, open_run
from trajkit.checkpoints.reading import open_checkpoint
from trajkit.checkpoints.selecting import EVERYTHING, arrange
from trajkit.checkpoints.streaming import StreamedWeights, read_buffers
from trajkit.digest import digest
from trajkit.documents import parse

MULTIPLIER = int(os.environ.get("TRAJKIT_FUZZ_EXAMPLES", "1"))
Data = st.DataObject


def fuzz(n: int) -> Callable[[Any], Any]:
    """As many examples, the same in every run; `data` draws what is changed."""

    def decorate(test: Any) -> Any:
        chosen = settings(
            max_examples=n * MULTIPLIER,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return chosen(given(data=st.data())(test))

    return decorate


# --- What is changed, and into what

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 255, 300, 2**16, 2**31, 2**47, 2**53, 2**60, 2**63, 2**64, -(2**63), 10**25])
TEXTS = st.one_of(
    st.sampled_from(["", ".", "..", "/", "../x", "weights", "float32", "bool", "buffer", "NaN", "\ud800", "\0"]),
    st.text(max_size=5),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.integers(-5, 400), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def changed(data: Data, document: Any) -> Any:
    """The document with one to three values, anywhere in it, that are others, gone, or there twice."""
    box = [copy.deepcopy(document)]
    for _ in range(data.draw(st.integers(1, 3))):
        parent: Any = box
        key: Any = 0
        while isinstance(parent[key], list | dict) and parent[key] and data.draw(st.integers(0, 3)):
            parent = parent[key]
            key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        how = data.draw(st.sampled_from(["other", "other", "gone", "twice"]))
        if how == "gone" and parent is not box:
            del parent[key]
        elif how == "twice" and isinstance(parent, list) and parent is not box:
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = data.draw(VALUES)
    return box[0]


def changed_bytes(data: Data, content: bytes) -> bytes:
    """The bytes with one to four places overwritten, cut out or filled."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(found)))
        stop = start + data.draw(st.sampled_from([0, 1, 2, 4, 8, 100]))
        found[start:stop] = data.draw(st.one_of(st.binary(max_size=8), st.just(bytes(8)), st.just(b"\xff" * 8)))
    return bytes(found)


def hashed(record: Any) -> str:
    """The hash of any JSON value, as a record and a fit have it."""
    return digest(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


# --- Archives


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "run"
    plain(path)
    return path


def read_everything(path: Path) -> None:
    """Only an error of ours may come of it."""
    try:
        found = open_run(path)
        for read in (
            lambda: found.weights[:],
            lambda: found.state_dict(1),
            lambda: found.probe_index,
            lambda: [item.to_json() for item in found.evaluations],
            lambda: [found.fit(name) for name in found.fits],
            lambda: [(fit.mode, fit.offset, fit.quality_by_tensor, fit.state_dict(0)) for fit in [found.fit("a")]],
        ):
            try:
                read()
            except TrajkitError:
                continue
    except TrajkitError:
        return


@contextmanager
def instead(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content, for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def fuzz_document(data: Data, run: Path, key: str, again: Callable[[Any], Any] = lambda document: document) -> None:
    """Read the run with a document changed, and with its bytes changed; `again` hashes the document again."""
    content = (run / key).read_bytes()
    if data.draw(st.integers(0, 4)) == 0:
        content = changed_bytes(data, content)
    else:
        content = json.dumps(again(changed(data, json.loads(content)))).encode()
    with instead(run / key, content):
        read_everything(run)


def sealed(what: str, document: Any) -> Any:
    """The document with the hash of what it seals, where it still has a place for one."""
    try:
        saved = document["attributes"][f"trajkit_{what}"]
        saved["blake3"] = hashed(saved[what])
    except (KeyError, TypeError):
        pass
    return document


@fuzz(100)
def test_any_root(run: Path, data: Data) -> None:
    fuzz_document(data, run, ROOT)


@fuzz(100)
def test_any_array(run: Path, data: Data) -> None:
    arrays = ["weights", "epoch", "probe", "probe_index", "buffers/int64", "fits/a/0/mode"]
    fuzz_document(data, run, data.draw(st.sampled_from(arrays)) + "/zarr.json")


@fuzz(200)
def test_any_commit_record(run: Path, data: Data) -> None:
    def again(document: Any) -> Any:
        record = document.get("record") if isinstance(document, dict) else document
        return {"record": record, "blake3": hashed(record)}

    fuzz_document(data, run, RECORD, again)


@fuzz(150)
def test_any_fit(run: Path, data: Data) -> None:
    fuzz_document(data, run, "fits/a/zarr.json", partial(sealed, "fit"))


@fuzz(150)
def test_any_table_of_a_fit(run: Path, data: Data) -> None:
    table = changed(data, json.loads((run / "fits/a/0/mode/objects.json").read_bytes()))
    content = json.dumps(table).encode()
    document = json.loads((run / "fits/a/zarr.json").read_bytes())
    saved = document["attributes"]["trajkit_fit"]
    saved["fit"]["objects"] = digest(content)
    saved["blake3"] = hashed(saved["fit"])
    with (
        instead(run / "fits/a/zarr.json", json.dumps(document).encode()),
        instead(run / "fits/a/0/mode/objects.json", content),
    ):
        read_everything(run)


@fuzz(150)
def test_any_evaluation(run: Path, data: Data) -> None:
    fuzz_document(data, run, "evaluations/0000/zarr.json", partial(sealed, "evaluation"))


@fuzz(30)
def test_any_archive_for_a_writer(run: Path, data: Data) -> None:
    path = Path(shutil.copytree(run, run.with_name("copy")))
    try:
        key = data.draw(st.sampled_from([ROOT, RECORD, "weights/zarr.json", "epoch/zarr.json"]))
        document = changed(data, json.loads((path / key).read_bytes()))
        (path / key).write_text(json.dumps(document))
        try:
            with RunWriter(path, fsync=False) as writer:
                layout = writer.layout
                assert layout is not None
                buffers = {dtype: np.zeros(size, dtype) for dtype, size in layout.buffer_sizes.items()}
                writer.append(layout, 99, np.ones(layout.n_weights, np.float32), buffers)
        except TrajkitError:
            return
    finally:
        shutil.rmtree(path)


@fuzz(300)
def test_any_layout(run: Path, data: Data) -> None:
    document = changed(data, open_run(run).layout.to_json())
    try:
        layout = ParameterLayout.from_json(document)
    except TrajkitError:
        return
    assert ParameterLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@fuzz(300)
def test_any_bytes_as_a_document(data: Data) -> None:
    content = json.dumps(data.draw(VALUES)).encode()
    content = content if data.draw(st.booleans()) else changed_bytes(data, content)
    try:
        document = parse(content)
    except ValueError:
        return
    assert parse(json.dumps(document).encode()) == document


# --- Checkpoint files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "epoch0.pt"


def read_file(path: Path) -> None:
    """Only an error of ours may come of it."""
    try:
        arranged = arrange(open_checkpoint(path), EVERYTHING, None)
        read_buffers(arranged)
        assert StreamedWeights(arranged)[:].size == arranged.layout.n_weights
    except TrajkitError:
        return


def a_model() -> dict[str, torch.Tensor]:
    shared = torch.arange(12.0)
    return {
        "a": shared[:6].view(2, 3),
        "b": shared[6:],
        "tied": shared[6:],
        "half": torch.ones(3).bfloat16(),
        "count": torch.tensor(7),
    }


def saved(**options: Any) -> bytes:
    """The bytes of a sound file."""
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": a_model(), "sparse": torch.eye(2).to_sparse()}, buffer, **options)
    return buffer.getvalue()


ZIP = saved()
LEGACY = saved(_use_new_zipfile_serialization=False)
SAFETENSORS = save({name: value.clone() for name, value in a_model().items()})


@pytest.mark.parametrize("content", [ZIP, LEGACY, SAFETENSORS], ids=["zip", "legacy", "safetensors"])
@fuzz(150)
def test_any_bytes_of_a_checkpoint(content: bytes, file: Path, data: Data) -> None:
    file.write_bytes(changed_bytes(data, content))
    read_file(file)


@fuzz(200)
def test_any_safetensors_header(file: Path, data: Data) -> None:
    length = int.from_bytes(SAFETENSORS[:8], "little")
    header = changed(data, json.loads(SAFETENSORS[8 : 8 + length]))
    safetensors(header, SAFETENSORS[8 + length :])(file)
    read_file(file)


def opcodes_of(pickled: bytes) -> list[bytes]:
    """A pickle cut into its opcodes, each with its argument."""
    starts = [position for _, _, position in pickletools.genops(pickled) if position is not None]
    return [pickled[start:stop] for start, stop in zip(starts, [*starts[1:], len(pickled)], strict=True)]


with zipfile.ZipFile(io.BytesIO(ZIP)) as _archive:
    MEMBERS = {name: _archive.read(name) for name in _archive.namelist()}
PICKLE = next(name for name in MEMBERS if name.endswith("data.pkl"))
OPCODES = opcodes_of(MEMBERS[PICKLE])
FUNCTIONS = [
    "_rebuild_tensor",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_sparse_tensor",
    "_rebuild_qtensor",
]
FUNCTIONS += ["_rebuild_nested_tensor", "_rebuild_wrapper_subclass", "_rebuild_meta_tensor_no_storage"]
MORE = [f"ctorch._utils\n{name}\n".encode() for name in FUNCTIONS]
MORE += [f"ctorch\n{name}\n".encode() for name in ("float32", "sparse_coo", "Size", "Tensor", "device", "IntStorage")]
MORE += [
    b"(",
    b"t",
    b")",
    b"]",
    b"}",
    b"N",
    b"R",
    b"b",
    b"Q",
    b"K\x00",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\x7f" * 8,
]


@fuzz(300)
def test_any_pickle_in_a_zip(file: Path, data: Data) -> None:
    found = list(OPCODES)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(found) - 1))
        stop = start + data.draw(st.integers(0, 3))
        found[start:stop] = data.draw(st.lists(st.sampled_from(OPCODES + MORE), max_size=3))
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, b"".join(found) if name == PICKLE else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_file(file)


# --- Checkpoint folders


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint-1"
    folder.mkdir()
    model = {name: value.clone() for name, value in a_model().items()}
    shards = {"s1": ["a", "b"], "s2": ["tied", "half", "count"]}
    for shard, names in shards.items():
        (folder / shard).write_bytes(save({name: model[name] for name in names}))
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": 0.5, "global_step": 1}))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "trainer_state.json"])
@fuzz(100)
def test_any_document_of_a_checkpoint_folder(name: str, sharded: Path, data: Data) -> None:
    sound = (sharded / name).read_bytes()
    with instead(sharded / name, json.dumps(changed(data, json.loads(sound))).encode()):
        read_file(sharded)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "distributed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": a_model(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@fuzz(150)
def test_any_bytes_of_a_distributed_checkpoint(name: str, distributed: Path, data: Data) -> None:
    with instead(distributed / name, changed_bytes(data, (distributed / name).read_bytes())):
        read_file(distributed)


@fuzz(300)
def test_any_pickle_of_a_distributed_checkpoint(distributed: Path, data: Data) -> None:
    found = opcodes_of((distributed / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(found) - 1))
        stop = start + data.draw(st.integers(0, 3))
        found[start:stop] = data.draw(st.lists(st.sampled_from(found + MORE), max_size=3))
    with instead(distributed / ".metadata", b"".join(found)):
        read_file(distributed)
