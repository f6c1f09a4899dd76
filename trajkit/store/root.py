"""The group's own ``zarr.json``: what the run is, and the metadata of its arrays in one place.

xarray warns about a store without consolidated metadata, and with it a reader that opens the group sees all arrays grow
at the same instant. Only the writer of epochs writes it, so it lists the arrays that grow and not the fits and
evaluations, which are saved beside a recording and opened by their own path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..digest import ALGORITHM, canonical_json, digest
from ..documents import parse, require_fields, require_size, shown
from ..errors import DamagedRunError, InputError, RunNotFoundError, UnsupportedFormatError
from ..layout import ParameterLayout
from .format import ATTRIBUTE, BUFFERS, FORMAT, IDENTITY, LAYOUT_COPIES, METADATA, group_document
from .objects import DAMAGED_DISK
from .place import Objects

CONSOLIDATED = "consolidated_metadata"
BEGIN, END = b"{\n", b"\n}"
"""Of a document with fields, as `encoded` spells it."""


@dataclass(frozen=True)
class Root:
    """The group of a run: its ``zarr.json``, and the layout and the identity that stand there.

    `identity` is None in runs of older versions.
    """

    document: dict[str, Any]
    layout: ParameterLayout
    identity: str | None


def root_document(layout: ParameterLayout, identity: str | None = None) -> dict[str, Any]:
    """Return the group of a run without arrays; the identity is known from the first commit on."""
    known = {} if identity is None else {IDENTITY: identity}
    return group_document({ATTRIBUTE: {"format": FORMAT, "layout": layout.to_json()}, **known})


def with_identity(root: dict[str, Any], identity: str | None) -> dict[str, Any]:
    """Return the group with an identity, the same group where that is None."""
    if identity is None:
        return root
    return {**root, "attributes": {**root["attributes"], IDENTITY: identity}}


def with_arrays(root: dict[str, Any], documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The group with the consolidated metadata of these arrays."""
    nodes = dict(documents)
    if any(path.startswith(BUFFERS) for path in documents):
        nodes[BUFFERS] = group_document()
    return {**root, CONSOLIDATED: {"kind": "inline", "must_understand": False, "metadata": nodes}}


def read_root(objects: Objects) -> Root:
    """Read the group of a run.

    Raises `RunNotFoundError` where it is another one's, `UnsupportedFormatError` if it has another format than this
    version reads, `LayoutError` or `DamagedRunError` where it is damaged.
    """
    root = read_document(objects, METADATA)
    try:
        ours = require_fields(attribute_of(root, ATTRIBUTE), {"format": object})
    except ValueError:
        raise RunNotFoundError(f"{objects.root}: a Zarr node, but not a run of trajkit; check the path") from None
    if type(ours["format"]) is not int or ours["format"] != FORMAT:
        raise UnsupportedFormatError(
            f"{objects.root}: the run has format {shown(ours['format'])}, this version reads format {FORMAT};"
            " update trajkit"
        )
    identity = root["attributes"].get(IDENTITY)
    if identity is not None and not isinstance(identity, str):
        raise DamagedRunError(f"{objects.root}: {METADATA} has no identity ({shown(identity)}); trajkit repair")
    return Root(root, ParameterLayout.from_json(ours.get("layout")), identity)


def write_layout_copies(objects: Objects, layout: ParameterLayout) -> None:
    """Write the copies of the layout beside the root's."""
    objects.replace(dict.fromkeys(LAYOUT_COPIES, canonical_json(layout.to_json())))


def layout_copy(objects: Objects, key: str) -> ParameterLayout:
    """Read a copy of the layout; raise `DamagedRunError` where there is none."""
    try:
        return ParameterLayout.from_json(parse(read_small(objects, key)))
    except ValueError as error:
        raise DamagedRunError(f"{objects.root}: {key} cannot be read ({error})") from error


def sealed_group(attribute: str, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A group whose attribute holds ``{name: content, "blake3": hash of it}``."""
    return group_document({attribute: {name: content, ALGORITHM: digest(canonical_json(content))}})


def unsealed(document: dict[str, Any], attribute: str, name: str) -> dict[str, Any]:
    """The content of a sealed group; raises `ValueError` where it is not what was sealed."""
    found = require_fields(attribute_of(document, attribute), {name: dict, ALGORITHM: str})
    content: dict[str, Any] = found[name]
    if digest(canonical_json(content)) != found[ALGORITHM]:
        raise ValueError("its content does not match its hash")
    return content


def attribute_of(document: dict[str, Any], name: str) -> Any:
    """An attribute in a ``zarr.json``; raises `ValueError` where there is none."""
    return require_fields(document.get("attributes"), {name: object})[name]


def read_document(objects: Objects, key: str) -> dict[str, Any]:
    """A ``zarr.json``; raises `DamagedRunError` where it is missing, beyond a cap of `documents` or no JSON object."""
    try:
        document = parse(read_small(objects, key))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document
    except ValueError as error:
        raise DamagedRunError(f"{objects.root}: {key} cannot be read ({error}); restore it from a copy") from error


def read_small(objects: Objects, key: str) -> bytes:
    """The bytes of a document; raises `ValueError` where it is missing, lost, or longer than any that is read."""
    length = objects.size(key)
    if length is None:
        raise ValueError("missing")
    require_size(length)
    try:
        return objects.read(key)
    except OSError as error:
        if error.errno not in DAMAGED_DISK:
            raise
        raise ValueError(error.strerror) from error


class RootSpelling:
    """Spells the ``zarr.json`` of a group that grows: what stays the same, the layout above all, is spelled once."""

    def __init__(self) -> None:
        self._same: dict[str, Any] = {}
        self._spelled = b""

    def of(self, root: dict[str, Any]) -> bytes:
        """Return the group as stored; raise `InputError` where it could not be read again."""
        same = {name: value for name, value in root.items() if name != CONSOLIDATED}
        if same != self._same or not self._spelled:
            self._spelled, self._same = encoded(same, ""), same
        arrays = encoded({CONSOLIDATED: root[CONSOLIDATED]}, "")
        return self._spelled[: -len(END)] + b",\n" + arrays[len(BEGIN) :]


def write_documents(objects: Objects, documents: Mapping[str, dict[str, Any]]) -> None:
    """Write the ``zarr.json`` of each node, path -> document, in their order and over older ones if there are any."""
    objects.replace(spelled(documents))


def spelled(documents: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """The objects that hold the ``zarr.json`` of each node, path -> document."""
    return {metadata_key(path): encoded(document, path) for path, document in documents.items()}


def metadata_key(path: str) -> str:
    """The object that holds the ``zarr.json`` of a node, "" for the run itself."""
    return f"{path}/{METADATA}" if path else METADATA


def encoded(document: dict[str, Any], path: str) -> bytes:
    """A ``zarr.json`` as stored; raises `InputError` where it could not be read again."""
    return require_readable(json.dumps(document, indent=2, allow_nan=False).encode(), path or "the run")


def require_readable(data: bytes, what: str) -> bytes:
    """`data`, if it can be read again as a document; raises `InputError`."""
    try:
        parse(data)
    except ValueError as error:
        raise InputError(
            f"the metadata of {what} could not be read again ({error}); record fewer tensors or metrics, by plain names"
        ) from error
    return data
