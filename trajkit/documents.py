"""The one reader of JSON. What it is given may come from a stranger, so it bounds the work before it begins.

A document is UTF-8 without NaN, without an infinity, without a name twice in one object and without half a surrogate
pair. Its size, its depth and the number of its values are capped; an integer has at most 20 digits, as one of 64 bits.
With these caps a document takes at most about 0.2 GB and a second to read, whatever is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any

SIZE_LIMIT = 32 << 20
VALUES_LIMIT = 1 << 20
DEPTH_LIMIT = 32
DIGITS_LIMIT = 20
TOO_DEEP = f"nested more than {DEPTH_LIMIT} levels deep"


def parse(data: bytes) -> Any:
    """What a JSON document says; raises `ValueError` where it is none, or is beyond a cap."""
    require_size(len(data))
    _require_few(data)
    try:
        document = json.loads(
            data.decode(), parse_int=_integer, parse_float=_finite, parse_constant=_refused, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    _require_shallow(document)
    if b"\\u" in data:  # half a surrogate pair can be written so, and is no text
        json.dumps(document, ensure_ascii=False).encode()
    return document


def require_size(n_bytes: int) -> None:
    """Raise `ValueError` for a document that is longer than any that is read."""
    if n_bytes > SIZE_LIMIT:
        raise ValueError(f"{n_bytes} bytes, at most {SIZE_LIMIT} are read")


def require_fields(document: Any, kinds: Mapping[str, type | UnionType]) -> dict[str, Any]:
    """`document`, if it is an object with these fields of these types; raises `ValueError` naming one that is not."""
    if not isinstance(document, dict):
        raise ValueError(f"expected an object with {', '.join(kinds)}, found {shown(document)}")
    for name, kind in kinds.items():
        if name not in document:
            raise ValueError(f"'{name}' is missing")
        require_kind(document[name], kind, f"'{name}'")
    return document


def require_kind(value: Any, kind: type | UnionType, what: str) -> Any:
    """`value`, if it is of a type; raises `ValueError`. True is no integer here."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        raise ValueError(f"{what} is {shown(value)}, expected {getattr(kind, '__name__', kind)}")
    return value


def _require_few(data: bytes) -> None:
    if sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) > VALUES_LIMIT:
        raise ValueError(f"more than {VALUES_LIMIT} values")


def _require_shallow(document: Any) -> None:
    level = [document]
    for _ in range(DEPTH_LIMIT):
        held = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not held:
            return
        level = [value for values in held for value in values]
    raise ValueError(TOO_DEEP)


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_LIMIT:
        raise ValueError(f"an integer of {len(digits)} digits, at most {DIGITS_LIMIT} are read")
    return int(digits)


def _finite(spelled: str) -> float:
    value = float(spelled)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{spelled[:40]} is no number of 64 bits")
    return value


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def shown(value: Any) -> str:
    """A value as a message can name it, whatever it is."""
    return f"{value!r:.40}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
