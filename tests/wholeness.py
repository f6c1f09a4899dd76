"""What must hold of a run that `counting` recorded: exactly its first epochs, all whole, for all who read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from trajkit import open_run
from trajkit.errors import RunNotFoundError


def assert_whole(path: Path, n_epochs: int | range, last: int | None = None) -> int:
    """The run holds exactly its first epochs, all whole, for trajkit and for plain Zarr; returns how many.

    last: of so many epochs alone the values are read, of all by default.
    """
    found = 0
    try:
        run = open_run(path)
        found = len(run.epochs)
        rows = np.arange(found)[-last if last else None :]
        assert run.epochs.tolist() == list(range(found))
        np.testing.assert_array_equal(run.weights[rows], np.repeat(rows[:, None], run.layout.n_weights, axis=1))
        np.testing.assert_array_equal(run.trajectory("count", rows), rows * 10)
        np.testing.assert_array_equal(run.trajectory("mean", rows)[:, 0], -rows)
        assert run.metrics == {epoch: {"epoch": float(epoch)} for epoch in range(found)}
    except RunNotFoundError:
        pass
    assert found in (n_epochs if isinstance(n_epochs, range) else (n_epochs,)), f"{found} epochs, not {n_epochs}"
    if (path / "zarr.json").exists():
        for group in (zarr.open_group(path, mode="r"), zarr.open_group(path, mode="r", use_consolidated=False)):
            for array in (group["weights"], group["epoch"]):
                shown = array.shape[0]
                assert shown <= found
                rows = np.arange(max(0, shown - (last or shown)), shown)
                values = array[rows[0] :] if rows.size else rows
                np.testing.assert_array_equal(values if values.ndim == 1 else values[:, 0], rows)
                np.testing.assert_array_equal(values.T, np.broadcast_to(rows, values.T.shape))
    return found
