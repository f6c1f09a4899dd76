"""Embedded CMD: modelled values take the place of trained ones, so that more and more weights need no gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.running import UNIT
from .moments import DEVICE_PIECE, ModelMoments, Shelf, pieces_of
from .online import OnlineCMD, require_same_settings, require_state

Whole = Literal["all", "rest"]
STATE_VERSION = 1

MEMBERS = 0.25
"""The largest share of the weights that references are made of. These are never embedded: the more there are, the more
weights all over the model are trained to the end, and the less accuracy embedding costs, see docs/references.md."""


@dataclass(frozen=True)
class Frozen:
    """Beside a shelf of online CMD's numbers: which weights are embedded, and a and a·r + b of each weight.

    Those are of the moment when a weight was embedded; of others, of the last window. The references r have the values
    that they had at the end of the warm-up: b alone would cancel where a reference is far from zero.
    """

    embedded: Tensor
    scale: Tensor
    base: Tensor

    def part(self, columns: slice) -> Frozen:
        """Some of the weights, in the same memory."""
        return Frozen(self.embedded[columns], self.scale[columns], self.base[columns])


class EmbeddedCMD:
    """Embeds CMD in a training (Brokman et al. 2024, section 3.3): after each epoch, modelled weights are overwritten.

    >>> cmd = trajkit.EmbeddedCMD(model, optimizer, warmup=20, window=10, percent=10)
    >>> for epoch in range(150):
    ...     train_one_epoch(model, optimizer)
    ...     cmd.step()

    After the warm-up of `OnlineCMD`, at every `window`-th epoch, the weights whose a and b changed least since the last
    such epoch are embedded: from then on each `step` sets them to a·r + b, with the a and b that they have then and
    the trained value r of their reference, and clears their momentum. References are never embedded, nor weights that
    had no gradient at the start. Those of ``"centroid"`` and ``"principal"`` are made of 25 % of the weights, up to
    16,384, where `members` is not given. The change of a weight is √(Δa² + Δb²).

    optimizer: whose state of the embedded weights is cleared: momentum, and whatever else it keeps of each weight.
    window, percent, of: L; P; and of what: of ``"all"`` weights, which leaves none to train after 100/P windows and
        saves half of the trained weights at 150 epochs, or of the ``"rest"`` that is not embedded yet.
    threshold: instead of `percent`: all weights that changed less are embedded.
    mask_gradients: zero the gradients of embedded weights, too; else the epoch trains them, and they are overwritten.
    settings: of `OnlineCMD`: warmup, modes, samples, seed, sampling, run, references, weighting, members, decay.

    Beside what online CMD keeps, it takes 9 bytes a weight. Raises `InputError` for settings that cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        window: int = 10,
        percent: float = 10.0,
        *,
        of: Whole = "all",
        threshold: float | None = None,
        mask_gradients: bool = False,
        **settings: Any,
    ) -> None:
        for name in {"reassign", "use_buffers"} & settings.keys():
            raise InputError(
                f"{name} is for OnlineCMD alone, embedded CMD has fixed modes and no buffers; leave it out"
            )
        _require_schedule(window, percent, of)
        if threshold is not None and not (_is_number(threshold) and threshold >= 0):
            raise InputError(f"threshold is {threshold!r}, expected a number of at least 0; use 1e-3 or the like")
        if settings.get("references", "weight") != "weight":
            settings.setdefault("members", MEMBERS)
        self.online = OnlineCMD(model, **settings)
        self.window, self.percent, self.of = int(window), float(percent), of
        self.threshold = None if threshold is None else float(threshold)
        self._model, self._optimizer = model, optimizer
        self._frozen: dict[torch.device, Frozen] = {}
        self._origin: NDArray[np.float64] = np.empty(0)
        self._windows = 0
        self.shares: list[float] = []
        """The share of weights that was embedded during each epoch so far, in [0, 1]."""
        self._trainable = [entry for entry in self.online.entries if entry.trainable]
        if not self._trainable:
            raise InputError("no weight of the model needs a gradient, expected at least one to train; thaw some")
        self._masks: dict[str, Tensor] = {}
        self._mask_gradients = mask_gradients
        self._hooked: dict[str, Tensor] = {}
        self._is_whole = True
        self._hook()

    def __repr__(self) -> str:
        return f"EmbeddedCMD({self.online!r}, {100 * self.share:.1f} % embedded)"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_hooked": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._hook()  # a copied parameter has none

    @property
    def n_weights(self) -> int:
        """How many weights had a gradient at the start."""
        return sum(entry.size for entry in self._trainable)

    @property
    def n_embedded(self) -> int:
        """How many weights are embedded."""
        return sum(int(frozen.embedded.sum()) for frozen in self._frozen.values())

    @property
    def share(self) -> float:
        """The share of weights that is embedded now, in [0, 1]."""
        return self.n_embedded / self.n_weights

    @property
    def saving(self) -> float:
        """The share of trained weights, summed over the epochs so far, that embedding has saved, in [0, 1]."""
        return sum(self.shares) / len(self.shares) if self.shares else 0.0

    def step(self) -> None:
        """Take an epoch that was trained; embed weights where it is time, and overwrite those that are embedded.

        Raises as `OnlineCMD.update_parameters` does.
        """
        self._require_whole()
        share = self.share
        self._hook()
        self.online.update_parameters(self._model)
        self.shares += [share] * (self.online.n_updates - len(self.shares))  # a fit that failed has left one out
        if not self.online.is_warm:
            return
        self._is_whole = False
        tensors = self.online.tensors_of(self._model)
        if not self._frozen:
            self._begin()
        if self._is_window(self.online.n_updates):
            self._embed()
        if self.n_embedded:
            self._overwrite(tensors)
        self._is_whole = True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside model and optimizer, as plain values and tensors, not copied."""
        self._require_whole()
        return {
            "version": STATE_VERSION,
            "settings": self._settings,
            "online": self.online.state_dict(),
            "windows": self._windows,
            "shares": list(self.shares),
            "origin": torch.from_numpy(self._origin),
            "frozen": [vars(frozen).copy() for frozen in self._frozen.values()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was taken; raises `InputError` for one of other settings, or of another model."""
        require_state(state_dict, STATE_VERSION, "EmbeddedCMD")
        require_same_settings(state_dict["settings"], self._settings)
        self.online.load_state_dict(state_dict["online"])
        self._windows, self.shares = state_dict["windows"], list(state_dict["shares"])
        self._origin = state_dict["origin"].numpy().copy()
        self._frozen = (
            {
                device: Frozen(**{name: tensor.to(device, copy=True) for name, tensor in frozen.items()})
                for device, frozen in zip(self.online.moments.shelves, state_dict["frozen"], strict=True)
            }
            if state_dict["frozen"]
            else {}
        )
        self._is_whole = True
        self._remask()

    @property
    def _settings(self) -> dict[str, Any]:
        return {"window": self.window, "percent": self.percent, "of": self.of, "threshold": self.threshold}

    def _is_window(self, n_updates: int) -> bool:
        return n_updates > self.online.warmup and n_updates % self.window == 0

    def _require_whole(self) -> None:
        if not self._is_whole:
            raise InputError(
                f"step {self.online.n_updates} did not end, expected whole steps; load_state_dict a state from before,"
                " with the model and the optimizer of that time"
            )

    def _begin(self) -> None:
        """At the end of the warm-up: a and b to measure changes from."""
        moments = self.online.moments
        able = sum(int((~self._never(shelf)).sum()) for shelf in moments.shelves.values())
        if able < 0.7 * self.n_weights and not moments.functional.is_weights:
            warnings.warn(
                f"the references are made of {self.n_weights - able} of the {self.n_weights} weights that are trained,"
                f" and these are never embedded: the others are {able / self.n_weights:.1%}; ask for fewer members",
                RuntimeWarning,
                stacklevel=3,
            )
        self._origin = moments.references.values.copy()
        for device, shelf in moments.shelves.items():
            n = shelf.mean.numel()
            frozen = Frozen(*(torch.zeros(n, dtype=dtype, device=device) for dtype in (torch.bool, None, None)))
            self._frozen[device] = frozen
            for columns in _pieces(n):
                part = frozen.part(columns)
                for kept, now in zip((part.scale, part.base), self._solved(shelf.part(columns)), strict=True):
                    kept.copy_(now)

    def _solved(self, shelf: Shelf) -> tuple[Tensor, Tensor]:
        """(n,) a, and a·r + b with the references' values at the end of the warm-up, over all updates so far."""
        references = self.online.moments.references
        mode = shelf.mode[0].to(torch.int64)
        inverse, reach = (
            _like(shelf.mean, references.per_power(values))
            for values in (np.ones_like(self._origin), self._origin - references.mean)
        )
        below = shelf.rest.to(torch.float32) * (shelf.mean * float(UNIT))
        return shelf.products[0] * inverse[mode], shelf.mean + (below + shelf.products[0] * reach[mode])

    def _embed(self) -> None:
        """A window: the weights that changed least join, and the others' changes are measured from now on."""
        self._windows += 1
        changes = self._changes()
        chosen = _least(changes, self._limit(changes))
        start = 0
        for frozen in self._frozen.values():
            stop = start + frozen.embedded.numel()
            frozen.embedded.logical_or_(torch.from_numpy(chosen[start:stop]).to(frozen.embedded.device))
            start = stop
        self._remask()

    def _changes(self) -> NDArray[np.float32]:
        """√(Δa² + Δb²) of each weight since the last window, infinite for those that do not join; a and b are kept."""
        changes = []
        for device, shelf in self.online.moments.shelves.items():
            frozen = self._frozen[device]
            found = np.empty(shelf.mean.numel(), np.float32)
            for columns in _pieces(found.size):
                part, kept = shelf.part(columns), frozen.part(columns)
                scale, base = self._solved(part)
                moved, shifted = scale - kept.scale, base - kept.base
                shifted -= moved * _like(base, self._origin)[part.mode[0].to(torch.int64)]
                change = torch.hypot(moved, shifted).masked_fill_(kept.embedded, torch.inf)
                found[columns] = change.cpu().numpy()
                kept.scale.copy_(torch.where(kept.embedded, kept.scale, scale))
                kept.base.copy_(torch.where(kept.embedded, kept.base, base))
            found[self._never(shelf)] = np.inf
            changes.append(found)
        return np.concatenate(changes)

    def _never(self, shelf: Shelf) -> NDArray[np.bool_]:
        """(n,) which weights of a shelf are never embedded: references, and those without a gradient at the start."""
        never = np.ones(shelf.mean.numel(), np.bool_)
        index = self.online.moments.functional.index
        for entry in self._trainable:
            if (start := shelf.starts.get(entry.name)) is not None:
                never[start : start + entry.size] = False
                inside = index[(index >= entry.offset) & (index < entry.stop)]
                never[start + inside - entry.offset] = True
        return never

    def _limit(self, changes: NDArray[np.float32]) -> int:
        """How many weights join now."""
        able = int(np.isfinite(changes).sum())
        if self.threshold is not None:
            return int((changes < self.threshold).sum())
        if self.of == "all":
            wanted = round(self._windows * self.percent / 100 * self.n_weights) - self.n_embedded
        else:
            wanted = round(self.percent / 100 * (self.n_weights - self.n_embedded))
        return min(max(wanted, 0), able)

    def _remask(self) -> None:
        each = self._each(self.online.moments) if self._frozen else ()
        self._masks = {entry.name: frozen.embedded.view(entry.shape) for entry, _, frozen in each}

    def _overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Set embedded weights to a·r + b, and clear what the optimizer keeps of them."""
        moments = self.online.moments
        reach = moments.values(tensors).astype(np.float64) - self._origin
        with torch.no_grad():
            for entry, shelf, frozen in self._each(moments):
                for columns, view in pieces_of(tensors[entry.name].detach(), DEVICE_PIECE):
                    part, kept = shelf.part(columns), frozen.part(columns)
                    values = kept.base + kept.scale * _like(kept.base, reach)[part.mode[0].to(torch.int64)]
                    here = kept.embedded.view(view.shape)
                    view.copy_(torch.where(here, values.view(view.shape).to(view.dtype), view))
            self._clear_momentum(tensors)

    def _clear_momentum(self, tensors: Mapping[str, Tensor]) -> None:
        if self._optimizer is None:
            return
        for name, mask in self._masks.items():
            parameter = tensors[name]
            for kept in self._optimizer.state.get(parameter, {}).values():
                if isinstance(kept, Tensor) and kept.shape == parameter.shape and kept.is_floating_point():
                    kept.masked_fill_(mask, 0)

    def _hook(self) -> None:
        """Have the gradients of the model's parameters masked, also of those that have taken the place of others."""
        tensors = self.online.tensors_of(self._model) if self._mask_gradients else {}
        for entry in self._trainable if self._mask_gradients else ():
            parameter = tensors[entry.name]
            if parameter.requires_grad and self._hooked.get(entry.name) is not parameter:
                hook = functools.partial(self._mask, entry.name)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._hooked[entry.name] = parameter

    def _mask(self, name: str, parameter: Tensor) -> None:
        if name in self._masks and parameter.grad is not None:
            parameter.grad.masked_fill_(self._masks[name], 0)

    def _each(self, moments: ModelMoments) -> Iterator[tuple[Any, Shelf, Frozen]]:
        """Each tensor with its numbers."""
        for device, shelf in moments.shelves.items():
            for entry in self._trainable:
                if (start := shelf.starts.get(entry.name)) is not None:
                    columns = slice(start, start + entry.size)
                    yield entry, shelf.part(columns), self._frozen[device].part(columns)


def schedule(
    epochs: int, warmup: int = 20, window: int = 10, percent: float = 10.0, of: Whole = "all"
) -> tuple[float, ...]:
    """(epochs,) the share of weights that embedded CMD has embedded during each epoch, but for the few references.

    The mean is the share of trained weights that is saved: 0.5 for 150 epochs of the defaults, 0.369 of the rest.
    """
    _require_schedule(window, percent, of)
    shares, share, windows = [], 0.0, 0
    for epoch in range(1, epochs + 1):
        shares.append(share)
        if epoch > warmup and epoch % window == 0:
            windows += 1
            share = min(windows * percent / 100, 1.0) if of == "all" else share + percent / 100 * (1 - share)
    return tuple(shares)


def _require_schedule(window: int, percent: float, of: str) -> None:
    if isinstance(window, bool) or not hasattr(window, "__index__") or window < 1:
        raise InputError(f"window is {window!r}, expected an integer of at least 1; use 10")
    if not _is_number(percent) or not 0 <= percent <= 100:
        raise InputError(f"percent is {percent!r}, expected a number from 0 to 100; use 10")
    if of not in ("all", "rest"):
        raise InputError(f"of is {of!r}, expected 'all' or 'rest'; choose one")


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")


def _least(values: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """(n,) which are the `count` smallest; the first ones of equal ones."""
    if count == 0:
        return np.zeros(values.size, np.bool_)
    limit = np.partition(values, count - 1)[count - 1]
    chosen = np.asarray(values < limit)
    chosen[np.flatnonzero(values == limit)[: count - int(chosen.sum())]] = True
    return chosen


def _pieces(n: int) -> Sequence[slice]:
    return [slice(start, min(start + DEVICE_PIECE, n)) for start in range(0, n, DEVICE_PIECE)]


def _like(tensor: Tensor, values: NDArray[np.float64]) -> Tensor:
    """(M,) values on the device of a tensor, as float32."""
    return torch.from_numpy(values.astype(np.float32)).to(tensor.device)
