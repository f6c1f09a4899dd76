"""Pearson correlation of trajectories, safe for weights far from zero and for constant ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def standardised(trajectories: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(E, K) trajectories, centred and with Euclidean norm 1 over the E epochs, and the (K,) norms, in float64.

    The first value is subtracted before the mean, so that a constant trajectory gives exact zeros and norm 0.
    """
    moved = trajectories.astype(np.float64) - trajectories[:1].astype(np.float64)
    moved -= moved.mean(axis=0)
    largest = np.abs(moved).max(axis=0)
    moved /= np.where(largest > 0, largest, 1.0)  # squares of tiny motions would underflow
    norm = np.sqrt(np.einsum("ek,ek->k", moved, moved))
    return moved / np.where(norm > 0, norm, 1.0), norm * largest


def correlation_matrix(trajectories: NDArray[np.floating]) -> NDArray[np.float64]:
    """(K, K) signed Pearson correlations of (E, K) trajectories; a constant one correlates 0 with all, itself too."""
    unit, _ = standardised(trajectories)
    matrix = unit.T @ unit
    np.clip(matrix, -1.0, 1.0, out=matrix)
    np.fill_diagonal(matrix, unit.any(axis=0))  # exactly, or rounding would choose between the members of a pair
    return matrix


def correlation_magnitude(trajectories: NDArray[np.floating]) -> NDArray[np.float64]:
    """(K, K) |correlations| of (E, K) trajectories, in the memory of one such matrix."""
    matrix = correlation_matrix(trajectories)
    return np.abs(matrix, out=matrix)
