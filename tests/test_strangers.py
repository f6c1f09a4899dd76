"""Opening what a stranger made: only errors of ours, no code, nothing outside, bounded memory and time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import ARCHIVES, CHECKPOINTS, HARMLESS
from corpus_folders import FOLDERS, HARMLESS_FOLDERS
from hostile import BASES, LEGACY, Case, in_a_second, marker, watched
from safetensors.torch import save_file

from trajkit import (
    RunWriter,
    TrajkitError,
    evaluate,
    fit,
    import_checkpoints,
    load_weights,
    open_run,
    repair,
    update,
    verify,
    write_checkpoint,
)
from trajkit.errors import InputError
from trajkit.store.writer import is_being_written


def every_fit(read: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda path: [read(run.fit(name)) for run in [open_run(path)] for name in run.fits]


def record_one_more(path: Path) -> None:
    with RunWriter(path, fsync=False) as writer:
        layout = writer.layout
        assert layout is not None
        buffers = {dtype: np.zeros(size, dtype) for dtype, size in layout.buffer_sizes.items()}
        writer.append(layout, writer.epochs[-1] + 1, np.ones(layout.n_weights, np.float32), buffers)


def written_in(path: Path, suffix: str) -> Path:
    return write_checkpoint(path, int(open_run(path).epochs[-1]), path.with_suffix(suffix), overwrite=True)


# The last ones change the archive.
WAYS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: repr(open_run(path)),
    "weights": lambda path: open_run(path).weights[:],
    "columns": lambda path: open_run(path).weights.gather([1], np.array([0, 7])),
    "trajectories": lambda path: [run.trajectory(name) for run in [open_run(path)] for name in run.layout.names()],
    "checkpoint": lambda path: open_run(path).checkpoint(1),
    "state dict": lambda path: load_weights(path, 1),
    "probe": lambda path: open_run(path).probe_index,
    "metrics": lambda path: open_run(path).metrics,
    "evaluations": lambda path: [item.to_json() for item in open_run(path).evaluations],
    "sizes": lambda path: (open_run(path).size_bytes, open_run(path).epoch_bytes),
    "fits": every_fit(
        lambda found: (repr(found), found.epochs, found.settings, found.quality, found.quality_by_tensor)
    ),
    "modes": every_fit(lambda found: (found.mode, found.scale, found.correlation, found.offset)),
    "references": every_fit(lambda found: (found.reference, found.reference_index, found.sample_index)),
    "reference values": every_fit(lambda found: found.reference_at([0])),
    "modelled": every_fit(lambda found: found.modelled([0])),
    "modelled state dict": every_fit(lambda found: found.state_dict(0)),
    "modelled trajectory": every_fit(lambda found: found.trajectory("w")),
    "another fit": lambda path: open_run(path).fit("../../outside/secret"),
    "lock": is_being_written,
    "safetensors": lambda path: written_in(path, ".safetensors"),
    "pt": lambda path: written_in(path, ".pt"),
    "new fit": lambda path: fit(path, modes=2, samples=20, name="b"),
    "evaluate": lambda path: evaluate(path, lambda _: 1.0, epochs=[0]),
    "record": record_one_more,
    "update": lambda path: update(path, "a"),
    "verify": lambda path: verify(path, "full"),
    "repair": repair,
}


WITHOUT_OPENING = ("lock", "record", "verify", "repair")


def attempt(way: str, path: Path) -> bool:
    """Whether that way works; only an error of ours may say that it does not."""
    with in_a_second(way, looks=2 if way == "repair" else 1):
        try:
            WAYS[way](path)
        except TrajkitError:
            return False
    return True


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound archive of each kind, after every way was once gone: imports and compilation are over."""
    paths = {name: tmp_path_factory.mktemp("bases") / "run" for name in BASES}
    for name, path in paths.items():
        BASES[name](path)
        used = Path(shutil.copytree(path, path.with_name("used")))
        for go in WAYS.values():
            try:
                go(used)
            except TrajkitError:
                continue
    return paths


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of archives are written here, and none has to survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may touch; with a file of the name that the corpus asks for."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    yield folder
    assert not marker(tmp_path / "run").exists()


def test_a_sound_archive_works_in_every_way(bases: dict[str, Path], tmp_path: Path, outside: Path) -> None:
    shutil.copytree(bases["plain"], tmp_path / "run")
    with watched([tmp_path / "run", tmp_path / ".run."], outside):
        assert [way for way in WAYS if not attempt(way, tmp_path / "run")] == ["another fit"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the archive goes; Python's own `rmtree`, by which pytest clears, does not get to the end of all of them."""
    path = tmp_path / "run"
    yield path
    if (path / "weights/c/9").is_dir():
        subprocess.run(["rm", "-rf", path], check=True)


@pytest.mark.filterwarnings("ignore:the evaluation is not kept:RuntimeWarning")
@pytest.mark.parametrize("case", ARCHIVES, ids=lambda case: case.sentence)
def test_a_strangers_archive(case: Case, bases: dict[str, Path], place: Path, outside: Path) -> None:
    path = shutil.copytree(bases[case.base], place)
    case.make(path)
    with watched([path, path.with_name(".run.")], outside):
        opens = attempt("open", path)  # where it does not, all the other ways begin in the same way
        worked = [way for way in (WAYS if opens else WITHOUT_OPENING) if attempt(way, path)]
    assert (case.sentence in HARMLESS) == (len(worked) == len(WAYS) - 1)


@pytest.fixture(scope="session")
def _torch_is_warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("warm")
    torch.save({"w": torch.zeros(3)}, folder / "epoch0.pt")
    torch.save({"w": torch.zeros(3)}, folder / "epoch1.pt", _use_new_zipfile_serialization=False)
    import_checkpoints(folder / "run", sorted(folder.glob("*.pt")))


@pytest.mark.usefixtures("_torch_is_warm")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*CHECKPOINTS, *FOLDERS], ids=lambda case: case.sentence)
def test_a_strangers_checkpoint(case: Case, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # another library's wish, which is not ours
    path = tmp_path / "epoch0.pt"
    case.make(path)
    works = False
    with watched([tmp_path / "run", path], outside), in_a_second("import"):
        try:
            import_checkpoints(tmp_path / "run", [path], fsync=False)
            write_checkpoint(tmp_path / "run", 0, tmp_path / "run/again.safetensors")
            works = True
        except TrajkitError:
            pass
    assert works == (case.sentence in HARMLESS | HARMLESS_FOLDERS)
    if works:
        assert all(torch.isfinite(value).all() for value in open_run(tmp_path / "run").state_dict(0).values())


@pytest.mark.parametrize(
    ("cap", "save", "message"),
    [
        ("pickles.PICKLE_LIMIT", torch.save, "a pickle of .* bytes, at most 10 are read"),
        ("pickles.PICKLE_LIMIT", partial(torch.save, **LEGACY), "a pickle of more than 10 bytes"),
        ("pickles.OPCODES_LIMIT", torch.save, "a pickle of more than .* or 10 opcodes"),
        ("pickles.OPCODES_LIMIT", partial(torch.save, **LEGACY), "a pickle of more than .* or 10 opcodes"),
        ("safetensors_format.HEADER_LIMIT", save_file, "a safetensors header of .* bytes, at most 10 are read"),
    ],
)
def test_a_checkpoint_beyond_a_cap_is_refused(
    cap: str, save: Callable[..., None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save({"w": torch.zeros(4)}, tmp_path / "epoch0.pt")
    monkeypatch.setattr(f"trajkit.checkpoints.{cap}", 10)
    with pytest.raises(InputError, match=message):
        import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
    monkeypatch.undo()
    import_checkpoints(tmp_path / "run", [tmp_path / "epoch0.pt"])
