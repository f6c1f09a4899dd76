"""Runs in an object store, on a real S3 server: the same promise, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from click.testing import CliRunner
from conftest import correlated, vector_layout
from counting import append
from obstore.store import MemoryStore
from s3 import S3, Trouble, conflict, hanging, lost, process, s3_server, unavailable, wait_until
from safetensors.torch import load_file
from torch import nn

import trajkit
from trajkit import Recorder, RunWriter, evaluate, fit, load_weights, open_run, write_checkpoint
from trajkit.errors import DamagedRunError, InputError, PathExistsError, RunLockedError, RunNotFoundError, StorageError
from trajkit.store import lease as lease_module
from trajkit.store import remote
from trajkit.store.remote import RemoteObjects
from trajkit_cli.main import main

LEASE_S = 1.5


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


_numbers = itertools.count()


@pytest.fixture
def bucket(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of one's own; leases are short, and so is the patience with a server."""
    monkeypatch.setattr(lease_module, "LEASE_S", LEASE_S)
    monkeypatch.setattr(remote, "LEASE_S", LEASE_S)
    monkeypatch.setattr(remote, "SMALL_S", 1.0)
    server.requests.clear()
    yield server.bucket(f"bucket{next(_numbers)}")
    assert server.troubles == [], "some trouble was met by no request"


@pytest.fixture
def url(bucket: Any) -> str:
    """Where there is no run yet."""
    return f"s3://{bucket.name}/runs/first"


def keys(bucket: Any) -> set[str]:
    return {item.key for item in bucket.objects.all()}


def content(bucket: Any, key: str) -> bytes:
    return bucket.Object(f"runs/first/{key}").get()["Body"].read()


def record(url: str, n_epochs: int) -> None:
    with RunWriter(url) as writer:
        for epoch in range(len(writer.epochs), n_epochs):
            append(writer, epoch)


def assert_whole(url: str, n_epochs: int) -> None:
    run = open_run(url)
    assert run.epochs.tolist() == list(range(n_epochs))
    np.testing.assert_array_equal(run.weights[:], np.repeat(np.arange(n_epochs)[:, None], 300, axis=1))
    np.testing.assert_array_equal(run.trajectory("count"), np.arange(n_epochs) * 10)


# --- The same as on a disk


def test_a_model_is_recorded_fitted_and_given_back(url: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))
    for place in (url, tmp_path / "run"):
        with Recorder(model, place) as recorder:
            for epoch in range(6):
                with torch.no_grad():
                    for number, parameter in enumerate(model.parameters()):
                        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                recorder.record(epoch, {"epoch": epoch})
            assert recorder.next_epoch == 6
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))
    there, here = open_run(url), open_run(tmp_path / "run")
    assert there.path == url
    np.testing.assert_array_equal(there.weights[:], here.weights[:])
    fits = [fit(run, modes=3, samples=100, name="mine", updatable=True) for run in (there, here)]
    for array in ("mode", "scale", "mean", "correlation", "reference"):
        np.testing.assert_array_equal(getattr(fits[0], array), getattr(fits[1], array))
    files = [write_checkpoint(run, 5, tmp_path / f"{n}.safetensors", "mine") for n, run in enumerate((there, here))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_file(files[0]).keys() == model.state_dict().keys()
    torch.testing.assert_close(load_weights(url, 3)["0.weight"], load_weights(tmp_path / "run", 3)["0.weight"])
    table = evaluate(there, lambda state: float(state["0.bias"].sum()), fit="mine", epochs=[4, 5])
    assert open_run(url).evaluations == (table,)
    with RunWriter(url) as writer:
        writer.append(
            there.layout,
            6,
            there.weights[5] * 2,
            {d: there.archive.read(f"buffers/{d}", [5], (0, s))[0] for d, s in there.layout.buffer_sizes.items()},
        )
    updated = trajkit.update(url, "mine")
    assert updated.epochs.tolist() == list(range(7))
    assert updated.stored.version == 1


def test_a_run_of_many_objects_is_read_as_on_a_disk(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkit.store.format.COLUMN_GRID", 32)
    monkeypatch.setattr("trajkit.store.format.CHUNK_VALUES", 64)
    monkeypatch.setattr("trajkit.store.format.SHARD_CHUNKS", 4)
    matrix = correlated(5, 1000)
    with RunWriter(url) as writer:
        for epoch, weights in enumerate(matrix):
            writer.append(vector_layout(1000), epoch, weights, {})
    run = open_run(url)
    np.testing.assert_array_equal(run.weights[:], matrix)
    np.testing.assert_array_equal(open_run(url).weights[1:3, 500:700], matrix[1:3, 500:700])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(run)).weights[2], matrix[2])


def test_compressed_weights_are_read_as_on_a_disk(url: str) -> None:
    rough = correlated(3, 5000).view(np.uint32) & 0xFFFF0000  # bfloat16
    with RunWriter(url) as writer:
        for epoch, weights in enumerate(rough.view(np.float32)):
            writer.append(vector_layout(5000), epoch, weights, {})
    run = open_run(url)
    assert run.archive.reading != "raw"
    np.testing.assert_array_equal(run.weights[:], rough.view(np.float32))


def test_an_object_is_fetched_once_and_the_copies_go_with_the_run(url: str, server: S3) -> None:
    record(url, 4)
    run = open_run(url)
    server.requests.clear()
    for _ in range(3):
        run.weights[:], run.weights[1:3, 5:9]
    assert sorted(server.requests) == [("GET", f"{url[4:]}/weights/c/{row}/0") for row in range(4)]
    folder = run.archive.objects.files
    assert (folder / "weights/c/3/0").is_file()
    del run
    assert not folder.exists()


def test_the_command_line_takes_urls(url: str, bucket: Any, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "epoch0.pt")
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "epoch1.pt")
    for arguments in (
        ["record", url, str(tmp_path / "epoch0.pt"), str(tmp_path / "epoch1.pt")],
        ["info", url],
        ["fit", url, "--modes", "2", "--samples", "9"],
        ["reconstruct", url, "--fit", "modes2", "--epoch", "1", "-o", str(tmp_path / "out.safetensors")],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert f"{url}: 2 epochs" in CliRunner().invoke(main, ["info", url]).output
    assert {key.split("/")[1] for key in keys(bucket)} == {"first"}


def test_a_cluster_fits_a_run_in_an_object_store(url: str) -> None:
    from distributed import Client

    record(url, 3)
    with RunWriter(url) as writer:
        writer.append(
            writer.layout,
            3,
            np.arange(300, dtype=np.float32),
            {"float32": np.zeros(3, np.float32), "int64": np.zeros(1, np.int64)},
        )  # type: ignore[arg-type]
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        fitted = fit(url, modes=1, samples=20, scheduler=client)
    np.testing.assert_array_equal(fitted.mode, fit(url, modes=1, samples=20).mode)


def test_damage_names_the_place(url: str, bucket: Any) -> None:
    record(url, 3)
    bucket.put_object(Key="runs/first/weights/c/1/0", Body=b"x" + content(bucket, "weights/c/1/0")[1:])
    with pytest.raises(DamagedRunError, match=rf"{url}: epoch 1: 'w': object weights/c/1/0 does not have the content"):
        open_run(url).weights[:]
    bucket.put_object(Key="runs/first/weights/c/1/0", Body=b"short")
    with pytest.raises(DamagedRunError, match="epoch 1: 'w': object weights/c/1/0 is 5 bytes long"):
        open_run(url).weights[:]
    bucket.Object("runs/first/weights/c/1/0").delete()
    with pytest.raises(DamagedRunError, match="epoch 1: 'w': object weights/c/1/0 is missing"):
        open_run(url).weights[:]


def test_nothing_there_and_something_else_there(url: str, bucket: Any) -> None:
    with pytest.raises(RunNotFoundError, match=rf"{url}: no run here"):
        open_run(url)
    bucket.put_object(Key="runs/first/mine.txt", Body=b"mine")
    with pytest.raises(PathExistsError, match=r"expected a run or an empty folder, found 'mine.txt'"):
        RunWriter(url)
    assert keys(bucket) == {"runs/first/mine.txt"}
    for wrong in ("s3://", "ftp://host/run", "s3:///"):
        with pytest.raises(InputError, match="expected a URL such as s3://bucket/run"):
            open_run(wrong)
    for path in ("s3:/bucket/run", Path("s3://bucket/run")):
        with pytest.raises(InputError, match="s3:/bucket/run: a path, expected s3://bucket/run; write two slashes"):
            RunWriter(path)


# --- Trouble on the way


@pytest.mark.parametrize("trouble", [unavailable, lost, hanging, conflict])
@pytest.mark.parametrize(
    "part",
    ["weights/c/", "probe/c/", "epoch/c/", "epoch/commits", "weights/zarr.json", "first/zarr.json", "locks/writer"],
)
def test_a_put_that_meets_trouble_is_done_once(part: str, trouble: Trouble, url: str, server: S3) -> None:
    if trouble is conflict and "zarr.json" in part:
        pytest.skip("a put without a condition has no conflict")
    record(url, 1)
    with RunWriter(url) as writer:
        server.troubles.append(("PUT", part, trouble))
        append(writer, 1)
        append(writer, 2)
        wait_until(lambda: not server.troubles)
    assert_whole(url, 3)


@pytest.mark.parametrize("trouble", [unavailable, lost, hanging])
def test_a_read_that_meets_trouble_is_asked_again(trouble: Trouble, url: str, server: S3) -> None:
    record(url, 3)
    server.troubles += [("GET", part, trouble) for part in ("commits/00000001", "weights/c/2/0", "zarr.json")]
    assert_whole(url, 3)


def test_a_server_that_is_gone_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "RETRIES", 1)
    with pytest.raises(StorageError, match=rf"{url}2: zarr.json: the object store says .*; check the URL"):
        open_run(url + "2")


def test_a_bucket_that_does_not_exist_is_told(server: S3, bucket: Any) -> None:  # noqa: ARG001
    with pytest.raises((StorageError, RunNotFoundError), match="s3://nowhere/run"):
        open_run("s3://nowhere/run")
    with pytest.raises(StorageError, match=r"s3://nowhere/run.*NoSuchBucket"):
        RunWriter("s3://nowhere/run")


def test_a_store_that_refuses_all_writes_records_nothing(url: str, server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRIES", 0)
    remote._client.cache_clear()
    record(url, 2)
    with RunWriter(url) as writer:
        server.troubles += [("PUT", "weights/c/2", unavailable)] * remote.TRIES
        with pytest.raises(StorageError, match=r"weights/c/2/0: the object store says .*503"):
            append(writer, 2)
        assert_whole(url, 2)
        append(writer, 2)
    assert_whole(url, 3)


# --- Two writers


def test_a_second_writer_is_refused_and_told_who_holds_the_run(url: str) -> None:
    with RunWriter(url) as writer:
        append(writer, 0)
        began = time.monotonic()
        with pytest.raises(RunLockedError, match=rf"{url}: the run is being written by process {os.getpid()} on"):
            RunWriter(url)
        assert time.monotonic() - began < LEASE_S
        append(writer, 1)
    record(url, 3)
    assert_whole(url, 3)


RECORD = """
import trajkit, trajkit.store.lease
from counting import append
trajkit.store.lease.LEASE_S = 1.5
writer = trajkit.RunWriter(sys.argv[1])
epoch = len(writer.epochs)
while True:
    append(writer, epoch)
    print(epoch, flush=True)
    epoch += 1
"""


def test_a_killed_writer_loses_nothing_and_gives_way(url: str) -> None:
    acknowledged = 0
    for round_ in range(4):
        with process(RECORD, url) as recording:
            assert recording.stdout is not None
            for _ in range(3):
                acknowledged = int(recording.stdout.readline()) + 1
            time.sleep(0.013 * round_)
            recording.kill()
            acknowledged = max([acknowledged, *(int(line) + 1 for line in recording.stdout)])
        run = open_run(url)
        found = len(run.epochs)
        assert acknowledged <= found <= acknowledged + 1
        assert_whole(url, found)
    began = time.monotonic()
    record(url, found + 1)
    assert time.monotonic() - began > LEASE_S / 2  # the dead one's lease had to run out
    assert_whole(url, found + 1)


def test_a_writer_whose_lease_somebody_deletes_acknowledges_nothing(url: str, bucket: Any) -> None:
    with RunWriter(url) as writer:
        append(writer, 0)
        bucket.Object("runs/first/epoch/locks/writer").delete()
        with pytest.raises((InputError, RunLockedError), match=r"has lost the run to another|has taken the run over"):
            append(writer, 1)
    assert_whole(url, 1)
    record(url, 3)
    assert_whole(url, 3)


@pytest.mark.parametrize("others", [0, 1])
def test_a_writer_that_slept_past_its_lease_acknowledges_nothing(others: int, url: str) -> None:
    """It sleeps where it hurts most: when its data is written, and the next thing is the commit record."""
    sleeper = RunWriter(url)
    append(sleeper, 0)
    state, objects = sleeper._writer._lock._state, sleeper._writer._objects  # type: ignore[attr-defined]

    def wake_up_late(key: str, data: bytes) -> None:
        state.renew = lambda: None
        with RunWriter(url) as other:
            for epoch in range(1, 1 + others):
                append(other, epoch)
        del state.renew, objects.create_atomically
        objects.create_atomically(key, data)

    objects.create_atomically = wake_up_late
    what = "another writer has recorded one here" if others else "another writer has taken the run over"
    with pytest.raises(RunLockedError, match=f"epoch 1: {what}; open "):
        append(sleeper, 1)
    with pytest.raises(InputError, match="the writer is closed, or has lost the run to another"):
        append(sleeper, 1)


def test_many_writers_at_once_make_one_run(url: str) -> None:
    def attempt(_: int) -> RunWriter | None:
        try:
            return RunWriter(url)
        except RunLockedError:
            return None

    with ThreadPoolExecutor(4) as pool:
        writers = [writer for writer in pool.map(attempt, range(4)) if writer is not None]
    assert len(writers) == 1
    append(writers[0], 0)
    writers[0].close()
    assert_whole(url, 1)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("recorded", [0, 2])
def test_a_crash_at_any_request_loses_nothing(recorded: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request that changes the store, before or after it; of a store in memory, there are many."""
    url = "s3://bucket/run"
    points = 0
    for at in itertools.count(1):
        store = MemoryStore()
        monkeypatch.setattr(remote, "_client", lambda *_, _store=store: _store)
        record(url, recorded)
        count = 0

        def request(original: Any, *arguments: Any, _at: int = at, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > _at or (count == _at and not after):
                raise Crash
            result = original(*arguments, **options)
            if count == _at:
                raise Crash
            return result

        with monkeypatch.context() as patch:
            patch.setattr(lease_module._State, "end", lambda _: None)  # a dead process gives nothing back
            patch.setattr(lease_module._State, "renew_until_the_end", lambda _: None)
            changing = {name: partial(request, getattr(obstore, name)) for name in ("put", "delete", "copy")}
            patch.setattr(remote, "_obstore", lambda _changing=changing: SimpleNamespace(**vars(obstore) | _changing))
            try:
                append(RunWriter(url), recorded)
                break
            except Crash:
                points += 1
        with contextlib.suppress(RunNotFoundError):
            found = len(open_run(url).epochs)
            assert recorded <= found <= recorded + 1
            assert_whole(url, found)
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "LEASE_S", 0.02)
            writer = RunWriter(url)
            patch.setattr(lease_module, "LEASE_S", 10)
            for epoch in range(len(writer.epochs), recorded + 2):
                append(writer, epoch)
            writer.close()
        assert_whole(url, recorded + 2)
    assert points > 12


def test_a_forked_child_is_told(url: str) -> None:
    record(url, 1)
    child = os.fork()
    if child == 0:
        try:
            open_run(url)
        except StorageError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert_whole(url, 1)


def test_profiles_are_used_where_boto3_is(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    remote._client.cache_clear()
    record(url, 2)
    assert_whole(url, 2)


def test_a_profile_that_does_not_exist_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    remote._client.cache_clear()
    result = CliRunner().invoke(main, ["info", f"{url}-by-nobody"])
    remote._client.cache_clear()
    assert result.exit_code == 1
    assert result.output.startswith("Error: the credentials for AWS cannot be found (")
    assert result.output.endswith("check AWS_PROFILE\n")
    assert result.output.count("\n") == 1


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    result = CliRunner().invoke(main, ["verify", "s3://bucket/run"])
    assert result.output == "Error: runs in object stores need obstore; pip install 'trajkit[cloud]'\n"


def test_objects_have_names_and_lengths(url: str) -> None:
    objects = RemoteObjects(url)
    for key in ("b", "a/y", "a/x/1"):
        objects.create(key, b"12")
    objects.create("b", b"1", b"2")  # the same again, as after a lost answer
    with pytest.raises(FileExistsError):
        objects.create("b", b"34")
    assert sorted(objects.lengths("")) == [("a/x/1", 2), ("a/y", 2), ("b", 2)]
    assert (objects.names(""), objects.names("a"), objects.names("nothing")) == (["a", "b"], ["x", "y"], [])
    objects.move("a/y", "c/y")
    objects.delete_tree("a")
    objects.delete("a/y")
    assert [key for key, _ in objects.lengths("")] == ["b", "c/y"]
    assert (objects.size("b"), objects.size("nothing"), objects.exists("c")) == (2, None, False)
