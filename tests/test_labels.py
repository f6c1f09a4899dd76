"""Which epoch a checkpoint is: by a word of time in its name, by what it says, by a bare number, or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from trajkit import import_checkpoints, open_run
from trajkit.checkpoints.labels import Evidence, label_all
from trajkit.checkpoints.naming import NOTHING_SAID, Said, natural
from trajkit.errors import InputError

# What is named, and the epoch that it is by its name alone, None where it is refused. The names are those that
# libraries and published models have.
NAMES: dict[str, int | None] = {
    # an epoch
    "epoch10.pt": 10,
    "epoch_12.pth": 12,
    "epoch=03-val_loss=0.32.ckpt": 3,
    "epoch=3-step=1200.ckpt": 3,
    "epoch=3-v1.ckpt": 3,
    "epoch=12-loss=-3.ckpt": 12,
    "step-055000-epoch-05-loss=0.4.pt": 5,
    "best_coco_bbox_mAP_epoch_12.pth": 12,
    "checkpoint_20240105-123000_epoch7.pth.tar": 7,
    "model_v2_epoch3.pt": 3,
    "resnet50_epoch_7.pth": 7,
    "resnet18-Epoch_007.pth": 7,
    "fold0-ep12.pt": 12,
    "epoch5of100.pt": 5,
    "epochs100_lr0.1_epoch7.pt": 7,
    "model_epoch_10_fold_2.pth": 10,
    "epoch.7": 7,
    "epoch3step100.ckpt": 3,
    "epoch_3/step_100.pt": 3,
    "epoch_2/checkpoint.pt": 2,
    "epoch=3-val/acc=0.77.ckpt": 3,
    "bert-epochs-3/best.pt": None,
    "bert-epochs-3/model.pt": None,
    "num_epochs=100.pt": None,
    "epoch=-1.ckpt": None,
    "epoch3_epoch5.pt": None,
    "epoch_2/epoch_3.pt": None,
    "epoch0.5.pt": None,
    # a step, an iteration
    "iter_20000.pth": 20000,
    "iter_0005000": 5000,
    "iter_0005000/mp_rank_00/model_optim_rng.pt": 5000,
    "iter-005000-ckpt.pth": 5000,
    "global_step1000": 1000,
    "global_step1000/mp_rank_00_model_states.pt": 1000,
    "step1000-unsharded": 1000,
    "step1000-unsharded/model.pt": 1000,
    "step1000-tokens4B": 1000,
    "stage1-step140000-tokens294B": 140000,
    "TinyLlama-1.1B-intermediate-step-1431k-3T": 1431000,
    "multiberts-seed_0-step_20k": 20000,
    "megatron_gpt--val_loss=1.23-step=1000-consumed_samples=64000.0-last.ckpt": 1000,
    "llama-epochs-3-lr-2e-5/step_500.pt": 500,
    "step_20240105.pt": 20240105,
    "max_steps=1000_lr0.1.pt": None,
    "step500_iter1000.pt": None,
    # a checkpoint
    "checkpoint_0012.pth.tar": 12,
    "checkpoint-12.pth.tar": 12,
    "checkpoint12.pt": 12,
    "checkpoint_3_20000.pt": 3,
    "checkpoint-500": 500,
    "checkpoint-500/model.safetensors": 500,
    "checkpoint-500/pytorch_model.bin.index.json": 500,
    "checkpoint-500/unet/diffusion_pytorch_model.safetensors": 500,
    "bert-epochs-3/checkpoint-500": 500,
    "model.ckpt-10000": 10000,
    "ckpt_000": 0,
    "revision-5": 5,
    "ckpt-1B-tokens": None,
    "ckpt-1000-tokens": None,
    "checkpoint-7b": None,
    "checkpoint-8bit.pt": None,
    "checkpoint-v2.pt": None,
    "checkpoint-0.3.0.pt": None,
    "checkpoint_20240105.pt": None,
    "checkpoint-00001-of-00004.bin": None,
    "CKPT+2023-05-06+12-30-00+00": None,
    "ckpt.pt": None,
    # a bare number
    "model_3.bin": 3,
    "0001.pth": 1,
    "model050000.pt": 50000,
    "ema_0.9999_050000.pt": 50000,
    "model_0004999.pth": 4999,
    "network-snapshot-025000.pkl": 25000,
    "rl_model_10000_steps.zip": 10000,
    "12epoch.pth": 12,
    "weights.03-0.75.hdf5": 3,
    "1200-0.32.ckpt": 1200,
    "best_model_9_val_acc=0.77.pt": 9,
    "v2_12.safetensors": 12,
    "ViT-B-16_5.pt": 5,
    "G_1000.pth": 1000,
    "7_net_G.pth": 7,
    "model_3_20.pt": None,
    # what never counts
    "best.pt": None,
    "last.pt": None,
    "last-v1.ckpt": None,
    "model_final.pth": None,
    "model_v0.3.0.pt": None,
    "val_acc=81.pt": None,
    "best_score_12.pt": None,
    "model-fp16.safetensors": None,
    "resnet50.pth": None,
    "resnet-50.pth": None,
    "fold0.pt": None,
    "seed_3.pt": None,
    "bs32_lr1e-4.pt": None,
    "layers_24-hidden_512.pt": None,
    "tokens_4000000.pt": None,
    "train_00220B": None,
    "2026-01-05_model.pt": None,
    "model_20260105_123000.pt": None,
    "resnet18-5c106cde.pth": None,
    "resnet34-43635321.pth": None,
    "fcn_r50-d8_512x1024_40k_cityscapes_20200604_192536-aa239635.pth": None,
    "yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth": None,
    "avg_30.pt": None,
    "mp_rank_00_model_states.pt": None,
    "model-00001-of-00002.safetensors": None,
    "3fa85f64-5717-4562-b3fc-2c963f66afa6.pt": None,
    "f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0ab91/model.safetensors": None,
    "pytorch_model.bin": None,
    "².pt": None,
}


def evidence(path: str, **said: int) -> Evidence:
    return Evidence.of(Path(path), Path("/checkpoints") / path, Said(**said) if said else NOTHING_SAID)


def labels(*files: Evidence) -> dict[str, int]:
    """File -> label; raises what is wrong with the first."""
    found = label_all(files)
    if found.problems:
        raise found.problems[0]
    return {str(path): label.epoch for path, label in found.labels.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_an_epoch_or_is_refused(name: str) -> None:
    if NAMES[name] is not None:
        assert labels(evidence(name)) == {name: NAMES[name]}
        return
    with pytest.raises(
        InputError, match=r"say which with --label 'REGEX' or --epoch N, or number .* with --first-epoch"
    ):
        labels(evidence(name))


def test_the_table_of_names_is_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs/checkpoints.md").read_text()
    rows = [row.split("|")[1:3] for row in page.splitlines() if row.startswith("| `")]
    told = {name.strip().strip("`"): label.strip() for name, label in rows}
    shown = {name: label for name, label in told.items() if name in NAMES}
    assert len(shown) > 20
    assert shown == {name: "–" if NAMES[name] is None else str(NAMES[name]) for name in shown}


# --- What the file says


def test_a_file_without_a_number_is_what_it_says() -> None:
    assert labels(evidence("last.pt", epoch=8, step=800)) == {"last.pt": 8}
    assert labels(evidence("model.pt", step=900)) == {"model.pt": 900}
    assert labels(evidence("resnet50.pt", epoch=3), evidence("resnet50-b.pt", epoch=4)) == {
        "resnet50.pt": 3,
        "resnet50-b.pt": 4,
    }


@pytest.mark.parametrize(
    ("name", "said", "both"),
    [
        ("epoch=3.ckpt", {"epoch": 7}, "is epoch 3 by its name, the file says epoch 7"),
        ("epoch_3/model.pt", {"epoch": 2}, "is epoch 3 by its name, the file says epoch 2"),
        ("step_900.pt", {"step": 950}, "is step 900 by its name, the file says step 950"),
        ("checkpoint-500", {"step": 700}, "is checkpoint 500 by its name, the file says step 700"),
        ("epoch3_epoch5.pt", {}, "its names have 3 and 5 as epoch"),
    ],
)
def test_numbers_of_one_kind_that_differ_are_refused(name: str, said: dict[str, int], both: str) -> None:
    with pytest.raises(InputError, match=f"{name}: {both}; say which with --label"):
        labels(evidence(name, **said))


@pytest.mark.parametrize(
    ("name", "said", "label"),
    [
        ("epoch=3-step=1200.ckpt", {"epoch": 3, "step": 1201}, 3),
        ("step_900.pt", {"epoch": 3}, 900),
        ("step_900.pt", {"epoch": 3, "step": 900}, 900),
        ("checkpoint-500", {"epoch": 2, "step": 500}, 500),
        ("checkpoint-500", {"epoch": 2}, 500),
        ("checkpoint_12.pth.tar", {"epoch": 12, "step": 48000}, 12),
        ("model_20000.pt", {"epoch": 3}, 3),
    ],
)
def test_numbers_of_different_kinds_do_not_contradict_each_other(name: str, said: dict[str, int], label: int) -> None:
    assert labels(evidence(name, **said)) == {name: label}


def test_a_file_that_says_the_next_epoch_is_called_by_its_name_and_that_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trajkit")
    numbered = [evidence(f"checkpoint_{epoch:04d}.pth.tar", epoch=epoch + 1) for epoch in range(3)]
    best = evidence("model_best.pth.tar", epoch=2)  # by the habit of the others, the epoch 1
    later = evidence("final.pth.tar", epoch=9)
    found = labels(best, later, *numbered)
    assert list(found.values()) == [0, 1, 2, 8]
    assert [message for message in caplog.messages if "the names hold" in message] == [
        "checkpoint_0000.pth.tar: is epoch 0 by its name and says 1, as trainings do that save the number of the next"
        " one; the names hold"
    ]
    assert labels(*(evidence(f"model_{epoch}.pt", epoch=epoch + 1) for epoch in (4, 5))) == {
        "model_4.pt": 4,
        "model_5.pt": 5,
    }


def test_a_best_file_that_comes_later_is_called_as_the_recorded_ones(tmp_path: Path) -> None:
    for epoch in range(3):
        content = {"epoch": epoch + 1, "state_dict": {"w": torch.full((3,), float(epoch))}}
        torch.save(content, tmp_path / f"checkpoint_{epoch}.pth.tar")
    import_checkpoints(tmp_path / "run", sorted(tmp_path.glob("*.tar")))
    (tmp_path / "checkpoint_1.pth.tar").rename(tmp_path / "model_best.pth.tar")
    (item,) = import_checkpoints(tmp_path / "run", [tmp_path / "model_best.pth.tar"])
    assert (item.epoch, item.new) == (1, False)


# --- Several files


def test_a_bare_number_counts_only_where_all_names_have_one_form() -> None:
    assert labels(*(evidence(f"best_model_{n}_val_acc=0.{81 - n}.pt") for n in (8, 9, 10))) == {
        "best_model_8_val_acc=0.73.pt": 8,
        "best_model_9_val_acc=0.72.pt": 9,
        "best_model_10_val_acc=0.71.pt": 10,
    }
    with pytest.raises(InputError, match=r"other_2.pt: the number in its name may be anything, since model_1.pt has"):
        labels(evidence("model_1.pt"), evidence("other_2.pt"))
    assert list(labels(evidence("net_16_5.pt"), evidence("net_16_6.pt")).values()) == [5, 6]
    with pytest.raises(InputError, match=r"net_1_5.pt: its name has 2 numbers, 1, 5"):
        labels(evidence("net_1_5.pt"), evidence("net_2_6.pt"))
    folders = [evidence(f"{step:07d}/pretrained_model") for step in (900_000, 1_000_000)]
    assert list(labels(*folders).values()) == [900_000, 1_000_000]


def test_all_files_are_numbered_by_one_thing() -> None:
    assert labels(evidence("epoch=3-step=12.ckpt"), evidence("step=20.ckpt")) == {
        "epoch=3-step=12.ckpt": 12,
        "step=20.ckpt": 20,
    }
    assert list(labels(evidence("epoch=3.ckpt"), evidence("step=20.ckpt", epoch=4)).values()) == [3, 4]
    assert list(labels(evidence("step_100.pt"), evidence("checkpoint-200")).values()) == [100, 200]
    for others in ("step=20.ckpt", "checkpoint-20", "model_7.pt"):
        with pytest.raises(InputError, match=r"is numbered by .*, .* by .*, expected the same for all"):
            labels(evidence("epoch=3.ckpt"), evidence(others))


def test_two_files_of_one_epoch_are_refused_unless_one_is_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trajkit")
    with pytest.raises(InputError, match=r"b/epoch3.pt: is epoch 3, and so is a/epoch3.pt; say which with --label"):
        labels(evidence("a/epoch3.pt"), evidence("b/epoch3.pt"))
    with pytest.raises(InputError, match=r"last.pt: is epoch 8, and so is best.pt"):
        labels(evidence("best.pt", epoch=8), evidence("last.pt", epoch=8))
    for copy in (evidence("last.pt", epoch=8), evidence("best_mAP_epoch_8.pt"), evidence("best.pt", step=8)):
        assert labels(copy, evidence("epoch8.pt")) == {"epoch8.pt": 8}
    assert labels(evidence("last.pt", epoch=8), evidence("model_8.pt")) == {"model_8.pt": 8}
    assert "last.pt: left out, it is epoch 8, as epoch8.pt is" in caplog.messages


def test_all_problems_are_named() -> None:
    found = label_all(
        [evidence("last.pt"), evidence("epoch=3.ckpt", epoch=7), evidence("ckpt.pt"), evidence("epoch4.pt")]
    )
    assert [str(problem).partition(":")[0] for problem in found.problems] == ["last.pt", "ckpt.pt", "epoch=3.ckpt"]


# --- Order


def test_names_are_ordered_by_numbers_that_count_then_by_folders() -> None:
    in_order = [
        ["step1000/model.pt", "step2000/model.pt", "step10000/model.pt"],
        ["a/iter_9/mp_rank_00/model_optim_rng.pt", "a/iter_10/mp_rank_00/model_optim_rng.pt"],
        ["model_8_acc=0.9.pt", "model_9_acc=0.8.pt", "model_10_acc=0.7.pt"],
        ["acc=0.9_epoch_8.pt", "acc=0.8_epoch_9.pt"],
        ["epoch1/acc=0.9.pt", "epoch2/acc=0.8.pt"],
        ["resnet18.pt", "resnet50.pt", "resnet101.pt"],
        ["last-v1.ckpt", "last-v2.ckpt", "last-v10.ckpt"],
        ["checkpoint_3_900.pt", "checkpoint_3_1000.pt"],
    ]
    for names in in_order:
        assert sorted(map(Path, reversed(names)), key=natural) == list(map(Path, names))
    hashes = ["f0" * 20, "0b" * 20, "1d" * 20]
    assert sorted(map(Path, hashes), key=natural) == list(map(Path, hashes))  # they have no order


# --- The cache of the hub


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    """Make a snapshot of a model and refs to it."""

    def snapshot(commit: str, value: float, *refs: str) -> Path:
        root = tmp_path / "models--someone--suite"
        folder = root / "snapshots" / commit
        folder.mkdir(parents=True)
        torch.save({"w": torch.full((3,), float(value))}, folder / "pytorch_model.bin")
        for ref in refs:
            (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (root / "refs" / ref).write_text(f"{commit}\n")
        return folder

    return snapshot


def test_a_snapshot_is_called_by_its_refs(hub: Any, tmp_path: Path) -> None:
    one = hub("f0" * 18 + "ab91", 1, "step1000", "main")
    two = hub("0b" * 18 + "cc17", 2, "stage1-step2000-tokens5B")
    assert {
        item.path: item.epoch for item in import_checkpoints(tmp_path / "run", [two, one / "pytorch_model.bin"])
    } == {
        one / "pytorch_model.bin": 1000,
        two: 2000,
    }
    ordered = import_checkpoints(tmp_path / "numbered", [two, one], first_epoch=0)
    assert [item.path for item in ordered] == [two, one]  # stage1-… comes before step1000


def test_a_snapshot_without_a_number_in_its_refs_is_refused(hub: Any, tmp_path: Path) -> None:
    only_main, none = hub("1" * 40, 1, "main", "pr/5"), hub("2" * 39 + "a", 2)
    (tmp_path / "models--someone--suite/refs/step7").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("1" * 40)
    for folder in (only_main, none):
        with pytest.raises(InputError, match=r"expected the epoch's number in the name.* found none"):
            import_checkpoints(tmp_path / "run", [folder])
    two = hub("3" * 40, 3, "step1", "step2")
    with pytest.raises(InputError, match=r"its names have 1 and 2 as step"):
        import_checkpoints(tmp_path / "run", [two])
    assert not (tmp_path / "run").exists()


# --- What is asked for


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"model_{value}_of_fold{value + 2}.pt" for value in range(3)]
    for value, file in enumerate(found):
        torch.save({"w": torch.full((3,), float(value)), "epoch": torch.tensor(value)}, file)
    return found


@pytest.mark.parametrize(
    ("asked", "epochs"),
    [
        ({"label": r"fold([0-9]+)"}, [2, 3, 4]),
        ({"label": r"^model_(\d+)"}, [0, 1, 2]),
        ({"epochs": [9, 8, 7]}, [9, 8, 7]),
        ({"epochs": range(4, 7)}, [4, 5, 6]),
        ({"first_epoch": 5}, [5, 6, 7]),
    ],
)
def test_epochs_are_those_that_are_asked_for(
    asked: dict[str, Any], epochs: list[int], files: list[Path], tmp_path: Path
) -> None:
    done = import_checkpoints(tmp_path / "run", files, **asked)
    assert {item.path: item.epoch for item in done} == dict(zip(files, epochs, strict=True))
    assert {item.by for item in done} == {"given"}
    run = open_run(tmp_path / "run")
    for value, epoch in enumerate(epochs):
        assert run.weights[run.row_of(epoch)].tolist() == [value] * 3


def test_an_epoch_for_one_file_and_for_each_by_its_path(files: list[Path], tmp_path: Path) -> None:
    assert [item.epoch for item in import_checkpoints(tmp_path / "one", files[:1], epochs=12)] == [12]
    given = {str(files[0]): 3, files[1]: 1, "elsewhere.pt": 7}
    assert [item.epoch for item in import_checkpoints(tmp_path / "two", files[:2], epochs=given)] == [1, 3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"label": "fold"},
            r"label is 'fold', expected a group for the number; write one such as 'epoch_\(\[0-9\]\+\)'",
        ),
        ({"label": "("}, r"label is '\(', expected a regular expression \(.*\); check it"),
        ({"label": 3}, r"label is 3, expected a regular expression"),
        ({"label": r"step(\d+)"}, r"model_0_of_fold2.pt: 'step\(\\d\+\)' is not found in it, expected it in each name"),
        (
            {"label": r"(model)"},
            r"model_0_of_fold2.pt: '\(model\)' finds 'model', expected a number of at most 18 digits",
        ),
        ({"label": r"_(x)?of"}, r"finds '', expected a number"),
        ({"label": r"model_\d(_)"}, r"finds '_', expected a number"),
        ({"epochs": [1, 2]}, r"epochs has 2 of 3 files, expected one for each; give as many"),
        ({"epochs": 4}, r"epochs has 1 of 3 files, expected one for each"),
        ({"epochs": [1, 2, "3"]}, r"an epoch is '3', expected an integer; pass a number"),
        ({"epochs": [1, 2, 2]}, r"model_2_of_fold4.pt: is epoch 2, and so is .*model_1_of_fold3.pt"),
        (
            {"epochs": {"a": 1}},
            r"model_0_of_fold2.pt: epochs does not have it, expected the epoch of each file; add it",
        ),
        ({"first_epoch": "0"}, r"first_epoch is '0', expected an integer"),
        ({"first_epoch": 0, "label": "(a)"}, r"first_epoch and label exclude each other; give one"),
    ],
)
def test_what_cannot_be_asked_for_is_told(
    asked: dict[str, Any], message: str, files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        import_checkpoints(tmp_path / "run", files, **asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x.pt", r"files is 'x.pt', expected a list of paths; pass \['x.pt'\]"),
        (Path("x.pt"), r"files is 'x.pt', expected a list of paths; pass \['x.pt'\]"),
        (None, r"files is a NoneType, expected a list of paths; pass a list"),
        (7, r"files is a int, expected a list of paths"),
        ([], r"files is empty, expected the path of one checkpoint at least; check the pattern or the folder"),
        (["x.pt", None], r"files holds None, expected paths of checkpoints; pass a list of paths"),
        ([b"x.pt"], r"files holds b'x.pt', expected paths of checkpoints"),
        (["x.pt"], r"x.pt: no such file, expected a checkpoint; check the name"),
    ],
)
def test_what_are_no_files_is_told(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}$" if "\\[" in message else message):
        import_checkpoints(tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


def test_files_may_be_a_generator_and_name_a_file_twice(files: list[Path], tmp_path: Path) -> None:
    done = import_checkpoints(tmp_path / "run", (file for file in [*files, files[0]]), first_epoch=0)
    assert [item.epoch for item in done] == [0, 1, 2]


def test_a_file_whose_epoch_is_given_keeps_its_step(tmp_path: Path) -> None:
    for epoch in range(3):
        state = {"w": torch.full((3,), float(epoch))}
        torch.save({"model": state, "epoch": 7 * epoch, "global_step": 10 * epoch}, tmp_path / f"epoch{epoch}.pt")
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
    with pytest.raises(InputError, match=r"epoch1.pt: is epoch 1 by its name, the file says epoch 7"):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"])
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch1.pt"], epochs=1)
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch2.pt"], label=r"epoch(\d)")
    steps = open_run(tmp_path / "run").steps
    assert steps is not None
    assert steps.tolist() == [0, 10, 20]
