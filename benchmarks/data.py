"""Real data for the benchmarks: from the folder that TRAJKIT_DATA names, or `shared/data` beside the repository."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATA = Path(os.environ.get("TRAJKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def mnist(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (n, 784) in [0, 1] and labels (n,) of the standard idx files; `split` is ``"train"`` or ``"t10k"``."""
    folder = DATA / "mnist"
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return (images / 255).astype(np.float32), labels.astype(np.int64)


def cifar10(split: str, cache: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of CIFAR-10; `split` is ``"train"`` or ``"test"``.

    From the standard `cifar-10-batches-py`, else from JPEG files, as a folder `cifar10_jpeg` or an archive of that name
    with ``train/<class>/<number>.jpg``; these are decoded once, into `cache`.
    """
    batches = DATA / "cifar-10-batches-py"
    if batches.is_dir():
        return _batches(sorted(batches.glob("data_batch_*" if split == "train" else "test_batch")))
    decoded = cache / f"cifar10-jpeg-{split}.npz"
    if not decoded.exists():
        cache.mkdir(parents=True, exist_ok=True)
        images, labels = _decoded(split)
        np.savez(decoded, images=images, labels=labels)
    with np.load(decoded) as arrays:
        return arrays["images"], arrays["labels"]


def _batches(files: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([part[b"labels"] for part in parts]).astype(np.int64)


def _decoded(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images: dict[str, NDArray[np.uint8]] = {}
    for name, content in _jpegs(split):
        with Image.open(io.BytesIO(content)) as image:
            images[name] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    names = sorted(images)
    classes = sorted({name.split("/")[-2] for name in names})
    labels = np.array([classes.index(name.split("/")[-2]) for name in names])
    return np.stack([images[name] for name in names]), labels


def _jpegs(split: str) -> Iterator[tuple[str, bytes]]:
    folder = DATA / "cifar10_jpeg" / split
    if folder.is_dir():
        yield from ((str(path), path.read_bytes()) for path in folder.glob("*/*.jpg"))
        return
    with tarfile.open(DATA / "cifar10_jpeg.tar.xz") as archive:
        for member in archive:
            if member.name.startswith(f"{split}/") and (file := archive.extractfile(member)) is not None:
                yield member.name, file.read()
