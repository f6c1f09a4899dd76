"""One process of a distributed training records; the others learn from it what they have to know."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from torch import distributed

from ..errors import ClusterError, InputError

_recorders: Counter[str] = Counter()


def this_rank() -> int:
    """The rank of this process in a distributed training, 0 in any other."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def is_alone() -> bool:
    """Whether there are no other processes."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


class Word:
    """What rank 0 tells the others about its recorder of `path`, one message after the other.

    It goes through the key-value store of the process group, not through a collective: rank 0 waits for nobody, and may
    be the only one that has a recorder.
    """

    def __init__(self, path: object) -> None:
        name = str(path)
        self._name = f"trajkit/recorder/{name}/{_recorders[name]}"
        self._said = 0
        _recorders[name] += 1

    def say(self, message: Any) -> None:
        """Tell the others (rank 0); `message` is plain JSON."""
        if not is_alone():
            self._store().set(self._next(), json.dumps(message))

    def hear(self) -> Any:
        """The next message of rank 0; raises `ClusterError` where it says nothing for as long as the group waits."""
        key = self._next()
        try:
            return json.loads(self._store().get(key))
        except (distributed.DistError, RuntimeError) as error:
            raise ClusterError(
                f"rank {this_rank()} hears nothing of rank 0 about {key} ({error}); make the recorder, and record, on"
                " all ranks"
            ) from error

    def _next(self) -> str:
        self._said += 1
        return f"{self._name}/{self._said}"

    @staticmethod
    def _store() -> Any:
        return distributed.distributed_c10d._get_default_store()


def refusal(error: BaseException) -> dict[str, str]:
    """The message that something was refused."""
    return {"refused": f"{type(error).__name__}: {error}"}


def require_granted(message: Any) -> Any:
    """The message of rank 0, if it is none that something was refused; raises `InputError` with that."""
    if isinstance(message, dict) and "refused" in message:
        raise InputError(f"rank 0: {message['refused']}")
    return message
