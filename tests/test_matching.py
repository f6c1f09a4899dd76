"""Names of a checkpoint beside those of a run: nothing is merged, swapped or left out without a word."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trajkit import ParameterLayout, Recorder, import_checkpoints, open_run
from trajkit.checkpoints.matching import match_names, nearest_prefix, plain_names, prefixes_to_choose
from trajkit.checkpoints.selecting import Selection
from trajkit.errors import InputError, LayoutError
from trajkit.layout import TensorEntry


def layout(*names: str) -> ParameterLayout:
    """A run's layout; names that are tied are joined by a sign of equality."""
    tied = [name.split("=") for name in names]
    return ParameterLayout.of(TensorEntry(one, (1,), "float32", "weight", aliases=tuple(more)) for one, *more in tied)


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        ("module.a.w module.b", "a.w b"),
        ("module._orig_mod.module.a.w", "a.w"),
        ("_module.a _module.b", "a b"),
        ("a.module.w b", "a.module.w b"),
        ("a._orig_mod.w a._orig_mod.v b", "a.w a.v b"),
        ("a._checkpoint_wrapped_module._fsdp_wrapped_module.w", "a.w"),
        ("module.a b", "module.a b"),
        ("a._orig_mod.w a.w", "a._orig_mod.w a.w"),
        ("module.a._orig_mod.w module.a.w", "a._orig_mod.w a.w"),
        ("module", "module"),
        ("module.module", "module"),
        ("modules.w", "modules.w"),
        ("a.my_module.w", "a.my_module.w"),
        ("", ""),
    ],
)
def test_what_names_alone_say_of_wrappers(names: str, plain: str) -> None:
    assert list(plain_names(names.split()).values()) == plain.split()


@pytest.mark.parametrize(
    ("names", "known", "found"),
    [
        ("module.a.w", "a.w", "a.w"),
        ("a.w", "module.a.w", "module.a.w"),
        ("a.module.w module.b", "a.w b", "a.w b"),
        ("a._orig_mod.w", "a.module.w", "a.module.w"),
        # What is really called so: more wrappers in the file are more wrappers in the run.
        ("module.w w", "module.w w", "module.w w"),
        ("module.module.w module.w", "module.w w", "module.w w"),
        ("w module.w", "w", "w module.w"),
        ("module.w module.module.w", "w", "w module.w"),
        ("a.module.w a.module.module.w head", "a.w a.module.w head", "a.w a.module.w head"),
        # Nobody knows which of two is meant: they keep their names.
        ("a.module.w a._orig_mod.w", "a.w", "a.module.w a._orig_mod.w"),
        ("module.w _orig_mod.w", "w", "module.w _orig_mod.w"),
        # Prefixes.
        ("model.a.w model.b", "a.w b", "a.w b"),
        ("net.a.w net.b", "a.w=b", "a.w b"),
        ("net.b", "a.w=b", "b"),
        ("a.w b", "x.y.a.w x.y.b", "x.y.a.w x.y.b"),
        ("model.a.module.w model.b", "a.w b", "a.w b"),
        ("model.a.w model.b model.c", "a.w b", "a.w b c"),
        ("model.a.w c", "a.w", "model.a.w c"),
        ("a.w", "b.w", "a.w"),
        ("model.a", "a b", "model.a"),
    ],
)
def test_names_beside_those_of_a_run(names: str, known: str, found: str) -> None:
    match = match_names(names.split(), layout(*known.split()))
    assert list(match.names.values()) == found.split()


def test_a_prefix_that_finds_a_part_is_named_and_not_taken_off() -> None:
    known = layout("a", "b")
    assert match_names(["model.a"], known).prefix is None
    nearest = nearest_prefix(["model.a"], known)
    assert nearest is not None
    assert str(nearest.prefix) == "all names of the checkpoint begin with 'model.', which those of the run lack"
    assert nearest.found == {"a"}
    assert nearest_prefix(["model.c"], known) is None
    assert prefixes_to_choose(["x.a", "x.b", "y.a", "module.z.a", "z.b", "c"], known) == ["x.", "z."]


PARTS = st.sampled_from(["a", "b", "w", "module", "_orig_mod", "_module", "n_averaged"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)


@given(names=NAMES, known=NAMES)
def test_no_two_names_become_one(names: list[str], known: list[str]) -> None:
    match = match_names(names, layout(*known))
    for found in (plain_names(names), match.names):
        assert list(found) == names
        assert len(set(found.values())) == len(names)
    if set(names) == set(known):
        assert all(name == found for name, found in match.names.items())
    assert match.found <= set(known)


@given(names=NAMES, wrapper=st.sampled_from(["module", "_orig_mod", "_module.module"]))
def test_a_wrapper_around_all_names_is_seen_through_whatever_they_are(names: list[str], wrapper: str) -> None:
    match = match_names([f"{wrapper}.{name}" for name in names], layout(*names))
    assert list(match.names.values()) == names


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: ["module." * (n // 7) + "w"],
        lambda n: ["a." * (n // 2) + "w"],
        lambda n: [f"module.{number}.n_averaged" for number in range(n // 20)],
        lambda n: [f"{'module.' * 20}{number}.w" for number in range(n // 150)],
        lambda n: [f"{number}.w" for number in range(n // 8)],
    ],
    ids=["wrappers", "parts", "counters", "many wrappers", "many names"],
)
def test_names_of_a_stranger_cost_time_in_proportion_to_their_length(hostile: object) -> None:
    def seconds(n: int) -> float:
        names, known = hostile(n), layout(*(f"k{number}.w" for number in range(10)))  # type: ignore[operator]
        start = time.process_time()
        match_names(names, known)
        nearest_prefix(names, known)
        prefixes_to_choose(names, known)
        return time.process_time() - start

    seconds(1 << 12)  # whatever is made once
    # 16 times the length: linear costs are 16 times as high, quadratic ones 256 times.
    assert min(seconds(1 << 18) for _ in range(3)) < 64 * min(seconds(1 << 14) for _ in range(3)) + 0.05


# --- Through the import


def saved(path: Path, prefix: str, **more: torch.Tensor) -> Path:
    state = {f"{prefix}{name}": tensor for name, tensor in nn.Linear(3, 2).state_dict().items()}
    torch.save(state | more, path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Recorder(nn.Linear(3, 2), tmp_path / "run", fsync=False) as recorder:
        recorder.record(0)
    return tmp_path / "run"


def test_a_prefix_that_is_taken_off_is_said_once(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [saved(tmp_path / f"epoch{epoch}.pt", "model.") for epoch in (1, 2)]
    with caplog.at_level(logging.INFO, "trajkit"):
        import_checkpoints(run, files)
    said = [record.getMessage() for record in caplog.records if "begin with" in record.getMessage()]
    assert said == [
        f"{files[0]}: all names of the checkpoint begin with 'model.', which those of the run lack: it is taken off"
    ]


def test_a_prefix_that_is_put_on_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import_checkpoints(tmp_path / "run", [saved(tmp_path / "epoch0.pt", "net.")])
    with caplog.at_level(logging.INFO, "trajkit"):
        import_checkpoints(tmp_path / "run", [saved(tmp_path / "epoch1.pt", "")])
    assert "all names of the run begin with 'net.', which those of the checkpoint lack: it is put on" in caplog.text
    assert list(open_run(tmp_path / "run").layout.names()) == ["net.weight", "net.bias"]


def test_a_part_of_a_checkpoint_goes_into_the_run_that_has_it_by_shorter_names(run: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "epoch1.pt", "student.", **{"teacher.weight": torch.ones(2, 3)})
    with pytest.raises(LayoutError, match=r"names that begin with 'student.' are the run's; choose .*'student.\*'"):
        import_checkpoints(run, [file])
    import_checkpoints(run, [file], select=Selection(include=("student.*",)))
    assert open_run(run).epochs.tolist() == [0, 1]


@pytest.mark.parametrize("pattern", ["head.*", "model.head.*"])
def test_a_pattern_may_have_the_prefix_or_not(pattern: str, run: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "epoch1.pt", "model.", **{"model.head.weight": torch.ones(2, 3)})
    import_checkpoints(run, [file], select=Selection(exclude=(pattern,)))
    assert open_run(run).epochs.tolist() == [0, 1]


def test_an_averages_counter_that_the_run_has_is_kept(tmp_path: Path) -> None:
    """Of a run that was made of such files before counters were told, or of a model that has one itself."""
    model = nn.Module()
    model.module, model.n_averaged = nn.Linear(2, 2), nn.Parameter(torch.tensor(3), requires_grad=False)
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    torch.save(model.state_dict(), tmp_path / "epoch1.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])
    assert "n_averaged" in open_run(tmp_path / "run").layout


def test_a_weight_called_as_a_counter_is_none(tmp_path: Path) -> None:
    torch.save({"module.w": torch.ones(3), "n_averaged": torch.ones(2)}, tmp_path / "epoch0.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
    assert list(open_run(tmp_path / "run").layout.names()) == ["module.w", "n_averaged"]


def test_extra_state_in_a_file_is_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [saved(tmp_path / f"epoch{epoch}.pt", "", _extra_state=torch.ones(epoch + 1)) for epoch in (0, 1)]
    with caplog.at_level(logging.INFO, "trajkit"):
        import_checkpoints(tmp_path / "run", files)
    assert list(open_run(tmp_path / "run").layout.names()) == ["weight", "bias"]
    assert caplog.text.count("'_extra_state' left out, extra state of modules is not recorded") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, "trajkit"):
        import_checkpoints(tmp_path / "other", files, select=Selection(exclude=("*_extra_state",)))
    assert "left out" not in caplog.text


def test_stubs_in_a_file_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (0, 1):
        torch.save({"fc.weight": torch.empty(0), "fc.bias": torch.ones(4)}, tmp_path / f"epoch{epoch}.pt")
    import_checkpoints(tmp_path / "run", sorted(tmp_path.glob("*.pt")))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "epoch0.pt: 'fc.weight' has shape (0,) and no values, as DeepSpeed's ZeRO-3 leaves" in warning.getMessage()
    assert "zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save" in warning.getMessage()


def test_files_of_stubs_or_integers_alone_are_refused_for_what_they_are(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.empty(0)}, tmp_path / "epoch0.pt")
    with pytest.raises(InputError, match=r"epoch0.pt: .* all of them have shape \(0,\), as DeepSpeed's ZeRO-3"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
    torch.save({"fc.weight": torch.ones(3, dtype=torch.int8)}, tmp_path / "epoch0.pt")
    with pytest.raises(InputError, match=r"'fc.weight' is int8, .* record the model before it is quantised"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
