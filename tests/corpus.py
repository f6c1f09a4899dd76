"""The corpus of malicious inputs: archives and checkpoint files, one sentence each."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from hostile import (
    DEEP,
    LEGACY,
    PARTS,
    RECORD,
    ROOT,
    TRAVERSAL,
    WHOLE_TENSOR,
    Case,
    a_socket,
    a_tar,
    called,
    claiming,
    content,
    edited,
    evaluation,
    first_tensor,
    fit_attributes,
    fit_content,
    fit_table,
    in_shard,
    layout,
    legacy_storage,
    linked,
    marked,
    number,
    numbers,
    objects_of_record,
    one,
    opcodes,
    record,
    replaced,
    safetensors,
    saved,
    shard_index,
    sharing_tuples,
    state_dict,
    tensor,
    text,
    very_deep,
    with_crc,
    written,
    zipped,
    zstd_bomb,
)
from numcodecs import Zstd

from trajkit.documents import SIZE_LIMIT, VALUES_LIMIT

MILLION_DIGITS = b'{"attributes": {"trajkit": {"format": ' + b"1" * 10**6 + b"}}}"
ZEROS = Zstd(level=1).encode(bytes(4000))


def of_length(n_bytes: int) -> Any:
    """The root's document, filled up to a length with spaces in a string."""

    def tamper(root: Path) -> None:
        document = json.loads((root / ROOT).read_bytes())
        document["attributes"]["filling"] = ""
        document["attributes"]["filling"] = " " * (n_bytes - len(json.dumps(document)))
        (root / ROOT).write_text(json.dumps(document))

    return tamper


def in_root(old: bytes, new: bytes) -> Any:
    """The root's document with other bytes somewhere."""

    def tamper(root: Path) -> None:
        found = (root / ROOT).read_bytes()
        assert old in found
        (root / ROOT).write_bytes(found.replace(old, new, 1))

    return tamper


def other_root(make: Any) -> Any:
    """Something else in the place of the run."""
    return lambda root: replaced("", make)(root)


FORMAT = b'"format": 1'

ROOTS = [
    Case("the root's document is empty", written(ROOT, b"")),
    Case("the root's document is cut short", written(ROOT, b'{"attributes": {"trajkit"')),
    Case("the root's document is a list", written(ROOT, b"[]")),
    Case("the root's document is nested 100,000 levels deep", written(ROOT, DEEP)),
    Case("an attribute of the root is nested 100,000 levels deep", in_root(FORMAT, FORMAT + b', "x": ' + DEEP)),
    Case(
        "an attribute of the root is nested 40 levels deep",
        in_root(FORMAT, b'"x": ' + b"[" * 40 + b"]" * 40 + b", " + FORMAT),
    ),
    Case("the root's document is as long as is read", of_length(SIZE_LIMIT)),
    Case("the root's document is longer than is read", of_length(SIZE_LIMIT + 1)),
    Case("the root's document has a million values too many", written(ROOT, b"[" + b"{}," * 2 * VALUES_LIMIT + b"0]")),
    Case("the format is a number of a million digits", written(ROOT, MILLION_DIGITS)),
    Case("an attribute of the root has 4000 digits", in_root(FORMAT, b'"x": ' + b"1" * 4000 + b", " + FORMAT)),
    Case("the root's document holds NaN", in_root(FORMAT, b'"x": NaN, "format": 1')),
    Case("the root's document holds an infinity", in_root(FORMAT, b'"x": -Infinity, "format": 1')),
    Case("the root's document holds a number beyond all floats", in_root(FORMAT, b'"x": 1e999, "format": 1')),
    Case("the root's document says its format twice", in_root(FORMAT, b'"format": 2, "format": 1')),
    Case("the root's document is UTF-16", lambda root: written(ROOT, (root / ROOT).read_text().encode("utf-16"))(root)),
    Case("the root's document holds bytes that are no UTF-8", in_root(b'"w"', b'"\xed\xa0\x80"')),
    Case("the root's document holds half a surrogate pair", in_root(b'"w"', b'"\\ud800"')),
    Case("the format is a later one", in_root(FORMAT, b'"format": 2')),
    Case("the format is a text", in_root(FORMAT, b'"format": "1"')),
    Case("the format is a text of a megabyte", in_root(FORMAT, b'"format": "' + b"1" * 10**6 + b'"')),
    Case("the format is true", in_root(FORMAT, b'"format": true')),
    Case("the format is a list", in_root(FORMAT, b'"format": [1]')),
    Case("the attributes of the root are a list", edited(ROOT, lambda document: document.update(attributes=[1]))),
    Case("the root has no attributes", edited(ROOT, lambda document: document.pop("attributes") and None)),
    Case("the run is a file", other_root(lambda root: root.write_bytes(b"{}"))),
    Case("the run is a pipe", other_root(os.mkfifo)),
    Case("the run is another group", other_root(lambda root: zarr.create_group(root))),
    Case("the run is an array", other_root(lambda root: zarr.create_array(root, shape=(3,), dtype="f4"))),
    Case("the run is a group of Zarr 2", other_root(lambda root: written(".zgroup", b'{"zarr_format": 2}')(root))),
]

STRANGE_FILES = (
    [Case(f"{part} is a symbolic link to the outside", linked(part)) for part in PARTS]
    + [Case(f"{part} is a pipe", replaced(part, os.mkfifo)) for part in PARTS]
    + [Case(f"{part} is a socket", replaced(part, a_socket)) for part in (ROOT, RECORD, "weights/c/1/0")]
    + [Case(f"{part} is a folder", replaced(part, Path.mkdir)) for part in PARTS if part[-1] in "n0r"]
    + [Case(f"{part} is an empty file", replaced(part, Path.touch)) for part in PARTS]
    + [
        Case("a link to the outside lies among rows that were not committed", linked("weights/c/9")),
        Case("a pipe lies among rows that were not committed", replaced("weights/c/9", os.mkfifo)),
        Case("a folder without end lies among rows that were not committed", replaced("weights/c/9", very_deep)),
        Case("a row that was not committed has a number that is no number", written("weights/c/²", b"x")),
        Case("a row that was not committed has a number of 200 digits", written("weights/c/" + "9" * 200, b"x")),
        Case("a link to the outside lies deep in a row that was not committed", linked("weights/c/9/x/y")),
    ]
)

LIES: list[Any] = [None, -1, 1.5, "x", [[1]], {"a": {}}]
FIELDS = {
    "row": (None, -1, True, 3.0, "3", []),
    "epoch": (None, True, 3.0, "3", [], 2**63, 10**19),
    "metrics": (None, 1, "x", [], {"a": None}, {"a": True}, {"a": [1]}, {"a": "1_000"}, {"a": {"b": 1}}),
    "recorded_at": (None, 1, []),
    "seconds": (None, True, "1", []),
    "layout": (None, 1, [], "x"),
    "writer": (None, 1, []),
    "previous": (None, 1, [], "x"),
    "objects": (None, 1, "x", [], {}, {"weights/c/3/0": None}),
}


def with_key(key: str) -> Any:
    """The record names one more object."""
    return objects_of_record(lambda objects: objects.update({key: [6, "0" * 64]}))


def instead(key: str) -> Any:
    """The record names another object than that of its weights."""
    return objects_of_record(lambda objects: objects.update({key: objects.pop("weights/c/3/0")}))


def object_is(stored: Any) -> Any:
    """The record says something else of the object of its weights."""
    return objects_of_record(lambda objects: objects.update({"weights/c/3/0": stored}))


RECORDS = (
    [
        Case(f"the commit record's {field} is {json.dumps(lie)}", record(**{field: lie}))
        for field, lies in FIELDS.items()
        for lie in lies
    ]
    + [Case(f"a commit record also names {key!r:.30}", with_key(key)) for key in TRAVERSAL]
    + [Case(f"a commit record names {key!r:.30} in place of its weights", instead(key)) for key in TRAVERSAL]
    + [
        Case("a commit record names its weights by another spelling", instead("weights/c/3/../3/0")),
        Case("a commit record names the weights of another epoch", instead("weights/c/2/0")),
        Case("a commit record names the fits", with_key("fits/a/zarr.json")),
        Case("a commit record names another commit record", with_key("epoch/commits/00000000.json")),
        Case(
            "a commit record names a hundred thousand objects",
            objects_of_record(lambda objects: objects.update({f"weights/c/3/{i}": [1, ""] for i in range(100_000)})),
        ),
        Case("a commit record says that an object has a terabyte", object_is([2**40, "0" * 64])),
        Case("a commit record says that an object has -1 bytes", object_is([-1, "0" * 64])),
        Case("a commit record says that an object has true bytes", object_is([True, "0" * 64])),
        Case("a commit record says that an object is text", object_is("ab")),
        Case("a commit record says that a hash is a number", object_is([1204, 7])),
        Case("a commit record has a field too many", record(more=1)),
        Case("a commit record is nested 100,000 levels deep", written(RECORD, b'{"blake3":"","record":' + DEEP + b"}")),
        Case(
            "a commit record holds a number of a million digits", written(RECORD, b'{"blake3":' + b"1" * 10**6 + b"}")
        ),
        Case("a commit record is longer than is read", written(RECORD, b" " * (SIZE_LIMIT + 1))),
        Case("a commit record has metrics that are half a surrogate pair", record(metrics={"\ud800": 1.0})),
        Case("a commit record lies beside its hash", edited(RECORD, lambda document: document.update(blake3=3))),
    ]
)

LAYOUTS = [
    Case(f"a tensor of the layout has {field} {json.dumps(lie)}", first_tensor(**{field: lie}))
    for field in ("name", "shape", "dtype", "kind", "offset", "trainable", "aliases")
    for lie in LIES
] + [
    Case("a tensor has 2**60 weights", first_tensor(shape=[2**60])),
    Case("a tensor has 2**47 weights, and the arrays say so too", first_tensor(shape=[2**47])),
    Case("a tensor has 10**19 weights", first_tensor(shape=[10**19])),
    Case("a tensor has lengths whose product overflows", first_tensor(shape=[2**33, 2**33])),
    Case("a tensor has no weights and a length of 2**62", layout(lambda tensors: tensors[1].update(shape=[0, 2**62]))),
    Case(
        "a tensor has no weights and lengths that overflow",
        layout(lambda tensors: tensors.append({**tensors[0], "name": "v", "shape": [2**40, 0, 2**40], "offset": 300})),
    ),
    Case("a tensor has a million dimensions", first_tensor(shape=[1] * 10**6)),
    Case("a tensor has 65 dimensions", first_tensor(shape=[300] + [1] * 64)),
    Case("a tensor has a length below zero", first_tensor(shape=[-300, -1])),
    Case(
        "the layout has 70,000 tensors",
        layout(
            lambda tensors: tensors.extend({**tensors[0], "name": str(i), "offset": 300 * i} for i in range(1, 70_000))
        ),
    ),
    Case("two tensors have a name", layout(lambda tensors: tensors[1].update(name="w"))),
    Case("a tensor is its own alias", first_tensor(aliases=["w"])),
    Case("a tensor holds Python objects", layout(lambda tensors: tensors[1].update(dtype="object"))),
    Case("a tensor has a dtype by a path", first_tensor(dtype="../../x")),
    Case("the layout is empty", layout(list.clear)),
    Case("the layout is a list of lists", layout(lambda tensors: tensors.append([]))),  # type: ignore[arg-type]
    Case(
        "a buffer has 2**47 values, and the arrays say so too", layout(lambda tensors: tensors[2].update(shape=[2**47]))
    ),
    *(Case(f"a tensor has the name {name!r:.30}", first_tensor(name=name)) for name in ("", *TRAVERSAL)),
    Case("a tensor has a name of a megabyte", first_tensor(name="x" * 10**6)),
    Case("an alias is half a surrogate pair", first_tensor(aliases=["\udfff"])),
]

WEIGHTS = "weights/zarr.json"


def array(path: str = WEIGHTS, **lies: Any) -> Any:
    """An array's document says something else."""
    return edited(path, lambda document: document.update(lies))


ARRAYS = [
    Case(f"the shape of the weights is {json.dumps(shape)}", array(shape=shape))
    for shape in (
        None,
        [],
        [2**60, 300],
        [4, 2**60],
        [-1, 300],
        [4, -300],
        [True, 300],
        [4, 300.0],
        ["4", 300],
        [[4], 300],
    )
] + [
    Case(
        "the chunks of the weights have lengths with a point",
        edited(WEIGHTS, lambda document: document["chunk_grid"]["configuration"].update(chunk_shape=[1.0, 300.0])),
    ),
    Case(
        "the chunks of the weights have length 0",
        edited(WEIGHTS, lambda document: document["chunk_grid"]["configuration"].update(chunk_shape=[1, 0])),
    ),
    Case("the weights are Python objects", array(data_type="object")),
    Case("the weights pass through a pickle codec", array(codecs=[{"name": "numcodecs.pickle"}])),
    Case("the weights pass through blosc", array(codecs=[{"name": "bytes"}, {"name": "blosc"}, {"name": "crc32c"}])),
    Case("the weights pass through a codec by a path", array(codecs=[{"name": "../../outside/codec"}])),
    Case("the codecs of the weights are nested 100,000 levels deep", written(WEIGHTS, b'{"codecs":' + DEEP + b"}")),
    Case("the keys of the weights have another separator", array(chunk_key_encoding={"name": "v2"})),
    Case("the weights have a storage transformer", array(storage_transformers=[{"name": "x"}])),
    Case("the probe has 2**60 weights", array("probe_index/zarr.json", shape=[2**60])),
    Case("the probe has no weights", array("probe_index/zarr.json", shape=[0])),
    Case("the probe has weights in two dimensions", array("probe_index/zarr.json", shape=[300, 1])),
    *(
        Case(
            f"the probe's indices {what}", content("probe_index/c/0", lambda _, index=index: with_crc(index.tobytes()))
        )
        for what, index in {
            "are beyond the weights": np.arange(300) + 1,
            "are below zero": np.arange(300) - 1,
            "fall": np.arange(300)[::-1],
            "are huge": np.arange(300) * 2**53,
            "are all the same": np.zeros(300, np.int64),
        }.items()
    ),
    Case("a row of the weights is an empty file, and its record says so", content("weights/c/1/0", lambda _: b"")),
    Case("a row of the weights is too long, and its record says so", content("weights/c/1/0", lambda data: data * 9)),
]

NOWHERE = 2**64 - 1
PACKED = "weights/c/1/0"
PACKED_ROWS = [
    Case("a chunk becomes 2 GB and does not say so", content(PACKED, lambda _: with_crc(zstd_bomb(1000))), "packed"),
    Case("a chunk becomes 2 GB and says so", content(PACKED, lambda _: with_crc(zstd_bomb(1000, 2**31))), "packed"),
    Case(
        "a chunk becomes 2 GB and says 4000 bytes", content(PACKED, lambda _: with_crc(zstd_bomb(1000, 4000))), "packed"
    ),
    Case("a chunk claims 2**50 bytes", content(PACKED, lambda _: with_crc(zstd_bomb(3, 2**50))), "packed"),
    Case("a chunk claims 2**64 - 1 bytes", content(PACKED, lambda _: with_crc(zstd_bomb(3, NOWHERE))), "packed"),
    Case("a chunk has a bomb behind its values", content(PACKED, lambda _: with_crc(ZEROS + zstd_bomb(900))), "packed"),
    Case("a chunk has its values twice", content(PACKED, lambda _: with_crc(ZEROS * 2)), "packed"),
    Case("a chunk becomes too little", content(PACKED, lambda _: with_crc(Zstd().encode(bytes(8)))), "packed"),
    Case("a chunk lacks its last block", content(PACKED, lambda _: with_crc(zstd_bomb(2, 4000)[:-4])), "packed"),
    Case("a chunk is cut short", content(PACKED, lambda data: data[:9]), "packed"),
    Case("a chunk is a single byte", content(PACKED, lambda _: b"\0"), "packed"),
    Case("a chunk is no zstd", content(PACKED, lambda data: b"x" * len(data)), "packed"),
    Case("a chunk's checksum is wrong", content(PACKED, lambda data: data[:-4] + b"1234"), "packed"),
    Case("a chunk is zstd's with a dictionary", content(PACKED, lambda data: data[:4] + b"\x63" + data[5:]), "packed"),
    Case("a chunk in a shard is a bomb", content(PACKED, in_shard(with_crc(zstd_bomb(1000)))), "packed shards"),
    Case(
        "a chunk in a shard claims 2**50 bytes",
        content(PACKED, in_shard(with_crc(zstd_bomb(3, 2**50)))),
        "packed shards",
    ),
    *(
        Case(f"the index of a {kind} {what}", content(PACKED, shard_index(*entries)), base)
        for kind, base in (("packed shard", "packed shards"), ("shard", "shards"))
        for what, entries in {
            "points beyond the file": (2**40, 9, 2**40, 9),
            "claims more than the file has": (0, 2**40, 0, 2**40),
            "overflows": (2**63, 2**63, NOWHERE - 1, 2),
            "has no chunks": (NOWHERE,) * 4,
            "has chunks of no length": (0, 0, 0, 0),
            "points into itself": (2**10, 2**10, 0, 2**10),
        }.items()
    ),
    Case("a shard is smaller than its index", content(PACKED, lambda _: b"1234"), "packed shards"),
]

FIT_LIES = {
    "version": (None, -1, True, "../../outside", 10**18),
    "layout": (None, "x"),
    "objects": (None, "x"),
    "epochs": ({}, [], [3, 1], ["1"], [True], [2**63], [-(10**18)], list(range(10**5))),
    "modes": ({}, [], [1], [[1]], [["1", 1, 1]], [[1, 1, 1]] * 10**5),
    "tensors": ([], {"w": None}, {"w": [1]}, {"w": ["1", 2, 3]}),
    "settings": (None, "x"),
    "n_samples": (None, -1, 0, True, 2**60, 10**19),
    "updatable": (None, 1, False),
    "n_members": (None, 0, -1, True, 7, 2**60),
}
FITS = (
    [
        Case(f"a fit's {field} is {json.dumps(lie):.40}", fit_attributes(**{field: lie}))
        for field, lies in FIT_LIES.items()
        for lie in lies
    ]
    + [
        Case(f"a fit's table names {key!r:.30}", fit_table(lambda table, key=key: table.update({key: [6, ""]})))
        for key in TRAVERSAL
    ]
    + [
        Case(
            f"a fit's {array} {what}",
            fit_content(
                array,
                lambda data, value=value, dtype=dtype: with_crc(
                    np.full((len(data) - 4) // np.dtype(dtype).itemsize, value, dtype).tobytes()
                ),
            ),
        )
        for array, dtype in (("mode", "uint16"), ("reference_index", "int64"), ("sample_index", "int64"))
        for what, value in (("is beyond what there is", 40_000), ("is all ones", 2**16 - 1))
    ]
    + [
        Case(
            "a fit's references are weights below zero",
            fit_content("reference_index", lambda data: with_crc(np.full((len(data) - 4) // 8, -1).tobytes())),
        ),
        Case(
            "a fit's references are NaN",
            fit_content(
                "reference", lambda data: with_crc(np.full((len(data) - 4) // 4, np.nan, np.float32).tobytes())
            ),
        ),
        Case("a fit's table is nested 100,000 levels deep", fit_table(lambda _: DEEP)),
        Case("a fit's table is a list", fit_table(lambda _: b"[]")),
        Case("a fit's table is longer than is read", fit_table(lambda _: b" " * (SIZE_LIMIT + 1))),
        Case("a fit's table holds text for lengths", fit_table(lambda table: table.update(dict.fromkeys(table, "ab")))),
        Case(
            "a fit's table holds a terabyte", fit_table(lambda table: table.update({key: [2**40, ""] for key in table}))
        ),
        Case("a fit's table is empty", fit_table(dict.clear)),
        Case(
            "a fit's group has attributes that are a list",
            edited("fits/a/zarr.json", lambda document: document.update(attributes=[])),
        ),
        Case("a fit's group is nested 100,000 levels deep", written("fits/a/zarr.json", DEEP)),
        Case(
            "a fit has a name that is no text",
            lambda root: (root / "fits/a").rename(os.fsdecode(os.fsencode(root) + b"/fits/\xff")),
        ),
        Case("a fit has a name beyond all rules", lambda root: (root / "fits/a").rename(root / "fits/-; rm -rf ~ \n")),
    ]
)

EVALUATIONS = (
    [
        Case(
            f"an evaluation's {field} is {json.dumps(lie)}",
            evaluation(lambda found, f=field, lie=lie: found.update({f: lie})),
        )
        for field, lies in {
            "function": (None, 1),
            "fit": (1, True),
            "evaluated_at": (None,),
            "epochs": (None, {}, [1], [{}]),
        }.items()
        for lie in lies
    ]
    + [
        Case(
            f"a row of an evaluation has {field} {json.dumps(lie)}",
            evaluation(lambda found, f=field, lie=lie: found["epochs"][0].update({f: lie})),
        )
        for field, lies in {
            "epoch": (None, True, "0"),
            "recorded": (None, [], {"a": None}, {"a": "1e5"}),
            "modelled": (1, {"a": True}),
        }.items()
        for lie in lies
    ]
    + [
        Case("an evaluation is nested 100,000 levels deep", written("evaluations/0000/zarr.json", DEEP)),
        Case(
            "an evaluation has attributes that are a list",
            edited("evaluations/0000/zarr.json", lambda document: document.update(attributes=[])),
        ),
        Case("an evaluation has a name that is no number", written("evaluations/x y/zarr.json", b"{}")),
    ]
)

MARKS = [
    Case("a mark is nested 100,000 levels deep", written("epoch/bad/00000001.json", DEEP)),
    Case("a mark is a list", written("epoch/bad/00000001.json", b"[]")),
    Case("a mark belongs to another row", marked("00000001", row=0)),
    Case("a mark has a row of text", marked("00000001", row="1")),
    Case("a mark has an epoch beyond 64 bits", marked("00000001", epoch=2**63)),
    Case("a mark has a field too many", marked("00000001", more=1)),
    Case("a mark says that a hundred million records are lost", marked("99999999", row=99999999, layout="0" * 64)),
    Case("a mark says that a record is lost that is there", marked("00000002", row=2, layout="0" * 64)),
    Case("a mark has a path for a name", written("epoch/bad/..%2f..%2foutside.json", b"{}")),
]

ARCHIVES = [*MARKS, *ROOTS, *STRANGE_FILES, *RECORDS, *LAYOUTS, *ARRAYS, *PACKED_ROWS, *FITS, *EVALUATIONS]

W = torch.zeros(4)
WHOLE = tensor((4,), (1,))
META = (
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
    + numbers((2**30, 2**30))
    + numbers((2**30, 1))
    + b"\x89tR"
)

CODE = [
    Case("a .pt holds code beside its tensors", saved(lambda evil: {"w": W, "evil": evil})),
    Case("a .pt is code alone", saved(lambda evil: evil)),
    Case("a .ckpt holds code under state_dict", saved(lambda evil: {"state_dict": {"w": W, "evil": evil}})),
    Case(
        "a .ckpt holds code beside state_dict", saved(lambda evil: {"hyper_parameters": evil, "state_dict": {"w": W}})
    ),
    Case("a .bin holds code in a list", saved(lambda evil: {"model": {"w": W}, "x": [[evil]]})),
    Case("a name of a tensor is code", saved(lambda evil: {evil: W})),
    Case("a legacy .pt holds code beside its tensors", saved(lambda evil: {"w": W, "evil": evil}, **LEGACY)),
    Case("a legacy .ckpt holds code under state_dict", saved(lambda evil: {"state_dict": {"evil": evil}}, **LEGACY)),
    Case("a .pt of a late protocol holds code", saved(lambda evil: {"evil": evil}, pickle_protocol=5)),
    Case("code hides in an array of objects", saved(lambda evil: {"w": np.array([evil, 1], dtype=object)})),
    Case("code hides in the state of a module", saved(lambda evil: {"w": torch.nn.Linear(2, 2), "x": evil})),
    Case("a file is a pickle of code alone", lambda path: path.write_bytes(called("os", "mkdir")(path))),
    Case(
        "code stands where the magic number of a legacy file belongs",
        lambda path: path.write_bytes(called("os", "mkdir")(path) * 5),
    ),
    *(
        Case(f"a pickle calls {'.'.join(names)}", zipped(called(*names)))
        for names in (
            ("os", "mkdir"),
            ("posix", "mkdir"),
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("builtins", "open"),
            ("builtins", "getattr"),
            ("builtins", "__import__"),
            ("os", "system"),
            ("subprocess", "Popen"),
            ("torch", "load"),
            ("torch.hub", "load"),
            ("torch.jit", "load"),
            ("torch.storage", "_load_from_bytes"),
            ("torch._utils", "_import_dotted_name"),
            ("torch.serialization", "add_safe_globals"),
            ("torch.utils._config_module", "install_config_module"),
            ("pickle", "loads"),
            ("numpy", "load"),
            ("torch.package", "PackageImporter"),
            ("torch._dynamo", "compile"),
            ("pathlib", "Path"),
        )
    ),
    Case("a pickle calls by INST", zipped(lambda path: opcodes(b"(", text(str(path)), b"ios\nmkdir\n"))),
    Case("a pickle calls by OBJ", zipped(lambda path: opcodes(b"(cos\nmkdir\n", text(str(path)), b"o"))),
    Case(
        "a pickle calls by STACK_GLOBAL",
        zipped(lambda path: opcodes(text("os"), text("mkdir"), b"\x93", text(str(path)), b"\x85R")),
    ),
    Case("a pickle calls by an extension", zipped(opcodes(b"\x82\x01)R"))),
    Case(
        "a pickle sets the state of a class",
        zipped(opcodes(b"ctorch\nTensor\n}", text("__reduce__"), b"cos\nmkdir\nsb")),
    ),
    Case(
        "a pickle sets the state of a function",
        zipped(opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n}", text("__code__"), b"Nsb")),
    ),
    Case(
        "a pickle asks for a storage by a path", zipped(state_dict(tensor((4,), (1,), key="../../../outside/secret")))
    ),
    Case("a pickle asks for a storage by text", zipped(opcodes(b"P0\n"))),
    Case(
        "a file begins like safetensors and goes on as a pickle",
        lambda path: path.write_bytes(b"\x80\x02\0\0\0\0\0\0{" + called("os", "mkdir")(path) + bytes(1000)),
    ),
    Case(
        "a zip of code stands in a safetensors file",
        lambda path: (saved(lambda evil: evil)(path), safetensors(b"{}", path.read_bytes())(path)),
    ),
    Case(
        "a zip of code stands behind a pickle",
        lambda path: (saved(lambda evil: evil)(path), path.write_bytes(b"\x80\x02}." + path.read_bytes())),
    ),
    Case(
        "a file is a TorchScript archive",
        zipped(called("os", "mkdir"), more={"archive/constants.pkl": opcodes(b")"), "archive/code/__torch__.py": b"x"}),
    ),
    Case(
        "a file is a torch.package",
        zipped(called("os", "mkdir"), more={"archive/.data/python_version": b"3.11", "archive/model.py": b"x"}),
    ),
    Case("a file is a tar of code", a_tar),
]

SIZES = [
    Case(
        "a pickle is compressed and inflates to a gigabyte",
        zipped(lambda _: opcodes(text("x" * 50_000_000)), compress=zipfile.ZIP_DEFLATED),
    ),
    Case("a storage is compressed", zipped(state_dict(WHOLE), {"0": bytes(10**7)}, compress=zipfile.ZIP_DEFLATED)),
    Case(
        "a storage is compressed beside a member that cannot be",
        zipped(
            state_dict(WHOLE),
            {"0": bytes(16)},
            compress=zipfile.ZIP_DEFLATED,
            more={"archive/noise": np.random.default_rng(0).bytes(20_000)},
        ),
    ),
    Case("a zip is compressed by lzma", zipped(state_dict(WHOLE), {"0": bytes(16)}, compress=zipfile.ZIP_LZMA)),
    Case("a pickle has a memo of 2**31 places", zipped(opcodes(b"]r\xff\xff\xff\x7f"))),
    Case("a pickle has 17 MB of empty dicts", zipped(opcodes(b"(" + b"}" * (17 << 20) + b"t"))),
    Case("a legacy pickle has 17 MB in one text", lambda path: path.write_bytes(opcodes(text("x" * (17 << 20))))),
    Case("a name is a tuple that takes days to hash", zipped(opcodes(b"}", sharing_tuples(60), number(1), b"s"))),
    Case("a value is a tuple that takes days to write", zipped(opcodes(b"}", number(1), sharing_tuples(60), b"s"))),
    Case(
        "a legacy name is a tuple that takes days to hash",
        lambda path: path.write_bytes(opcodes(b"}", sharing_tuples(60), number(1), b"s")),
    ),
    Case(
        "a name in a dict is a tuple of a quarter of a million values",
        zipped(opcodes(b"}", sharing_tuples(18), number(1), b"s")),
    ),
    Case("a dict holds itself", zipped(opcodes(b"}q\x00", text("model"), b"h\x00s"))),
    Case("lists are nested 100,000 levels deep", zipped(opcodes(b"]" * 100_000 + b"a" * 99_999))),
    Case("tuples are nested 100,000 levels deep", zipped(opcodes(b")" + b"\x85" * 100_000))),
    Case("a tensor of one value is expanded to 2**40", claiming(tensor((2**40,), (0,)))),
    Case("a tensor of four values is expanded to sixteen", claiming(tensor((4, 4), (0, 1)))),
    Case("a tensor of four values is strided to 2**60", claiming(tensor((2**30, 2**30), (0, 0)))),
    Case("a tensor has strides beyond its storage", claiming(tensor((4,), (2**40,)))),
    Case("a tensor has strides below zero", claiming(tensor((4,), (-1,)))),
    Case("a tensor begins behind its storage", claiming(tensor((4,), (1,), offset=10**6))),
    Case("a tensor begins before its storage", claiming(tensor((4,), (1,), offset=-1))),
    Case("a tensor has a length below zero", claiming(tensor((-4,), (1,)))),
    Case("a tensor has lengths whose product overflows", claiming(tensor((2**33, 2**33), (2**33, 1)))),
    Case("a tensor has a length of 2**62 and none", claiming(WHOLE, tensor((0, 2**62), (1, 1)))),
    Case("a tensor has 10,000 dimensions", claiming(tensor((1,) * 10_000, (1,) * 10_000))),
    Case("a tensor has 65 dimensions", claiming(WHOLE, tensor((1,) * 65, (1,) * 65))),
    Case("a tensor has fewer strides than lengths", claiming(tensor((2, 2), (1,)))),
    Case("a tensor is larger than its storage", claiming(tensor((5,), (1,)))),
    Case("a storage claims 2**40 values", claiming(tensor((2**40,), (1,), n_stored=2**40))),
    Case("a storage claims 2**62 values", claiming(tensor((4,), (1,), n_stored=2**62))),
    Case("a storage claims -1 values", claiming(tensor((4,), (1,), n_stored=-1))),
    Case("a storage has values of another size", claiming(tensor((4,), (1,), kind="DoubleStorage"))),
    Case("a storage is missing", claiming(tensor((4,), (1,), key="1"))),
    Case("a legacy storage claims 2**33 values", legacy_storage(2**33)),
    Case("a legacy storage claims 2**50 values", legacy_storage(2**50)),
    Case("a legacy storage claims -1 values", legacy_storage(-1)),
    Case(
        "2000 tensors are views of the same megabyte",
        zipped(
            state_dict(*(tensor((250_000,), (1,), 262_144, offset) for offset in range(2000))), {"0": bytes(1 << 20)}
        ),
    ),
    Case("a tensor is on the meta device and has 2**60 values", zipped(state_dict(META))),
    Case(
        "a tensor is sparse and has 2**62 values",
        saved(
            lambda _: {
                "w": torch.sparse_coo_tensor(torch.zeros((2, 1), dtype=torch.int64), torch.ones(1), (2**31, 2**31))
            }
        ),
    ),
    Case("a tensor is nested", saved(lambda _: {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})),
    Case("a tensor is complex", saved(lambda _: {"w": torch.zeros(4, dtype=torch.complex64)})),
    Case("tensors have names that are paths", saved(lambda _: {name: torch.ones(3) for name in TRAVERSAL})),
    Case("a tensor has half a surrogate pair for a name", saved(lambda _: {"\ud800": W})),
    Case("tensors have no names", saved(lambda _: {1: W, None: W})),
    Case(
        "a zip has members that are paths",
        zipped(state_dict(WHOLE), {"0": bytes(16)}, more={"../../outside/secret": b"x", "/etc/passwd": b"x"}),
    ),
    Case("a zip has a member twice", zipped(state_dict(WHOLE), {"0": bytes(16)}, more={"archive/data/0": bytes(8)})),
    Case("a zip has no end", lambda path: (saved(lambda _: {"w": W})(path), path.write_bytes(path.read_bytes()[:-30]))),
    Case("a zip has no pickle", lambda path: zipfile.ZipFile(path, "w").writestr("archive/version", "3")),
    Case("a file is a pipe", os.mkfifo),
    Case("a file is a socket", a_socket),
    Case("a file is a folder", Path.mkdir),
    Case("a file is endless zeros", lambda path: path.symlink_to("/dev/zero")),
]


def headers(*values: Any) -> Any:
    """A safetensors file of sixteen bytes in which w0, w1, … are these."""
    return safetensors({f"w{position}": value for position, value in enumerate(values)})


def many(n: int) -> bytes:
    """A header of n tensors without values."""
    return json.dumps({f"layer{position}.weight": one([0], [0, 0]) for position in range(n)}).encode()


SAFETENSORS = [
    Case("tensors of safetensors overlap", headers(one([4], [0, 16]), one([4], [0, 16]))),
    Case("tensors of safetensors overlap in part", headers(one([3], [0, 12]), one([2], [8, 16]))),
    Case("safetensors leaves a gap", headers(one([1], [0, 4]), one([1], [12, 16]))),
    Case("safetensors begins after its begin", headers(one([3], [4, 16]))),
    Case("a tensor of safetensors is beyond the file", headers(one([4], [16, 32]))),
    Case("a tensor of safetensors claims 2**62 bytes", headers(one([2**60], [0, 2**62]))),
    Case("offsets of safetensors overflow", headers(one([4], [2**64 - 8, 8]))),
    Case("offsets of safetensors are below zero", headers(one([4], [-16, 0]))),
    Case("offsets of safetensors run backwards", headers(one([4], [16, 0]))),
    Case("offsets of safetensors are text", headers(one([4], ["0", "16"]))),
    Case("a shape of safetensors overflows", headers(one([2**40, 2**40], [0, 16]))),
    Case("a shape of safetensors is below zero", headers(one([-4], [0, 16]))),
    Case("a shape of safetensors has none and 2**60", headers(WHOLE_TENSOR, one([0, 2**60], [16, 16]))),
    Case("a shape of safetensors has 100,000 dimensions", headers(one([1] * 100_000 + [4], [0, 16]))),
    Case("a dtype of safetensors is unknown", headers(one([4], [0, 16], "O"))),
    Case("a dtype of safetensors has 8 bits", headers(one([16], [0, 16], "F8_E4M3"))),
    Case("a tensor of safetensors has another size than its shape", headers(one([3], [0, 16]))),
    Case("a tensor of safetensors is a list", headers([])),
    Case("a tensor of safetensors has no dtype", headers({"shape": [4], "data_offsets": [0, 16]})),
    Case(
        "safetensors has a tensor twice",
        safetensors(
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
        ),
    ),
    Case("safetensors has no tensors", safetensors({}, b"")),
    Case("the metadata of safetensors is no text", safetensors({"__metadata__": {"a": [1]}, "w": WHOLE_TENSOR})),
    Case("the metadata of safetensors is nested 100,000 levels deep", safetensors(b'{"__metadata__":' + DEEP + b"}")),
    Case("the header of safetensors is no JSON", safetensors(b'{"w":}')),
    Case("the header of safetensors holds a number of a million digits", safetensors(b'{"w":' + b"1" * 10**6 + b"}")),
    Case("the header of safetensors claims 2**63 bytes", safetensors({}, length=2**63)),
    Case("the header of safetensors claims more than the file", safetensors({}, length=10**6)),
    Case("the header of safetensors claims no bytes", safetensors({}, length=0)),
    Case("the header of safetensors has 100 MB", safetensors(b'{"w":"' + b"x" * (99 << 20) + b'"}')),
    Case("the header of safetensors has 20,000 tensors", safetensors(many(20_000), b"")),
    Case(
        "tensors of safetensors have names that are paths",
        lambda path: safetensors(
            {name: one([1], [4 * i, 4 * i + 4]) for i, name in enumerate(TRAVERSAL)}, bytes(4 * len(TRAVERSAL))
        )(path),
    ),
    Case(
        "a name of safetensors is half a surrogate pair",
        safetensors(b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    ),
]

CHECKPOINTS = [*CODE, *SIZES, *SAFETENSORS]

HARMLESS = {
    "a mark has a path for a name",
    "a mark says that a record is lost that is there",
    "evaluations/0000/zarr.json is a folder",
    "evaluations is an empty file",
    "epoch/locks/writer is an empty file",
    "a folder without end lies among rows that were not committed",
    "a row that was not committed has a number that is no number",
    "a row that was not committed has a number of 200 digits",
    "the weights have a storage transformer",
    "a link to the outside lies deep in a row that was not committed",
    "a zip has members that are paths",
    "tensors have names that are paths",
    "tensors of safetensors have names that are paths",
}
"""What all ways of reading may take: it does no harm."""
