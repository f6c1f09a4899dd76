"""Objects in an object store, through obstore: S3 and what speaks its protocol, Google Cloud Storage, Azure.

A put is atomic and safe when it returns, and a reader sees it at once. There is no rename and no lock: what must not be
overwritten is put on the condition that it does not exist, and `trajkit.store.lease` says who may write.

Credentials and endpoint come from where each service's own tools look: ``AWS_ACCESS_KEY_ID`` and the like,
``AWS_ENDPOINT_URL``, roles of the machine, and the profiles in ``~/.aws`` where boto3 is installed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

from ..digest import Hasher, digest_of_file
from ..errors import InputError, StorageError
from ..forks import in_forked_child
from .disk import SoundFile, identity_of
from .format import LOCKS
from .lease import LEASE_S, TRIES, ConflictError, Lease
from .objects import Bytes, DamagedObjectError, require_content, require_length

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")

CONNECT_S = 5
SMALL_S = 20
"""For a request that carries up to `SMALL_BYTES`; a server that does not answer is asked again."""
LARGE_S = 300
SMALL_BYTES = 1 << 20
RETRIES = 4
PIECE_BYTES = 1 << 20


class RemoteObjects:
    """The objects under the prefix of a URL such as ``s3://bucket/runs/first``. See `trajkit.store.place.Objects`.

    What is read as a file is fetched once into a temporary folder, which goes with the last user of these objects.
    """

    at_a_time = 16

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES or not rest.strip("/"):
            raise InputError(
                f"{url}: expected a URL such as s3://bucket/run, gs://bucket/run or az://account/container/run"
            )
        _obstore()  # or say what to install
        self.root = url.rstrip("/")
        self._spool_lock = threading.Lock()
        self._spool: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteObjects, (self.root,)

    def owned_by(self, owner: str) -> RemoteObjects:  # noqa: ARG002 (nothing is ever half written here)
        """The same objects."""
        return self

    @property
    def above(self) -> list[str]:
        """Object stores have no folders."""
        return []

    @property
    def files(self) -> Path:
        """The folder into which objects are fetched, by key."""
        with self._spool_lock:
            if self._spool is None:
                self._spool = Path(tempfile.mkdtemp(prefix="trajkit-"))
                weakref.finalize(self, _remove, self._spool, os.getpid())
            return self._spool

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Length in bytes, None where there is no such object."""
        found = self._head(key)
        return None if found is None else int(found["size"])

    def read(self, key: str) -> bytes:
        """All bytes of an object; raises `FileNotFoundError`."""
        return self.read_versioned(key)[0]

    def read_versioned(self, key: str) -> tuple[bytes, Any]:
        """All bytes of an object and its version; raises `FileNotFoundError`."""
        with self._asking(key) as store:
            found = _obstore().get(store, key)
            return bytes(found.bytes()), _version(found.meta)

    def digest(self, key: str) -> str:
        """Hash of an object's content."""
        hasher = Hasher()
        with self._asking(key, large=True) as store:
            for piece in _obstore().get(store, key).stream(min_chunk_size=PIECE_BYTES):
                hasher.update(piece)
        return hasher.hexdigest()

    def sound_file(self, key: str, length: int, hash: str) -> SoundFile:  # noqa: A002
        """A file that holds an object; raises `DamagedObjectError` unless it has this length and hash."""
        target = self.files / key
        if not self._is_fetched(target, hash):
            self._fetch(key, target, length, hash)
        return SoundFile(str(target), identity_of(target.stat()))

    def _is_fetched(self, target: Path, hash: str) -> bool:  # noqa: A002
        return target.is_file() and digest_of_file(target) == hash

    def _fetch(self, key: str, target: Path, length: int, hash: str) -> None:  # noqa: A002
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        hasher = Hasher()
        try:
            with self._asking(key, large=length > SMALL_BYTES) as store, partial.open("xb") as file:
                found = _obstore().get(store, key)
                require_length(key, found.meta["size"], length)
                for piece in found.stream(min_chunk_size=PIECE_BYTES):
                    hasher.update(piece)
                    file.write(piece)
            require_content(key, hasher.hexdigest(), hash)
            os.replace(partial, target)
        except FileNotFoundError as error:
            raise DamagedObjectError(key, "is missing") from error
        finally:
            partial.unlink(missing_ok=True)

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted; none where there is no such prefix."""
        with self._asking(prefix) as store:
            found = _obstore().list_with_delimiter(store, prefix or None)
        keys = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return sorted({key.rstrip("/").rpartition("/")[2] for key in keys})

    def lengths(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys of all objects under a prefix, at any depth, and their lengths in bytes."""
        with self._asking(prefix) as store:
            for some in _obstore().list(store, prefix or None):
                for item in some:
                    yield item["path"], int(item["size"])

    def create(self, key: str, *parts: Bytes) -> None:
        """Write a new object; raises `FileExistsError` rather than touch one of another content."""
        data = b"".join(parts)
        for attempt in range(1, TRIES + 1):
            try:
                self.put_if(key, data, None)
                return
            except ConflictError:
                with contextlib.suppress(FileNotFoundError):  # somebody is putting it: asked again below
                    if self.read(key) == data:  # ours: the answer to an earlier request was lost on the way
                        return
                    raise FileExistsError(17, "exists with other content", f"{self.root}/{key}") from None
            except StorageError:
                if attempt == TRIES:
                    raise
            time.sleep(0.1 * attempt)
        raise StorageError(f"{self.root}/{key}: another writer is at this object; try again")

    def create_atomically(self, key: str, data: Bytes) -> None:
        """As `create`."""
        self.create(key, data)

    def put(self, key: str, *parts: Bytes) -> None:
        """As `create`: helpers that do the same put the same bytes."""
        self.create(key, *parts)

    def replace(self, contents: Mapping[str, Bytes]) -> None:
        """Exchange objects atomically, in their order: a reader sees the old bytes of each or the new ones."""
        for key, data in contents.items():
            self._put(key, data, "overwrite")

    def stage(self, contents: Mapping[str, Bytes]) -> None:
        """What is put is safe at once."""

    def put_if(self, key: str, data: Bytes, version: Any) -> Any:
        """Write an object if it still has a version, or does not exist where that is None; its new version.

        Raises `ConflictError` where it has another one.
        """
        return _version(self._put(key, data, "create" if version is None else version))

    def _put(self, key: str, data: Bytes, mode: Any) -> Any:
        """Put an object in one request; raises `ConflictError` where that has a condition that does not hold."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._asking(key, large=len(data) > SMALL_BYTES) as store:
            try:
                return _obstore().put(store, key, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                raise ConflictError(key) from error
            except FileNotFoundError as error:  # no such bucket
                raise self._refused(key, error) from error

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        with contextlib.suppress(FileNotFoundError), self._asking(key) as store:
            _obstore().delete(store, key)

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects under a prefix."""
        keys = [key for key, _ in self.lengths(prefix)]
        if keys:
            with self._asking(prefix) as store:
                _obstore().delete(store, keys)

    def move(self, key: str, target: str) -> None:
        """Give an object, if there is one, another key that is free."""
        with contextlib.suppress(FileNotFoundError), self._asking(key, large=True) as store:
            _obstore().copy(store, key, target, overwrite=True)
            self.delete(key)

    def make_room(self, prefix: str) -> None:
        """Object stores have no folders."""

    def ready_temporary(self) -> None:
        """Nothing is ever half written."""

    def clear_temporary(self) -> None:
        """Nothing was left half written."""

    def sync(self, keys: Iterable[str]) -> None:
        """What was put is safe."""

    def sync_names(self, *also: str) -> None:
        """What was put is safe, by its name."""

    def lock(self, name: str, what: str) -> Lease:
        """A lease that nobody else has; raises `RunLockedError` naming who holds `what`."""
        return Lease(self, f"{LOCKS}/{name}", f"{self.root}: {what}")

    def is_locked(self, name: str) -> bool:
        """Whether somebody has renewed the lease lately, going by this machine's clock."""
        key = f"{LOCKS}/{name}"
        found = self._head(key)
        if found is None or datetime.now(UTC) - found["last_modified"] > timedelta(seconds=2 * LEASE_S):
            return False
        return not Lease.is_released(self.read(key))

    def _head(self, key: str) -> Any:
        with contextlib.suppress(FileNotFoundError), self._asking(key) as store:
            return _obstore().head(store, key)
        return None

    @contextlib.contextmanager
    def _asking(self, key: str, large: bool = False) -> Iterator[Any]:
        """The client to ask for an object; what obstore raises becomes a `StorageError`."""
        if in_forked_child():
            raise StorageError(
                f"{self.root}: an object store cannot be used in a forked process; start it with 'spawn'"
                " or 'forkserver'"
            )
        from obstore.exceptions import BaseError

        try:
            yield _client(self.root, LARGE_S if large else SMALL_S)
        except (BaseError, ValueError) as error:
            raise self._refused(key, error) from error

    def _refused(self, key: str, error: Exception) -> StorageError:
        what = str(error).partition("\n\nDebug source")[0].replace("\n", " ")
        return StorageError(
            f"{self.root}: {key or 'the run'}: the object store says {what[:500]};"
            " check the URL, the credentials, the endpoint and the network"
        )


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise InputError("runs in object stores need obstore; pip install 'trajkit[cloud]'") from error
    return obstore


@cache
def _client(url: str, timeout_s: float) -> Any:
    """A client for a URL, shared by all: it keeps connections open."""
    from obstore.store import from_url

    scheme = url.partition("://")[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        options = _aws_options(endpoint)
    return from_url(
        url,
        client_options={
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=timeout_s),
            "allow_http": endpoint.startswith("http://") or os.environ.get("AWS_ALLOW_HTTP", "") == "true",
        },
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=3 * timeout_s)},
        **options,
    )


def _aws_options(endpoint: str) -> dict[str, Any]:
    """What the environment says to AWS's own tools and obstore does not read."""
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        with contextlib.suppress(ImportError, ValueError):  # no boto3, or it knows no credentials either
            from botocore.exceptions import BotoCoreError
            from obstore.auth.boto3 import Boto3CredentialProvider

            try:
                options["credential_provider"] = Boto3CredentialProvider()
            except BotoCoreError as error:
                raise StorageError(f"the credentials for AWS cannot be found ({error}); check AWS_PROFILE") from error
    return options


def _version(found: Any) -> Any:
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has a copy of the finalizer, not of the folder
        rmtree(folder, ignore_errors=True)
