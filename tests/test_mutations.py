"""A harness that finds nothing proves nothing: each careless change of the library must be reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS, BrokenPromiseError, Story

from trajkit.store import root as store_root
from trajkit.store import writer as store_writer
from trajkit.store.commit import CommitRecord
from trajkit.store.fits import FitWriter
from trajkit.store.objects import LocalObjects
from trajkit.store.writer import ArchiveWriter

SCENARIO = {scenario.name: scenario for scenario in SCENARIOS}
Mutation = Callable[[pytest.MonkeyPatch], None]


def no_sync_of_files(patch: pytest.MonkeyPatch) -> None:
    sync = LocalObjects._sync
    patch.setattr(LocalObjects, "_sync", lambda self, paths: sync(self, [path for path in paths if path.is_dir()]))


def no_sync_of_names(patch: pytest.MonkeyPatch) -> None:
    sync = LocalObjects._sync
    patch.setattr(LocalObjects, "_sync", lambda self, paths: sync(self, [path for path in paths if path.is_file()]))


def no_sync_of_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalObjects, "sync", lambda *_: None)


def no_sync_of_what_is_staged(patch: pytest.MonkeyPatch) -> None:
    stage = LocalObjects.stage

    def staged(self: LocalObjects, contents: Mapping[str, bytes]) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LocalObjects, "_remember", lambda *_: None)
            stage(self, contents)

    patch.setattr(LocalObjects, "stage", staged)


def no_sync_after_the_commit(patch: pytest.MonkeyPatch) -> None:
    create = LocalObjects.create_atomically

    def create_atomically(self: LocalObjects, key: str, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LocalObjects, "sync_names", lambda *_: None)
            create(self, key, data)

    patch.setattr(LocalObjects, "create_atomically", create_atomically)


def commit_before_data(patch: pytest.MonkeyPatch) -> None:
    create, create_atomically = LocalObjects.create, LocalObjects.create_atomically
    waiting: list[tuple[Any, ...]] = []

    def commit(self: LocalObjects, key: str, data: bytes) -> None:
        create_atomically(self, key, data)
        while waiting:
            create(*waiting.pop())

    patch.setattr(LocalObjects, "create", lambda *arguments: waiting.append(arguments))
    patch.setattr(LocalObjects, "create_atomically", commit)


def grow_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    commit = ArchiveWriter._commit

    def grown(self: ArchiveWriter, record: CommitRecord, data: bytes) -> None:
        self._grow(self._grown((*self.records, record)))
        commit(self, record, data)

    patch.setattr(ArchiveWriter, "_commit", grown)


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    def replace(self: LocalObjects, contents: Mapping[str, bytes]) -> None:
        for key, data in contents.items():
            descriptor = os.open(self.ready(key), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                os.write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    patch.setattr(LocalObjects, "replace", replace)


def commit_record_in_place(patch: pytest.MonkeyPatch) -> None:
    def create_atomically(self: LocalObjects, key: str, data: bytes) -> None:
        self.create(key, data)
        self.sync_names()

    patch.setattr(LocalObjects, "create_atomically", create_atomically)


def cleared_where_nothing_is_shown(patch: pytest.MonkeyPatch) -> None:
    """Opening takes the shapes, which may lag behind, for what is committed."""
    read_all_records, document = store_writer.read_all_records, store_root.read_document
    patch.setattr(
        store_writer,
        "read_all_records",
        lambda objects, marks: read_all_records(objects, marks)[
            : document(objects, "epoch/zarr.json")["shape"][0] if objects.exists("epoch/zarr.json") else 0
        ],
    )


def nothing_rolled_forward(patch: pytest.MonkeyPatch) -> None:
    names = LocalObjects.names
    patch.setattr(LocalObjects, "names", lambda self, prefix: [] if prefix.endswith("/c") else names(self, prefix))


def old_version_removed_first(patch: pytest.MonkeyPatch) -> None:
    complete = FitWriter._complete

    def impatient(self: FitWriter, *arguments: Any) -> str:
        self._objects.delete_tree(f"fits/{self.name}/{self._version - 1}")
        return complete(self, *arguments)

    patch.setattr(FitWriter, "_complete", impatient)


def fit_before_its_objects(patch: pytest.MonkeyPatch) -> None:
    put, commit = LocalObjects.put, FitWriter.commit
    late: list[Callable[[], None]] = []
    patch.setattr(LocalObjects, "put", lambda *arguments: late.append(lambda: put(*arguments)))
    patch.setattr(LocalObjects, "sync", lambda *_: None)

    def committed(self: FitWriter, *arguments: Any) -> None:
        commit(self, *arguments)
        while late:
            late.pop()()

    patch.setattr(FitWriter, "commit", committed)


CAUGHT_BY_CRASHES = [
    (commit_before_data, "record"),
    (commit_before_data, "create"),
    (grow_before_the_commit, "record"),
    (write_in_place, "record"),
    (write_in_place, "update"),
    (commit_record_in_place, "record"),
    (cleared_where_nothing_is_shown, "record"),
    (nothing_rolled_forward, "record"),
    (old_version_removed_first, "update"),
    (fit_before_its_objects, "fit"),
]
CAUGHT_BY_POWER_CUTS = [
    (no_sync_of_files, "record"),
    (no_sync_of_files, "create"),
    (no_sync_of_files, "record shards"),
    (no_sync_of_files, "evaluate"),
    (no_sync_of_names, "record"),
    (no_sync_of_names, "create"),
    (no_sync_of_names, "fit"),
    (no_sync_of_names, "evaluate"),
    (no_sync_of_what_is_staged, "record"),
    (no_sync_of_what_is_staged, "create"),
    (no_sync_of_blocks, "fit"),
    (no_sync_of_blocks, "update"),
    (no_sync_after_the_commit, "record"),
]


def _id(value: Any) -> str:
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("mutation", "scenario"), CAUGHT_BY_CRASHES, ids=_id)
def test_a_crash_reports(mutation: Mutation, scenario: str, fast_folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        story = Story(SCENARIO[scenario], fast_folder)
        with pytest.raises(BrokenPromiseError, match="after"):
            story.check_kills()


@pytest.mark.parametrize(("mutation", "scenario"), CAUGHT_BY_POWER_CUTS, ids=_id)
def test_a_power_cut_reports(mutation: Mutation, scenario: str, fast_folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        story = Story(SCENARIO[scenario], fast_folder, power_cuts=True)
        last = story.disk.moments[-1]
        story.check(last.killed, last.acknowledged, last.after)  # without the cut no harm is done
        with pytest.raises(BrokenPromiseError, match="power cut"):
            story.check_power_cuts()
