"""The group's own ``zarr.json``: what the run is, and the metadata of its arrays in one place.

xarray warns about a store without consolidated metadata, and with it a reader that opens the group sees all arrays grow
at the same instant. Only the writer of epochs writes it, so it lists the arrays that grow and not the fits and
evaluations, which are saved beside a recording and opened by their own path.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import DamagedRunError, InputError, RunNotFoundError, UnsupportedFormatError
from ..layout import ParameterLayout
from .format import ATTRIBUTE, BUFFERS, FORMAT, METADATA, METADATA_LIMIT, group_document
from .place import Objects


def root_document(layout: ParameterLayout) -> dict[str, Any]:
    """The group of a new run, before it has arrays."""
    return group_document({ATTRIBUTE: {"format": FORMAT, "layout": layout.to_json()}})


def with_arrays(root: dict[str, Any], documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The group with the consolidated metadata of these arrays."""
    nodes = dict(documents)
    if any(path.startswith(BUFFERS) for path in documents):
        nodes[BUFFERS] = group_document()
    return {**root, "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes}}


def layout_of_root(objects: Objects) -> ParameterLayout:
    """The layout of the run; raises `UnsupportedFormatError` if it has another format than this version reads."""
    attributes = read_document(objects, METADATA).get("attributes")
    ours = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict) or "format" not in ours:
        raise RunNotFoundError(f"{objects.root}: a Zarr node, but not a run of trajkit; check the path")
    if ours["format"] != FORMAT:
        raise UnsupportedFormatError(
            f"{objects.root}: the run has format {ours['format']}, this version reads format {FORMAT}; update trajkit"
        )
    return ParameterLayout.from_json(ours.get("layout"))


def read_document(objects: Objects, key: str) -> dict[str, Any]:
    """A ``zarr.json``; raises `DamagedRunError` where it is missing, too long or no JSON object."""
    length = objects.size(key)
    try:
        if length is None or length > METADATA_LIMIT:
            raise ValueError("missing" if length is None else f"{length} bytes, at most {METADATA_LIMIT} are read")
        document = json.loads(objects.read(key))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document
    except (ValueError, RecursionError) as error:
        raise DamagedRunError(f"{objects.root}: {key} cannot be read ({error}); restore it from a copy") from error


def write_document(objects: Objects, path: str, document: dict[str, Any]) -> None:
    """Write the ``zarr.json`` of the node at `path`, over an older one if there is one."""
    objects.replace(f"{path}/{METADATA}" if path else METADATA, encoded(document, path))


def encoded(document: dict[str, Any], path: str) -> bytes:
    """A ``zarr.json`` as stored; raises `InputError` where it would be too long to be read again."""
    data = json.dumps(document, indent=2, allow_nan=False).encode()
    if len(data) > METADATA_LIMIT:
        raise InputError(
            f"the metadata of {path or 'the run'} has {len(data)} bytes, at most {METADATA_LIMIT} are read again;"
            " record fewer tensors or evaluate fewer metrics"
        )
    return data
