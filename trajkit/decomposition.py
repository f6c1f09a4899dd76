"""A fit of CMD to a run: which mode each weight follows, and how; and the weights that it models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import DamagedRunError, InputError
from .kernels.affine import References
from .kernels.components import components_of_equal_storage, storage_bytes
from .kernels.functionals import Functional
from .kernels.model import model
from .store.fits import StoredFit
from .store.origin import Origin
from .tensors import to_tensors

if TYPE_CHECKING:
    from .kernels.curve import Curve
    from .run import Run


def relative_to_motion(residual: float, motion: float) -> float | None:
    """Return √(residual / motion) of Σ(w - modelled)² and Σ(w - mean)²; None where both are 0, ∞ where one is."""
    if motion > 0:
        return math.sqrt(residual / motion)
    return None if residual == 0 else math.inf


@dataclass(frozen=True)
class Quality:
    """How much of a group of weights' motion a fit gives back, from sums over these weights."""

    weights: int
    variation: float
    """Σ(w - mean)² over the epochs"""
    explained: float
    """what of it is modelled"""
    last_motion: float | None = None
    """Σ(w - mean)² at the last epoch; None in fits of older versions"""
    last_residual: float | None = None
    """Σ(w - modelled)² at the last epoch"""

    @property
    def variance_explained(self) -> float | None:
        """Share of the variation, in [0, 1]; None where nothing moves, or there are no weights."""
        return self.explained / self.variation if self.variation > 0 else None

    @property
    def last_epoch_error(self) -> float | None:
        """‖w - modelled‖ / ‖w - mean‖ at the last epoch: the error relative to the motion.

        Relative to how far the weights are from their means over the epochs, so that modelling each by its mean would
        give 1. Relative to the weights themselves, most of which hardly move, it would be small for any model. None
        where weights and model are at the means, and in fits of older versions.
        """
        if self.last_motion is None or self.last_residual is None:
            return None
        return relative_to_motion(self.last_residual, self.last_motion)


@dataclass(frozen=True)
class Decomposition:
    """A saved fit of M modes to N weights over e epochs of a run.

    ``w_i(t) ≈ scale_i · r_mode(i)(t) + offset_i`` with r the reference trajectories. Arrays over all weights are read
    from the archive when first asked for, and kept; `modelled` works on a slice and keeps nothing.
    """

    run: Run
    stored: StoredFit

    def __repr__(self) -> str:
        return f"Decomposition('{self.name}' of {self.run!r}, {self.n_modes} modes)"

    @property
    def name(self) -> str:
        """The name under which the run keeps it."""
        return self.stored.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that was chosen: modes, samples, sampling, seed, and the version of trajkit."""
        settings: Mapping[str, Any] = self.stored.attributes["settings"]
        return settings

    @property
    def origin(self) -> Origin | None:
        """The run and the content of the epochs that it was made of; None in fits of older versions."""
        return self.stored.origin

    @property
    def n_modes(self) -> int:
        """M; may be fewer than asked for where the sample has fewer clusters."""
        return len(self.stored.attributes["modes"])

    @cached_property
    def epochs(self) -> NDArray[np.int64]:
        """(e,) labels of the fitted epochs, rising."""
        return np.array(self.stored.attributes["epochs"], dtype=np.int64)

    @cached_property
    def mode(self) -> NDArray[np.uint16]:
        """(N,) mode of each weight, 0 … M-1; modes are numbered by falling size of their cluster."""
        return self.stored.read("mode")

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """(N,) a."""
        return self.stored.read("scale")

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(N,) mean of each weight over the fitted epochs."""
        return self.stored.read("mean")

    @cached_property
    def offset(self) -> NDArray[np.float64]:
        """(N,) b, in float64: with float32 a·r + b would cancel where a reference's mean is far above its motion."""
        return self._references.offset(self.mode, self.scale, self.mean)

    @cached_property
    def correlation(self) -> NDArray[np.float32]:
        """(N,) signed Pearson correlation of each weight with its mode's reference; 0 for a constant weight."""
        return self.stored.read("correlation")

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """(e, M) reference trajectories over the fitted epochs."""
        return self.stored.read("reference")

    @property
    def references(self) -> str:
        """What the references are: ``"weight"``, ``"centroid"`` or ``"principal"``."""
        kind: str = self.settings.get("references", "weight")
        return kind

    @cached_property
    def reference_index(self) -> NDArray[np.int64]:
        """(M,) which weights the references are; raises `InputError` where they are made of many."""
        if self.stored.shape.n_members:
            raise InputError(
                f"{self.run.path}: fit '{self.name}': each {self.references} reference is made of many weights,"
                " expected single ones; `functional` names them"
            )
        return self.stored.read("reference_index")

    @cached_property
    def functional(self) -> Functional:
        """How the references' values follow from those of single weights, at any epoch."""
        if not self.stored.shape.n_members:
            return Functional.of_weights(self.reference_index)
        index, mode = self.stored.read("members")
        return Functional(self.n_modes, index, mode.astype(np.uint16), *self.stored.read("terms"))

    @cached_property
    def sample_index(self) -> NDArray[np.int64]:
        """(K,) rising indices of the weights that the clusters were found on."""
        return self.stored.read("sample_index")

    @cached_property
    def quality(self) -> Quality:
        """Quality over all weights."""
        parts = self.stored.attributes["modes"]
        return Quality(*(sum(column) for column in zip(*parts, strict=True)))

    @cached_property
    def quality_by_tensor(self) -> dict[str, Quality]:
        """Quality of each weight tensor."""
        return {name: Quality(*values) for name, values in self.stored.attributes["tensors"].items()}

    @cached_property
    def quality_by_mode(self) -> tuple[Quality, ...]:
        """Quality of each mode's weights; the sizes of the modes stand here too."""
        return tuple(Quality(*values) for values in self.stored.attributes["modes"])

    @property
    def pca(self) -> tuple[float, ...]:
        """Shares of the variance that principal component analysis explains over these epochs, by the run's probe.

        By `pca_components` of them, the most that take no more storage than the fit, and by one more. Empty where
        nothing moves, and in fits of older versions.
        """
        return tuple(self.stored.attributes.get("pca", ())) if self.quality.variation > 0 else ()

    @property
    def pca_components(self) -> int | None:
        """Number of components d that the first share of `pca` is of; None where that is empty.

        The largest d with d·(N + E) + N numbers in float32 no more than `storage_bytes`, but 1 in fits of versions that
        did not know this rule (`pca_is_of_equal_storage`).
        """
        components: int = self.stored.attributes.get("pca_components", 1)
        return components if self.pca else None

    @property
    def pca_is_of_equal_storage(self) -> bool:
        """Whether `pca_components` are as many as take the storage of the fit."""
        return self.pca_components == components_of_equal_storage(*self._storage)

    @property
    def curve(self) -> Curve:
        """Numbers of modes that were tried, and the variance explained of held-out weights, by which M was chosen.

        Empty where M was given, and where none of these weights moves.
        """
        return tuple((n_modes, score) for n_modes, score in self.stored.attributes.get("curve", ()))

    @property
    def storage_ratio(self) -> float:
        """`storage_bytes` over the bytes of the weights at all fitted epochs in float32."""
        return self.storage_bytes / (4 * len(self.epochs) * self.stored.shape.n_weights)

    @property
    def storage_bytes(self) -> int:
        """Bytes of a and mean in float32, modes in 1 byte (2 with more than 256) and the references' trajectories.

        What the fit takes on the disk, correlations and means in float64 among it, is `size_bytes`.
        """
        return storage_bytes(*self._storage)

    @property
    def _storage(self) -> tuple[int, int, int]:
        """N, E, M."""
        return self.stored.shape.n_weights, len(self.epochs), self.n_modes

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.stored.size_bytes

    @cached_property
    def _references(self) -> References:
        return References(self.reference)

    def covers(self, epoch: int) -> bool:
        """Return whether the fit was made for an epoch; at others only the references say where the weights are."""
        return bool(np.isin(epoch, self.epochs))

    def reference_at(self, epochs: Iterable[int]) -> NDArray[np.float32]:
        """(k, M) reference values at any recorded epochs, also those that were not fitted."""
        return self.reference_rows(np.array([self.run.row_of(epoch) for epoch in epochs], dtype=np.int64))

    def reference_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, M) reference values at some rows of the run."""
        values: NDArray[np.float32] = self.functional.values(self.run.columns(self.functional.index, rows))
        return values

    def modelled(
        self, epochs: Iterable[int], start: int = 0, stop: int | None = None, dtype: DTypeLike = np.float32
    ) -> NDArray[Any]:
        """(k, n) modelled values of the weights ``start : stop`` at recorded epochs, without reading the weights.

        They are computed in float64 and rounded to `dtype`: a weight near 1 that moves by 1e-4 shows its motion to
        three digits in float32.

        Raises `UnknownNameError` for an epoch that is not recorded, `DamagedRunError` for a damaged fit.
        """
        mode = self.stored.read("mode", start, stop)
        scale = self.stored.read("scale", start, stop)
        mean = self.stored.read("mean", start, stop)
        references = np.ascontiguousarray(self.reference_at(epochs) - self._references.mean)
        try:
            return model(references, mode, scale, mean, dtype)
        except ValueError as error:
            raise DamagedRunError(f"{self.run.path}: fit '{self.name}': {error}; fit again by another name") from error

    def trajectory(self, name: str, epochs: Iterable[int] | None = None) -> NDArray[np.float32]:
        """(e, *shape) modelled trajectory of one weight tensor over the fitted epochs, or the given recorded ones."""
        entry = self.run.layout[name]
        if entry.kind == "buffer":
            raise InputError(f"'{name}' is a buffer, only weights are modelled; run.trajectory gives it as recorded")
        chosen = self.epochs if epochs is None else list(epochs)
        return self.modelled(chosen, entry.offset, entry.stop).reshape(len(chosen), *entry.shape)

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Name -> `torch.Tensor` of the modelled weights at a recorded epoch, buffers as recorded then."""
        return next(self.state_dicts([epoch]))

    def state_dicts(self, epochs: Iterable[int]) -> Iterator[dict[str, Any]]:
        """`state_dict` of rising epochs, one after the other."""
        layout, labels = self.run.layout, list(epochs)
        for epoch, vector in zip(labels, self.one_by_one(labels), strict=True):
            yield to_tensors(layout, layout.split(vector, layout.weights) | self.run.stored_buffers(epoch))

    def one_by_one(self, epochs: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """(N,) modelled weights at rising recorded epochs, one after the other."""
        for epoch in epochs:
            yield self.modelled([epoch])[0]
