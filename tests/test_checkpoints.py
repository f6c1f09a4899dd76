from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from test_recorder import Awkward, assert_same, copied
from torch import nn

from trajkit import Recorder, Run, fit, import_checkpoints, load_weights, open_run, tensors, write_checkpoint
from trajkit.checkpoints import placing
from trajkit.errors import InputError, LayoutError, PathExistsError, TrajkitError, UnknownNameError

# --- Writing


@pytest.fixture
def awkward_run(tmp_path: Path) -> Run:
    torch.manual_seed(0)
    model = Awkward()
    with Recorder(model, tmp_path / "awkward", fsync=False) as recorder:
        for epoch in range(6):
            recorder.record(epoch)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += torch.randn(parameter.shape).bfloat16().to(parameter.dtype)
    return open_run(tmp_path / "awkward")


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_file_holds_what_load_weights_gives(
    suffix: str, fitted: bool, awkward_run: Run, tmp_path: Path
) -> None:
    name = fit(awkward_run, modes=3).name if fitted else None
    path = write_checkpoint(awkward_run, 4, tmp_path / f"out{suffix}", fit=name)
    loaded = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    expected = load_weights(awkward_run, 4, name)
    assert_same({key: loaded[key] for key in expected}, expected)
    Awkward().load_state_dict(loaded)
    if suffix == ".pt":
        assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


def test_recorded_weights_come_back_bit_for_bit(awkward_run: Run, tmp_path: Path) -> None:
    """Written, and brought back into the same run."""
    write_checkpoint(awkward_run, 3, tmp_path / "epoch9.safetensors")
    with pytest.raises(InputError, match=r"is epoch 9 by its name, the file says epoch 3; say which with --label"):
        import_checkpoints(awkward_run.path, [tmp_path / "epoch9.safetensors"])
    import_checkpoints(awkward_run.path, [tmp_path / "epoch9.safetensors"], epochs=[9])
    run = open_run(awkward_run.path)
    assert_same(run.state_dict(9), run.state_dict(3))


def test_the_safetensors_file_is_aligned_and_tells_its_origin(awkward_run: Run, tmp_path: Path) -> None:
    name = fit(awkward_run, modes=2).name
    path = write_checkpoint(awkward_run, 4, tmp_path / "out.safetensors", fit=name)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "4", "fit": name}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0


def test_tensors_are_streamed_slab_by_slab(digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fit(digits_run).name
    whole = write_checkpoint(digits_run, 30, tmp_path / "whole.safetensors", fit=name).read_bytes()
    monkeypatch.setattr(tensors, "SLAB", 100)
    assert write_checkpoint(digits_run, 30, tmp_path / "slabs.safetensors", fit=name).read_bytes() == whole


def test_a_file_appears_whole_or_not_at_all(digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.safetensors").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(placing.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for name, overwrite in (("new.safetensors", False), ("old.safetensors", True)):
            with pytest.raises(OSError, match="No space left"):
                write_checkpoint(digits_run, 3, tmp_path / name, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["digits", "old.safetensors"]
    assert (tmp_path / "old.safetensors").read_bytes() == b"old"


def test_writing_where_it_cannot_be_is_told(digits_run: Run, tmp_path: Path) -> None:
    path = write_checkpoint(digits_run, 3, tmp_path / "a.pt")
    with pytest.raises(PathExistsError, match=r"a.pt: exists already; choose another name or overwrite"):
        write_checkpoint(digits_run, 3, path)
    write_checkpoint(digits_run, 4, path, overwrite=True)
    with pytest.raises(InputError, match=r"a.bin: expected a name that ends in .safetensors or .pt"):
        write_checkpoint(digits_run, 3, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"cannot be written .No such file or directory.; choose another place"):
        write_checkpoint(digits_run, 3, tmp_path / "none" / "a.pt")
    with pytest.raises(UnknownNameError, match="no epoch 77"):
        write_checkpoint(digits_run, 77, tmp_path / "b.pt")
    with pytest.raises(UnknownNameError, match="no fit 'none'"):
        write_checkpoint(digits_run, 3, tmp_path / "b.pt", fit="none")
    assert not (tmp_path / "b.pt").exists()


def test_a_written_file_has_the_usual_permissions(digits_run: Run, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    path = write_checkpoint(digits_run, 3, tmp_path / "a.safetensors")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- Reading


def model_at(step: int) -> nn.Module:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 4))
    return model


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: torch.save(state, path),
        lambda state, path: torch.save({"epoch": int(path.stem[5:]), "state_dict": state, "loss": 0.5}, path),
        lambda state, path: torch.save({"model": {"state_dict": state}}, path),
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        save_file,
    ],
    ids=["pt", "nested", "nested twice", "legacy", "safetensors"],
)
def test_checkpoints_are_told_by_their_content(save: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"epoch{epoch}.anything" for epoch in range(3)]
    for epoch, path in enumerate(paths):
        save(model_at(epoch).state_dict(), path)
    imported = import_checkpoints(tmp_path / "run", paths)
    assert [(item.epoch, item.new) for item in imported] == [(0, True), (1, True), (2, True)]
    run = open_run(tmp_path / "run")
    for epoch in range(3):
        expected = copied(model_at(epoch))
        state = run.state_dict(epoch)
        assert_same({name: state[name] for name in expected}, expected)
    buffers = {entry.name for entry in run.layout.buffers}
    assert buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_importing_again_brings_in_what_is_new(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt-{step}.pt" for step in (9, 10, 100)]
    for path in paths:
        torch.save(model_at(1).state_dict(), path)
    assert [item.epoch for item in import_checkpoints(tmp_path / "run", paths[1::-1])] == [9, 10]
    again = import_checkpoints(tmp_path / "run", paths)
    assert [(item.epoch, item.new) for item in again] == [(9, False), (10, False), (100, True)]


def test_a_run_of_a_recorder_takes_files_of_the_same_model(tmp_path: Path) -> None:
    model = model_at(0)
    model.register_buffer("positions", torch.randn(5))  # floating, and in a file not to be told from a weight
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    torch.save(model.state_dict(), tmp_path / "epoch1.pt")
    save_file(model.state_dict(), tmp_path / "epoch2.safetensors")  # in another order
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt", tmp_path / "epoch2.safetensors"])
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1, 2]


def test_tied_weights_in_a_pt_file_stand_once(tmp_path: Path) -> None:
    model = Awkward()
    del model.double_buffer  # of random values: in a file it cannot be told from a weight
    torch.save(model.state_dict(), tmp_path / "epoch0.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
    assert open_run(tmp_path / "run").layout["head.weight"].name == "embed.weight"


def test_tied_weights_in_safetensors_are_one_or_copies(tmp_path: Path) -> None:
    model = Awkward()
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.record(0)
    write_checkpoint(tmp_path / "run", 0, tmp_path / "epoch1.safetensors")
    save_model(model, str(tmp_path / "epoch2.safetensors"))
    files = [tmp_path / "epoch1.safetensors", tmp_path / "epoch2.safetensors"]  # the first says that it is epoch 0
    import_checkpoints(tmp_path / "run", files, label=r"epoch(\d)")
    run = open_run(tmp_path / "run")
    for epoch in (1, 2):
        assert_same(run.state_dict(epoch), run.state_dict(0))
    untied = load_file(tmp_path / "epoch1.safetensors")
    untied["head.weight"] += 1
    save_file(untied, tmp_path / "epoch3.safetensors")
    with pytest.raises(LayoutError, match=r"embed.weight and head.weight differ, the run has them tied"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch3.safetensors"])


def test_files_without_numbers_say_their_epoch_or_are_numbered_on_request(tmp_path: Path) -> None:
    names = ["last.pt", "net9.pt", "net10.pt", "².pt"]
    for name in names:
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / name)
    files = [tmp_path / name for name in names]
    with pytest.raises(InputError, match=r"last.pt: expected the epoch's number in the name, or in the file .*-epoch"):
        import_checkpoints(tmp_path / "run", files[:1])
    with pytest.raises(InputError, match=r"².pt: expected the epoch's number in the name"):
        import_checkpoints(tmp_path / "run", files[3:])
    (tmp_path / "b").mkdir()
    shutil.copy(files[1], tmp_path / "b")
    with pytest.raises(InputError, match=r"b/net9.pt: is epoch 9, and so is .*/net9.pt; say which .* --first-epoch"):
        import_checkpoints(tmp_path / "run", [files[1], tmp_path / "b/net9.pt"])
    numbered = import_checkpoints(tmp_path / "run", files[2::-1], first_epoch=5)
    assert {item.epoch: item.path.name for item in numbered} == {5: "last.pt", 6: "net9.pt", 7: "net10.pt"}
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "epoch": 8, "global_step": 800}, tmp_path / "last.pt")
    torch.save({"model": nn.Linear(2, 2).state_dict(), "global_step": 900}, tmp_path / "later.pt")
    found = import_checkpoints(tmp_path / "run", [tmp_path / "last.pt"])
    found += import_checkpoints(tmp_path / "run", [tmp_path / "later.pt"])
    assert [(item.epoch, item.path.name) for item in found] == [(8, "last.pt"), (900, "later.pt")]
    found = import_checkpoints(tmp_path / "by-step", [tmp_path / "later.pt", tmp_path / "last.pt"])
    assert [(item.epoch, item.path.name) for item in found] == [(800, "last.pt"), (900, "later.pt")]
    shutil.copy(tmp_path / "last.pt", tmp_path / "epoch8.pt")
    found = import_checkpoints(tmp_path / "run2", [tmp_path / "last.pt", tmp_path / "epoch8.pt"])
    assert [(item.epoch, item.path.name) for item in found] == [(8, "epoch8.pt")]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_no_checkpoint_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for number, save in enumerate([torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]):
        path = tmp_path / f"epoch{number}.pt"
        save({"weight": torch.zeros(2), "evil": Evil(marker)}, path)
        with pytest.raises(
            InputError, match=rf"epoch{number}.pt: holds more than tensors, and loading it could run code"
        ):
            import_checkpoints(tmp_path / f"run{number}", [path])
    assert not marker.exists()


def test_a_safetensors_file_that_begins_like_a_pickle(tmp_path: Path) -> None:
    """The first byte is the low byte of the header's length: 0x80 in one file of 32."""
    for length in range(200):
        save_file({"w" + "x" * length: torch.randn(4)}, tmp_path / "epoch1.st")
        if (tmp_path / "epoch1.st").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of such a length")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.st"])
    assert open_run(tmp_path / "run").layout.n_weights == 4


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**13)}, tmp_path / "epoch1.pt")
    with pytest.raises(InputError, match=r"epoch1.pt: 'weight' has shape \(10000000000000,\), the file holds 4 bytes"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "epoch1.pt")
    with pytest.raises(InputError, match=r"epoch1.pt: expected a state dict"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])


def test_tied_weights_with_nan_are_still_tied(tmp_path: Path) -> None:
    model = Awkward()
    with torch.no_grad():
        model.embed.weight[0, 0] = torch.nan
    with Recorder(model, tmp_path / "run", nonfinite="record") as recorder:
        recorder.record(0)
    write_checkpoint(tmp_path / "run", 0, tmp_path / "epoch1.safetensors")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.safetensors"], nonfinite="record", epochs=[1])
    assert open_run(tmp_path / "run").epochs.tolist() == [0, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, I am text",
        b"PK\x03\x04 no zip",
        b"\x80\x02 no pickle",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        b"\x02\0\0\0\0\0\0\0{}garbage",
        b'\x10\0\0\0\0\0\0\0{"a":{"dtype":}}',
    ],
)
def test_a_wrong_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "epoch1.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"epoch1.pt"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])


def test_files_that_hold_no_model_are_told(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "scores": [1, 2]}, tmp_path / "epoch1.pt")
    torch.save(torch.zeros(3), tmp_path / "epoch2.pt")
    for name, found in (("epoch1.pt", "a dict with epoch, scores"), ("epoch2.pt", "Tensor")):
        with pytest.raises(InputError, match=rf"{name}: expected a state dict of named tensors, .* found {found}"):
            import_checkpoints(tmp_path / "run", [tmp_path / name])
    with pytest.raises(InputError, match=r"epoch7.pt: no such file"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch7.pt"])
    (tmp_path / "epoch7.pt").mkdir()
    with pytest.raises(InputError, match=r"epoch7.pt: a folder without a checkpoint, expected model.safetensors"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch7.pt"])


def test_a_file_that_does_not_fit_names_itself_and_keeps_the_ones_before(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "epoch0.pt")
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "epoch1.pt")
    broken = nn.Linear(2, 2).state_dict()
    broken["weight"][0, 0] = np.nan
    torch.save(broken, tmp_path / "epoch2.pt")
    with pytest.raises(LayoutError, match=r"epoch1.pt: .*epoch 1: 'weight' has shape \(3, 2\), the run has \(2, 2\)"):
        import_checkpoints(tmp_path / "run", sorted(tmp_path.glob("*.pt")))
    with pytest.raises(InputError, match=r"epoch2.pt: .*'weight' has nan"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch2.pt"])
    assert open_run(tmp_path / "run").epochs.tolist() == [0]


def test_an_earlier_epoch_cannot_be_brought_in_later(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "epoch5.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "epoch3.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch5.pt"])
    with pytest.raises(TrajkitError, match="epoch 3 comes before the last one, 5"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch3.pt"])
