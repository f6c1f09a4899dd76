"""Compare a fit of a recorded run with the float64 oracle of the tests, weight by weight.

    python benchmarks/oracle.py RUN [--modes 10] [--samples 1000]

Prints how many modes agree, overall and where the two best |correlations| differ by more than 1e-6, and the largest
errors of scale (in σ_w/σ_r) and of the modelled trajectory (in σ_w); and, for comparison, how many weights the one-pass
float32 correlation n·Σxy - ΣxΣy of the official code puts into another mode than the oracle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import trajkit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

COLUMNS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--modes", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1000)
    arguments = parser.parse_args()
    run = trajkit.open_run(arguments.run)
    fit = trajkit.fit(run, modes=arguments.modes, samples=arguments.samples)
    sample = fit.sample_index
    trajectories = run.weights[:]
    references = sample[np.searchsorted(sample, oracle.step1(trajectories, sample, arguments.modes))]
    print(f"references: {np.array_equal(references, fit.reference_index)}")
    agree = decided = wrong = constant = one_pass = 0
    scale_error = model_error = 0.0
    for start in range(0, trajectories.shape[1], COLUMNS):
        columns = np.r_[references, start : min(start + COLUMNS, trajectories.shape[1])]
        expected = oracle.fit(trajectories[:, columns], np.arange(len(references)))
        here = slice(len(references), None)
        mode, part = expected.mode[here], columns[here]
        same = mode == fit.mode[part]
        agree += int(same.sum())
        decided += int((expected.margin[here] > 1e-6).sum())
        wrong += int((~same & (expected.margin[here] > 1e-6)).sum())
        w = trajectories[:, part].astype(np.float64)
        moves = same & (w != w[0]).any(0)
        one_pass += int((one_pass_modes(trajectories[:, part], trajectories[:, references]) != mode)[moves].sum())
        constant += int((w == w[0]).all(0).sum())
        spread = w.std(0)[moves]
        spread_r = trajectories[:, references].astype(np.float64).std(0)[mode[moves]]
        scale_error = max(
            scale_error,
            float(np.abs((expected.scale[here][moves] - fit.scale[part][moves]) / (spread / spread_r)).max()),
        )
        r = trajectories[:, references].astype(np.float64)[:, fit.mode[part]]
        modelled = r * fit.scale[part].astype(np.float64) + fit.offset[part]
        model_error = max(model_error, float((np.abs(modelled - expected.modelled[:, here])[:, moves] / spread).max()))
    n = trajectories.shape[1]
    print(f"weights: {n}, constant: {constant}, modes that agree: {agree} ({100 * agree / n:.5f} %)")
    print(f"decided by more than 1e-6: {decided}, of these wrong: {wrong}")
    print(f"largest error of scale: {scale_error:.2e} σ_w/σ_r, of the modelled trajectory: {model_error:.2e} σ_w")
    print(f"the one-pass float32 formula gives another mode to {100 * one_pass / (n - constant):.1f} % of what moves")


def one_pass_modes(w: np.ndarray, r: np.ndarray) -> np.ndarray:
    """(n,) modes by the float32 formula of the official code; what is infinite wins, as it does there."""
    n = np.float32(len(w))
    with np.errstate(all="ignore"):
        top = n * (r.T @ w) - np.outer(r.sum(0), w.sum(0))
        bottom = np.outer(n * (r * r).sum(0) - r.sum(0) ** 2, n * (w * w).sum(0) - w.sum(0) ** 2)
        return np.nan_to_num(np.abs(top / np.sqrt(bottom)), posinf=np.inf).argmax(0)


if __name__ == "__main__":
    main()
