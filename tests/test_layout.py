from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajkit import ParameterLayout
from trajkit.errors import LayoutError, UnknownNameError
from trajkit.layout import STORED_DTYPE, TensorEntry, require_floating, require_same_layout, stub_warning


def weight(name: str, *shape: int, dtype: str = "float32", **more: object) -> TensorEntry:
    return TensorEntry(name=name, shape=shape, dtype=dtype, kind="weight", **more)  # type: ignore[arg-type]


def buffer(name: str, *shape: int, dtype: str = "float32") -> TensorEntry:
    return TensorEntry(name=name, shape=shape, dtype=dtype, kind="buffer")


def test_weights_and_buffers_stand_in_vectors_of_their_own() -> None:
    layout = ParameterLayout.of(
        [weight("a", 2, 3), buffer("mean", 4), weight("scalar"), buffer("count", dtype="int64"), weight("b", 5)]
    )
    assert [(entry.name, entry.offset, entry.stop) for entry in layout.weights] == [
        ("a", 0, 6),
        ("scalar", 6, 7),
        ("b", 7, 12),
    ]
    assert layout.n_weights == 12
    assert layout.buffer_sizes == {"float32": 4, "int64": 1}
    assert [layout.weight_at(index) for index in (0, 5, 6, 7, 11)] == ["a", "a", "scalar", "b", "b"]


def test_an_alias_finds_its_tensor() -> None:
    layout = ParameterLayout.of([weight("embed", 4, aliases=("head",))])
    assert layout["head"] is layout["embed"]
    assert list(layout.names()) == ["embed", "head"]


def test_an_unknown_tensor_names_some_that_exist() -> None:
    with pytest.raises(UnknownNameError, match=r"no tensor 'x' in the layout; it has a, b"):
        ParameterLayout.of([weight("a", 1), weight("b", 1)])["x"]


def test_weights_beyond_two_to_the_31_have_their_places() -> None:
    layout = ParameterLayout.of([weight("huge", 2**31, 3), weight("last", 7)])
    assert layout["last"].offset == 3 * 2**31
    assert layout.weight_at(3 * 2**31 + 1) == "last"
    assert ParameterLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no weights"),
        ([buffer("only", 3)], "no weights"),
        ([weight("none", 0, 3)], "no weights"),
        ([weight("a", 1), weight("a", 2)], "'a' appears twice"),
        ([weight("a", 1, aliases=("b",)), weight("b", 1)], "'b' appears twice"),
        ([weight("z", 1, dtype="complex64")], "'z' is complex64, a weight can be recorded as float16, bfloat16"),
        ([weight("z", 1, dtype="int64")], "'z' is int64, a weight"),
        ([weight("a", 0), weight("b", 0)], r"all of them have shape \(0,\), as DeepSpeed's ZeRO-3 .*zero_to_fp32.py"),
    ],
)
def test_a_layout_that_cannot_be_recorded_is_refused(entries: list[TensorEntry], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParameterLayout.of(entries)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([weight("a", 2, 3)], "epoch 4: 'b' is missing, the run has it; record into a new run"),
        ([weight("a", 2, 3), weight("b", 5), weight("c", 1)], "epoch 4: 'c' is new"),
        ([weight("a", 2, 4), weight("b", 5)], r"epoch 4: 'a' has shape \(2, 4\), the run has \(2, 3\)"),
        ([weight("a", 2, 3, dtype="float16"), weight("b", 5)], "'a' has dtype float16, the run has float32"),
        ([weight("b", 5), weight("a", 2, 3)], "in another order"),
        (
            [weight("x", 2, 3), weight("y", 5), weight("z", 1), weight("a", 2, 3)],
            "epoch 4: 'b' is missing, the run has it, and 'x' is new, the run does not have it"
            r" \(3 are: also 'y', 'z'\); record into a new run",
        ),
        ([weight("a", 2, 3, aliases=("b",))], r"'a' has names \['a', 'b'\], the run has \['a'\]"),
    ],
)
def test_a_changed_model_names_the_tensor_and_the_cure(changed: list[TensorEntry], message: str) -> None:
    run = ParameterLayout.of([weight("a", 2, 3), weight("b", 5)])
    with pytest.raises(LayoutError, match=message):
        require_same_layout(ParameterLayout.of(changed), run, "epoch 4")


def test_a_layout_of_other_names_tells_some_of_both_and_how_many_there_are() -> None:
    run = ParameterLayout.of(weight(f"run{number}", 1) for number in range(7))
    with pytest.raises(LayoutError) as raised:
        require_same_layout(ParameterLayout.of(weight(f"file{number}", 1) for number in range(2)), run, "here")
    assert str(raised.value) == (
        "here: 'run0' is missing, the run has it (7 are: also 'run1', 'run2', 'run3' and 3 more), and"
        " 'file0' is new, the run does not have it (2 are: also 'file1'); record into a new run"
    )


def test_stubs_are_trainable_weights_of_shape_0_beside_others_with_values() -> None:
    layout = ParameterLayout.of(
        [
            weight("matrix", 0),
            weight("bias", 4),
            weight("frozen", 0, trainable=False),
            weight("no rows", 0, 3),
            buffer("observed", 0),
        ]
    )
    assert layout.stubs == ("matrix",)
    assert str(stub_warning(layout)).startswith("'matrix' has shape (0,) and no values, as DeepSpeed's ZeRO-3")
    assert stub_warning(ParameterLayout.of([weight("matrix", 3)])) is None


def test_parameters_of_which_none_is_floating_are_refused_with_their_dtype() -> None:
    require_floating([])
    require_floating([weight("a", 1, dtype="int8"), weight("b", 1, dtype="bfloat16")])
    with pytest.raises(LayoutError, match=r"no weights: 'a' is int8, .*; record the model before it is quantised"):
        require_floating([weight("a", 1, dtype="int8"), weight("b", 1, dtype="int64")])


def test_freezing_a_layer_changes_no_layout() -> None:
    thawed = ParameterLayout.of([weight("a", 2)])
    frozen = ParameterLayout.of([weight("a", 2, trainable=False)])
    assert frozen == thawed
    assert frozen.digest == thawed.digest


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(STORED_DTYPE)), st.booleans()),
        max_size=8,
    )
)
def test_a_layout_survives_json(tensors: list[tuple[list[int], str, bool]]) -> None:
    layout = ParameterLayout.of(
        [weight("first", 1)]
        + [
            TensorEntry(name=f"t{number}", shape=tuple(shape), dtype=dtype, kind="buffer", trainable=trainable)
            for number, (shape, dtype, trainable) in enumerate(tensors)
        ]
    )
    again = ParameterLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest == layout.digest
    assert [entry.trainable for entry in again.tensors] == [entry.trainable for entry in layout.tensors]


@pytest.mark.parametrize("field", ["name", "shape", "dtype", "kind", "offset", "trainable", "aliases"])
@pytest.mark.parametrize("lie", [None, -1, "x", [[]], {"a": 1}, 2.5, "absent"])
def test_a_lying_stored_layout_is_a_layout_error(field: str, lie: object) -> None:
    document = ParameterLayout.of([weight("a", 2, 3), weight("b", 5)]).to_json()
    if lie == "absent":
        del document[1][field]
    else:
        document[1][field] = lie
    if field == "name" and isinstance(lie, str) and lie != "absent":
        assert ParameterLayout.from_json(document)["x"].offset == 6  # a name may be anything
        return
    with pytest.raises(LayoutError):
        ParameterLayout.from_json(document)


def test_split_gives_views_in_shape() -> None:
    layout = ParameterLayout.of([weight("a", 2, 3), weight("scalar")])
    vector = np.arange(7, dtype=np.float32)
    parts = layout.split(vector, layout.weights)
    assert parts["a"].shape == (2, 3)
    assert parts["scalar"].shape == ()
    assert np.shares_memory(parts["a"], vector)
