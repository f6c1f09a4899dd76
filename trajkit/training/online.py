"""Online CMD beside a training: a second set of weights, modelled by CMD, as others keep an average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..decomposition import Decomposition
from ..errors import InputError, LayoutError, placed
from ..kernels.affine import References
from ..kernels.clustering import Cut, DistanceCut, checked_cut
from ..kernels.fused import fit_block_fused
from ..kernels.lines import Kind, ReferenceChoice, Weighting
from ..kernels.running import ReferenceMoments, RunningBlock, checked_candidates, checked_decay
from ..kernels.sampling import Sampling
from ..layout import TensorEntry
from ..pipeline import fit
from ..pipeline.sampling import SampleChoice
from ..replay import n_candidates, start_of
from ..run import PathLike
from ..vector import is_spread
from .model import RecordedModel, warn_of_stubs
from .moments import ModelMoments
from .warmup import LateRecording, Recording, tracked_layout, warm_up
from .wrapping import PlainNames, plain_copy, require_whole

Model = nn.Module
STATE_VERSION = 2


class OnlineCMD:
    """Keeps a second set of weights of a model in training, modelled by Correlation Mode Decomposition.

    >>> cmd = trajkit.OnlineCMD(model, warmup=20, modes=10)
    >>> for epoch in range(150):
    ...     train_one_epoch(model)
    ...     cmd.update_parameters(model)
    ...     with cmd.applied_to(model):
    ...         accuracy = test_accuracy(model)

    It is used as `torch.optim.swa_utils.AveragedModel` is, and leaves the training as it is. The weights of the first
    `warmup` updates are kept on disk; then M references are chosen among them, and a mode for each weight (Brokman et
    al. 2024, section 3.2). From there on each update refines a and b of every weight in running moments, and the CMD
    weights are a·r + b with r the references' weights at the last update. Until then they are the trained ones.

    warmup: F, updates before the modes are chosen.
    modes, samples, sampling, seed: as for `trajkit.fit`, with which the warm-up is fitted. ``"auto"`` or ``"95%"``
        choose the number of modes at its end, where a share that no number explains is told.
    run: where the training is recorded, a `Recorder` or a path: the warm-up is read there, and its fit is saved there
        as ``online10`` or the like. Each epoch has to be recorded before its update, and committed where a path is
        given. Without, the warm-up is kept in a temporary folder (TMPDIR), 4 bytes a weight and epoch, until it ends.
    references, weighting, members: as for `trajkit.fit`: what a mode's weights are fitted to. A single weight brings
        its noise at the last epoch into all of them; ``"centroid"`` and ``"principal"`` average it out.
    reassign: of the two references with which a weight correlated most in the warm-up, its mode is the one with the
        larger correlation so far; a number chooses among so many. It takes 6 bytes a weight and 5 a candidate: 16
        instead of 11.
    decay: an epoch after the warm-up counts for so many times what the next one does. With 1, as in the paper, a and b
        are of all epochs; with 0.9 of the last ten or so, and the CMD weights are what an EMA of that decay gives, but
        moved on along the modes.
    use_buffers: model floating buffers, such as BatchNorm's statistics, as weights are, variances at least 0; else the
        modelled model has the buffers of the trained one.

    A model may come plain or in `DistributedDataParallel`, `DataParallel`, `torch.compile`, `AveragedModel` or the
    like, around it or around submodules, and otherwise at the next call. In a distributed training each process keeps
    its own, all of them the same.

    bfloat16, float16 and float64 weights are modelled in float32. Raises `InputError` for settings that cannot be met,
    `LayoutError` naming a tensor that cannot be modelled.
    """

    def __init__(
        self,
        model: Model,
        warmup: int = 20,
        modes: Cut = 10,
        samples: int = 1000,
        seed: int = 0,
        run: PathLike | Recording | LateRecording | None = None,
        *,
        sampling: Sampling = "balanced",
        references: Kind = "weight",
        weighting: Weighting | None = None,
        members: float | None = None,
        reassign: bool | int = False,
        decay: float = 1.0,
        use_buffers: bool = False,
    ) -> None:
        if isinstance(warmup, bool) or not hasattr(warmup, "__index__") or warmup < 2:
            raise InputError(f"warmup is {warmup!r}, expected an integer of at least 2; use 20")
        self.warmup = int(warmup)
        self._choices = {
            "modes": checked_cut(modes, "modes"),
            **SampleChoice(samples, sampling, seed).settings,
            **ReferenceChoice(references, weighting, members).settings,
            "reassign": checked_candidates(reassign),
            "decay": checked_decay(decay),
        }
        self._use_buffers = bool(use_buffers)
        with placed("the model"):
            require_whole(model, PlainNames(model).parameters())
            recorded = RecordedModel(model)
            self._layout = recorded.layout(recorded.tensors())
        warn_of_stubs(self._layout)
        self._own = recorded.own_names(self._layout)
        self._tracked = tracked_layout(self._layout, self._use_buffers, self._own)
        # A run of one's own holds what is modelled; a recorded one all that the model has.
        self._warm_up = warm_up(self._tracked if run is None else self._layout, run)
        self._model = model
        self._module: nn.Module | None = None
        self._moments: ModelMoments | None = None
        self._broken: str | None = None
        self._swapped = False
        self.n_updates = 0

    def __repr__(self) -> str:
        state = f"warming up, {self.n_updates} of {self.warmup}" if self._moments is None else f"{self.n_modes} modes"
        return f"OnlineCMD({self._layout.n_weights} weights, {self.n_updates} updates, {state})"

    @property
    def is_warm(self) -> bool:
        """Whether the warm-up is over: the modes are chosen, and there are CMD weights."""
        return self._moments is not None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The weight tensors that are modelled, tied ones once."""
        return self._layout.weights

    @property
    def moments(self) -> ModelMoments:
        """What is kept of the weights since the warm-up; raises `InputError` before its end."""
        if self._moments is None:
            raise InputError(
                f"online CMD has seen {self.n_updates} of {self.warmup} epochs of its warm-up and has no modes yet;"
                " go on training"
            )
        return self._moments

    @property
    def n_modes(self) -> int:
        """M; may be fewer than asked for where the sample has fewer clusters. Raises `InputError` before."""
        return self.moments.functional.n_modes

    @property
    def reference_index(self) -> NDArray[np.int64]:
        """(M,) which weights of the flat vector the references are; raises `InputError` where they are made of many."""
        if not self.moments.functional.is_weights:
            raise InputError(
                "each reference is made of many weights, expected single ones; `moments.functional` names them"
            )
        return self.moments.functional.index

    @property
    def mode(self) -> NDArray[np.uint16]:
        """(N,) mode of each weight."""
        return self._gathered()[0]

    @property
    def scale(self) -> NDArray[np.float32]:
        """(N,) a, over all updates so far."""
        return self._gathered()[1]

    @property
    def offset(self) -> NDArray[np.float64]:
        """(N,) b, over all updates so far."""
        return self._gathered()[2]

    def update_parameters(self, model: Model) -> None:
        """Take the weights of the model, once an epoch.

        The last one of the warm-up takes the time of a fit; where that fails or is interrupted, the next call
        begins with it. Raises `InputError` for weights that are not finite; `LayoutError` where the model has changed.
        After an update that failed or was interrupted later, the state has to be loaded from before.
        """
        self._require_own_weights()
        self._require_usable()
        self.end_warm_up()
        tensors = self.tensors_of(model)
        if self._moments is None:
            self._warm_up.add(tensors)
        else:
            self._broken = (
                f"update {self.n_updates} did not end, so that some weights have taken it and others have not"
            )
            name = self._moments.take(tensors)
            self._broken = f"'{name}' was not finite at update {self.n_updates}" if name else None
            self._require_usable()
        self.n_updates += 1
        self._model = model
        if not self._warm_up.is_late:
            self.end_warm_up()
        if self._module is not None:
            self._refresh(self._module)

    def end_warm_up(self) -> None:
        """Choose the modes, where the last update could not: its epoch comes later (`LateRecording`), or it failed."""
        if self._moments is None and self.n_updates == self.warmup:
            self._moments = self._fitted(self.tensors_of(self._model))

    @property
    def module(self) -> nn.Module:
        """A second model, plain and not compiled, with the CMD weights, made when first asked for; updates refresh it.

        `torch.optim.swa_utils.update_bn(loader, cmd.module)` estimates its BatchNorm statistics anew. An update sets
        them to those of the trained model again.
        """
        if self._module is None:
            self._require_usable()
            module = plain_copy(self._model)
            self._refresh(module)
            self._module = module
        return self._module

    @contextmanager
    def applied_to(self, model: Model) -> Iterator[Model]:
        """Within the ``with`` block the model has the CMD weights; after it, what it had before, to the bit.

        What the block does to buffers is undone as well. It takes a copy of the model's tensors for the time.
        """
        self._require_own_weights()
        self._require_usable()
        tensors = self.tensors_of(model)
        mine = (tensors if self._moments is not None else {}) | PlainNames(model).buffers()
        before = {name: tensor.detach().clone() for name, tensor in mine.items()}
        self._swapped = True
        try:
            self.write(tensors)
            yield model
        finally:
            self._swapped = False
            with torch.no_grad():
                for name, tensor in mine.items():
                    tensor.copy_(before[name])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, as plain values and tensors, which are not copied.

        In a warm-up without `run` it holds the trajectory so far, as a tensor in a file: 4 bytes a weight and epoch.
        """
        self._require_usable()
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "settings": self._settings,
            "layout": self._layout.digest,
            "n_updates": self.n_updates,
        }
        if self._moments is None:
            return state | {"warm_up": self._warm_up.state()}
        return state | {"moments": self._moments.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was taken; raises `InputError` for one of other settings, or of another model."""
        require_state(state_dict, STATE_VERSION, "OnlineCMD")
        if state_dict["layout"] != self._layout.digest:
            raise LayoutError("the state is of a model with other tensors, expected this one's; load the state of it")
        require_same_settings(state_dict["settings"], self._settings)
        if "warm_up" in state_dict:
            self._warm_up.load(state_dict["warm_up"])
            self._moments = None
        else:
            tensors = self.tensors_of(self._model)
            self._moments = ModelMoments.from_state(self._tracked.tensors, tensors, state_dict["moments"])
            self._warm_up.close()
        self.n_updates = state_dict["n_updates"]
        self._broken = None
        if self._module is not None:
            self._refresh(self._module)

    @property
    def _settings(self) -> dict[str, Any]:
        cut = self._choices["modes"]
        return {
            **self._choices,
            "modes": f"1/{cut.divisor:g}" if isinstance(cut, DistanceCut) else cut,
            "warmup": self.warmup,
            "use_buffers": self._use_buffers,
        }

    def _require_own_weights(self) -> None:
        if self._swapped:
            raise InputError("the model has the CMD weights now, expected its own; leave the `with` block first")

    def _require_usable(self) -> None:
        if self._broken:
            raise InputError(
                f"{self._broken}, expected whole epochs of finite weights; load_state_dict a state from before"
            )

    def tensors_of(self, model: Model) -> dict[str, Tensor]:
        """Return the tensors that are modelled, by name; raise `LayoutError` where they have changed."""
        tensors = self.tensors_anywhere(model)
        if self._moments is not None:
            self._moments.require_devices(tensors)
        return tensors

    def tensors_anywhere(self, model: Model) -> dict[str, Tensor]:
        """Return what `tensors_of` does, also where the model has moved to another device."""
        tensors = {}
        with placed("the model"):
            names = PlainNames(model)
            every = names.parameters() | (names.buffers() if self._use_buffers else {})
            for entry in self._tracked.tensors:
                tensor = every.get(self._own[entry.name])
                if tensor is None or tensor.shape != entry.shape or is_spread(tensor):
                    require_whole(model, every)
                    found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise LayoutError(
                        f"'{entry.name}' is {found}, this online CMD was made for {entry.shape};"
                        " make one for this model"
                    )
                tensors[entry.name] = tensor
        return tensors

    def _fitted(self, tensors: Mapping[str, Tensor]) -> ModelMoments:
        """Steps 1 to 3 on the warm-up, which is not needed any more then."""
        run, epochs = self._warm_up.whole()
        fitted = fit(run, **self._choices, epochs=epochs, online=True, scheduler="threads")
        references = References(fitted.reference)
        moments = ReferenceMoments.of(references, self._choices["decay"])

        def source(entry: TensorEntry, columns: slice) -> RunningBlock:
            if entry.kind == "weight":
                start = entry.offset
                return start_of(fitted, moments, slice(start + columns.start, start + columns.stop))
            return _start_of_buffer(fitted, references, moments, entry, columns)

        started = ModelMoments.of(self._tracked.tensors, tensors, fitted.functional, moments, source)
        self._warm_up.close()
        return started

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the CMD weights to tensors by their names, where there are any yet."""
        if self._moments is None:
            return
        with torch.no_grad():
            self._moments.write(tensors)
            for entry in self._tracked.buffers:
                if entry.name.endswith("running_var"):
                    tensors[entry.name].clamp_(min=0)

    def _refresh(self, module: nn.Module) -> None:
        """Give a copy of the model the CMD weights, and what is not modelled from the model."""
        with torch.no_grad():
            theirs, mine = (names.parameters() | names.buffers() for names in map(PlainNames, (self._model, module)))
            modelled = (
                {self._own[entry.name] for entry in self._tracked.tensors} if self._moments is not None else set()
            )
            for name, tensor in mine.items():
                if name not in modelled:
                    tensor.copy_(theirs[name])
        self.write(self.tensors_of(module))

    def _gathered(self) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.float64]]:
        self._require_usable()
        n, moments = self._layout.n_weights, self.moments
        mode, scale, offset = np.empty(n, np.uint16), np.empty(n, np.float32), np.empty(n)
        for entry, block in moments.host_blocks():
            if entry.kind == "weight":
                here = slice(entry.offset, entry.stop)
                mode[here], scale[here], offset[here] = block.solved(moments.references)
        return mode, scale, offset


def require_state(state_dict: Any, version: int, kind: str) -> None:
    """Raise `InputError` for what is no state of this kind and version."""
    is_state = isinstance(state_dict, Mapping) and {"version", "settings"} <= state_dict.keys()
    if not is_state or state_dict["version"] != version:
        raise InputError(f"this is no state of {kind}, expected what its state_dict() gave; load that one")


def require_same_settings(found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `InputError` naming a setting of a state that is another one here."""
    for name in sorted({*found, *mine}):
        if found.get(name) != mine.get(name):
            raise InputError(
                f"the state was taken with {name}={found.get(name)!r}, this has {mine.get(name)!r}; make it the same"
            )


def _start_of_buffer(
    fitted: Decomposition, references: References, moments: ReferenceMoments, entry: TensorEntry, columns: slice
) -> RunningBlock:
    """What is kept of a buffer when the warm-up ends: it is fitted to the references as weights are."""
    values = fitted.run.trajectory(entry.name, fitted.epochs).reshape(len(fitted.epochs), -1)[:, columns]
    candidates = n_candidates(fitted)
    found = fit_block_fused(values.astype(np.float32), references, every=candidates > 1)
    if found.correlations is not None:
        return RunningBlock.of_correlations(moments, found.correlations, found.variation, found.mean, candidates)
    return RunningBlock.of_fit(moments, found.mode, found.scale, found.mean)
