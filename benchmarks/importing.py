"""Importing a sharded checkpoint of a billion bfloat16 parameters: memory and time, against loading it.

    python benchmarks/importing.py FOLDER [--parameters 1000000000]

The checkpoint, some 2 GB, and the runs made of it, are written to FOLDER and removed again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import alone
from safetensors.torch import save_file

SHARD_BYTES = 500 << 20
WIDTH = 2048

# What a billion-parameter language model is made of, as far as shapes go: an embedding and equal layers.
LAYER = {
    "attention.qkv.weight": (3 * WIDTH, WIDTH),
    "attention.out.weight": (WIDTH, WIDTH),
    "mlp.up.weight": (4 * WIDTH, WIDTH),
    "mlp.down.weight": (WIDTH, 4 * WIDTH),
    "norm.weight": (WIDTH,),
}
EMBEDDING = (32_000, WIDTH)

IMPORTING = """
import trajkit
began = time.perf_counter()
trajkit.import_checkpoints(sys.argv[2], [sys.argv[1]], first_epoch=0)
print(json.dumps({"s": time.perf_counter() - began, "peak": peak()}))
"""

# What there is without: every shard loaded into a dict of tensors, flattened, appended.
LOADING = """
import json as documents, os
import numpy as np, torch
from pathlib import Path
from safetensors.torch import load_file
from trajkit import RunWriter
from trajkit.vector import flatten, layout_of
began = time.perf_counter()
folder = Path(sys.argv[1])
index = next(folder.glob("*.index.json"))
state = {}
for shard in sorted(set(documents.loads(index.read_text())["weight_map"].values())):
    load = load_file if shard.endswith("safetensors") else lambda path: torch.load(path, weights_only=True)
    state |= load(folder / shard)
layout = layout_of(state)
with RunWriter(sys.argv[2]) as writer:
    writer.append(layout, 0, *flatten(layout, state))
print(json.dumps({"s": time.perf_counter() - began, "peak": peak()}))
"""

BARE = """
import trajkit, torch
trajkit.import_checkpoints, trajkit.RunWriter
print(json.dumps({"s": 0.0, "peak": peak()}))
"""


def shapes(n_parameters: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model of at least so many parameters."""
    yield "embedding.weight", EMBEDDING
    of_a_layer = sum(math.prod(shape) for shape in LAYER.values())
    for layer in range(max(-(-(n_parameters - math.prod(EMBEDDING)) // of_a_layer), 1)):
        for name, shape in LAYER.items():
            yield f"layers.{layer}.{name}", shape


def write(folder: Path, n_parameters: int, safe: bool) -> int:
    """Write a sharded checkpoint as Hugging Face's libraries do, shard by shard; its number of parameters."""
    folder.mkdir(parents=True)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    n_written, n_shards = 0, 0

    def finish() -> None:
        nonlocal n_shards
        n_shards += 1
        name = f"{stem}-{n_shards:05d}.{suffix}"
        if safe:
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(n_parameters):
        shard[name] = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()
        n_written += shard[name].numel()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            finish()
    if shard:
        finish()
    index = {"metadata": {"total_size": 2 * n_written}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return n_written


def importing(cache: Path, n_parameters: int = 1_000_000_000) -> list[str]:
    """The table: each way by a process of its own, on both formats of shards."""
    folder = cache / "importing"
    shutil.rmtree(folder, ignore_errors=True)
    bare = alone(BARE)["peak"]
    rows: list[str] = []
    n_written = 0
    try:
        for safe, what in ((True, "safetensors"), (False, ".bin of torch.save")):
            n_written = write(folder / what, n_parameters, safe)
            for way, code in (("trajkit record", IMPORTING), ("loaded as a whole", LOADING)):
                found = alone(code, folder / what, folder / "run")
                shutil.rmtree(folder / "run")
                rows.append(f"| {what} | {way} | {found['peak'] / 2**30:.2f} | {found['s']:.1f} |")
            shutil.rmtree(folder / what)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        f"## Importing {n_written / 1e9:.2f} billion bfloat16 parameters ({2 * n_written / 1e9:.1f} GB) in shards",
        "",
        f"Peak of resident memory, mapped pages counted; imports alone, with PyTorch, take {bare / 2**30:.2f} GiB.",
        "",
        "| shards | way | peak GiB | s |",
        "|---|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    print("\n".join(importing(arguments.folder, arguments.parameters)))
