"""How good a fit is: what is kept of it, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import MakeRun, correlated

from trajkit import Decomposition, Run, fit, open_run, update
from trajkit.decomposition import Quality
from trajkit.errors import DamagedRunError
from trajkit.kernels.clustering import Cut
from trajkit.kernels.lines import Kind
from trajkit.store import format as store_format
from trajkit.store.fits import FIT_ATTRIBUTE
from trajkit.store.root import encoded, sealed_group

Array = np.ndarray[Any, Any]


def assert_quality(part: Quality, w: Array, modelled: Array) -> None:
    """Of some weights' (E, n) trajectories and what is modelled of them."""
    motion = w - w.mean(0)
    assert part.weights == w.shape[1]
    assert part.variance_explained == pytest.approx(1 - ((w - modelled) ** 2).sum() / (motion**2).sum(), abs=1e-6)
    error = np.linalg.norm((w - modelled)[-1]) / np.linalg.norm(motion[-1])
    assert part.last_epoch_error == pytest.approx(error, rel=1e-5)


def assert_is_the_oracles_quality(run: Run, found: Decomposition) -> None:
    w = run.weights[run.rows_of(found.epochs)].astype(np.float64)
    modelled = found.modelled(found.epochs, dtype=np.float64)
    assert_quality(found.quality, w, modelled)
    groups = [(found.mode == mode, part) for mode, part in enumerate(found.quality_by_mode)]
    tensors = [np.arange(entry.offset, entry.stop) for entry in run.layout.weights]
    for its, part in [*groups, *zip(tensors, found.quality_by_tensor.values(), strict=True)]:
        if part.weights:
            assert_quality(part, w[:, its], modelled[:, its])


@pytest.mark.parametrize("chunk_values", [1024, 131072])
@pytest.mark.parametrize("references", ["weight", "principal"])
def test_errors_of_the_last_epoch_are_the_oracles(
    references: Kind, chunk_values: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_format, "CHUNK_VALUES", chunk_values)
    run = make_run(correlated(20, 3000), sizes=(700, 0, 2300))
    found = fit(run, modes=4, references=references)
    assert_is_the_oracles_quality(run, found)
    nothing = found.quality_by_tensor["layer1"]
    assert (nothing.weights, nothing.variance_explained, nothing.last_epoch_error) == (0, None, None)


def test_a_fit_of_some_epochs_has_the_error_of_its_own_last_one(digits_run: Run) -> None:
    assert_is_the_oracles_quality(digits_run, fit(digits_run, epochs=range(5, 25, 3), samples=300))


@pytest.mark.parametrize("updatable", [True, False])
def test_an_update_has_the_error_of_the_new_last_epoch(updatable: bool, digits_run: Run) -> None:
    before = fit(digits_run, modes=5, name="a", epochs=range(30), samples=300, updatable=updatable)
    updated = update(digits_run, "a")
    assert_is_the_oracles_quality(digits_run, updated)
    assert updated.quality.last_epoch_error != before.quality.last_epoch_error
    assert updated.pca == pytest.approx(fit(digits_run, modes=3).pca)


@pytest.mark.parametrize("modes", [4, "auto", "95%"])
@pytest.mark.parametrize("references", ["weight", "centroid", "principal"])
def test_where_nothing_moves_there_is_nothing_to_explain(modes: Cut, references: Kind, make_run: MakeRun) -> None:
    found = fit(make_run(np.ones((5, 30), np.float32), sizes=(20, 10)), modes=modes, references=references)
    for part in (found.quality, *found.quality_by_tensor.values(), *found.quality_by_mode):
        assert (part.variance_explained, part.last_epoch_error) == (None, None)
    assert (found.n_modes, found.curve, found.pca, found.pca_components) == (1, (), (), None)


def test_a_tensor_and_a_mode_that_do_not_move_have_no_share_beside_others_that_have(make_run: MakeRun) -> None:
    weights = correlated(12, 300)
    weights[:, 200:] = weights[0, 200:]
    found = fit(make_run(weights, sizes=(200, 100)), modes=3, samples=50)
    moving, still = found.quality_by_tensor.values()
    assert (still.variance_explained, still.last_epoch_error) == (None, None)
    assert moving.variance_explained == pytest.approx(found.quality.variance_explained)
    with pytest.raises(TypeError):  # no average and no comparison passes over it
        max(part.variance_explained for part in (moving, still))  # type: ignore[type-var]


def test_an_error_relative_to_no_motion_is_infinite_unless_there_is_none() -> None:
    assert Quality(3, 1.0, 1.0, 0.0, 1.0).last_epoch_error == float("inf")
    assert Quality(3, 1.0, 1.0, 0.0, 0.0).last_epoch_error is None
    assert Quality(3, 1.0, 1.0, 4.0, 1.0).last_epoch_error == 0.5


# --- Against what stores as much


def components(w: Array, counts: Array, d: int = 1) -> tuple[float, float]:
    """Shares of the variance by d components and by d + 1, by a singular value decomposition."""
    powers = np.linalg.svd((w - w.mean(0)) * np.sqrt(counts), compute_uv=False) ** 2
    return powers[:d].sum() / powers.sum(), powers[: d + 1].sum() / powers.sum()


def test_pca_is_that_of_all_weights_where_the_probe_has_them_all(digits_run: Run) -> None:
    w = digits_run.weights[:].astype(np.float64)
    found = fit(digits_run, modes=3)
    assert found.pca == pytest.approx(components(w, np.ones(w.shape[1])), abs=1e-9)
    assert fit(digits_run, modes=3, epochs=[4, 9]).pca == (pytest.approx(1.0), pytest.approx(1.0))


@pytest.mark.parametrize(("modes", "expected"), [(1, 1), (10, 1), (30, 1), (256, 3), (257, 4), (1000, 12)])
def test_pca_has_the_components_that_take_as_much_storage(modes: int, expected: int, digits_run: Run) -> None:
    n, n_epochs, mode_bytes = 3682, 40, 1 if modes <= 256 else 2
    numbers = 2 * n + n * mode_bytes / 4 + modes * n_epochs
    d = max(d for d in range(1, 100) if d * (n + n_epochs) + n <= numbers)
    found = fit(digits_run, modes=modes)
    assert (found.n_modes, d) == (modes, expected)
    assert (found.pca_components, found.pca_is_of_equal_storage) == (d, True)
    w = digits_run.weights[:].astype(np.float64)
    assert found.pca == pytest.approx(components(w, np.ones(n), d), abs=1e-9)


def test_more_components_than_epochs_explain_all(make_run: MakeRun) -> None:
    found = fit(make_run(correlated(4, 60)), modes=60, samples=60)
    assert found.pca_components == (60 * 5 + 4 * 4 * found.n_modes) // (4 * 64) > 3
    assert found.pca == (1.0, 1.0)


def test_an_update_has_the_components_of_its_epochs(digits_run: Run) -> None:
    before = fit(digits_run, modes=300, name="a", epochs=range(20), updatable=True)
    updated = update(digits_run, "a")
    assert (before.pca_components, updated.pca_components) == (3, 4)
    w = digits_run.weights[:].astype(np.float64)
    assert updated.pca == pytest.approx(components(w, np.ones(3682), 4), abs=1e-9)


def test_each_weight_of_the_probe_counts_for_those_it_stands_for(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajkit.store.probe.PROBE_SIZE", 100)
    run = make_run(correlated(12, 1000), sizes=(60, 940))
    layer = (run.probe_index >= 60).astype(int)
    counts = (np.array([60, 940]) / np.bincount(layer))[layer]
    expected = components(run.weights[:, run.probe_index].astype(np.float64), counts)
    assert fit(run, modes=3, samples=50).pca == pytest.approx(expected, abs=1e-9)


def test_with_very_many_epochs_pca_is_of_every_second_weight_or_fewer(
    digits_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajkit.kernels.components.ENOUGH", 500)
    monkeypatch.setattr("trajkit.kernels.components.MOST_PRODUCTS", 3682 * 40**2 // 4)
    w = digits_run.weights[:, ::4].astype(np.float64)
    assert fit(digits_run, modes=3).pca == pytest.approx(components(w, np.ones(w.shape[1])), abs=1e-9)


@pytest.mark.parametrize(("modes", "mode_bytes"), [(6, 1), (256, 1), (257, 2)])
def test_storage_is_two_floats_and_a_mode_against_all_epochs(modes: int, mode_bytes: int, digits_run: Run) -> None:
    found = fit(digits_run, modes=modes, epochs=range(20))
    assert found.n_modes == modes
    assert found.storage_bytes == (4 + 4 + mode_bytes) * 3682 + 4 * 20 * modes
    assert found.storage_ratio == pytest.approx(found.storage_bytes / (4 * 20 * 3682))
    files = [file for file in (digits_run.path / "fits" / found.name).rglob("*") if file.is_file()]  # type: ignore[operator]
    assert found.size_bytes == sum(file.stat().st_size for file in files) > (2 + 4 + 8 + 4) * 3682


# --- What is read


def rewritten(found: Decomposition, **changes: Any) -> Decomposition:
    """The fit with other attributes; those that are None are left out."""
    attributes = {key: value for key, value in {**found.stored.attributes, **changes}.items() if value is not None}
    key = f"fits/{found.name}/zarr.json"
    (found.run.path / key).write_bytes(encoded(sealed_group(FIT_ATTRIBUTE, "fit", attributes), key))  # type: ignore[operator]
    return open_run(found.run.path).fit(found.name)


def test_a_fit_of_before_stays_readable_without_what_it_lacks(digits_run: Run) -> None:
    found = fit(digits_run, modes=3)
    attributes = found.stored.attributes
    old = rewritten(
        found,
        pca=None,
        pca_components=None,
        modes=[part[:3] for part in attributes["modes"]],
        tensors={name: part[:3] for name, part in attributes["tensors"].items()},
    )
    assert old.quality.variance_explained == found.quality.variance_explained
    assert (old.quality.last_epoch_error, old.pca, old.pca_components, old.curve) == (None, (), None, ())
    assert all(part.last_epoch_error is None for part in old.quality_by_tensor.values())
    np.testing.assert_array_equal(old.scale, found.scale)


def test_a_fit_of_before_has_the_shares_of_one_component_and_two(digits_run: Run) -> None:
    few, many = (rewritten(fit(digits_run, modes=modes), pca_components=None) for modes in (3, 1000))
    assert (few.pca_components, few.pca_is_of_equal_storage) == (1, True)
    assert (many.pca_components, many.pca_is_of_equal_storage) == (1, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pca_components": 0}, "'pca_components' is below 1"),
        ({"pca_components": 1.5}, "'pca_components' is 1.5, expected int"),
        ({"pca": [0.5]}, "'pca' is not two numbers"),
        ({"pca": [0.5, "x"]}, "a part of 'pca' is 'x', expected int | float"),
        ({"curve": [[1, 0.5], [2]]}, "'curve' is not up to 256 pairs"),
        ({"curve": [[1, 0.5]] * 257}, "'curve' is not up to 256 pairs"),
        ({"curve": [[1.5, 0.5]]}, "a number of modes is 1.5, expected int"),
        ({"curve": {}}, "'curve' is a dict, expected list"),
        ({"modes": [[1, 0.5, 0.5, 0.5]]}, "a quality is not so many numbers"),
        ({"tensors": {"a": [1, 0.5, 0.5]}}, "a quality is not so many numbers"),
        ({"modes": [[1, 1.0, 0.5]] * 2 + [[1, 1.0, 0.5, 1.0, 0.5]], "pca": None}, "a quality is not so many numbers"),
        ({"modes": [[1, 1.0, 0.5, 1.0, -0.5]] * 3}, "a quality has a number below 0"),
        ({"tensors": {"a": [1, 1.0, 0.5, -1.0, 0.5]}}, "a quality has a number below 0"),
        ({"settings": {"references": 5}}, "'references' is 5, expected str"),
        ({"settings": {"references": "\x1b[2J"}}, "'references' is no word"),
        ({"settings": {"online": True, "decay": None}}, "decay is None, expected a number above 0"),
        ({"settings": {"online": True, "decay": 1e300}}, r"decay is 1e\+300, expected a number above 0"),
        ({"settings": {"online": True, "reassign": 0}}, "reassign is 0, expected True, or a number"),
        ({"settings": {"online": True, "reassign": ["x"]}}, r"reassign is \['x'\], expected True, or a number"),
        ({"settings": {"online": True, "reassign": 2}}, "it has not kept the correlations"),
    ],
)
def test_numbers_that_cannot_be_are_damage(changes: dict[str, Any], message: str, digits_run: Run) -> None:
    found = fit(digits_run, modes=3, samples=100)
    with pytest.raises(DamagedRunError, match=message.replace("|", r"\|")):
        rewritten(found, **changes)
