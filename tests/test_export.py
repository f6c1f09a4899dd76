"""Weights leave a run: recorded, modelled or averaged, in every format, as the training had them."""

from __future__ import annotations

import json
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from conftest import MakeRun, correlated
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from test_recorder import Awkward, assert_same, copied
from torch import Tensor, nn
from trajkit_cli.main import main

from trajkit import Recorder, Run, fit, load_weights, open_run, repair, tensors, write_checkpoint
from trajkit.checkpoints import placing
from trajkit.checkpoints.writing_safetensors import split
from trajkit.errors import InputError, PathExistsError, UnknownNameError
from trajkit.layout import ParameterLayout, TensorEntry
from trajkit.store.archive import Archive

State = dict[str, Tensor]

N_EPOCHS = 6

# Averages of few epochs hold much of the first one, and a warning says so.
of_few_epochs = pytest.mark.filterwarnings("ignore::trajkit.advice.TrajkitWarning")


class Half(Awkward):
    """Awkward tensors, and a tied pair in half precision behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2, bias=False).half()
        self.second = nn.Linear(3, 2, bias=False)
        self.second.weight = self.first.weight


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """A run of every kind of tensor, with a fit, and what the training held at each epoch."""
    torch.manual_seed(0)
    model, states, path = Half(), [], tmp_path_factory.mktemp("export") / "run"
    with Recorder(model, path, fsync=False) as recorder:
        for epoch in range(N_EPOCHS):
            recorder.record(epoch)
            states.append(copied(model))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += torch.randn(parameter.shape).bfloat16().to(parameter.dtype)
                model.norm(torch.randn(8, 4))
                model.mask.logical_not_()  # type: ignore[operator]
    fit(path, modes=3, name="three")
    fit(path, modes=2, epochs=range(3), online=True)
    return path, states


@pytest.fixture
def run(recorded: tuple[Path, list[State]]) -> Run:
    return open_run(recorded[0])


def load_dcp(path: Path, like: State) -> State:
    loaded = {name: torch.full_like(tensor, 1) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.load(loaded, checkpoint_id=path)
    return loaded


def load_folder(path: Path) -> State:
    """As from_pretrained does: one file if there is one, else by the index."""
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(path / file) for file in set(weight_map.values())}
    assert sorted(weight_map) == sorted(name for file in files.values() for name in file)
    return {name: files[file][name] for name, file in weight_map.items()}


WAYS: dict[str, tuple[str, dict[str, Any], Callable[[Path, State], State]]] = {
    "a safetensors file": ("a.safetensors", {}, lambda path, _: load_file(path)),
    "a folder": ("folder", {"format": "safetensors"}, lambda path, _: load_folder(path)),
    "a sharded folder": (
        "shards",
        {"format": "safetensors", "max_shard_size": 60},
        lambda path, _: load_folder(path),
    ),
    "a pt file": ("a.pt", {}, lambda path, _: torch.load(path, weights_only=True)),
    "a pt file of another name": (
        "pytorch_model.bin",
        {"format": "pt"},
        lambda path, _: torch.load(path, weights_only=True),
    ),
    "a dcp folder": ("dcp", {"format": "dcp"}, load_dcp),
}


@of_few_epochs
@pytest.mark.parametrize(
    "source", [{}, {"fit": "three"}, {"fit": "online2"}, {"average": "last:3"}, {"ema": 0.5}], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_exported_is_loaded_bit_for_bit(
    way: str, source: dict[str, Any], recorded: tuple[Path, list[State]], tmp_path: Path
) -> None:
    (path, states), (name, options, load) = recorded, WAYS[way]
    expected = load_weights(path, 4, **source)
    if not source:
        assert_same({name: expected[name] for name in states[4]}, states[4])
    written = write_checkpoint(path, 4, tmp_path / name, **source, **options)
    assert written == tmp_path / name
    loaded = load(written, expected)
    assert_same({name: loaded[name] for name in expected}, expected)
    assert len(loaded) == len(expected)
    Half().load_state_dict(loaded, strict=True)
    if name.endswith((".pt", ".bin")):
        assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    assert [file for file in os.listdir(tmp_path) if file != name] == []


def test_shards_hold_what_fits_and_the_index_names_them(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(run, 4, tmp_path / "out", format="safetensors", max_shard_size="60B")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert sorted(os.listdir(folder)) == sorted([*files, "model.safetensors.index.json"])
    total = 0
    for file in files:
        loaded = load_file(folder / file)
        n_bytes = sum(tensor.numel() * tensor.itemsize for tensor in loaded.values())
        assert n_bytes <= 60 or len({name.partition(".")[0] for name in loaded}) <= 2  # one tensor, or a tied pair
        total += n_bytes
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "epoch": "4"}
    assert index["metadata"] == {"total_size": total}
    assert index["weight_map"]["head.weight"] == index["weight_map"]["embed.weight"]


def test_tensors_are_split_in_their_order() -> None:
    sizes = [3, 3, 10, 0, 1, 4, 5]
    layout = ParameterLayout.of(TensorEntry(f"w{i}", (size,), "float32", "weight") for i, size in enumerate(sizes))
    assert [[e.size for e in group] for group in split(layout.tensors, 24)] == [[3, 3], [10], [0, 1, 4], [5]]
    assert len(split(layout.tensors, 10**9)) == 1


@pytest.mark.parametrize("options", [{}, {"format": "safetensors", "max_shard_size": 200}], ids=["file", "shards"])
@pytest.mark.parametrize("average", [None, "last:4"])
def test_every_slab_is_read_once(
    average: str | None, options: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of dtypes in the file, and however many names a tensor has."""
    reads: list[tuple[int, int]] = []
    read = Archive.read

    def counted(self: Archive, path: str, rows: Any, columns: tuple[int, int], out: Any = None) -> NDArray[Any]:
        if path == "weights":
            reads.extend((int(row), columns[0]) for row in rows)
        return read(self, path, rows, columns, out)

    monkeypatch.setattr(Archive, "read", counted)
    monkeypatch.setattr(tensors, "SLAB", 16)
    write_checkpoint(run, 4, tmp_path / ("out" if options else "out.safetensors"), average=average, **options)
    n_slabs = -(-run.layout.n_weights // 16)
    assert n_slabs > 4
    assert len(reads) == len(set(reads)) == n_slabs * (4 if average else 1)


@of_few_epochs
def test_buffers_are_those_of_the_last_averaged_epoch(recorded: tuple[Path, list[State]]) -> None:
    path, states = recorded
    for epoch, averaged in ((4, {"average": "last:2"}), (4, {"ema": 0.9}), (None, {"average": [0, 4]})):
        state = load_weights(path, epoch, **averaged)  # type: ignore[arg-type]
        for name, _ in Half().named_buffers():
            if name in states[4]:
                assert torch.equal(state[name], states[4][name]), name
        assert torch.equal(state["index"], states[4]["index"])


# --- from_pretrained


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained_loads_what_the_training_had(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with Recorder(model, tmp_path / "run", fsync=False) as recorder:
        recorder.record(0)
    for size in ("1KB", "1GB"):
        folder = write_checkpoint(tmp_path / "run", 0, tmp_path / size, format="safetensors", max_shard_size=size)
        assert (folder / "model.safetensors").exists() == (size == "1GB")
        model.config.save_pretrained(folder)
        loaded, told = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not any(told.values())
        assert_same(copied(loaded), copied(model))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


# --- Whole or not at all


def readable(folder: Path) -> State | None:
    try:
        return load_folder(folder)
    except (OSError, KeyError):
        return None


@pytest.fixture
def every_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """Calls what is in the list before and after each name is given or taken away: what a kill would leave."""
    looks: list[Callable[[], None]] = []

    def watched(do: Callable[..., None]) -> Callable[..., None]:
        def watching(*arguments: Any, **options: Any) -> None:
            for look in looks:
                look()
            do(*arguments, **options)
            for look in looks:
                look()

        return watching

    for name in ("replace", "unlink", "rename", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return looks


@pytest.mark.parametrize(
    ("before", "after"), [(60, 60), (60, 100), (None, 60), (60, None), (None, None)], ids=lambda size: str(size)
)
def test_a_kill_leaves_the_old_folder_the_new_one_or_none(
    before: int | None, after: int | None, run: Run, tmp_path: Path, every_state: list[Callable[[], None]]
) -> None:
    folder, states = tmp_path / "out", []
    write_checkpoint(run, 0, folder, format="safetensors", max_shard_size=before)
    (folder / "config.json").write_text("{}")
    old, new = load_weights(run, 0), load_weights(run, 1)

    def look() -> None:
        found = readable(folder)
        states.append("none" if found is None else "old" if same(found, old) else "new" if same(found, new) else "?")

    every_state.append(look)
    write_checkpoint(run, 1, folder, format="safetensors", max_shard_size=after, overwrite=True)
    order = list(dict.fromkeys(states))
    assert order == (["old", "none", "new"] if before == after == 60 else ["old", "new"])
    assert (folder / "config.json").read_text() == "{}"
    expected = write_checkpoint(run, 1, tmp_path / "again", format="safetensors", max_shard_size=after)
    assert sorted(os.listdir(folder)) == ["config.json", *sorted(os.listdir(expected))]


def test_a_kill_leaves_the_old_dcp_folder_the_new_one_or_none(
    run: Run, tmp_path: Path, every_state: list[Callable[[], None]]
) -> None:
    folder, states = tmp_path / "dcp", []
    write_checkpoint(run, 0, folder, format="dcp")
    old, new = load_weights(run, 0), load_weights(run, 1)

    def look() -> None:
        found = load_dcp(folder, old) if folder.exists() else None
        states.append("none" if found is None else "old" if same(found, old) else "new" if same(found, new) else "?")

    every_state.append(look)
    write_checkpoint(run, 1, folder, format="dcp", overwrite=True)
    assert list(dict.fromkeys(states)) == ["old", "none", "new"]
    assert os.listdir(tmp_path) == ["dcp"]


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_that_could_not_take_its_place_leaves_the_old_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(run, 0, tmp_path / "dcp", format="dcp")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(placing.os, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 1, folder, format="dcp", overwrite=True)
    assert same(load_dcp(folder, load_weights(run, 0)), load_weights(run, 0))
    assert os.listdir(tmp_path) == ["dcp"]


def test_what_was_whole_is_not_deleted_once_the_old_index_is_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"format": "safetensors", "max_shard_size": 60}
    expected = {file.read_bytes() for file in write_checkpoint(run, 1, tmp_path / "new", **options).iterdir()}
    folder, replace = write_checkpoint(run, 0, tmp_path / "out", **options), os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name.startswith("model-00002"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(placing.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 1, folder, overwrite=True, **options)
    assert readable(folder) is None
    assert expected <= {file.read_bytes() for file in folder.iterdir()}


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    """What a full disk does, at the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "a pt file of another name"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(way: str, make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(correlated(2, 200_000), sizes=(10, 150_000, 49_990)).path
    name, options, load = WAYS[way]
    out = tmp_path / "out" / name
    out.parent.mkdir()
    write_checkpoint(path, 0, out, **options)
    before, old = sorted(os.listdir(out.parent)), load_weights(path, 0)
    chosen = ["--format", options.get("format") or out.suffix[1:], "--epoch", "1"]
    for arguments in (["-o", str(out), "--force"], ["-o", str(out.with_name(f"new{out.suffix}"))]):
        with no_file_above(400_000):
            done = CliRunner().invoke(main, ["export", str(path), *chosen, *arguments])
        assert (done.exit_code, done.output) == (1, "Error: File too large; nothing recorded is lost\n")
        assert sorted(os.listdir(out.parent)) == before
        assert same(load(out, old), old)


# --- What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 77}, r"no epoch 77; the run has 6, nearest: 4, 5"),
        ({"average": "last:0"}, r"average is 'last:0', expected last:N of at least one epoch, or a list of epochs"),
        ({"average": "last:7"}, r"the last 7 epochs are to be averaged, there are 6; ask for no more than there are"),
        ({"average": "last:4", "epoch": 2}, r"the last 4 epochs are to be averaged, there are 3; ask"),
        ({"average": "first:3"}, r"average is 'first:3', expected last:N"),
        ({"average": []}, r"epochs are to be averaged, there are 0; ask"),
        ({"average": [1, 9]}, r"no epoch 9"),
        ({"average": [1, 1]}, r"epoch 1 is named twice"),
        ({"average": [1, 5], "epoch": 3}, r"epoch 5 is to be averaged, expected epochs up to 3; leave it out"),
        ({"average": 3}, r"epochs is 3, expected several integers; pass a list or a range"),
        ({"ema": 1}, r"ema is 1, expected a decay from 0 up to, not including, 1; it is per recorded epoch: take 0.9"),
        ({"ema": True}, r"ema is True, expected a decay"),
        ({"ema_half_life": 0}, r"ema_half_life is 0, expected a number of recorded epochs above 0; take 5"),
        ({"ema_half_life": 5, "ema": 0.9}, r"ema and ema_half_life exclude each other"),
        ({"epoch": "3"}, r"epoch is '3', expected an integer"),
        ({"average": b"last:2"}, r"epochs is b'last:2', expected several integers"),
        ({"average": np.ones((2, 2), int)}, r"epoch is array\(\[1, 1\]\), expected an integer"),
        ({"ema": -0.1}, r"ema is -0.1, expected a decay"),
        ({"ema": float("nan")}, r"ema is nan, expected a decay"),
        ({"ema": "0.9"}, r"ema is '0.9', expected a decay"),
        ({"fit": "three", "average": "last:2"}, r"fit and average exclude each other, expected one of them at most"),
        ({"average": "last:2", "ema": 0.9}, r"average and ema exclude each other"),
        ({"fit": "four"}, r"no fit 'four'"),
        ({"path": "s3://bucket/a.pt"}, r"s3://bucket/a.pt: a URL, checkpoints are written to a disk; name a path here"),
        (
            {"path": "a.bin"},
            r"a.bin: expected a name that ends in .safetensors or .pt; choose one of these, or name th",
        ),
        ({"path": "a.pt", "format": "safetensors"}, r"a.pt: a name of pt files, expected one for safetensors"),
        ({"path": "a.safetensors", "format": "dcp"}, r"a.safetensors: a name of safetensors files, expected one for d"),
        ({"path": "a", "format": "zip"}, r"format is 'zip', expected safetensors, pt, dcp; choose one of these"),
        ({"path": "none/a.pt"}, r"none/a.pt: cannot be written \(No such file or directory\); choose another place"),
        ({"path": "none/a", "format": "safetensors"}, r"none/a: cannot be written \(No such file or directory\)"),
        ({"path": "none/a", "format": "dcp"}, r"none/a: cannot be written \(No such file or directory\)"),
        (
            {"path": "a.safetensors", "max_shard_size": 60},
            r"the tensors have \d+ bytes, a file is to have 60 at most .*",
        ),
        (
            {"path": "a.pt", "max_shard_size": "5GB"},
            r"a pt checkpoint is not split, found max_shard_size; leave it out",
        ),
        ({"format": "safetensors", "max_shard_size": "5 houses"}, r"max_shard_size is '5 houses', expected bytes or"),
        ({"format": "safetensors", "max_shard_size": 0}, r"max_shard_size is 0, expected bytes or a size such as 5GB"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_and_nothing_is_written(
    options: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    name = options.get("path", "out" if "format" in options else "out.pt")
    place = name if "://" in name else tmp_path / name
    rest = {key: value for key, value in options.items() if key not in ("path", "epoch")}
    with pytest.raises((InputError, UnknownNameError), match=message) as told:
        write_checkpoint(run, options.get("epoch"), place, **rest)
    assert "\n" not in str(told.value)
    assert os.listdir(tmp_path) == []


def test_what_is_in_the_way_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    for kind in ("safetensors", "dcp"):
        with pytest.raises(PathExistsError, match=r"file: a file, expected a folder to write; choose another name"):
            write_checkpoint(run, 0, tmp_path / "file", format=kind, overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"folder: a folder, expected a file to write"):
        write_checkpoint(run, 0, tmp_path / "folder", format="pt", overwrite=True)
    with pytest.raises(PathExistsError, match=r"folder: holds notes.txt already; choose another folder$"):
        write_checkpoint(run, 0, tmp_path / "folder", format="dcp", overwrite=True)
    write_checkpoint(run, 0, tmp_path / "folder", format="safetensors")
    with pytest.raises(PathExistsError, match=r"model.safetensors: exists already; choose another folder or overwrite"):
        write_checkpoint(run, 1, tmp_path / "folder", format="safetensors", max_shard_size=60)
    write_checkpoint(run, 0, tmp_path / "dcp", format="dcp")
    with pytest.raises(PathExistsError, match=r"dcp: holds .metadata already; .* overwrite it \(--force\)"):
        write_checkpoint(run, 1, tmp_path / "dcp", format="dcp")
    assert same(load_folder(tmp_path / "folder"), load_weights(run, 0))
    assert (tmp_path / "folder/notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


# --- The command


def export(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_the_command_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(run.path, "--epoch", 3, "-o", f"{out}.pt").stdout.startswith(f"{out}.pt: epoch 3 recorded, ")
    assert (
        "out.pt: epoch 5 modelled by 'three', "
        in export(run.path, "--fit", "three", "--force", "-o", f"{out}.pt").stdout
    )
    said = export(run.path, "--average", "1:4", "--format", "safetensors", "--max-shard-size", "60B", "-o", out)
    assert said.stdout.startswith(f"{out}: average of 3 epochs, 1 to 3, ")
    assert said.stderr == (
        "Warning: the statistics of BatchNorm are those of epoch 3, not of the averaged weights; estimate them again,"
        " with torch.optim.swa_utils.update_bn\n"
    )
    assert same(load_folder(out), load_weights(run, average=[1, 2, 3]))
    told = json.loads(
        export(run.path, "--ema", 0.5, "--epoch", 2, "--format", "dcp", "-o", tmp_path / "d", "--json").stdout
    )
    assert told.pop("bytes") > 1000
    assert told == {
        "run": str(run.path),
        "epoch": 2,
        "fit": None,
        "ema": 0.5,
        "averaged": [0, 1, 2],
        "left_out": [],
        "output": str(tmp_path / "d"),
    }


def test_the_command_says_which_epochs_it_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(correlated(6, 10)).path
    for row in (3, 5):
        (path / f"weights/c/{row}/0").write_bytes(b"damaged")
    repair(path)
    said = export(path, "--average", "last:2", "-o", tmp_path / "a.pt")
    assert said.stdout.endswith("a.pt: average of 2 epochs, 2 to 4, 1.5 KiB\n")
    assert said.stderr == "Warning: epoch 3, 5 is marked as bad and left out\n"
    assert "epoch 4 recorded" in export(path, "-o", tmp_path / "b.pt").stdout


def test_sources_that_exclude_each_other_are_a_usage_error(run: Run, tmp_path: Path) -> None:
    arguments = ["export", str(run.path), "--fit", "three", "--average", "last:2", "-o", str(tmp_path / "a.pt")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--fit, --average and --ema exclude each other; give one" in result.output
    arguments = ["export", str(run.path), "--ema", "0.9", "--ema-half-life", "5", "-o", str(tmp_path / "a.pt")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--ema and --ema-half-life exclude each other; give one" in result.output


def test_an_average_that_is_mostly_its_first_epoch_is_told_once(run: Run, tmp_path: Path) -> None:
    said = export(run.path, "--ema", 0.999, "-o", tmp_path / "a.pt")
    first, rest = said.stderr.splitlines()
    assert first == (
        f"Warning: {run.path}: EMA 0.999 of 6 epochs, 0 to 5: 99.5 % of it is the first epoch, as the decay is per"
        " recorded epoch; a half-life of 1.1 or less (ema_half_life=, --ema-half-life) leaves at most 5 %"
    )
    assert rest.startswith("Warning: the statistics of BatchNorm")
    told = json.loads(export(run.path, "--ema-half-life", 1, "-o", tmp_path / "b.pt", "--json").stdout)
    assert (told["ema"], told["ema_half_life"]) == (0.5, 1)
    assert same(torch.load(tmp_path / "b.pt", weights_only=True), load_weights(run, ema=0.5))
