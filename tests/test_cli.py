from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from interruptible import interruptible
from safetensors.torch import load_file
from test_quality import rewritten
from torch import nn
from trajkit_cli.main import main
from trajkit_cli.options import EpochRange
from trajkit_cli.output import number, size

from trajkit import fit, load_weights, open_run

TRAJKIT = Path(sys.executable).parent / "trajkit"


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def invoke_json(*arguments: object) -> Any:
    quiet = ["-q"] if arguments[0] in ("fit", "evaluate", "demo") else []
    return json.loads(invoke(*arguments, "--json", *quiet).stdout)


def test_the_whole_path(tmp_path: Path) -> None:
    for epoch in range(12):
        torch.manual_seed(epoch)
        torch.save(nn.Linear(6, 3).state_dict(), tmp_path / f"epoch{epoch}.pt")
    files = sorted(tmp_path.glob("epoch*.pt"))
    run = tmp_path / "run"
    assert "12 epochs recorded" in invoke("record", run, *files).stdout
    assert "0 epochs recorded, 12 were there already" in invoke("record", run, *files).stdout
    fitted = invoke("fit", run, "--modes", 3, "--name", "three")
    assert "fit 'three': 3 modes, 12 epochs" in fitted.stdout
    assert "fitting weights: 21 of 21" in fitted.stderr
    out = tmp_path / "out.safetensors"
    assert (
        "epoch 11 modelled by 'three'" in invoke("reconstruct", run, "--fit", "three", "--epoch", 11, "-o", out).stdout
    )
    expected = load_weights(run, 11, "three")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    table = invoke("evaluate", run, "--fit", "three", "--with", "test_cli:bias_sum", "--epochs", "0,10:12").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["epoch", "0", "10", "11"]
    shown = invoke("info", run).stdout
    for words in ("12 epochs (0 to 11) of 21 weights", "fit three", "variance explained", "test_cli:bias_sum"):
        assert words in shown


def test_online_cmd_is_replayed_and_evaluated_like_a_fit(digits_path: Path) -> None:
    shown = invoke("online", digits_path, "--warmup", 10, "--modes", 4, "-q").stdout
    assert "fit 'online4': 4 modes, 10 epochs" in shown
    assert f"epochs 10 to 39 follow: trajkit evaluate {digits_path} --fit online4 --with …" in shown
    evaluate = ("evaluate", digits_path, "--fit", "online4", "--with", "trajkit.demo:test_accuracy", "--epochs", "5,30")
    early, late = invoke_json(*evaluate)["epochs"]
    assert early["modelled"] == early["recorded"]
    assert late["modelled"] != late["recorded"]
    assert late["modelled"]["test_accuracy"] > 0.9
    exported = digits_path.parent / "cmd.safetensors"
    invoke("export", digits_path, "--fit", "online4", "--epoch", 30, "-o", exported)
    modelled = open_run(digits_path).fit("online4").state_dict(30)
    assert all(torch.equal(tensor, modelled[name]) for name, tensor in load_file(exported).items())
    assert invoke_json("online", digits_path, "--reassign", "3", "-q")["settings"]["reassign"] == 3


def bias_sum(state_dict: dict[str, Any]) -> dict[str, float]:
    return {"sum": state_dict["bias"].sum()}


def test_json_is_for_machines(digits_path: Path) -> None:
    fitted = invoke_json("fit", digits_path, "--modes", 4, "--samples", 200, "--seed", 3, "--epochs", "0:40:2")
    assert fitted["fit"] == "modes4"
    assert fitted["settings"] == {"modes": 4, "samples": 200, "sampling": "balanced", "seed": 3}
    assert fitted["epochs"] == list(range(0, 40, 2))
    assert sum(fitted["mode_sizes"]) == fitted["weights"] == 3682
    assert 0 < fitted["variance_explained"] < 1
    described = invoke_json("info", digits_path)
    assert described["epochs"] == list(range(40))
    assert described["metrics"]["39"]["test_accuracy"] == pytest.approx(0.9777778)
    assert described["fits"]["modes4"]["variance_explained"] == fitted["variance_explained"]
    assert described["fits"]["modes4"]["variance_explained_by_tensor"].keys() == {
        entry.name for entry in open_run(digits_path).layout.weights
    }
    evaluated = invoke_json("evaluate", digits_path, "--with", "test_cli:nan_score", "--epochs", "3")
    assert evaluated["epochs"] == [{"epoch": 3, "recorded": {"score": "NaN"}, "modelled": None}]
    written = invoke_json("reconstruct", digits_path, "--epoch", 3, "-o", digits_path.parent / "a.pt")
    assert written["bytes"] == (digits_path.parent / "a.pt").stat().st_size


def failing(_state_dict: dict[str, Any]) -> float:
    raise RuntimeError("my mistake")


def nan_score(_state_dict: dict[str, Any]) -> float:
    return float("nan")


def test_fits_by_distance_and_with_fewer_modes(digits_path: Path) -> None:
    assert "fit 'cut2'" in invoke("fit", digits_path, "--cut", 2).stdout
    refused = invoke("fit", digits_path, "--cut", 2, "--modes", 3, code=2)
    assert "--modes and --cut exclude each other; give one" in refused.stderr


def test_modes_chosen_by_held_out_weights_are_shown_with_their_curve(digits_path: Path) -> None:
    shown = invoke("fit", digits_path, "--modes", "auto", "--references", "principal", "-q").stdout
    fitted = open_run(digits_path).fit("principal-auto")
    *_, summary, against, last, curve = shown.splitlines()
    assert f"fit 'principal-auto': {fitted.n_modes} modes, 40 epochs, " in summary
    assert f"{fitted.quality.variance_explained:.4g} of the variance explained" in summary
    one, two = fitted.pca
    assert against == f"PCA of equal storage (1 component) explains {one:.4g}, with a component more {two:.4g}"
    assert f"last-epoch error / motion {fitted.quality.last_epoch_error:.4g}; takes" in last
    assert f"{fitted.n_modes}: {dict(fitted.curve)[fitted.n_modes]:.4g} (chosen)" in curve
    assert curve.removesuffix(" (chosen)").endswith(f"30: {fitted.curve[-1][1]:.4g}")
    named = invoke_json("fit", digits_path, "--modes", "90%", "-q")
    assert named["fit"] == "explained90"
    assert named["curve"][-1]["variance_explained"] >= 0.9
    assert named["variance_explained_by_pca"] == {"of_equal_storage": one, "of_one_component_more": two}
    assert named["pca_components"] == 1
    assert len(named["last_epoch_error_by_mode"]) == named["modes"]
    described = invoke_json("info", digits_path)["fits"]["explained90"]
    for key in ("last_epoch_error", "last_epoch_error_by_tensor", "storage_ratio", "variance_explained_by_pca"):
        assert described[key] == named[key]
    table = invoke("info", digits_path).stdout
    for words in ("last-epoch error / motion", "explained by PCA of equal storage", f"{one:.4g} (1 component)"):
        assert words in table
    assert "fit 'online-auto'" in invoke("online", digits_path, "--modes", "auto", "-q").stdout


def test_fewer_modes_than_asked_for_are_told(tmp_path: Path) -> None:
    for epoch in range(4):
        torch.save({"weight": torch.full((5,), float(epoch))}, tmp_path / f"epoch{epoch}.pt")
    invoke("record", tmp_path / "run", *sorted(tmp_path.glob("*.pt")))
    modes = invoke_json("fit", tmp_path / "run", "--modes", 9)["modes"]
    assert modes < 9
    shown = invoke("fit", tmp_path / "run", "--modes", 9).stdout
    assert f"{modes} modes (9 asked for, the sample has no more clusters)" in shown
    for words in (("fit",), ("fit", "--follow"), ("online", "--warmup", 3)):
        by_default = invoke(words[0], tmp_path / "run", *words[1:]).stdout
        assert f"{modes} modes (10 asked for, the sample has no more clusters)" in by_default


def test_what_does_not_move_has_no_share_in_tables_and_in_json(tmp_path: Path) -> None:
    for epoch in range(4):
        torch.save({"a": torch.arange(5.0) * epoch, "b": torch.ones(3)}, tmp_path / f"epoch{epoch}.pt")
    invoke("record", tmp_path / "run", *sorted(tmp_path.glob("*.pt")))
    invoke("fit", tmp_path / "run", "--name", "moving", "--modes", 1)
    rows = {line.split()[0]: line.split()[-1] for line in invoke("info", tmp_path / "run").stdout.splitlines() if line}
    assert (rows["a"], rows["b"]) == ("1", "–")
    described = invoke_json("info", tmp_path / "run")["fits"]["moving"]
    assert described["variance_explained_by_tensor"] == {"a": 1.0, "b": None}
    assert described["last_epoch_error_by_tensor"]["b"] is None


def test_a_run_that_does_not_move_is_told_so(tmp_path: Path) -> None:
    for epoch in range(4):
        torch.save({"a": torch.ones(5)}, tmp_path / f"epoch{epoch}.pt")
    invoke("record", tmp_path / "run", *sorted(tmp_path.glob("*.pt")))
    shown = invoke("fit", tmp_path / "run", "--modes", "auto", "-q").stdout
    heading, mode, _, summary, last = shown.splitlines()
    assert mode.split() == ["0", "0", "5", "–", "–"]
    assert heading.split("  ")[-1] == "last-epoch error / motion"
    assert "fit 'auto': 1 modes, 4 epochs, no weight moves, " in summary
    assert last.startswith("last-epoch error / motion –; takes ")
    fitted = invoke_json("fit", tmp_path / "run", "-q")
    assert (fitted["variance_explained"], fitted["last_epoch_error"], fitted["variance_explained_by_pca"]) == (
        None,
    ) * 3
    assert invoke("info", tmp_path / "run").stdout.count("–") == 8


def test_a_fit_of_before_names_the_components_that_it_knows(digits_path: Path) -> None:
    found = fit(digits_path, modes=300)
    rewritten(found, pca_components=None)
    assert f"{found.pca[0]:.4g} (PCA of 1 component)" in invoke("info", digits_path).stdout
    shown = invoke("fit", digits_path, "--follow", "--name", found.name, "-q").stdout
    assert f"\nPCA of 1 component explains {found.pca[0]:.4g}, with a component more " in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "nowhere"], 1, "Error: nowhere: no run here"),
        (["fit", "nowhere"], 1, "Error: nowhere: no run here"),
        (["fit", "RUN", "--modes", "0"], 2, "Invalid value for '--modes'"),
        (["fit", "RUN", "--modes", "120%"], 1, "or a share of the variance below 100 % such as '95%'"),
        (["fit", "RUN", "--modes", "99.9%"], 1, "of the variance of held-out weights"),
        (["fit", "RUN", "--sampling", "clever"], 2, "'clever' is not one of"),
        (["fit", "RUN", "--epochs", "1:x"], 2, "'1:x' names no epochs; write 3, or 0,5,9"),
        (["fit", "RUN", "--epochs", "39:10"], 2, "'39:10' names no epochs; write 3, or 0,5,9"),
        (["fit", "RUN", "--epochs", "3,9:9"], 2, "'3,9:9' names no epochs"),
        (["fit", "RUN", "--epochs", "0:9:0"], 2, "'0:9:0' names no epochs"),
        (["fit", "RUN", "--epochs", "0:99999999999999"], 2, "names more than 10,000,000 epochs"),
        (["fit", "RUN", "--epochs", "0:99999999999999999999"], 2, "'0:99999999999999999999' names no epochs"),
        (["export", "RUN", "--average", "39:10", "-o", "x.pt"], 2, "'39:10' names no epochs; write 3, or 0,5,9"),
        (["export", "RUN", "--average", "last:0", "-o", "x.pt"], 1, "average is 'last:0', expected last:N of at least"),
        (["fit", "RUN", "--epochs", "38:50"], 1, "no epoch 40; the run has 40, nearest: 38, 39"),
        (["reconstruct", "RUN", "--epoch", "99", "-o", "x.pt"], 1, "no epoch 99"),
        (["reconstruct", "RUN", "--epoch", "9", "--fit", "no", "-o", "x.pt"], 1, "no fit 'no'; the run has none"),
        (["reconstruct", "RUN", "--epoch", "9", "-o", "x.bin"], 1, "x.bin: expected a name that ends in"),
        (["evaluate", "RUN", "--with", "nonsense"], 2, "'nonsense' is not MODULE:FUNCTION"),
        (["evaluate", "RUN", "--with", "nosuch:thing"], 2, "'nosuch:thing' cannot be loaded (No module named"),
        (["evaluate", "RUN", "--with", "json:nosuch"], 2, "cannot be loaded (module 'json' has no attribute"),
        (["evaluate", "RUN", "--with", "json:__name__"], 2, "is a str, not a function"),
        (["fit", "RUN", "--seed", "-1"], 2, "Invalid value for '--seed'"),
        (["fit", "RUN", "--name", "zarr.json"], 1, "fit 'zarr.json': expected letters"),
        (
            ["evaluate", "RUN", "--with", "test_cli:failing", "--epochs", "3", "-q"],
            1,
            "test_cli:failing raised RuntimeError: my mistake while evaluating the recorded weights of epoch 3",
        ),
        (["evaluate", "RUN", "--with", "broken_module:f"], 2, "'broken_module:f' cannot be loaded"),
        (["online", "RUN", "--warmup", "40"], 1, "40 epochs, expected more than the warm-up's 40; give a smaller"),
        (["fit", "RUN", "--update", "online2"], 1, "no fit 'online2'"),
        (["record", "RUN", "missing3.pt"], 1, "missing3.pt: no such file, expected a checkpoint"),
        (["record", "new"], 2, "nothing to record; give checkpoints, or --watch DIR"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], code: int, message: str, digits_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke(*[digits_path if word == "RUN" else word for word in arguments], code=code)
    assert message in result.stderr.replace("\n", " ") or message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_wrong_record_beyond_40_is_in_order(digits_path: Path, tmp_path: Path) -> None:
    torch.save(load_weights(digits_path, 39), tmp_path / "epoch40.pt")
    assert "1 epochs recorded" in invoke("record", digits_path, tmp_path / "epoch40.pt").stdout
    np.testing.assert_array_equal(open_run(digits_path).weights[40], open_run(digits_path).weights[39])


def test_force_overwrites_a_file_and_nothing_else_does(digits_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    arguments = ("reconstruct", digits_path, "--epoch", 3, "-o", out)
    invoke(*arguments)
    assert "exists already" in invoke(*arguments, code=1).stderr
    invoke(*arguments, "--force")


@pytest.mark.parametrize(
    ("text", "epochs"),
    [("3", [3]), ("0,5,9", [0, 5, 9]), ("10:13", [10, 11, 12]), ("0:9:4,20", [0, 4, 8, 20]), ("-3", [-3])],
)
def test_epochs_are_written_as_ranges(text: str, epochs: list[int]) -> None:
    assert EpochRange().convert(text, None, None) == epochs


def test_numbers_and_sizes_are_short() -> None:
    assert [number(value) for value in (None, 0.123456, 1e-9, float("nan"))] == ["–", "0.1235", "1e-09", "nan"]
    sizes = [size(value) for value in (0, 1023, 1024, 3 << 30, 5 << 50)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB", "5120.0 TiB"]


@pytest.mark.parametrize("command", ["record", "fit", "online", "reconstruct", "evaluate", "info", "check", "demo"])
def test_every_help_has_an_example(command: str) -> None:
    assert f"Example:\n    trajkit {command}" in invoke(command, "--help").stdout


@pytest.mark.parametrize("updatable", [["--updatable"], []])
def test_a_fit_takes_the_epochs_recorded_since(updatable: list[str], digits_path: Path) -> None:
    invoke("fit", digits_path, "--epochs", "0:30", "--name", "mine", "--samples", 200, *updatable, "-q")
    updated = invoke_json("fit", digits_path, "--update", "mine")
    assert (updated["fit"], updated["epochs"], updated["reading"]) == ("mine", list(range(40)), "raw")
    assert invoke("fit", digits_path, "--update", "mine").stdout == "fit 'mine': nothing was recorded since epoch 39\n"


def test_a_run_that_nobody_records_is_followed_to_its_end(digits_path: Path) -> None:
    followed = invoke("fit", digits_path, "--follow", "--name", "mine", "--samples", 200, "--modes", 4, "-q")
    assert "fit 'mine': 4 modes, 40 epochs" in followed.stdout
    again = invoke("fit", digits_path, "--follow", "--name", "mine", "--modes", 4, "-q", "--json").stdout
    assert [len(json.loads(line)["epochs"]) for line in again.splitlines()] == [40]
    other = invoke("fit", digits_path, "--follow", "--name", "mine", "--modes", 5, "-q", code=1)
    assert "fit 'mine' has modes 4, not 5, and keeps its settings; choose another name" in other.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--memory", "1MiB"], 1, "the budget is 1 MiB; give more memory (--memory)"),
        (["--memory", "256"], 1, "the budget is 256 bytes"),
        (["--memory", "much"], 1, "memory is 'much', expected bytes or a text such as '2GiB'"),
        (["--scheduler", "cluster"], 1, "scheduler is 'cluster', expected 'threads'"),
        (["--device", "gpu"], 1, "device is 'gpu', expected 'cpu', 'cuda' or 'cuda:1'"),
        (["--update", "none"], 1, "no fit 'none'"),
        (["--update", "a", "--follow"], 2, "--update and --follow exclude each other"),
        (["--update", "a", "--modes", "3"], 2, "--update keeps the settings of the fit; leave out --modes"),
        (["--update", "a", "--device", "cuda"], 2, "--update works on the host; leave out --device"),
        (["--warmup", "5"], 2, "--warmup and --interval are for --follow"),
        (["--follow", "--interval", "0"], 1, "interval_s 0.0, expected at least 2 and more than 0"),
        (["--follow", "--interval", "nan"], 1, "interval_s nan, expected at least 2 and more than 0"),
    ],
)
def test_what_a_fit_cannot_do_is_one_clear_line(options: list[str], code: int, message: str, digits_path: Path) -> None:
    result = invoke("fit", digits_path, "-q", *options, code=code)
    assert message in result.stderr
    assert open_run(digits_path).fits == ()


def test_the_version_is_shown() -> None:
    assert "0.1.0" in invoke("--version").stdout


def test_the_demo_runs_and_is_kept_on_request(tmp_path: Path) -> None:
    result = invoke_json("demo", "--keep", tmp_path / "kept")
    assert [line["epoch"] for line in result["epochs"]] == list(range(32, 40))
    assert all(line["recorded_accuracy"] > 0.9 and line["cmd_accuracy"] > 0.85 for line in result["epochs"])
    kept = open_run(tmp_path / "kept/digits").fit("modes10")
    assert all(0 < line["error_relative_to_motion"] < 1 for line in result["epochs"])
    assert result["epochs"][-1]["error_relative_to_motion"] == pytest.approx(kept.quality.last_epoch_error, rel=1e-5)
    assert 0.8 < result["variance_explained"] < 1
    assert set(result["seconds"]) == {"train and record", "fit", "reconstruct", "evaluate"}
    assert open_run(tmp_path / "kept/digits").fits == ("modes10",)
    assert (tmp_path / "kept/digits-cmd.safetensors").exists()
    assert "exists already" in invoke("demo", "--keep", tmp_path / "kept", code=1).stderr


# --- As its own process


def imported_modules(*arguments: object) -> set[str]:
    code = "import sys; from trajkit_cli.main import main; main(standalone_mode=False); "
    code += "print(*sys.modules, file=sys.stderr)"
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in process.stderr.split()}


def test_help_info_and_fit_do_not_import_torch(digits_path: Path) -> None:
    assert not imported_modules("--help") & {"torch", "zarr", "dask", "sklearn", "numpy", "cupy", "matplotlib"}
    assert not imported_modules("fit", "--help") & {"torch", "zarr", "dask", "sklearn", "numpy", "cupy", "matplotlib"}
    for arguments in (["fit", digits_path, "-q"], ["info", digits_path]):
        assert not imported_modules(*arguments) & {"torch", "cupy", "matplotlib"}


def test_ctrl_c_in_a_fit_leaves_the_run_as_it_was(digits_path: Path) -> None:
    code = """
import sys, time, trajkit.device
from trajkit_cli.main import main
original = trajkit.device.fit_block_fused
def slow(*arguments):
    print("fitting", file=sys.stderr, flush=True)
    time.sleep(2)
    return original(*arguments)
trajkit.device.fit_block_fused = slow
main()
"""
    process = subprocess.Popen(
        interruptible([sys.executable, "-c", code, "fit", digits_path, "-q"]), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "fitting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert "Aborted" in said
    assert "Traceback" not in said
    assert open_run(digits_path).fits == ()
    assert not any(path.is_file() for path in (digits_path / "fits").rglob("*"))
    assert fit(digits_path).name == "modes10"


def test_the_installed_command_reads_json_through_a_pipe(digits_path: Path) -> None:
    process = subprocess.run([TRAJKIT, "info", digits_path, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["weights"] == 3682
    assert process.stderr == ""


def test_a_modules_folder_is_found_from_where_the_user_works(digits_path: Path, tmp_path: Path) -> None:
    (tmp_path / "my_evaluation.py").write_text("def score(state):\n    return len(state)\n")
    command = [TRAJKIT, "evaluate", digits_path, "--epochs", "3", "--with", "my_evaluation:score", "--json", "-q"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ})
    assert json.loads(process.stdout)["epochs"][0]["recorded"] == {"score": 16}
