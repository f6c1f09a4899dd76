"""What is done to a run while faults happen, and what must hold of the disk whatever happens.

A `Scenario` is a line of a table: what the disk holds before, and what is done then. Each step of it ends with an
acknowledgement. `Story` does it once on a watched disk; after that, every state that a fault could have left is checked
by the same rules: a reader sees what was acknowledged, or that and the step under way, and nothing between; so does
plain Zarr, which may lag behind; and the next one who does the same ends where an undisturbed one ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import counting
import numpy as np
import pytest
import xarray
import zarr
from conftest import vector_layout
from faults import Disk, Tree, not_waiting_for_the_disk, write_tree

from trajkit import ParameterLayout, RunWriter, evaluate, fit, open_run, update
from trajkit.errors import RunNotFoundError
from trajkit.layout import TensorEntry
from trajkit.store import format as store_format
from trajkit.store.fit_shape import FitShape
from trajkit.store.fits import FitWriter
from trajkit.store.format import BUFFERS, EPOCH, PROBE, STEP, WEIGHTS, all_arrays
from trajkit.store.sources import Look, Source

Steps = Callable[[Path], Iterator[None]]
"""Does what is left to do to the run at a path; every `yield` acknowledges a step."""
Content = dict[str, Any]
"""All that a reader sees of a run: path -> what is there, in a form that can be compared."""

SEVERAL_DTYPES = ParameterLayout.of(
    [
        TensorEntry(name="w", shape=(40, 3), dtype="float32", kind="weight"),
        TensorEntry(name="half", shape=(7,), dtype="bfloat16", kind="weight"),
        *(
            TensorEntry(name=f"buffer_{dtype}", shape=(5,), dtype=dtype, kind="buffer")
            for dtype in ("float16", "float32", "float64", "int64", "uint8", "bool")
        ),
    ]
)
SEVERAL_SHARDS = vector_layout(200, 130)


class BrokenPromiseError(AssertionError):
    """A promise is broken; says after which operation."""


# --- Steps


def values_of(layout: ParameterLayout, epoch: int) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Weights and buffers of an epoch: no two are equal."""
    if layout is counting.LAYOUT:
        return counting.epoch_values(epoch)
    phase = np.arange(layout.n_weights) % 7
    weights = np.sin(phase + 0.3 * (epoch + 1)) + 0.01 * np.arange(layout.n_weights)
    sizes = layout.buffer_sizes.items()
    return weights.astype(np.float32), {dtype: (np.arange(size) + epoch).astype(dtype) for dtype, size in sizes}


def recording(
    n_epochs: int, layout: ParameterLayout = counting.LAYOUT, with_steps: bool = False, with_sources: bool = False
) -> Steps:
    """Record until the run has so many epochs; with a training's steps, with the checkpoints that they are from."""

    def steps(path: Path) -> Iterator[None]:
        with RunWriter(path) as writer:
            for epoch in range(len(writer.epochs), n_epochs):
                step = 100 * epoch if with_steps else None
                writer.append(layout, epoch, *values_of(layout, epoch), {"epoch": epoch}, step)
                if with_sources:
                    writer.keep_source(Source(epoch, f"epoch{epoch}.pt", Look(1, 2, 3), "all"))
                yield

    return steps


def fitting(name: str, n_epochs: int | None = None) -> Steps:
    """Save a fit of the first epochs, one that can be updated."""

    def steps(path: Path) -> Iterator[None]:
        if name not in open_run(path).fits:
            epochs = None if n_epochs is None else range(n_epochs)
            fit(
                path, modes=2, samples=20, name=name, epochs=epochs, updatable=True, scheduler="synchronous",
                memory="1GiB",
            )  # fmt: skip
            yield

    return steps


def updating(name: str) -> Steps:
    """Take all epochs into a fit."""

    def steps(path: Path) -> Iterator[None]:
        if len(open_run(path).fit(name).epochs) < len(open_run(path).epochs):
            update(path, name, scheduler="synchronous", memory="1GiB")
            yield

    return steps


def evaluating(n_evaluations: int) -> Steps:
    """Evaluate until the run has so many evaluations."""

    def steps(path: Path) -> Iterator[None]:
        for _ in range(len(open_run(path).evaluations), n_evaluations):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # one that is not kept warns
                evaluate(path, lambda state: float(state["w"].sum()))
            yield

    return steps


def abandoning(name: str) -> Steps:
    """Leave what a fit leaves that is killed."""

    def steps(path: Path) -> Iterator[None]:
        run = open_run(path)
        shape = FitShape(run.layout.n_weights, len(run.epochs), 2, 20, updatable=False)
        writer = FitWriter(run.archive.objects, name, shape)
        results = {"mode": np.zeros(300, np.uint16), "mean": np.zeros(300)}
        results |= {array: np.zeros(300, np.float32) for array in ("scale", "correlation")}
        writer.blocks.write(0, results)
        writer._lock.release()
        yield

    return steps


def beginning(name: str) -> Steps:
    """Begin a fit and give it up, which clears what others have left."""

    def steps(path: Path) -> Iterator[None]:
        run = open_run(path)
        with FitWriter(run.archive.objects, name, FitShape(run.layout.n_weights, 2, 2, 20, updatable=False)):
            pass
        return iter(())

    return steps


def opening(path: Path) -> Iterator[None]:
    """Open the run for writing, and nothing more."""
    RunWriter(path).close()
    return iter(())


# --- The table


@dataclass(frozen=True)
class Scenario:
    """What the disk holds `before`, and what is done `then` while faults happen."""

    name: str
    before: tuple[Steps, ...]
    then: tuple[Steps, ...]
    sharded: bool = False
    hard_links: bool = True

    def __str__(self) -> str:
        return self.name

    def do(self, path: Path) -> Iterator[None]:
        """Do what is left to do."""
        for steps in self.then:
            yield from steps(path)

    @contextlib.contextmanager
    def rules(self) -> Iterator[None]:
        """Small shards, or a file system without hard links, where the scenario asks for it."""
        with pytest.MonkeyPatch.context() as patch:
            if self.sharded:
                patch.setattr(store_format, "COLUMN_GRID", 8)
                patch.setattr(store_format, "CHUNK_VALUES", 32)
                patch.setattr(store_format, "SHARD_CHUNKS", 4)
            if not self.hard_links:
                patch.setattr("os.link", _no_hard_links)
            yield


def _no_hard_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


SCENARIOS = [
    Scenario("create", (), (recording(1),)),
    Scenario("create with steps, without hard links", (), (recording(1, with_steps=True),), hard_links=False),
    Scenario("record", (recording(2),), (recording(4),)),
    Scenario("record shards", (recording(1, SEVERAL_SHARDS),), (recording(2, SEVERAL_SHARDS),), sharded=True),
    Scenario(
        "record several dtypes and steps",
        (recording(1, SEVERAL_DTYPES, with_steps=True),),
        (recording(2, SEVERAL_DTYPES, with_steps=True),),
    ),
    Scenario("record checkpoints", (recording(1),), (recording(3, with_sources=True),)),
    Scenario("fit", (recording(4),), (fitting("a"),)),
    Scenario("update", (recording(5), fitting("a", 3)), (updating("a"),)),
    Scenario("evaluate", (recording(2),), (evaluating(2),)),
    Scenario("clear an abandoned fit", (recording(3), abandoning("dead")), (beginning("b"), recording(4))),
]


# --- What is seen


def seen(path: Path) -> Content:
    """All that a reader of trajkit sees; nothing where there is no run, or no epoch yet."""
    try:
        run = open_run(path)
    except RunNotFoundError:
        return {}
    content: Content = {
        array: _values(run.archive.read(array, np.arange(len(run.epochs)), (0, document["shape"][-1])))
        for array, document in run.archive.documents.items()
        if len(document["shape"]) == 2
    }
    content["epoch"] = _values(run.epochs)
    if run.steps is not None:
        content["step"] = _values(run.steps)
    content["probe_index"] = _values(run.probe_index)
    content["metrics"] = run.metrics
    content["evaluations"] = [evaluation.epochs for evaluation in run.evaluations]
    for name in run.fits:
        stored = run.fit(name).stored
        content[f"fits/{name}"] = (stored.attributes["epochs"], stored.attributes["modes"])
        for array in stored.documents:
            content[f"fits/{name}/{stored.version}/{array}"] = _values(stored.read(array))
    return content


def _values(array: Any) -> tuple[Any, ...]:
    """(shape, bytes of each row), so that beginnings can be compared, too."""
    values = np.asarray(array)
    return values.shape[1:], [row.tobytes() for row in values]


def assert_shown_whole(path: Path, content: Content, known: Iterable[Content], sound: set[Any]) -> None:
    """Plain Zarr and xarray show beginnings of `content` alone, and of fits that are not current ones that are `known`.

    Fits that are being written stand beside the current ones, and plain Zarr may come by them. `sound` remembers which
    arrays were looked at, in which state, so that a next one who looks at the same reads only what has changed.
    """
    if not (path / "zarr.json").exists():
        return
    known = [content, *known]
    n_epochs = len(content["epoch"][1]) if content else 0
    expected = {name for name, value in content.items() if isinstance(value, tuple) and isinstance(value[0], tuple)}
    for consolidated in (False, None):
        arrays = _arrays_in(zarr.open_group(path, mode="r", use_consolidated=consolidated))
        states = {name: (n_epochs, repr(array.metadata), _shown(path, name, array)) for name, array in arrays.items()}
        for name, state in states.items():
            if (name, state) not in sound:
                _assert_beginning(name, arrays[name][...], n_epochs, known)
                sound.add((name, state))
        missing = {name for name in expected - arrays.keys() if consolidated is False or not name.startswith("fits/")}
        assert not missing, f"plain Zarr does not find {missing}"
    all_states = frozenset(states.items())  # xarray goes by the consolidated metadata, too
    if all_states not in sound:
        with xarray.open_zarr(path) as dataset:
            for name in dataset.variables:
                _assert_beginning(str(name), dataset[name].values, n_epochs, known)
        sound.add(all_states)


def _shown(path: Path, name: str, array: Any) -> frozenset[tuple[str, bytes]]:
    """The stored objects that a reader of an array meets."""
    rows = [f"/{row}" for row in range(array.shape[0])] if grows(name) else [""]
    return frozenset(file for row in rows for file in _files_in(path / f"{name}/c{row}"))


def _files_in(place: Path) -> frozenset[tuple[str, bytes]]:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return frozenset((file.as_posix(), file.read_bytes()) for file in files)


def _arrays_in(group: zarr.Group) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        return {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def _assert_beginning(name: str, values: Any, n_epochs: int, known: list[Content]) -> None:
    shape, rows = _values(values)
    if grows(name):
        assert len(rows) <= n_epochs, f"{name} shows {len(rows)} epochs, {n_epochs} are committed"
        assert not rows or (shape, rows) == (known[0][name][0], known[0][name][1][: len(rows)]), f"{name} is torn"
    else:
        assert any((shape, rows) == content.get(name) for content in known), f"{name} is torn"


def assert_tidy(path: Path) -> None:
    """No object is left that no commit record names, and no temporary file of a writer of epochs."""
    records = [json.loads(record.read_bytes())["record"] for record in (path / "epoch/commits").iterdir()]
    committed = {key for record in records for key in record["objects"]}
    n_epochs = len(records)
    stored = {
        found.relative_to(path).as_posix()
        for array in all_arrays(open_run(path).layout, 1, zstd=False, steps=True)
        for found in (path / array / "c").rglob("*")
        if found.is_file()
    }
    assert stored == committed
    assert not list((path / "epoch/tmp").glob("writer*/*"))
    assert len(open_run(path).epochs) == n_epochs


def assert_goes_on(path: Path, expected: Content) -> None:
    """The run holds what is expected, one more epoch can be recorded, and then the run is tidy."""
    with RunWriter(path) as writer:
        epoch, layout = len(writer.epochs), writer.layout
        assert layout is not None
        weights, buffers = values_of(layout, epoch)
        writer.append(layout, epoch, weights, buffers, {"epoch": epoch}, 100 * epoch if "step" in expected else None)
    after = seen(path)
    assert after.pop("metrics").pop(epoch) == {"epoch": epoch}
    for name, value in after.items():
        if grows(name):
            new = weights if name == "weights" else buffers.get(name.removeprefix("buffers/"))
            assert new is None or value[1][-1] == new.tobytes()
            after[name] = value[0], value[1][:-1]
    assert after == {name: value for name, value in expected.items() if name != "metrics"}, "it does not end whole"
    assert_tidy(path)


def grows(name: str) -> bool:
    """Whether an array gets a row with each epoch."""
    return name in (WEIGHTS, EPOCH, STEP, PROBE) or name.startswith(BUFFERS)


# --- A scenario and its faults


class Story:
    """A scenario, done once on a watched disk without a fault, and what may be seen of it at each moment."""

    def __init__(self, scenario: Scenario, folder: Path, power_cuts: bool = False) -> None:
        self.scenario = scenario
        self._folder = folder
        self._names = itertools.count()
        self._sound: set[Any] = set()
        self._checked: set[Any] = set()
        with scenario.rules(), not_waiting_for_the_disk():
            disk = self.new_disk()
            for steps in scenario.before:
                for _ in steps(disk / RUN):
                    pass
            self.before = disk
            root = self.copy_of_before()
            self.contents = [seen(root / RUN)]
            with Disk(root, power_cuts) as self.disk:
                for _ in scenario.do(root / RUN):
                    self.disk.acknowledge()
                    self.contents.append(seen(root / RUN))
        self.root = root

    def new_disk(self) -> Path:
        """An empty folder that stands for a disk."""
        disk = self._folder / f"disk{next(self._names)}"
        disk.mkdir(parents=True)
        return disk

    def copy_of_before(self) -> Path:
        """A disk with what the scenario begins with."""
        disk = self._folder / f"disk{next(self._names)}"
        shutil.copytree(self.before, disk)
        return disk

    def check_kills(self) -> None:
        """Raise `BrokenPromiseError` where a process that is killed at some moment breaks a promise; the last first."""
        for moment in reversed(self.disk.moments):
            self.check(moment.killed, moment.acknowledged, moment.after)

    def check_power_cuts(self) -> None:
        """Raise `BrokenPromiseError` where a power cut at some moment breaks a promise; the last first."""
        for moment in reversed(self.disk.moments):
            for number, tree in enumerate(moment.power_cut):
                self.check(tree, moment.acknowledged, f"{moment.after}, power cut {number}")

    def allowed(self, acknowledged: int) -> list[Content]:
        """What may be seen when so many steps were acknowledged: these, or these and the next one."""
        return self.contents[acknowledged : acknowledged + 2]

    def check(self, tree: Tree, acknowledged: int, where: str, allowed: list[Content] | None = None) -> bool:
        """Raise `BrokenPromiseError` unless a disk that holds this keeps the promise; tells whether it is new."""
        key = _without_what_nobody_reads(tree), acknowledged
        if key in self._checked:
            return False
        self._checked.add(key)
        disk = self._folder / "state"
        try:
            write_tree(tree, disk)
            self.check_disk(disk, allowed or self.allowed(acknowledged), where)
        finally:
            shutil.rmtree(disk)
        return True

    def check_disk(self, disk: Path, allowed: list[Content], where: str) -> None:
        """Raise `BrokenPromiseError` unless this disk keeps the promise; then it is at the end of the scenario."""
        path = disk / RUN
        with self.scenario.rules(), not_waiting_for_the_disk():
            try:
                found = seen(path)
                assert found in allowed, f"seen are {_short(found)}, expected {' or '.join(map(_short, allowed))}"
                self._check_shown(path, found)
                for _ in self.scenario.do(path):
                    pass
                assert_goes_on(path, self.contents[-1])
            except Exception as error:
                raise BrokenPromiseError(f"{self.scenario}, after {where}: {type(error).__name__}: {error}") from error

    def _check_shown(self, path: Path, found: Content) -> None:
        # It depends on nothing but the files that Zarr reads, so that each combination is looked at once.
        private = re.compile("/epoch/(tmp|locks|commits)/")
        visible = frozenset(file for file in _files_in(path) if not private.search(file[0]))
        key = visible, len(found.get("epoch", ((), ()))[1])
        if key not in self._sound:
            assert_shown_whole(path, found, self.contents, self._sound)
            self._sound.add(key)


RUN = Path("runs", "run")
"""Where the run is on each disk; neither folder exists before it is created."""


def _without_what_nobody_reads(tree: Tree) -> frozenset[Any]:
    """A tree, where of temporary files counts which folders hold some, and of locks that they exist."""
    kept = set()
    for path, content in tree.items():
        if "/epoch/tmp/" in path and content is not None:
            kept.add((path.rpartition("/")[0], "files"))
        else:
            kept.add((path, None if "/epoch/locks/" in path else content))
    return frozenset(kept)


def _short(content: Content) -> str:
    names = [name for name in content if name.startswith("fits/") and isinstance(content[name][0], list)]
    rows = len(content["epoch"][1]) if content else 0
    fits = [f"{name} of {len(content[name][0])} epochs" for name in names]
    return ", ".join([f"{rows} epochs", *fits, f"{len(content.get('evaluations', []))} evaluations"])
