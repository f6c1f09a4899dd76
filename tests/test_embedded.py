"""Embedded CMD: which weights join when, what they are set to, and that nothing else is touched."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trajkit import EmbeddedCMD, OnlineCMD
from trajkit.demo import digits, digits_cnn
from trajkit.errors import InputError
from trajkit.training.embedded import schedule
from trajkit.training.naive import OverwritingCMD, ReferencesOnly


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Training:
    """A few real steps on the digits an epoch; what the weights were at the end of each, before and after `step`."""

    def __init__(self, optimizer: str = "sgd", **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = digits_cnn()
        weights = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(weights, lr=0.02, momentum=0.9)
            if optimizer == "sgd"
            else torch.optim.Adam(weights, lr=2e-3)
        )
        self.images, self.labels, *_ = digits()
        kind = settings.pop("kind", EmbeddedCMD)
        given = (self.model,) if kind is OverwritingCMD else (self.model, self.optimizer)
        self.cmd = kind(*given, **{"warmup": 4, "modes": 3} | settings)
        self.trained: list[Any] = []
        self.left: list[Any] = []

    def epoch(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.model.train()
        for batch in torch.randperm(len(self.images), generator=generator)[:256].split(64):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.images[batch]), self.labels[batch]).backward()
            self.optimizer.step()
        self.trained.append(self.weights())
        self.cmd.step()
        self.left.append(self.weights())

    def weights(self) -> Any:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).numpy().copy()

    def embedded(self) -> Any:
        return np.concatenate([f.embedded.numpy() for f in self.cmd._frozen.values()])

    def fitted(self, epochs: int) -> tuple[Any, Any]:
        """a and b by the weights at the ends of the first epochs, in float64."""
        w = np.array(self.trained[:epochs], dtype=np.float64)
        r = w[:, self.cmd.online.reference_index][:, self.cmd.online.mode]
        moved = r - r.mean(0)
        a = ((w - w.mean(0)) * moved).sum(0) / (moved**2).sum(0)
        return a, w.mean(0) - a * r.mean(0)


def test_the_schedule_of_the_paper_saves_half_of_the_trained_weights() -> None:
    shares = schedule(150, warmup=20, window=10, percent=10)
    assert shares[:30] == (0.0,) * 30
    assert shares[30] == pytest.approx(0.1)
    assert shares[119] == pytest.approx(0.9)
    assert shares[120:] == (1.0,) * 30
    assert f"{np.mean(shares):.1%}" == "50.0%"
    assert f"{np.mean(schedule(150, of='rest')):.1%}" == "36.9%"


@pytest.mark.parametrize(("of", "saved"), [("all", "50.0%"), ("rest", "36.9%")])
def test_the_embedded_share_follows_the_schedule_exactly(of: Any, saved: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 200)
    cmd = EmbeddedCMD(model, warmup=20, window=10, percent=10, of=of, modes=2, samples=50)
    n = cmd.n_weights
    motion = torch.randn(150, 2)
    sizes = [0]
    for epoch in range(150):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * (torch.randn(parameter.shape) + motion[epoch, 0])
        cmd.step()
        sizes.append(cmd.n_embedded)
    expected, windows, size = [0], 0, 0
    for epoch in range(1, 151):
        if epoch > 20 and epoch % 10 == 0:
            windows += 1
            wanted = round(windows * 0.1 * n) if of == "all" else size + round(0.1 * (n - size))
            size = min(wanted, n - cmd.online.n_modes)
        expected.append(size)
    assert sizes == expected
    assert cmd.shares == [size / n for size in expected[:-1]]
    assert cmd.shares == pytest.approx(schedule(150, of=of), abs=2e-4)
    assert f"{cmd.saving:.1%}" == saved


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_embedded_weights_follow_their_reference_by_frozen_scales(optimizer: str) -> None:
    training = Training(optimizer, window=3, percent=20)
    references, frozen, before = None, {}, None
    for number in range(1, 16):
        training.epoch(number)
        if number < 6:
            np.testing.assert_array_equal(training.trained[-1], training.left[-1])
            continue
        embedded = training.embedded()
        references = training.cmd.online.reference_index
        assert not embedded[references].any()
        if number % 3 == 0:
            a, b = training.fitted(number)
            old_a, old_b = training.fitted(4 if number == 6 else number - 3)
            joined = embedded if before is None else embedded & ~before
            change = np.hypot(a - old_a, b - old_b)
            able = np.ones(embedded.size, bool) if before is None else ~before
            able[references] = False
            limit = np.sort(change[able])[joined.sum() - 1]
            assert change[joined].max() <= limit * 1.001 + 1e-6
            assert change[able & ~joined].min() >= limit * 0.999 - 1e-6 if (able & ~joined).any() else True
            frozen |= {int(i): (a[i], b[i]) for i in np.flatnonzero(joined)}
            before = embedded
        assert sorted(frozen) == np.flatnonzero(embedded).tolist()
        mode = training.cmd.online.mode[embedded]
        kept = np.array([frozen[int(i)] for i in np.flatnonzero(embedded)])
        expected = kept[:, 0] * training.trained[-1][references][mode] + kept[:, 1]
        np.testing.assert_allclose(training.left[-1][embedded], expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(training.left[-1][~embedded], training.trained[-1][~embedded])
        state = [list(training.optimizer.state[p].values()) for p in training.model.parameters()]
        kinds = 1 if optimizer == "sgd" else 2
        for kind in range(kinds):
            values = [[v for v in kept if v is not None and v.dim() > 0][kind] for kept in state]
            flat = torch.cat([value.reshape(-1) for value in values]).numpy()
            assert np.all(flat[embedded] == 0)
            assert np.any(flat[~embedded] != 0) or embedded.all() or (~embedded).sum() < 10
    assert training.cmd.share == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("modes", "references"), [("auto", "weight"), ("auto", "centroid"), ("97%", "principal")])
def test_the_warm_up_chooses_the_number_of_modes(modes: str, references: Any) -> None:
    training = Training(modes=modes, references=references, window=3, percent=20)
    members = {} if references == "weight" else {"members": 0.25}
    beside = OnlineCMD(training.model, 4, modes, references=references, **members)
    for number in range(1, 8):
        training.epoch(number)
        if number <= 4:
            beside.update_parameters(training.model)
    found = training.cmd.online
    assert found.n_modes == beside.n_modes not in (1, 10)
    np.testing.assert_array_equal(found.mode, beside.mode)
    embedded = training.embedded()
    assert embedded.sum() == round(0.2 * embedded.size)
    assert not embedded[found.moments.functional.index].any()


def test_all_but_the_quarter_that_references_are_made_of_can_be_embedded() -> None:
    training = Training(references="centroid", window=1, percent=100)
    for number in range(1, 6):
        training.epoch(number)
    n = training.cmd.n_weights
    members = training.cmd.online.moments.functional.index
    assert 0.2 * n < members.size <= 0.25 * n
    assert np.flatnonzero(~training.embedded()).tolist() == sorted(members.tolist())
    everything = Training(references="centroid", members=1.0)
    for number in range(1, 4):
        everything.epoch(number)
    with pytest.warns(RuntimeWarning, match=r"the others are 1\d\.\d%; ask for fewer members"):
        everything.epoch(4)


def test_gradients_are_masked_where_that_is_asked_for() -> None:
    training = Training(window=2, percent=50, mask_gradients=True)
    for number in range(1, 10):
        embedded = training.embedded() if training.cmd.n_embedded else np.zeros(training.weights().size, bool)
        before = training.weights()
        training.epoch(number)
        np.testing.assert_array_equal(training.trained[-1][embedded], before[embedded])
        assert np.mean(training.trained[-1][~embedded] != before[~embedded]) > 0.5
    assert embedded.any()


@pytest.mark.parametrize("stop", [2, 4, 7, 11])
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 3, "percent": 20},
        {"window": 3, "percent": 20, "mask_gradients": True},
        {"window": 3, "percent": 20, "modes": "auto"},
        {"window": 3, "percent": 20, "references": "centroid", "decay": 0.9},
        {"kind": ReferencesOnly},
        {"kind": OverwritingCMD, "every": 3},
    ],
)
def test_a_resumed_training_ends_with_the_same_bits(stop: int, settings: dict[str, Any], tmp_path: Path) -> None:
    through, first = Training(**settings), Training(**settings)
    for number in range(1, 15):
        through.epoch(number)
        if number <= stop:
            first.epoch(number)
    parts = {"model": first.model, "optimizer": first.optimizer, "cmd": first.cmd}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    resumed = Training(**settings)
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.cmd.load_state_dict(state["cmd"])
    for number in range(stop + 1, 15):
        resumed.epoch(number)
    np.testing.assert_array_equal(resumed.weights(), through.weights())
    if "kind" not in settings:
        np.testing.assert_array_equal(resumed.embedded(), through.embedded())
        assert resumed.cmd.shares == through.cmd.shares
        assert resumed.cmd.saving == through.cmd.saving


def test_all_weights_that_change_less_than_a_threshold_join() -> None:
    training = Training(window=3, threshold=0.3)
    for number in range(1, 7):
        training.epoch(number)
    a, b = training.fitted(6)
    old_a, old_b = training.fitted(4)
    change = np.hypot(a - old_a, b - old_b)
    change[training.cmd.online.reference_index] = np.inf
    sure = np.abs(change - 0.3) > 1e-4
    np.testing.assert_array_equal(training.embedded()[sure], (change < 0.3)[sure])
    assert 0 < training.cmd.share < 1


def test_frozen_weights_do_not_count_and_tied_and_bfloat16_ones_are_embedded() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)
            self.two.weight = self.one.weight
            self.low = nn.Parameter(torch.randn(40).bfloat16())
            self.turned = nn.Parameter(torch.randn(4, 9).t())
            self.frozen = nn.Parameter(torch.randn(50), requires_grad=False)

    torch.manual_seed(0)
    model = Tied()
    cmd = EmbeddedCMD(model, warmup=5, window=2, percent=50, modes=2)
    assert cmd.n_weights == 36 + 6 + 6 + 40 + 36
    kept = model.frozen.clone()
    for _ in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape).to(parameter.dtype)
        cmd.step()
    frozen = next(entry for entry in cmd.online.entries if entry.name == "frozen")
    index = cmd.online.reference_index
    trained = (index < frozen.offset) | (index >= frozen.stop)  # a frozen weight may be a reference
    assert cmd.n_embedded == cmd.n_weights - trained.sum()
    assert torch.equal(model.frozen, kept)
    assert model.two.weight is model.one.weight
    a, b = cmd.online.scale, cmd.online.offset
    assert np.all(np.isfinite(a))
    assert np.all(np.isfinite(b))
    assert all(torch.all(torch.isfinite(parameter)) for parameter in model.parameters())


def test_the_naive_ways_to_compare_with() -> None:
    overwritten = Training(kind=OverwritingCMD, every=3)
    for number in range(1, 10):
        overwritten.epoch(number)
        same = np.array_equal(overwritten.trained[-1], overwritten.left[-1])
        assert same == (number not in (6, 9))
    a, b = overwritten.fitted(9)
    r = overwritten.trained[-1][overwritten.cmd.online.reference_index].astype(np.float64)[overwritten.cmd.online.mode]
    np.testing.assert_allclose(overwritten.left[-1], a * r + b, rtol=2e-5, atol=2e-6)

    only = Training(kind=ReferencesOnly)
    for number in range(1, 8):
        only.epoch(number)
    embedded = only.embedded()
    assert np.flatnonzero(~embedded).tolist() == sorted(only.cmd.online.reference_index.tolist())
    a, b = only.fitted(4)
    r = only.trained[-1][only.cmd.online.reference_index].astype(np.float64)[only.cmd.online.mode]
    np.testing.assert_allclose(only.left[-1][embedded], (a * r + b)[embedded], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is 0, expected an integer of at least 1"),
        ({"percent": 101}, "percent is 101, expected a number from 0 to 100"),
        ({"of": "none"}, "of is 'none', expected 'all' or 'rest'"),
        ({"threshold": -1.0}, "threshold is -1.0, expected a number of at least 0"),
        ({"reassign": True}, "reassign is for OnlineCMD alone"),
        ({"warmup": 1}, "warmup is 1, expected an integer of at least 2"),
    ],
)
def test_a_wrong_setting_is_told_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EmbeddedCMD(nn.Linear(2, 2), **settings)


def test_a_state_of_other_settings_is_refused() -> None:
    model = nn.Linear(2, 2)
    state = EmbeddedCMD(model).state_dict()
    with pytest.raises(InputError, match=r"taken with percent=10\.0, this has 20\.0; make it the same"):
        EmbeddedCMD(model, percent=20).load_state_dict(state)
    with pytest.raises(InputError, match="this is no state of EmbeddedCMD"):
        EmbeddedCMD(model).load_state_dict(model.state_dict())
    with pytest.raises(InputError, match="no weight of the model needs a gradient"):
        EmbeddedCMD(nn.Linear(2, 2).requires_grad_(False))
