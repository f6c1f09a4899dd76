"""The number of modes that is chosen by held-out weights."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import oracle
import pytest
from conftest import MakeRun, correlated
from threadpoolctl import threadpool_limits

from trajkit import CMD, Run, fit, follow, open_run, update
from trajkit.errors import InputError
from trajkit.kernels.curve import COST, MOST, ROUNDS, STEPS
from trajkit.kernels.lines import STILL, Kind

KINDS = get_args(Kind)
Array = np.ndarray[Any, Any]


def unit(trajectories: Array) -> Array:
    """(E, n) trajectories, centred, with norm 1; zeros where nothing moves."""
    moved = trajectories.astype(np.float64) - trajectories.astype(np.float64).mean(0)
    norm = np.linalg.norm(moved, axis=0)
    return np.divide(moved, norm, out=np.zeros_like(moved), where=norm > 1e-12)


def expected_score(run: Run, sample: Array, n_modes: int, kind: Kind) -> float:
    """By loops over modes and weights, of a run with fewer probe weights than the curve looks at."""
    w, probe, bounds = run.weights[:], run.probe_index, run.layout.weight_bounds
    held_out = np.setdiff1d(probe, sample)[::2]
    members = np.setdiff1d(probe, held_out)
    layer = np.searchsorted(bounds, np.arange(w.shape[1]), side="right") - 1

    def stands_for(chosen: Array) -> Array:
        return (np.diff(bounds) / np.maximum(np.bincount(layer[chosen], minlength=len(bounds) - 1), 1))[layer[chosen]]

    lines = unit(w[:, oracle.step1(w, sample, n_modes)])
    variance = w[:, members].var(0, dtype=np.float64)
    counts = variance * stands_for(members)
    if kind == "centroid":
        counts = np.minimum(variance / (STILL**2 * np.average(variance, weights=stands_for(members))), 1)
    for _ in range({"weight": 0, "centroid": 1, "principal": ROUNDS}[kind]):
        along = unit(w[:, members]).T @ lines
        mode = np.abs(along).argmax(1)
        sums = np.zeros_like(lines)
        for i, (its_mode, direction) in enumerate(zip(mode, unit(w[:, members]).T, strict=True)):
            share = along[i, its_mode]
            sums[:, its_mode] += direction * counts[i] * (np.sign(share) if kind == "centroid" else share)
        lines = sums / np.linalg.norm(sums, axis=0)
    variance = w[:, held_out].var(0, dtype=np.float64) * stands_for(held_out)
    explained = ((unit(w[:, held_out]).T @ lines) ** 2).max(1)
    return float((variance * explained).sum() / variance.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_variance_that_is_explained_of_held_out_weights(
    kind: Kind, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajkit.store.probe.PROBE_SIZE", 600)
    matrix = correlated(25, 2000)
    matrix[:, ::3] *= 0.02  # hardly move
    run = make_run(matrix, sizes=(300, 0, 1700))
    found = fit(run, modes="auto", samples=150, references=kind)
    assert [n_modes for n_modes, _ in found.curve] == list(STEPS)
    for n_modes, score in found.curve[::5]:
        assert score == pytest.approx(expected_score(run, found.sample_index, n_modes, kind), abs=1e-9)
    assert found.n_modes == max(found.curve, key=lambda point: point[1] - COST * point[0])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_modes_as_there_are_walks(kind: Kind, make_run: MakeRun) -> None:
    run = make_run(correlated(60, 4000, noise=0.03))
    found = fit(run, modes="auto", samples=300, references=kind)
    assert found.n_modes == 5
    assert found.quality.variance_explained > 0.995
    assert fit(run, modes="99%", samples=300, references=kind).n_modes == 5


@pytest.mark.parametrize("kind", KINDS)
def test_references_of_noise_explain_no_more_of_held_out_weights_than_random_ones(
    kind: Kind, make_run: MakeRun
) -> None:
    rng = np.random.default_rng(0)
    found = fit(make_run(rng.normal(size=(100, 3000)).astype(np.float32)), modes="auto", samples=300, references=kind)
    others = unit(rng.normal(size=(100, 3000)))
    for n_modes, score in found.curve:
        by_chance = ((others.T @ unit(rng.normal(size=(100, n_modes)))) ** 2).max(1).mean()
        assert score == pytest.approx(by_chance, rel=0.15, abs=0.002)
    assert found.curve[0][1] < 0.015
    assert found.curve[-1][1] < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_real_training_it_explains_at_most_a_hundredth_less_than_thirty_modes(kind: Kind, digits_run: Run) -> None:
    found = fit(digits_run, modes="auto", references=kind)
    for n_modes in (10, 20, 30):
        other = fit(digits_run, modes=n_modes, references=kind)
        assert found.quality.variance_explained > other.quality.variance_explained - 0.01
    scores = dict(found.curve)
    assert scores[found.n_modes] == pytest.approx(found.quality.variance_explained, abs=0.01)


# --- A share of the variance


def test_a_share_takes_the_fewest_modes_that_explain_it(digits_run: Run) -> None:
    for share in (0.86, 0.92, 0.96):
        found = fit(digits_run, modes=f"{100 * share:g}%", references="principal")
        *fewer, last = found.curve
        assert all(score < share for tried, score in fewer if tried < found.n_modes)
        assert dict(found.curve)[found.n_modes] >= share
        tried = [n_modes for n_modes, _ in found.curve]
        assert last[0] in STEPS
        assert {found.n_modes - 1, found.n_modes} - {0} <= set(tried)
        assert tried == sorted(set(tried))


def test_a_share_may_take_more_modes_than_auto(digits_run: Run) -> None:
    found = fit(digits_run, modes="97%")
    assert found.n_modes > MOST
    assert found.name == "explained97"


def test_a_share_that_no_modes_explain_is_told_with_the_best_that_was_found(digits_run: Run) -> None:
    message = (
        r"digits: \d+ modes explain 97\.\d+ % of the variance of held-out weights, .*, expected 99.5%; ask for less"
    )
    with pytest.raises(InputError, match=message):
        fit(digits_run, modes="99.5%")
    assert digits_run.fits == ()


@pytest.mark.parametrize(
    "wrong", ["auto ", "Auto", "", "0%", "0.0%", "100%", "120%", "-5%", "nan%", "1e1%", "95", "٩٥%", "%", "95%%", "1.%"]
)
def test_other_texts_are_refused(wrong: str, digits_run: Run) -> None:
    message = r"expected an integer from 1 to 65535, 'auto', or a share of the variance below 100 % such as '95%'; use"
    with pytest.raises(InputError, match=message):
        fit(digits_run, modes=wrong)
    with pytest.raises(ValueError, match=r"n_modes is .*'auto'"):
        CMD(n_modes=wrong).fit(correlated(5, 20).T)


# --- Small ones


def test_where_the_sample_is_all_there_is_a_half_of_it_is_held_out(make_run: MakeRun) -> None:
    found = fit(make_run(correlated(30, 60, noise=0.05)), modes="auto")
    assert found.sample_index.size == 60
    assert 3 <= found.n_modes <= 8
    assert max(n_modes for n_modes, _ in found.curve) <= MOST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_weights", [1, 2, 3])
def test_very_few_weights_have_few_modes(n_weights: int, kind: Kind, make_run: MakeRun) -> None:
    found = fit(make_run(correlated(6, n_weights)), modes="auto", references=kind)
    assert 1 <= found.n_modes <= n_weights
    assert fit(make_run(np.ones((5, n_weights), np.float32), name="still"), modes="99%", references=kind).n_modes == 1


# --- What is kept, and that it is always the same


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimator_finds_what_the_fit_finds(kind: Kind, make_run: MakeRun) -> None:
    matrix = correlated(20, 3000, noise=1.0)
    found = fit(make_run(matrix), modes="auto", samples=200, references=kind)
    model = CMD(n_modes="auto", sample_index=found.sample_index, references=kind).fit(matrix.T)
    assert model.curve_ == found.curve
    np.testing.assert_array_equal(model.labels_, found.mode)
    np.testing.assert_array_equal(model.references_, found.reference)
    assert CMD(n_modes=4).fit(matrix.T).curve_ == ()


def test_the_estimator_finds_the_same_with_any_number_of_threads() -> None:
    matrix, index = correlated(14, 3000).T, np.sort(np.random.default_rng(2).choice(3000, 60, replace=False))
    curves = set()
    for threads in (1, 2, 4):
        with threadpool_limits(threads, user_api="blas"):
            curves.add(CMD("auto", sample_index=index, references="principal").fit(matrix).curve_)
    assert len(curves) == 1


def test_every_scheduler_chooses_the_same(make_run: MakeRun) -> None:
    run = make_run(correlated(12, 40_000, noise=0.7), sizes=(10_000, 30_000))
    one, other = (
        fit(run, modes="auto", references="principal", scheduler=scheduler, memory=memory).stored.attributes
        for scheduler, memory in (("threads", None), ("synchronous", "64MiB"))
    )
    for key in ("curve", "modes", "tensors", "pca"):
        assert one[key] == other[key], key


def test_a_fit_keeps_its_curve_as_it_grows(digits_run: Run) -> None:
    made = fit(digits_run, modes="auto", epochs=range(30), references="centroid", updatable=True)
    assert made.name == "centroid-auto"
    assert made.settings["modes"] == "auto"
    assert open_run(digits_run.path).fit("centroid-auto").curve == made.curve
    updated = update(digits_run, "centroid-auto")
    assert (updated.curve, updated.n_modes) == (made.curve, made.n_modes)
    assert fit(digits_run, modes=3).curve == ()


def test_following_goes_on_with_a_share_however_it_is_spelled(digits_run: Run) -> None:
    fit(digits_run, modes="90.0 %", name="mine", epochs=range(30), samples=200)
    assert digits_run.fit("mine").settings["modes"] == "90%"
    assert [len(fitted.epochs) for fitted in follow(digits_run.path, "mine", modes="90%")] == [40]
    with pytest.raises(InputError, match="fit 'mine' has modes 90%, not auto, and keeps its settings"):
        next(follow(digits_run.path, "mine", modes="auto"))
