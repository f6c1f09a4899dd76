"""The arrays of a saved decomposition.

======================  =========  ===============  ===============================================================
array                   dtype      dimensions       content
======================  =========  ===============  ===============================================================
``mode``                uint16     (weight)         mode of each weight
``scale``               float32    (weight)         a
``mean``                float64    (weight)         mean over the fitted epochs; b = mean - a · mean of the reference
``correlation``         float32    (weight)         signed, with the reference of the mode
``reference``           float32    (epoch, m)       the reference trajectories over the fitted epochs
``reference_index``     int64      (m)              which weights they are; where each is a single one
``members``             int64      (2, member)      where each is made of many: weights, and the mode of each
``terms``               float64    (2, member)      theirs, o and c: a reference is the sum of c · (weight - o)
``sample_index``        int64      (sample)         the weights that Step 1 looked at
``variation``           float64    (weight)         Σ(w - mean)² over the fitted epochs; in fits that can be updated
``correlations``        float32    (m, weight)      with every reference; in fits that can be updated
======================  =========  ===============  ===============================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .format import array_document, result_rule

RESULTS = {"mode": "uint16", "scale": "float32", "mean": "float64", "correlation": "float32"}
MOMENTS = {"variation": "float64", "correlations": "float32"}
"""What a fit needs to take further epochs, beside its results."""
MEMBERS = {"members": "int64", "terms": "float64"}
"""What references are that are made of many weights."""


@dataclass(frozen=True)
class FitShape:
    """The numbers that decide every array of a fit."""

    n_weights: int
    n_epochs: int
    n_modes: int
    n_samples: int
    updatable: bool
    n_members: int = 0
    """0 where each reference is a single weight."""

    @property
    def results(self) -> tuple[str, ...]:
        """The arrays that are written block by block."""
        return (*RESULTS, *(MOMENTS if self.updatable else ()))

    def documents(self) -> dict[str, dict[str, Any]]:
        """Array -> ``zarr.json``; what is read does not depend on what is stored."""
        n, chunk = self.n_weights, result_rule(self.n_weights).chunk
        rows = ("epoch", "m")
        documents = {
            "reference": array_document("float32", (self.n_epochs, self.n_modes), (self.n_epochs, self.n_modes), rows),
            "sample_index": array_document("int64", (self.n_samples,), (self.n_samples,), ("sample",)),
        }
        if self.n_members:
            for array, dtype in MEMBERS.items():
                shape = (2, self.n_members)
                documents[array] = array_document(dtype, shape, shape, ("part", "member"))
        else:
            documents["reference_index"] = array_document("int64", (self.n_modes,), (self.n_modes,), ("m",))
        for array, dtype in (RESULTS | MOMENTS).items():
            documents[array] = array_document(dtype, (n,), (chunk,), ("weight",))
        documents["correlations"] = array_document("float32", (self.n_modes, n), (1, chunk), ("m", "weight"))
        if not self.updatable:
            documents = {array: document for array, document in documents.items() if array not in MOMENTS}
        return documents
