"""References made of many weights, against what their definitions give in float64, and at later epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from conftest import MakeRun, correlated
from test_growing import grow
from trajkit_cli.main import main

from trajkit import CMD, Decomposition, Run, fit, follow, open_run, update, verify
from trajkit.errors import DamagedRunError, InputError
from trajkit.kernels import lines
from trajkit.kernels.affine import References
from trajkit.kernels.functionals import Functional
from trajkit.kernels.fused import fit_block_fused
from trajkit.kernels.lines import Candidates, ReferenceChoice
from trajkit.kernels.sampling import represented
from trajkit.store.archive import Archive
from trajkit.store.format import WEIGHTS

Array = np.ndarray[Any, Any]
RESULTS = ("mode", "scale", "mean", "correlation", "reference")
KINDS = ("centroid", "principal")
WEIGHTINGS = ("equal", "variance")


# --- The definitions, by brute force


def counts(w: Array, represents: Array, weighting: str) -> Array:
    """(P,) k of each weight, 0 for a constant."""
    moves = (w != w[0]).any(axis=0)
    variance = np.where(moves, w.var(axis=0), 0.0)
    if weighting == "variance":
        return np.asarray(represents * variance)
    usual = (represents * variance).sum() / represents[moves].sum()
    return np.minimum(variance / (0.01 * usual), 1.0)


def z_scores(w: Array) -> Array:
    moves = (w != w[0]).any(axis=0)
    return np.where(moves, w - w.mean(axis=0), 0.0) / np.where(moves, w.std(axis=0), 1.0)


def centroids(w: Array, start: Array, k: Array) -> Array:
    """(E, M) centroids of the weights (E, P) of each mode of the lines (E, M), or the line itself without any."""
    corr = oracle.correlate(w, start)
    mode, found, z = np.abs(corr).argmax(axis=1), start - start.mean(axis=0), z_scores(w)
    for m in range(start.shape[1]):
        members = [i for i in range(w.shape[1]) if mode[i] == m and k[i] > 0]
        if members:
            total = sum(k[i] * np.sign(corr[i, m]) * z[:, i] for i in members)
            found[:, m] = total / sum(k[i] for i in members)
    return found


def k_lines(w: Array, start: Array, k: Array, rounds: int) -> Array:
    """(E, M) principal trajectories with standard deviation 1, to the sign, after so many rounds on all weights."""
    found, z = start.copy(), z_scores(w)
    for _ in range(rounds):
        mode = np.abs(oracle.correlate(w, found)).argmax(axis=1)
        for m in range(start.shape[1]):
            members = (mode == m) & (k > 0)
            assert members.any()
            left, _, _ = np.linalg.svd(z[:, members] * np.sqrt(k[members]), full_matrices=False)
            found[:, m] = left[:, 0] * np.sqrt(len(w))
    return found


def explained(w: Array, references: Array, k: Array) -> float:
    """Σ k · corr² with the best reference."""
    return float((k * np.abs(oracle.correlate(w, references)).max(axis=1) ** 2).sum())


def centred(trajectories: Array) -> Array:
    return np.asarray(trajectories - trajectories.mean(axis=0))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_centroid_is_the_mean_of_its_members_turned_by_their_signs(weighting: Any, dtype: type) -> None:
    matrix = correlated(25, 600, seed=3).astype(dtype)
    matrix[:, ::7] = matrix[0, ::7]  # constants are members of nothing
    model = CMD(4, 200, references="centroid", weighting=weighting, random_state=0).fit(matrix.T)
    paper = CMD(4, 200, random_state=0).fit(matrix.T)
    w = matrix.astype(np.float64)
    expected = centroids(w, paper.references_.astype(np.float64), counts(w, np.ones(600), weighting))
    np.testing.assert_allclose(centred(model.references_), expected, atol=3e-6 if dtype == np.float32 else 1e-12)
    assert model.references_.dtype == dtype
    assert np.isin(model.functional_.index, np.arange(0, 600, 7)).sum() == 1  # the one of the constants' own cluster
    assert np.abs(expected.std(axis=0)).max() <= 1 + 1e-9


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("n_modes", [2, 5, 6])
def test_a_principal_trajectory_is_that_of_k_lines(weighting: Any, n_modes: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(lines, "ENOUGH", 10**9)  # all rounds on all weights,
    monkeypatch.setattr(lines, "POWER_STEPS", 200)  # each to its end
    matrix = correlated(30, 900, seed=1).astype(np.float64)
    model = CMD(n_modes, 300, references="principal", weighting=weighting, random_state=0).fit(matrix.T)
    paper = CMD(n_modes, 300, random_state=0).fit(matrix.T)
    k = counts(matrix, np.ones(900), weighting)
    expected = k_lines(matrix, paper.references_, k, lines.FIRST_ROUNDS + lines.LAST_ROUNDS)
    found = centred(model.references_)
    expected *= np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-9)
    assert explained(matrix, model.references_, k) > explained(matrix, paper.references_, k)
    functional = model.functional_
    for mode in range(n_modes):  # the sign is that of the member that makes up most
        members = np.flatnonzero(functional.mode == mode)
        part = functional.coefficient[members] * matrix[:, functional.index[members]].std(axis=0)
        assert part[np.abs(part).argmax()] > 0


def test_candidates_count_for_the_weights_that_they_stand_for() -> None:
    bounds = np.array([0, 100, 130, 130, 140])
    candidates = np.array([0, 50, 99, 100, 129, 130, 131, 139])
    expected = [100 / 3] * 3 + [15.0] * 2 + [10 / 3] * 3
    np.testing.assert_allclose(represented(candidates, bounds), expected)
    matrix = correlated(20, 40, seed=5).astype(np.float64)
    several = np.repeat(np.arange(40), np.arange(40) % 3 + 1)  # the same weights, as often as they stand for
    start = matrix[:, [3, 7]]
    choice = ReferenceChoice("principal", "variance")
    values = []
    for index, represents in ((np.arange(40), np.arange(40) % 3 + 1.0), (several, np.ones(several.size))):
        found = choice.refined(np.array([3, 7]), start, Candidates(index, matrix[:, index], represents))
        values.append(centred(found.values(matrix[:, found.index])))
    np.testing.assert_allclose(np.abs(values[0]), np.abs(values[1]), atol=1e-9)


def test_a_mode_that_loses_all_members_begins_anew_with_what_is_explained_worst() -> None:
    matrix = correlated(20, 300, seed=2).astype(np.float64)
    start = matrix[:, [5, 5, 5, 9]]
    found = ReferenceChoice("principal").refined(
        np.array([5, 5, 5, 9]), start, Candidates(np.arange(300), matrix, np.ones(300))
    )
    assert set(found.mode.tolist()) == {0, 1, 2, 3}
    references = found.values(matrix[:, found.index])
    k = counts(matrix, np.ones(300), "variance")
    assert explained(matrix, references, k) > explained(matrix, start, k)
    corr = np.abs(np.corrcoef(references.T)) - np.eye(4)
    assert corr.max() < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_modes_without_a_candidate_that_moves_keep_their_weight(kind: Any) -> None:
    matrix = np.ones((10, 50)) * np.arange(50)
    start = correlated(10, 2).astype(np.float64)
    found = ReferenceChoice(kind).refined(np.array([70, 71]), start, Candidates(np.arange(50), matrix, np.ones(50)))
    assert found.index.tolist() == [70, 71]
    np.testing.assert_allclose(found.values(start), start - start[0])
    one = matrix.copy()
    one[:, 20] = 3 * start[:, 0]
    found = ReferenceChoice(kind).refined(np.array([70, 71]), start, Candidates(np.arange(50), one, np.ones(50)))
    assert found.index.tolist() == [20, 71]
    constant = np.ones((5, 3))
    model = CMD(3, references=kind).fit(constant.T)
    np.testing.assert_array_equal(model.reconstruct(), constant.T)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_a_single_weight_follow_it(kind: Any) -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 6))
    model = CMD(6, references=kind).fit(matrix.T)
    np.testing.assert_allclose(np.abs(model.correlation_), 1, atol=1e-12)
    np.testing.assert_allclose(model.reconstruct(), matrix.T, atol=1e-9)
    assert sorted(model.functional_.index.tolist()) == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("size", [2.0**-95, 2.0**110])
def test_the_ends_of_float32_are_no_other_than_its_middle(kind: Any, weighting: Any, size: float) -> None:
    matrix = correlated(20, 500)
    found, expected = (
        CMD(4, 100, references=kind, weighting=weighting, random_state=0).fit(values.T)
        for values in (matrix * np.float32(size), matrix)
    )
    assert np.isfinite(found.references_).all()
    np.testing.assert_allclose(found.references_, expected.references_, atol=1e-6)
    np.testing.assert_allclose(found.correlation_, expected.correlation_, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_references_of_weights_far_above_their_motion_keep_its_digits(kind: Any) -> None:
    motion = correlated(30, 400).astype(np.float64)
    motion /= motion.std(axis=0)
    far = 1000.0 + 2.0**-20 * np.round(motion * 256)  # exact in float64, and by its motion in any dtype
    found, expected = (CMD(4, references=kind, random_state=0).fit(w.T) for w in (far, far - 1000.0))
    np.testing.assert_allclose(found.references_, expected.references_, atol=1e-9)


# --- Fits of runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_that_of_the_estimator_to_the_bit(kind: Any, digits_run: Run) -> None:
    decomposition = fit(digits_run, modes=6, samples=300, references=kind)
    model = CMD(6, sample_index=decomposition.sample_index, references=kind).fit(digits_run.weights[:].T)
    np.testing.assert_array_equal(model.references_, decomposition.reference)
    np.testing.assert_array_equal(model.labels_, decomposition.mode)
    np.testing.assert_array_equal(model.scale_, decomposition.scale)
    for name in ("index", "mode", "coefficient", "origin"):
        np.testing.assert_array_equal(getattr(model.functional_, name), getattr(decomposition.functional, name))
    assert decomposition.name == f"{kind}6"
    assert decomposition.references == kind
    assert decomposition.settings["references"] == kind
    with pytest.raises(InputError, match=f"each {kind} reference is made of many weights, expected single ones"):
        _ = decomposition.reference_index
    assert not hasattr(model, "reference_indices_")
    assert model.set_params(references="weight").fit(digits_run.weights[:].T).reference_indices_.size == 6


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("n_modes", [2, 5, 10, 30])
def test_principal_trajectories_explain_more_than_weights(weighting: Any, n_modes: int, digits_run: Run) -> None:
    paper = fit(digits_run, modes=n_modes).quality.variance_explained
    found = fit(digits_run, modes=n_modes, references="principal", weighting=weighting).quality.variance_explained
    assert found > paper
    if weighting == "variance":
        assert found > paper + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_trajectories_are_the_values_of_the_functional(kind: Any, digits_run: Run) -> None:
    decomposition = fit(digits_run, epochs=range(5, 40, 3), references=kind, samples=200)
    np.testing.assert_array_equal(decomposition.reference_at(decomposition.epochs), decomposition.reference)
    functional = decomposition.functional
    w = digits_run.weights[:].astype(np.float64)
    moved = (w[:, functional.index] - w[5, functional.index]) * functional.coefficient
    expected = np.stack([moved[:, functional.mode == m].sum(axis=1) for m in range(10)], axis=1)
    np.testing.assert_allclose(decomposition.reference_at(digits_run.epochs), expected, rtol=1e-5, atol=1e-5)
    modelled = decomposition.modelled([1, 38])
    for row, epoch in zip(modelled, (1, 38), strict=True):
        r = decomposition.reference_at([epoch])[0].astype(np.float64)[decomposition.mode]
        np.testing.assert_allclose(row, decomposition.scale * r + decomposition.offset, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_at_any_scheduler_and_budget_gives_the_same_bits(kind: Any, make_run: MakeRun) -> None:
    matrix = correlated(10, 300_000)
    run = make_run(matrix, sizes=(299_000, 1000))
    fits = [
        fit(run, modes=4, samples=200, references=kind, name=name, memory=memory, scheduler=scheduler)
        for name, memory, scheduler in (("a", None, "threads"), ("b", "64MiB", "synchronous"))
    ]
    for name in RESULTS:
        np.testing.assert_array_equal(getattr(fits[0], name), getattr(fits[1], name))
    assert np.isin(fits[0].functional.index, run.probe_index).all()
    assert fits[0].functional.index.size == run.probe_index.size == 16384


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updatable", [True, False])
def test_an_update_is_a_fit_of_all_epochs_with_the_same_functional(
    kind: Any, updatable: bool, make_run: MakeRun
) -> None:
    matrix = correlated(40, 2000)
    run = make_run(matrix[:20])
    first = fit(run, modes=5, samples=300, name="a", references=kind, updatable=updatable)
    functional = first.functional
    for n_epochs in (23, 40):
        run = grow(run, matrix[:n_epochs])
        updated = update(run, "a")
        references = functional.values(matrix[:n_epochs, functional.index])
        np.testing.assert_array_equal(updated.reference, references)
        expected = fit_block_fused(matrix[:n_epochs], References(references), every=True)
        assert expected.correlations is not None
        margin = np.sort(np.abs(expected.correlations), axis=0)
        decided = margin[-1] - margin[-2] > 1e-5
        np.testing.assert_array_equal(updated.mode[decided], expected.mode[decided])
        same = updated.mode == expected.mode
        np.testing.assert_allclose(updated.scale[same], expected.scale[same], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updated.correlation[same], expected.correlation[same], atol=2e-6)
    assert updated.settings == first.settings
    np.testing.assert_array_equal(updated.functional.coefficient, functional.coefficient)
    again = open_run(run.path).fit("a")
    for name in RESULTS:
        np.testing.assert_array_equal(getattr(again, name), getattr(updated, name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_that_sleep_and_wake_up_later_do_not_swamp_their_reference(kind: Any, weighting: Any) -> None:
    matrix = correlated(40, 1000, seed=2).astype(np.float64)
    matrix = (matrix - matrix.mean(axis=0)) / matrix.std(axis=0)
    matrix[:20, 900:] = 1e-9 * matrix[:20, 900:]  # a tenth of them sleeps, as behind a ReLU that does not fire
    candidates = Candidates(np.arange(1000), matrix[:20], np.ones(1000))
    found = ReferenceChoice(kind, weighting).refined(np.array([1, 2, 3]), matrix[:20, 1:4], candidates)
    values = found.values(matrix[:, found.index])
    assert np.ptp(values[20:], axis=0).max() < 10 * np.ptp(values[:20], axis=0).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reassign", [4, False])
def test_online_cmd_follows_the_functional_beyond_the_warm_up(kind: Any, reassign: bool | int, digits_run: Run) -> None:
    online = fit(digits_run, modes=4, epochs=range(20), references=kind, online=True, reassign=reassign)
    assert online.name == f"online-{kind}4"
    w = digits_run.weights[:].astype(np.float64)
    references = online.functional.values(digits_run.weights[:][:, online.functional.index]).astype(np.float64)
    at = [30]
    expected = _online_oracle(w[:31], references[:31], None if reassign else online.mode)
    spread = np.maximum(w.std(axis=0), 1e-6)
    close = np.abs(online.modelled(at)[0] - expected) / spread < 1e-3
    assert close.mean() == 1 if not reassign else close.mean() > 0.999  # modes may be equally good
    np.testing.assert_array_equal(next(online.one_by_one(at)), online.modelled(at)[0])
    np.testing.assert_array_equal(online.modelled([3])[0], digits_run.weights[3])


def _online_oracle(w: Array, references: Array, mode: Array | None) -> Array:
    """(N,) modelled weights at the last epoch of a fit to all of them."""
    if mode is None:
        mode = np.abs(oracle.correlate(w, references)).argmax(axis=1)
    r = (references - references.mean(axis=0))[:, mode]
    a = (r * w).sum(axis=0) / (r**2).sum(axis=0)
    return np.asarray(w.mean(axis=0) + a * r[-1])


def test_later_values_are_read_from_the_probe_alone(digits_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposition = fit(digits_run, epochs=range(20), references="principal", samples=200)
    read = Archive.read

    def watching(self: Archive, path: str, *rest: Any) -> Any:
        assert path != WEIGHTS
        return read(self, path, *rest)

    monkeypatch.setattr(Archive, "read", watching)
    assert decomposition.reference_at(range(20, 40)).shape == (20, 10)


def test_columns_of_the_probe_and_of_other_weights_come_in_the_order_asked_for(make_run: MakeRun) -> None:
    matrix = correlated(3, 40_000)
    run = make_run(matrix)
    outside = np.setdiff1d(np.arange(40_000), run.probe_index)
    for index in (run.probe_index[[5, 2]], outside[[9, 1]], np.array([outside[-1], run.probe_index[7], outside[0]])):
        np.testing.assert_array_equal(run.columns(index, [2, 0]), matrix[[2, 0]][:, index])


def test_what_a_fit_of_single_weights_stores_is_what_it_was(digits_run: Run) -> None:
    decomposition = fit(digits_run, samples=200)
    assert "n_members" not in decomposition.stored.attributes
    folder = Path(digits_run.path) / "fits/modes10/0"
    assert not [*folder.glob("members"), *folder.glob("terms")]
    assert decomposition.references == "weight"
    assert decomposition.functional.is_weights
    np.testing.assert_array_equal(decomposition.functional.index, decomposition.reference_index)


# --- What is damaged, or cannot be


@pytest.mark.parametrize("array", ["members", "terms"])
def test_damage_of_a_member_array_is_found(array: str, digits_run: Run) -> None:
    fit(digits_run, references="centroid", name="a", samples=200)
    assert verify(digits_run.path, level="full").sound
    (stored,) = (Path(digits_run.path) / f"fits/a/0/{array}/c/0").iterdir()
    data = bytearray(stored.read_bytes())
    data[100] ^= 1
    stored.write_bytes(data)
    with pytest.raises(DamagedRunError, match=f"fit 'a': .*{array}"):
        open_run(digits_run.path).fit("a").reference_at([3])
    assert not verify(digits_run.path, level="full").sound


def test_an_update_beyond_float32_says_so(make_run: MakeRun) -> None:
    matrix = np.full((8, 60), 1e-30, np.float32) * correlated(8, 60)
    run = make_run(matrix[:5])
    fit(run, modes=2, name="a", references="centroid", updatable=True)
    matrix[7] = 1e30
    run = grow(run, matrix)
    with pytest.raises(InputError, match="the references of fit 'a' have moved beyond what float32 holds"):
        update(run, "a")
    assert len(run.fit("a").epochs) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_references_of_fewer_members_are_those_of_fewer_candidates(kind: Any, make_run: MakeRun) -> None:
    matrix = correlated(25, 5000, seed=5)
    run = make_run(matrix, sizes=(1000, 0, 4000))
    found = fit(run, modes=4, references=kind, members=0.05)
    chosen = found.functional.index
    some = run.probe_index[np.arange(250) * 20]
    assert np.isin(chosen, some).all()
    assert chosen.size == 250
    candidates = Candidates(some, matrix[:, some], represented(some, run.layout.weight_bounds))
    paper = fit(run, modes=4).reference_index
    expected = ReferenceChoice(kind).refined(paper, matrix[:, paper], candidates)
    np.testing.assert_array_equal(found.functional.coefficient, expected.coefficient)
    assert found.settings["members"] == 0.05
    assert found.quality.variance_explained > fit(run, modes=4).quality.variance_explained
    model = CMD(4, sample_index=found.sample_index, references=kind, members=0.05, weighting="equal").fit(matrix.T)
    assert model.functional_.index.size == 250
    auto = fit(run, modes="auto", references=kind, members=0.001)
    assert auto.curve != fit(run, modes="auto", references=kind).curve


def test_members_of_modes_that_there_are_not_are_refused() -> None:
    functional = Functional(2, np.arange(2), np.array([0, 2], np.uint16), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="a reference has mode 2, but there are 2"):
        functional.values(np.ones((3, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"references": "mean"}, "references is 'mean', expected one of weight, centroid, principal; choose one"),
        ({"references": None}, "references is None, expected one of"),
        ({"references": "centroid", "weighting": "size"}, "weighting is 'size', expected 'equal' or 'variance'"),
        ({"weighting": "variance"}, "a reference that is a single weight has nothing to weigh; leave it out"),
        ({"members": 0.1}, r"members is 0\.1, but a reference that is a single weight has nothing to weigh"),
        ({"references": "centroid", "members": 0}, "members is 0, expected a share of the weights above 0, up to 1"),
        ({"references": "centroid", "members": 1.5}, r"members is 1\.5, expected a share"),
        ({"references": "centroid", "members": float("nan")}, "members is nan, expected a share"),
        ({"references": "centroid", "members": "5%"}, "members is '5%', expected a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, message: str, digits_run: Run) -> None:
    with pytest.raises(InputError, match=message):
        fit(digits_run, **settings)
    with pytest.raises(InputError, match=message):
        CMD(**settings).fit(digits_run.weights[:].T)
    assert digits_run.fits == ()


def test_a_fit_that_is_followed_keeps_its_references(digits_run: Run) -> None:
    followed = [*follow(digits_run.path, "a", interval_s=0.01, references="principal", samples=200)]
    assert followed[-1].references == "principal"
    (again,) = follow(digits_run.path, "a", references="principal", weighting=None)
    assert again.epochs.size == 40
    for other, message in (
        ({"references": "weight"}, "fit 'a' has references principal, not weight"),
        ({"weighting": "equal"}, "fit 'a' has weighting variance, not equal"),
    ):
        with pytest.raises(InputError, match=message):
            [*follow(digits_run.path, "a", **other)]  # type: ignore[arg-type]
    fit(digits_run, name="paper", samples=200)
    with pytest.raises(InputError, match="fit 'paper' has references weight, not centroid"):
        [*follow(digits_run.path, "paper", references="centroid")]
    with pytest.raises(InputError, match="fit 'paper' has weighting None, not equal"):
        [*follow(digits_run.path, "paper", weighting="equal")]
    with pytest.raises(InputError, match=r"fit 'paper' has members None, not 0\.1"):
        [*follow(digits_run.path, "paper", members=0.1)]


def test_the_command_line_takes_them(digits_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, [arguments[0], str(digits_path), *arguments[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    assert "principal of" in run("fit", "--references", "principal", "--modes", "5", "-q")
    described = json.loads(run("fit", "--references", "centroid", "--weighting", "variance", "--json", "-q"))
    assert described["references"] == "centroid"
    assert described["settings"]["weighting"] == "variance"
    run("online", "--references", "centroid", "--members", "0.1", "--sampling", "uniform", "--warmup", "10", "-q")
    run("reconstruct", "--fit", "principal5", "--epoch", "39", "-o", str(digits_path.parent / "w.safetensors"))
    assert "online-centroid10" in run("info")
    refused = CliRunner().invoke(main, ["fit", str(digits_path), "--weighting", "equal"])
    assert refused.exit_code != 0
    assert "nothing to weigh" in refused.output
    assert isinstance(open_run(digits_path).fit("principal5"), Decomposition)
    online = open_run(digits_path).fit("online-centroid10")
    assert (online.settings["members"], online.settings["sampling"]) == (0.1, "uniform")
    assert 300 < online.functional.index.size <= 368
