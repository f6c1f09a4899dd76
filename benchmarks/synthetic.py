"""Record synthetic trajectories of realistic structure, block by block: random walks that fade, at many scales.

    python benchmarks/synthetic.py RUN WEIGHTS EPOCHS

Each weight follows one of ten walks, with scale, offset and noise of its own. With --bfloat16 the
values are rounded as a bfloat16 training leaves them, so that the archive is coded. A run that is there is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import trajkit
from trajkit.layout import ParameterLayout, TensorEntry

BLOCK = 1 << 20
N_WALKS = 10
LAYERS = 20


def layout_of(n_weights: int) -> ParameterLayout:
    """Some large and some small layers."""
    shares = np.geomspace(1, 100, LAYERS)
    bounds = np.r_[0, np.round(np.cumsum(shares / shares.sum()) * n_weights)].astype(int)
    return ParameterLayout.of(
        TensorEntry(name=f"layer{number}.weight", shape=(int(size),), dtype="float32", kind="weight")
        for number, size in enumerate(np.diff(bounds))
    )


def walks_of(n_epochs: int) -> NDArray[np.float32]:
    """(E, 10) walks whose steps become smaller, of standard deviation 1."""
    rng = np.random.default_rng(0)
    walks = (rng.normal(size=(n_epochs, N_WALKS)) / np.sqrt(1 + np.arange(n_epochs))[:, None]).cumsum(axis=0)
    return ((walks - walks.mean(0)) / walks.std(0)).astype(np.float32)


def record(path: Path, n_weights: int, n_epochs: int, bfloat16: bool = False) -> None:
    layout, walks = layout_of(n_weights), walks_of(n_epochs)
    noise = np.random.default_rng(1).standard_normal(4 * BLOCK, dtype=np.float32)
    places = np.random.default_rng(2)
    weights = np.empty(n_weights, dtype=np.float32)
    with trajkit.RunWriter(path, fsync=False) as writer:
        for epoch in range(len(writer.epochs), n_epochs):
            for number, start in enumerate(range(0, n_weights, BLOCK)):
                n = min(BLOCK, n_weights - start)
                own = np.random.default_rng(1000 + number)
                follows = own.integers(N_WALKS, size=n)
                scale = 0.01 * own.standard_normal(n, dtype=np.float32)
                offset = 0.05 * own.standard_normal(n, dtype=np.float32)
                place = int(places.integers(3 * BLOCK))
                moved = walks[epoch][follows] + 0.5 * noise[place : place + n]
                weights[start : start + n] = scale * moved + offset
            if bfloat16:
                weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            writer.append(layout, epoch, weights, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=float)
    parser.add_argument("epochs", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    record(arguments.run, int(arguments.weights), arguments.epochs, arguments.bfloat16)


if __name__ == "__main__":
    main()
