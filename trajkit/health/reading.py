"""One pass over the archive: what is in each tensor at each epoch, in memory that grows with neither N nor E."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels.contents import Contents, contents_of
from ..layout import TensorEntry
from ..run import Run
from ..scratch import scratch
from ..store.format import WEIGHTS, buffer_path, chunk_rule

Progress = Callable[[int, int], None]

BLOCK_BYTES = 16 << 20
"""That a thread reads at a time."""


@dataclass(frozen=True)
class TensorContents:
    """The tensors that have values, and what they hold in E rows, (S, E) each."""

    entries: tuple[TensorEntry, ...]
    contents: Contents


@dataclass(frozen=True)
class _Piece:
    """Neighbouring columns of one array, and which of the S tensors begin where in them."""

    path: str
    columns: slice
    first_tensor: int
    bounds: NDArray[np.int64]


def read_contents(run: Run, rows: NDArray[np.int64], progress: Progress | None = None) -> TensorContents:
    """What each tensor, weight or buffer, holds in the given rows of a run; each object is read and hashed once.

    `progress` is called with the number of values done, of one epoch, and all. Raises `DamagedRunError`.
    """
    arrays = _arrays(run)
    entries = tuple(entry for placed in arrays.values() for entry in placed)
    contents = Contents.zeros(len(entries), rows.size)
    total, done = sum(entry.size for entry in entries), 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = {pool.submit(_read_piece, run, rows, piece): piece for piece in _pieces(arrays)}
        try:
            for future in as_completed(futures):
                piece = futures[future]
                contents.add(future.result(), piece.first_tensor)
                done += piece.columns.stop - piece.columns.start
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
    return TensorContents(entries, contents)


def _arrays(run: Run) -> dict[str, list[TensorEntry]]:
    """Path -> the tensors in it that have values, in its order."""
    layout = run.layout
    arrays = {WEIGHTS: [entry for entry in layout.weights if entry.size]}
    for dtype in layout.buffer_sizes:
        arrays[buffer_path(dtype)] = [entry for entry in layout.buffers if entry.size and entry.vector == dtype]
    return arrays


def _pieces(arrays: dict[str, list[TensorEntry]]) -> Iterator[_Piece]:
    """The arrays chunk by chunk."""
    before = 0
    for path, entries in arrays.items():
        offsets = np.array([*(entry.offset for entry in entries), entries[-1].stop])
        width = chunk_rule(entries[-1].stop).chunk
        for start in range(0, entries[-1].stop, width):
            stop = min(start + width, entries[-1].stop)
            first = int(np.searchsorted(offsets, start, side="right")) - 1
            last = int(np.searchsorted(offsets, stop))
            bounds = np.clip(offsets[first : last + 1], start, stop) - start
            yield _Piece(path, slice(start, stop), before + first, bounds)
        before += len(entries)


def _read_piece(run: Run, rows: NDArray[np.int64], piece: _Piece) -> Contents:
    """What the tensors of a piece hold in all rows; some rows are read at a time, after the last one before them."""
    dtype = np.dtype(run.archive.documents[piece.path]["data_type"])
    width = piece.columns.stop - piece.columns.start
    together = min(rows.size, max(1, BLOCK_BYTES // (width * dtype.itemsize)))
    block = scratch("contents", (1 + together) * width, dtype).reshape(1 + together, width)
    found = Contents.zeros(piece.bounds.size - 1, rows.size)
    for start in range(0, rows.size, together):
        here = rows[start : start + together]
        run.archive.read(piece.path, here, (piece.columns.start, piece.columns.stop), block[1 : 1 + here.size])
        has_before = start > 0
        seen = block[0 if has_before else 1 : 1 + here.size]
        found.add(contents_of(seen, piece.bounds, piece.columns.start, has_before), 0, start)
        block[0] = block[here.size]
    return found
