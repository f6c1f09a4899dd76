"""The group's own ``zarr.json``: what the run is, and the metadata of every node in one place.

xarray warns about a store without consolidated metadata, and with it a reader that opens the group sees all arrays grow
at the same instant. It is derived from the nodes' own metadata each time one of them changes, under a lock that is held
for that moment only, since a fit may be saved while a training records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import DamagedRunError, RunNotFoundError, UnsupportedFormatError
from ..layout import ParameterLayout
from .format import ATTRIBUTE, FORMAT, LOCKS, METADATA, METADATA_LIMIT, group_document
from .lock import brief_lock
from .objects import LocalObjects


def create_root(objects: LocalObjects, layout: ParameterLayout) -> None:
    """Write the group of a new run."""
    _write(objects, {ATTRIBUTE: {"format": FORMAT, "layout": layout.to_json()}})


def refresh_root(objects: LocalObjects) -> None:
    """Bring the consolidated metadata up to date with the nodes."""
    with brief_lock(objects.path(f"{LOCKS}/root")):
        _write(objects, read_document(objects, METADATA)["attributes"])


def layout_of_root(objects: LocalObjects) -> ParameterLayout:
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


def read_document(objects: LocalObjects, key: str) -> dict[str, Any]:
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


def write_document(objects: LocalObjects, path: str, document: dict[str, Any]) -> None:
    """Write the ``zarr.json`` of the node at `path`, over an older one if there is one."""
    objects.replace(f"{path}/{METADATA}" if path else METADATA, json.dumps(document, indent=2).encode())


def _write(objects: LocalObjects, attributes: dict[str, Any]) -> None:
    nodes = {"kind": "inline", "must_understand": False, "metadata": dict(_nodes(objects, ""))}
    write_document(objects, "", {**group_document(attributes), "consolidated_metadata": nodes})


def _nodes(objects: LocalObjects, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in objects.names(path):
        below = f"{path}/{name}" if path else name
        if objects.exists(f"{below}/{METADATA}"):
            document = read_document(objects, f"{below}/{METADATA}")
            yield below, document
            if document["node_type"] == "group":
                yield from _nodes(objects, below)
