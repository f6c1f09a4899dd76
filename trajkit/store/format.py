"""The specification of the archive, format 1.

A **run** is the record of one training: a Zarr v3 group that `zarr.open_group` and `xarray.open_zarr` open as it is.
E epochs, N weights, P probe weights. A *row* is the position of an epoch, 0 … E-1.

====================  =========  ==================  ==============================================================
node                  dtype      dimensions          content
====================  =========  ==================  ==============================================================
``/``                            group               attribute ``trajkit``: ``format`` (1), ``layout`` (see below);
                                                     attribute ``trajkit_identity``, optional; consolidated metadata of
                                                     the arrays
``weights``           float32    (epoch, weight)     the flat weight vectors
``epoch``             int64      (epoch)             the recorded labels, strictly rising; the coordinate
``step``              int64      (epoch)             the training's global step at each, strictly rising; only where
                                                     every epoch was recorded with one
``probe``             float32    (epoch, probe_weight) the values of the probe weights once more
``probe_index``       int64      (probe_weight)      their indices in the flat vector, rising
``buffers/<dtype>``   <dtype>    (epoch, <dtype>)    the buffers of one stored dtype, exactly
``fits/<name>/<version>``        group               a saved decomposition, see `trajkit.store.fits`
``evaluations/<n>``              group               one evaluation, see `trajkit.store.evaluations`
====================  =========  ==================  ==============================================================

**Layout.** A list of tensors in the model's order: name, shape, dtype, kind (weight or buffer), offset, trainable,
aliases. Weights stand in ``weights``, buffers in ``buffers/<stored dtype>``; float16 and bfloat16 are stored as
float32, where they are exact.

**Chunks.** No stored object holds two epochs. A chunk is (1, c) with c of about 128 Ki values, one chunk when N is
smaller; where there are several, c is a multiple of 8192 and 128 chunks at most, 64 MiB, form a shard (1, s·c).
Codecs: little-endian bytes; zstd level 1 where it saves at least 15 % on the first object of the first epoch (bfloat16
weights do); crc32c last. Fill value NaN for floats; chunks equal to the fill value are written all the same, so that an
object that is missing is always damage.

**Commit.** What `append` acknowledges is a commit record, ``epoch/commits/<row, 8 digits>.json``: the JSON object
``{"record": {…}, "blake3": hash of the canonical record}``. It names every object of the row with its length and
BLAKE3 hash, the epoch, its step where the run has them, its metrics, the layout's hash, the writer and the hash of the
previous record; the first record also names the objects of ``probe_index``. A run has as many epochs as it has commit
records without a gap; a shape in a ``zarr.json`` may lag behind them by a crash, and never runs ahead. Zarr lists
nothing below an array, so records, locks and temporary files (``epoch/tmp``) under ``epoch`` disturb no other reader.
Nor do the copies of the layout, ``epoch/layout.json`` and ``probe_index/layout.json``, and what repair writes: marks of
damaged epochs (``epoch/bad``) and what it moved out of the way (``epoch/aside``).

**Optional parts**, which readers of an older version ignore, and which runs that were begun by one lack. Beside a
commit record stands ``"weights": [hash, seal]``: BLAKE3 of the N weights as little-endian float32, whatever objects
hold them, and a hash of that together with the record's. ``trajkit_identity`` in the root is the hash of the first
commit record and names the run; a copy of the run keeps it. Fits and evaluations say by both what they were made of
(`trajkit.store.origin`). ``probe_index/layout.json`` is the third copy of the layout. ``epoch/results`` lists the
results that were saved (`trajkit.store.ledger`).

Order of writes: (1) the objects of the row, beyond the stored shapes and so invisible, and under temporary names what
(3) and (4) will need; (2) fsync of files and directories, all together; (3) the commit record, created exclusively, and
fsync of its name; (4) the shapes grow, last of all in the group's consolidated metadata. The epoch is acknowledged; the
names of (4) reach the disk with the next epoch or when the writer is closed. The first row writes the array metadata
with zero epochs before (1), and the group's own ``zarr.json`` after (2). A writer that opens a run rolls forward (4)
and clears the objects of (1) that no record names. Nothing committed is rewritten or deleted.

**Sources.** Of an epoch that was recorded from a checkpoint, ``epoch/sources/<row, 8 digits>.json`` says from which: a
JSON object with the label ``epoch``, the ``path`` as it was given, ``size`` in bytes, ``modified_ns`` and ``inode``; in
``files`` the BLAKE3 hash of the names, sizes, times and inodes of a folder's files, else null; in ``selection`` the
hash of what was asked for of it; in ``said_epoch`` and ``said_step`` the numbers that it said, or null. It is written
after the commit, may be replaced, and is advisory: no commit record names it, a reader that does not know it leaves it
alone, and where it is missing or damaged a checkpoint of the same epoch is compared with the recorded values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from ..documents import require_fields, require_kind, shown
from ..errors import InputError
from ..layout import ParameterLayout

FORMAT = 1
ATTRIBUTE = "trajkit"

WEIGHTS = "weights"
EPOCH = "epoch"
STEP = "step"
PROBE = "probe"
PROBE_INDEX = "probe_index"
BUFFERS = "buffers"
FITS = "fits"
EVALUATIONS = "evaluations"
COMMITS = "epoch/commits"
LOCKS = "epoch/locks"
TEMPORARY = "epoch/tmp"
BAD = "epoch/bad"
LAYOUT_COPIES = ("epoch/layout.json", "probe_index/layout.json")
IDENTITY = "trajkit_identity"
"""Attribute of the root that names the run; see `trajkit.store.origin`."""
ASIDE = "epoch/aside"
LEDGER = "epoch/results"
SOURCES = "epoch/sources"
METADATA = "zarr.json"

PROBE_SIZE = 16384
COLUMN_GRID = 8192
CHUNK_VALUES = 16 * COLUMN_GRID
SHARD_CHUNKS = 128

ROW_FILE = re.compile(r"\d{8}\.json")
"""What is kept of each row under a name: commit records and marks."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Chunking:
    """How a vector of `n` values is cut: chunks of `chunk` values, objects of `stored` values (a shard or a chunk)."""

    n: int
    chunk: int
    stored: int

    @property
    def sharded(self) -> bool:
        """Whether an object holds several chunks."""
        return self.stored > self.chunk

    def objects(self) -> list[slice]:
        """The columns of each stored object."""
        return [slice(start, min(start + self.stored, self.n)) for start in range(0, self.n, self.stored)]


def chunk_rule(n: int) -> Chunking:
    """The chunk rule of the format for `n` values, n ≥ 1."""
    n_chunks = -(-n // CHUNK_VALUES)
    if n_chunks == 1:
        return Chunking(n, n, n)
    chunk = _round_up(-(-n // n_chunks), COLUMN_GRID)
    n_chunks = -(-n // chunk)
    n_shards = -(-n_chunks // SHARD_CHUNKS)
    return Chunking(n, chunk, chunk * -(-n_chunks // n_shards))


def result_rule(n: int) -> Chunking:
    """How the per-weight results of a fit are cut: whole chunks of the weights, unsharded, so that blocks write alone.

    Up to 4 chunks together where there remain 32 objects: many small files take longer to write than few.
    """
    chunk = chunk_rule(n).chunk
    n_chunks = -(-n // chunk)
    together = chunk * max(1, min(n_chunks // 32, 4))
    return Chunking(n, together, together)


def array_document(
    dtype: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dimensions: tuple[str, ...],
    shard: tuple[int, ...] | None = None,
    zstd: bool = False,
) -> dict[str, Any]:
    """The ``zarr.json`` of an array, by the Zarr v3 specification."""
    little_endian: dict[str, Any] = {"name": "bytes"}
    if np.dtype(dtype).itemsize > 1:
        little_endian["configuration"] = {"endian": "little"}
    checksum = {"name": "crc32c"}
    compressor = [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}] if zstd else []
    codecs: list[dict[str, Any]] = [little_endian, *compressor, checksum]
    if shard is not None:
        configuration = {
            "chunk_shape": list(chunk),
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, checksum],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    kind = np.dtype(dtype).kind
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard or chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if kind == "f" else False if kind == "b" else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(dimensions),
    }


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ``zarr.json`` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def all_arrays(layout: ParameterLayout, n_probe: int, zstd: bool, steps: bool = False) -> dict[str, dict[str, Any]]:
    """Every array of a run: path -> ``zarr.json`` with zero epochs. All but ``probe_index`` grow by a row an epoch."""
    chunking = chunk_rule(layout.n_weights)
    shard = (1, chunking.stored) if chunking.sharded else None
    arrays = {
        WEIGHTS: array_document(
            "float32", (0, layout.n_weights), (1, chunking.chunk), (EPOCH, "weight"), shard=shard, zstd=zstd
        ),
        PROBE: array_document("float32", (0, n_probe), (1, n_probe), (EPOCH, "probe_weight")),
    }
    for dtype, size in layout.buffer_sizes.items():
        arrays[buffer_path(dtype)] = array_document(dtype, (0, size), (1, size), (EPOCH, dtype))
    for label in (EPOCH, STEP) if steps else (EPOCH,):
        arrays[label] = array_document("int64", (0,), (1,), (EPOCH,))
    arrays[PROBE_INDEX] = array_document("int64", (n_probe,), (n_probe,), ("probe_weight",))
    return arrays


def buffer_path(dtype: str) -> str:
    """The array of the buffers of one stored dtype."""
    return f"{BUFFERS}/{dtype}"


def commit_key(row: int) -> str:
    """The object that commits a row."""
    return f"{COMMITS}/{row:08d}.json"


def is_name(name: Any) -> bool:
    """Return whether a node of the archive can have this name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and name != METADATA


def require_name(name: str, what: str) -> str:
    """`name`, if it can name a node of the archive; raises `InputError`."""
    if not is_name(name):
        raise InputError(
            f"{what} {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first, at most 100"
            "; choose another name"
        )
    return name


def spell_labelled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a commit record or a mark as they are stored: without a step where there is none."""
    return {name: value for name, value in fields.items() if name != STEP or value is not None}


def read_labelled(document: Any, kinds: Mapping[str, type | UnionType]) -> dict[str, Any]:
    """The inverse of `spell_labelled`; raises `ValueError` unless fields are of their kinds, and labels of 64 bits."""
    fields = require_fields(document, kinds)
    for label in (EPOCH, STEP):
        if label in fields and not -(2**63) <= require_kind(fields[label], int, f"'{label}'") < 2**63:
            raise ValueError(f"{label} {fields[label]} is no 64-bit integer")
    return fields


def spell_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as JSON can hold them: NaN and infinities become the strings by which Zarr spells them."""
    return {name: value if math.isfinite(value) else json.dumps(value) for name, value in metrics.items()}


def read_metrics(spelled: Mapping[str, Any]) -> dict[str, float]:
    """The inverse of `spell_metrics`; raises `ValueError` for what is no number."""
    return {name: _number(value) for name, value in spelled.items()}


def _number(spelled: Any) -> float:
    if isinstance(spelled, str) and spelled not in ("NaN", "Infinity", "-Infinity"):
        raise ValueError(f"{shown(spelled)} is no number")
    return float(require_kind(spelled, int | float | str, "a metric"))


def saves_enough(first_object: NDArray[np.float32]) -> bool:
    """Whether zstd level 1 saves at least 15 % on a first epoch, judged on up to 8 pieces of its first object (n,)."""
    starts = np.linspace(0, max(first_object.size - CHUNK_VALUES, 0), 8).astype(np.int64)
    pieces = [first_object[start : start + CHUNK_VALUES] for start in np.unique(starts)]
    codec = Zstd(level=1)
    compressed = sum(len(codec.encode(np.ascontiguousarray(piece))) for piece in pieces)
    return compressed <= 0.85 * sum(piece.nbytes for piece in pieces)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
