"""The few methods through which all access to the disk passes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from trajkit import Run, documents, fit, open_run
from trajkit.errors import DamagedRunError, InputError
from trajkit.store.arrays import PYTHON_PIPELINE, RUST_PIPELINE, encode
from trajkit.store.commit import read_records
from trajkit.store.format import array_document
from trajkit.store.objects import LocalObjects


def test_an_object_is_created_once(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    for create in (objects.create, objects.create_atomically):
        key = f"a/{create.__name__}"
        create(key, b"first")
        with pytest.raises(FileExistsError):
            create(key, b"second")
        assert objects.read(key) == b"first"
    assert not any(path.is_file() for path in (tmp_path / "epoch").rglob("*"))


def test_an_object_is_created_once_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    objects = LocalObjects(tmp_path)
    objects.create_atomically("a/b", b"first")
    with pytest.raises(FileExistsError):
        objects.create_atomically("a/b", b"second")
    assert objects.read("a/b") == b"first"


def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_room)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a/b'"):
        LocalObjects(tmp_path).create("a/b", b"data")


def test_keys_and_names(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    for key in ("b", "a/y", "a/x/1"):
        objects.create(key, b"12")
    assert sorted(key for key, _ in objects.lengths("")) == ["a/x/1", "a/y", "b"]
    assert objects.names("a") == ["x", "y"]
    assert objects.names("none") == objects.names("b") == []
    assert (objects.size("a/y"), objects.size("a/none"), objects.size("b/none")) == (2, None, None)
    objects.delete_tree("a")
    assert [key for key, _ in objects.lengths("")] == ["b"]


def test_a_fit_is_on_the_disk_before_it_exists(digits_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[tuple[int, int]] = set()
    fsync, link = os.fsync, os.link
    checked = 0

    def identity(path: Path) -> tuple[int, int]:
        return path.stat().st_dev, path.stat().st_ino

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        synced.add((os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino))

    def check(source: Path, target: Path) -> None:
        nonlocal checked
        for path in [digits_run.path, digits_run.path / "fits", *target.parent.rglob("*"), source]:
            assert identity(path) in synced, f"{path} is not on the disk when the fit begins to exist"
            checked += 1
        link(source, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "link", check)
    fit(digits_run)
    assert checked > 20
    assert identity(digits_run.path / "fits/modes10") in synced


@pytest.mark.parametrize("pipeline", [PYTHON_PIPELINE, RUST_PIPELINE])
def test_a_pipeline_that_the_user_has_set_changes_nothing(pipeline: str, digits_run: Run) -> None:
    document = array_document("float32", (2, 5), (1, 5), ("epoch", "weight"))
    values = np.arange(5, dtype=np.float32)[None]
    region = (slice(1, 2), slice(None))
    expected = {key: b"".join(parts) for key, parts in encode("a", document, region, values)}
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        found = dict(encode("a", document, region, values))
        assert {key: b"".join(parts) for key, parts in found.items()} == expected
        np.testing.assert_array_equal(open_run(digits_run.path).weights[3], digits_run.weights[3])
        assert zarr.config.get("codec_pipeline.path") == pipeline


def test_metadata_that_is_too_long_is_neither_read_nor_written(
    digits_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "SIZE_LIMIT", 100)
    with pytest.raises(DamagedRunError, match=r"zarr.json cannot be read \(\d+ bytes, at most 100 are read\)"):
        open_run(digits_run.path)
    with pytest.raises(DamagedRunError, match=r"commit record .* cannot be read \(\d+ bytes, at most 100 are read\)"):
        read_records(digits_run.archive.objects, {})
    with pytest.raises(InputError, match=r"could not be read again \(\d+ bytes, at most 100 are read\)"):
        fit(digits_run)
    assert digits_run.fits == ()
