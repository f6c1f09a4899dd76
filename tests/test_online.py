"""Online CMD beside a training: the same answer as the offline fit, whatever the model, and after any interruption."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import correlated, vector_layout
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import trajkit
from trajkit import OnlineCMD, Recorder, Run, RunWriter, fit, open_run, update
from trajkit.demo import digits, digits_cnn
from trajkit.errors import InputError, LayoutError
from trajkit.training.model import RecordedModel
from trajkit.vector import flatten

WARMUP = 20
EPOCHS = 40


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def training(run: Run, model: nn.Module, epochs: range = range(EPOCHS)) -> Iterator[int]:
    """The recorded training of the digits, once more."""
    for epoch in epochs:
        model.load_state_dict(run.state_dict(epoch))
        yield epoch


def trained(recorded: Run, epochs: range = range(EPOCHS), **settings: Any) -> tuple[nn.Module, OnlineCMD]:
    model = digits_cnn()
    cmd = OnlineCMD(model, **{"warmup": WARMUP} | settings)
    for _ in training(recorded, model, epochs):
        cmd.update_parameters(model)
    return model, cmd


def weights_of(model: nn.Module, cmd: OnlineCMD) -> Any:
    return flatten(cmd._layout, RecordedModel(model).tensors())[0]


def oracle(weights: Any, references: Any, mode: Any = None) -> tuple[Any, Any, Any]:
    """Mode, a and b of (E, N) weights on the columns `references`, in float64; a constant weight has a = 0."""
    w = weights.astype(np.float64) - weights[0]
    w_mean, r = w.mean(0), w[:, references]
    c, r = w - w_mean, r - r.mean(0)
    power = np.maximum((r**2).sum(0), 1e-300)  # a constant reference is nobody's
    if mode is None:
        mode = np.abs((r / np.sqrt(power)).T @ c).argmax(0)
    a = (c * r[:, mode]).sum(0) / power[mode]
    b = w_mean + weights[0] - a * weights[:, references].astype(np.float64).mean(0)[mode]
    return mode, a, b


def assert_equal_fits(
    weights: Any, references: Any, mode: Any, found: tuple[Any, Any], expected: tuple[Any, Any]
) -> None:
    """a to 1e-5 of σ_w/σ_r, and b to 1e-5 of what its parts are."""
    spread, of_reference = weights.std(0), weights[:, references].std(0)[mode]
    assert np.all(np.abs(found[0] - expected[0]) * of_reference <= 1e-5 * spread)
    size = np.abs(weights).mean(0) + np.abs(expected[0] * weights[:, references].mean(0)[mode])
    assert np.all(np.abs(found[1] - expected[1]) <= 1e-5 * size)


@pytest.mark.parametrize("last", [19, 20, 39])
def test_online_is_a_fit_of_all_epochs_with_the_references_of_the_warm_up(last: int, digits_run: Run) -> None:
    _, cmd = trained(digits_run, range(last + 1))
    offline = fit(digits_run, epochs=range(WARMUP))
    np.testing.assert_array_equal(cmd.reference_index, offline.reference_index)
    np.testing.assert_array_equal(cmd.mode, offline.mode)
    weights = digits_run.weights[: last + 1]
    _, a, b = oracle(weights, offline.reference_index, offline.mode)
    assert_equal_fits(weights, offline.reference_index, cmd.mode, (cmd.scale, cmd.offset), (a, b))
    if last == 19:
        assert_equal_fits(
            weights, cmd.reference_index, cmd.mode, (cmd.scale, cmd.offset), (offline.scale, offline.offset)
        )


def test_online_is_what_an_updated_fit_is(digits_run: Run) -> None:
    fit(digits_run, epochs=range(WARMUP), name="growing", updatable=True)
    updated = update(digits_run, "growing")
    weights = digits_run.weights[:]
    _, cmd = trained(digits_run, reassign=10)
    np.testing.assert_array_equal(cmd.mode, updated.mode)
    found, expected = (cmd.scale, cmd.offset), (updated.scale, updated.offset)
    assert_equal_fits(weights, updated.reference_index, cmd.mode, found, expected)
    mode, a, b = oracle(weights, updated.reference_index)
    np.testing.assert_array_equal(cmd.mode, mode)
    assert_equal_fits(weights, updated.reference_index, mode, found, (a, b))
    _, fixed = trained(digits_run)
    same = fixed.mode == cmd.mode
    assert 0.2 < same.mean() < 1
    np.testing.assert_allclose(fixed.scale[same], cmd.scale[same], rtol=1e-4, atol=1e-7)


KINDS: list[dict[str, Any]] = [
    {},
    {"reassign": True},
    {"reassign": 10, "references": "centroid"},
    {"references": "principal", "reassign": True, "decay": 0.9},
]


@pytest.mark.parametrize("settings", KINDS)
def test_online_references_of_many_weights_are_a_fit_of_all_epochs(settings: dict[str, Any], digits_run: Run) -> None:
    _, cmd = trained(digits_run, **settings)
    early = fit(digits_run, epochs=range(WARMUP), online=True, **settings)
    r = early.functional.values(digits_run.columns(early.functional.index, digits_run.rows_of(None))).astype(np.float64)
    w = digits_run.weights[:].astype(np.float64)
    counts = settings.get("decay", 1.0) ** np.minimum(EPOCHS - 1 - np.arange(EPOCHS), EPOCHS - WARMUP)[:, None]
    r, w = r - (counts * r).sum(0) / counts.sum(), w - (counts * w).sum(0) / counts.sum()
    power = (counts * r**2).sum(0)
    scale = (counts * w * r[:, cmd.mode]).sum(0) / power[cmd.mode]
    moving = np.ptp(digits_run.weights[:], axis=0) > 0
    assert moving.mean() > 0.9
    spread = np.sqrt((counts * w**2).sum(0))
    error = (np.abs(cmd.scale - scale) * np.sqrt(power)[cmd.mode])[moving] / spread[moving]
    assert error.max() < 1e-5
    assert np.all(cmd.scale[~moving] == 0)
    if settings.get("reassign") == 10:
        best = np.abs(r.T @ w / np.sqrt(power)[:, None]).argmax(0)
        np.testing.assert_array_equal(cmd.mode[moving], best[moving])
    elif not settings.get("reassign"):
        np.testing.assert_array_equal(cmd.mode, early.mode)


@pytest.mark.parametrize("settings", KINDS)
def test_a_replay_of_the_run_is_online_cmd_to_the_bit(settings: dict[str, Any], digits_run: Run) -> None:
    replayed = fit(digits_run, epochs=range(WARMUP), online=True, **settings)
    assert replayed.name == "-".join(["online", *filter(None, [settings.get("references")])]) + "10"
    model, every = digits_cnn(), list(range(EPOCHS))
    cmd = OnlineCMD(model, WARMUP, **settings)
    together = replayed.modelled(every)
    for epoch, vector in zip(training(digits_run, model), replayed.one_by_one(every), strict=True):
        cmd.update_parameters(model)
        with cmd.applied_to(model):
            np.testing.assert_array_equal(vector, weights_of(model, cmd), err_msg=str(epoch))
        np.testing.assert_array_equal(together[epoch], vector)
    np.testing.assert_array_equal(replayed.modelled([39, 3, 25], 1000, 3000), together[[39, 3, 25], 1000:3000])
    assert torch.equal(replayed.state_dict(39)["9.weight"], cmd.module.state_dict()["9.weight"])


@pytest.mark.parametrize("stop", [1, 7, 19, 20, 21, 33])
@pytest.mark.parametrize("settings", KINDS)
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    stop: int, settings: dict[str, Any], digits_run: Run, tmp_path: Path
) -> None:
    _, first = trained(digits_run, range(stop), **settings)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    del first
    model = digits_cnn()
    resumed = OnlineCMD(model, WARMUP, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert resumed.n_updates == stop
    for _ in training(digits_run, model, range(stop, EPOCHS)):
        resumed.update_parameters(model)
    through_model, through = trained(digits_run, **settings)
    np.testing.assert_array_equal(resumed.mode, through.mode)
    np.testing.assert_array_equal(resumed.scale, through.scale)
    np.testing.assert_array_equal(resumed.offset, through.offset)
    with resumed.applied_to(model), through.applied_to(through_model):
        np.testing.assert_array_equal(weights_of(model, resumed), weights_of(through_model, through))


SCRIPT = """
import os, sys, torch, trajkit
from trajkit.demo import digits_cnn
run, folder, last = trajkit.open_run(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model, state = digits_cnn(), folder + "/state.pt"
cmd = trajkit.OnlineCMD(model)
if os.path.exists(state):
    cmd.load_state_dict(torch.load(state))
for epoch in range(cmd.n_updates, 40):
    model.load_state_dict(run.state_dict(epoch))
    cmd.update_parameters(model)
    torch.save(cmd.state_dict(), state)
    if epoch == last:
        os.kill(os.getpid(), 9)
torch.save([cmd.mode, cmd.scale, cmd.offset], folder + "/end.pt")
"""


def test_it_is_killed_twice_and_ends_as_if_it_was_not(digits_run: Run, tmp_path: Path) -> None:
    for last in (12, 27, 99):
        command = [sys.executable, "-c", SCRIPT, str(digits_run.path), str(tmp_path), str(last)]
        own = {**os.environ, "TMPDIR": str(tmp_path)}  # where a killed process leaves its temporary run
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=own)
        assert done.returncode == (0 if last == 99 else -9), done.stderr
    assert not list(tmp_path.glob("trajkit-warmup-*"))  # the next process removes what a killed one left
    found = torch.load(tmp_path / "end.pt", weights_only=False)
    _, cmd = trained(digits_run)
    for mine, expected in zip(found, (cmd.mode, cmd.scale, cmd.offset), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_the_model_is_left_as_it_was_to_the_bit(digits_run: Run) -> None:
    model, cmd = trained(digits_run, range(30))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = digits()[0]
    with cmd.applied_to(model) as same:
        assert same is model
        assert not torch.equal(model.state_dict()["9.weight"], before["9.weight"])
        assert torch.equal(model.state_dict()["9.weight"], cmd.module.state_dict()["9.weight"])
        update_bn(images.split(64), model)
    with pytest.raises(ZeroDivisionError), cmd.applied_to(model):
        _ = 1 / 0
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_the_model_has_during_the_warm_up_are_its_own_weights(digits_run: Run) -> None:
    model, cmd = trained(digits_run, range(5))
    assert not cmd.is_warm
    assert torch.equal(cmd.module.state_dict()["9.weight"], model.state_dict()["9.weight"])
    with cmd.applied_to(model):
        assert torch.equal(cmd.module.state_dict()["9.weight"], model.state_dict()["9.weight"])
    with pytest.raises(InputError, match="has seen 5 of 20 epochs of its warm-up and has no modes yet; go on training"):
        _ = cmd.scale


def test_the_second_model_follows_and_its_statistics_can_be_estimated_anew(digits_run: Run) -> None:
    model, cmd = trained(digits_run, range(25))
    module = cmd.module
    for _ in training(digits_run, model, range(25, 30)):
        cmd.update_parameters(model)
        assert cmd.module is module
        with cmd.applied_to(model):
            assert all(torch.equal(value, module.state_dict()[name]) for name, value in model.state_dict().items())
    update_bn(digits()[0].split(64), module)
    assert not torch.equal(module.state_dict()["5.running_mean"], model.state_dict()["5.running_mean"])
    for _ in training(digits_run, model, range(30, 31)):
        cmd.update_parameters(model)
    assert torch.equal(module.state_dict()["5.running_mean"], model.state_dict()["5.running_mean"])


@pytest.mark.parametrize("recorded", [False, True])
def test_buffers_are_modelled_where_that_is_asked_for(recorded: bool, digits_run: Run) -> None:
    run = digits_run.path if recorded else None
    model, cmd = trained(digits_run, use_buffers=True, run=run)
    _, plain = trained(digits_run)
    np.testing.assert_array_equal(cmd.scale, plain.scale)
    names = ["1.running_mean", "5.running_var"]
    references = digits_run.weights[:][:, cmd.reference_index].astype(np.float64)
    references -= references.mean(0)
    for name in names:
        values = digits_run.trajectory(name).astype(np.float64)
        moved = values - values.mean(0)
        early = moved[:WARMUP] - moved[:WARMUP].mean(0)
        unit = references[:WARMUP] - references[:WARMUP].mean(0)
        mode = np.abs((unit / np.linalg.norm(unit, axis=0)).T @ early).argmax(0)
        r = references[:, mode]
        expected = values.mean(0) + (moved * r).sum(0) / (r**2).sum(0) * r[-1]
        np.testing.assert_allclose(cmd.module.state_dict()[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(cmd.module.state_dict()[name], model.state_dict()[name])
    assert torch.equal(cmd.module.state_dict()["1.num_batches_tracked"], model.state_dict()["1.num_batches_tracked"])


def test_a_modelled_variance_is_never_negative() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    cmd = OnlineCMD(model, warmup=3, modes=1, use_buffers=True)
    rng = torch.Generator().manual_seed(0)
    for epoch in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=rng)
            model[1].running_var.fill_(1e-6 if epoch == 5 else 0.1 * epoch)  # type: ignore[operator, union-attr]
            if epoch == 5:
                model[0].weight += 30.0
                model[0].bias -= 30.0
        cmd.update_parameters(model)
    variance = cmd.module.state_dict()["1.running_var"]
    assert torch.all(variance >= 0)
    assert torch.all(torch.isfinite(variance))


class Awkward(nn.Module):
    """Tied, frozen, constant, empty, scalar and turned weights, in four dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.head = nn.Linear(4, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.brain = nn.Parameter(torch.randn(30, 2).bfloat16())
        self.float16 = nn.Parameter(torch.randn(50).half())
        self.wide = nn.Parameter(torch.randn(20, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.turned = nn.Parameter(torch.randn(6, 30).t())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.index = nn.Parameter(torch.arange(4), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 3))


@pytest.mark.parametrize("reassign", [False, 3])
def test_every_kind_of_weight_is_modelled(reassign: bool | int) -> None:
    torch.manual_seed(0)
    model = Awkward()
    cmd = OnlineCMD(model, warmup=10, modes=3, reassign=reassign)
    motion, seen = torch.randn(25, 4).cumsum(0), []
    for epoch in range(25):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * (torch.randn(parameter.shape) + motion[epoch].sum()).to(parameter.dtype)
        cmd.update_parameters(model)
        seen.append(
            torch.cat([p.detach().reshape(-1).float() for p in model.parameters() if p.is_floating_point()]).numpy()
        )
    weights = np.array(seen)
    assert weights.shape[1] == 160 + 4 + 4 + 60 + 50 + 20 + 1 + 180 + 3
    mode, a, b = oracle(weights, cmd.reference_index, None if reassign else cmd.mode)
    np.testing.assert_array_equal(cmd.mode, mode)
    assert_equal_fits(weights, cmd.reference_index, mode, (cmd.scale, cmd.offset), (a, b))
    expected = a * weights[-1, cmd.reference_index].astype(np.float64)[mode] + b
    modelled: dict[str, Tensor] = cmd.module.state_dict()
    assert modelled["brain"].dtype == torch.bfloat16
    assert cmd.module.head.weight is cmd.module.embed.weight  # type: ignore[union-attr]
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            wanted = expected[start : start + parameter.numel()].reshape(parameter.shape)
            digits = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(parameter.dtype, 1e-6)
            np.testing.assert_allclose(modelled[name].double(), wanted, rtol=digits, atol=digits, err_msg=name)
            start += parameter.numel()
    assert torch.equal(modelled["frozen"], model.frozen)
    assert torch.equal(modelled["index"], model.index)


def test_more_modes_than_clusters_and_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    cmd = OnlineCMD(model, warmup=4, modes=10)
    for _ in range(6):
        with torch.no_grad():
            model.weight += torch.randn(1)
        cmd.update_parameters(model)
    assert cmd.n_modes <= 3
    assert cmd.scale[2] == 0
    assert cmd.offset[2] == model.bias.item()
    with cmd.applied_to(model):
        assert torch.all(torch.isfinite(model.weight))


@pytest.mark.parametrize("epoch", [2, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(epoch: int, value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    cmd = OnlineCMD(model, warmup=4, modes=2)
    for number in range(epoch + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape)
        if number < epoch:
            cmd.update_parameters(model)
    copied = torch.load(_saved(cmd.state_dict()))
    with torch.no_grad():
        model[1].weight[3, 3] = value  # type: ignore[index]
    with pytest.raises(InputError, match=r"'1\.weight' .*not finite"):
        cmd.update_parameters(model)
    with torch.no_grad():
        model[1].weight[3, 3] = 0.5  # type: ignore[index]
    if epoch == 6:
        with pytest.raises(InputError, match=r"was not finite at update 6, .*; load_state_dict a state from before"):
            cmd.update_parameters(model)
        cmd.load_state_dict(copied)
    cmd.update_parameters(model)
    assert cmd.n_updates == epoch + 1


def _saved(state: dict[str, Any]) -> str:
    path = os.path.join(tempfile.gettempdir(), "state.pt")
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("settings", "n_bytes"), [({}, 11), ({"reassign": True}, 16), ({"references": "centroid"}, 11)]
)
def test_what_is_kept_is_at_most_three_floats_a_weight_or_four(
    settings: dict[str, Any], n_bytes: int, digits_run: Run
) -> None:
    _, cmd = trained(digits_run, range(21), **settings)
    shelves = cmd.state_dict()["moments"]["shelves"]
    taken = sum(tensor.nbytes for shelf in shelves for tensor in shelf.values() if isinstance(tensor, Tensor))
    assert taken == n_bytes * digits_run.layout.n_weights


def test_the_temporary_run_is_gone_when_the_warm_up_ends_and_with_the_object(digits_run: Run, tmp_path: Path) -> None:
    def left() -> list[Path]:
        return [path for path in tmp_path.iterdir() if path.name.startswith("trajkit")]

    _, warm = trained(digits_run, range(WARMUP - 1))
    assert len(left()) == 1
    _ = warm.state_dict()
    assert len(left()) == 1
    del warm
    gc.collect()
    assert left() == []
    _, cmd = trained(digits_run, range(WARMUP))
    assert cmd.is_warm
    assert left() == []


def test_the_users_run_serves_for_the_warm_up_and_keeps_its_fit(tmp_path: Path, digits_run: Run) -> None:
    model = digits_cnn()
    with Recorder(model, tmp_path / "mine", fsync=False) as recorder:
        cmd = OnlineCMD(model, WARMUP, run=recorder)
        model.load_state_dict(digits_run.state_dict(39))
        recorder.record(100)  # of an earlier training
        for epoch in training(digits_run, model, range(25)):
            recorder.record(1000 + 10 * epoch)
            cmd.update_parameters(model)
    _, own = trained(digits_run, range(25))
    np.testing.assert_array_equal(cmd.scale, own.scale)
    np.testing.assert_array_equal(cmd.offset, own.offset)
    saved = open_run(tmp_path / "mine").fit("online10")
    assert saved.epochs.tolist() == list(range(1000, 1200, 10))
    with cmd.applied_to(model):
        np.testing.assert_array_equal(saved.modelled([1240])[0], weights_of(model, cmd))


def test_a_warm_up_in_the_users_run_is_resumed_by_a_few_hashes(digits_run: Run) -> None:
    _, first = trained(digits_run, range(12), run=digits_run.path)
    state = first.state_dict()
    assert list(state["warm_up"]) == ["probes"]
    model = digits_cnn()
    resumed = OnlineCMD(model, WARMUP, run=digits_run.path)
    resumed.load_state_dict(state)
    for _ in training(digits_run, model, range(12, EPOCHS)):
        resumed.update_parameters(model)
    np.testing.assert_array_equal(resumed.scale, trained(digits_run)[1].scale)


@pytest.mark.parametrize("modes", ["auto", "90%"])
def test_the_warm_up_chooses_the_number_of_modes(modes: str, digits_run: Run) -> None:
    early = fit(digits_run, modes=modes, epochs=range(WARMUP), online=True)
    assert early.name == ("online-auto" if modes == "auto" else "online-explained90")
    _, through = trained(digits_run, modes=modes)
    assert through.n_modes == early.n_modes != 10
    for stop in (5, 30):
        state = trained(digits_run, range(stop), modes=modes)[1].state_dict()
        assert state["settings"]["modes"] == modes
        model = digits_cnn()
        resumed = OnlineCMD(model, WARMUP, modes=modes)
        resumed.load_state_dict(state)
        for _ in training(digits_run, model, range(stop, EPOCHS)):
            resumed.update_parameters(model)
        np.testing.assert_array_equal(resumed.scale, through.scale)
        np.testing.assert_array_equal(resumed.mode, through.mode)


def test_a_share_that_no_modes_explain_is_told_at_the_end_of_the_warm_up(digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"modes explain .* % of the variance of held-out weights, .*, expected 99.9%"):
        trained(digits_run, range(WARMUP), modes="99.9%")


def test_an_epoch_that_was_not_recorded_is_told(digits_run: Run, tmp_path: Path) -> None:
    model = digits_cnn()
    cmd = OnlineCMD(model, warmup=3, run=tmp_path / "mine")
    with Recorder(model, tmp_path / "mine", fsync=False) as recorder:
        for epoch in training(digits_run, model, range(2)):
            recorder.record(epoch, wait=True)
            cmd.update_parameters(model)
        model.load_state_dict(digits_run.state_dict(2))
        with pytest.raises(
            InputError, match=r"mine: the weights of update 3 of online CMD are not in the run, .*record"
        ):
            cmd.update_parameters(model)


def test_a_state_of_other_settings_or_another_model_is_refused(digits_run: Run) -> None:
    model, cmd = trained(digits_run, range(22))
    state = cmd.state_dict()
    with pytest.raises(InputError, match="taken with modes=10, this has 5; make it the same"):
        OnlineCMD(model, WARMUP, modes=5).load_state_dict(state)
    with pytest.raises(LayoutError, match="the state is of a model with other tensors"):
        OnlineCMD(nn.Linear(3, 3), WARMUP).load_state_dict(state)
    with pytest.raises(InputError, match="this is no state of OnlineCMD"):
        cmd.load_state_dict(model.state_dict())
    with pytest.raises(LayoutError, match=r"the model: '0\.weight' is missing, .*; make one for this model"):
        cmd.update_parameters(nn.Linear(3, 3))
    with cmd.applied_to(model), pytest.raises(InputError, match="leave the `with` block first"):
        cmd.update_parameters(model)
    cmd.update_parameters(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 1}, "warmup is 1, expected an integer of at least 2"),
        ({"warmup": 2.5}, "warmup is 2.5, expected an integer"),
        ({"modes": 0}, "modes is 0, expected an integer from 1"),
        ({"modes": "automatic"}, "modes is 'automatic', expected an integer from 1"),
        ({"samples": 0}, "samples is 0, expected an integer of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"sampling": "fair"}, "sampling is 'fair', expected one of balanced"),
        ({"references": "mean"}, "references is 'mean', expected one of weight, centroid, principal"),
        ({"reassign": 0}, "reassign is 0, expected True, or a number"),
        ({"reassign": 1 << 16}, "reassign is 65536, expected True, or a number of .*, up to 65535; use True"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808, expected an integer"),
        ({"reassign": "all"}, "reassign is 'all', expected True"),
        ({"decay": 0}, "decay is 0, expected a number above 0"),
        ({"decay": 1.5}, "decay is 1.5, expected a number above 0, at most 1"),
        ({"decay": float("nan")}, "decay is nan"),
    ],
)
def test_a_wrong_setting_is_told_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnlineCMD(nn.Linear(2, 2), **settings)


@pytest.mark.parametrize("settings", [{"reassign": True}, {"decay": 0.9}])
def test_only_an_online_fit_goes_on_from_its_epochs(settings: dict[str, Any], digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"reassign and decay are for online fits, .*; leave them out"):
        fit(digits_run, **settings)


def test_an_online_fit_is_not_updated(digits_run: Run) -> None:
    fit(digits_run, epochs=range(WARMUP), online=True)
    with pytest.raises(InputError, match=r"fit 'online10' is an online one, .*; it follows later epochs without"):
        update(digits_run, "online10")


def test_a_fit_goes_on_over_blocks_and_bad_epochs(tmp_path: Path) -> None:
    trajectories = correlated(30, 300_000)
    with RunWriter(tmp_path / "large", fsync=False) as writer:
        for epoch, weights in enumerate(trajectories):
            writer.append(vector_layout(200_000, 100_000), 5 * epoch, weights, {})
    run = open_run(tmp_path / "large")
    online = fit(run, modes=4, epochs=run.epochs[:10], online=True)
    _, a, b = oracle(trajectories[:26], online.reference_index, online.mode)
    expected = a * trajectories[25, online.reference_index].astype(np.float64)[online.mode] + b
    found = online.modelled([125], 120_000, 290_001)[0]
    np.testing.assert_allclose(found, expected[120_000:290_001], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(next(online.one_by_one([125]))[120_000:290_001], found)
    assert trajkit.Decomposition in type(online).__mro__
