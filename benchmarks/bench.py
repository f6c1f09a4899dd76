"""All benchmarks, one after the other; each writes its part of benchmarks/RESULTS.md.

    python benchmarks/bench.py CACHE [PART …]

CACHE is the folder with the recorded trainings (mnist_mlp.py, trainings.py); synthetic runs are recorded there, some of
them for the moment. Without a PART all are done but those of `TRAINED`, whose trainings take hours.
Everything is compared in the same process, in turn; the archives are in the page cache.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import automatic
import fit
import importing
import integrity
import modelling
import online
import recording
import references
import scaling
import synthetic
from measure import MACHINE

from trajkit.device import open_device
from trajkit.errors import InputError

TRAINED = ("modelling", "references", "automatic")
RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = f"""# Results of the benchmarks

Written by `make bench`; ratios matter, seconds depend on the machine and on what else it does. {MACHINE}.
"""


def run_of(cache: Path, n_weights: int, n_epochs: int, bfloat16: bool = False) -> Path:
    path = cache / f"synthetic-{n_weights}x{n_epochs}{'-bfloat16' if bfloat16 else ''}"
    synthetic.record(path, n_weights, n_epochs, bfloat16)
    return path


def gpu() -> list[str]:
    try:
        open_device("cuda")
        found = "Run `python benchmarks/gpu.py RUN --write` for the table, benchmarks/RESULTS-gpu.md."
    except InputError as error:
        found = f"Not measured: {error}."
    return ["## GPU", "", found]


def parts(cache: Path) -> dict[str, Callable[[], list[str]]]:
    return {
        "small": lambda: fit.against_reading(cache / "mnist", 7, official_too=True),
        "kinds": lambda: fit.kinds(cache / "mnist"),
        "large": lambda: fit.against_reading(run_of(cache, 11_000_000, 100), 3, official_too=True),
        "coded": lambda: fit.against_reading(run_of(cache, 4_000_000, 40, bfloat16=True), 5, official_too=False),
        "kernels": fit.kernels,
        "sizes": lambda: scaling.sizes(cache),
        "clustering": scaling.clustering,
        "workers": lambda: fit.workers(run_of(cache, 11_000_000, 100)),
        "reconstruct": lambda: fit.reconstruct(run_of(cache, 11_000_000, 100)),
        "integrity": lambda: integrity.integrity(cache, run_of(cache, 11_000_000, 100)),
        "importing": lambda: importing.importing(cache),
        "recording": lambda: recording.recording(cache),
        "online": online.online,
        "modelling": lambda: modelling.modelling(cache),
        "references": lambda: references.references(cache),
        "automatic": lambda: automatic.automatic(cache),
        "gpu": gpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("part", nargs="*")
    arguments = parser.parse_args()
    every = parts(arguments.cache)
    written = RESULTS.read_text() if RESULTS.exists() else ""
    found = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n(?=<!--|\Z)", written, flags=re.DOTALL))
    for name in arguments.part or [part for part in every if part not in TRAINED]:
        found[name] = "\n".join(every[name]()) + "\n"
        print(found[name], flush=True)
        body = "\n".join(f"<!-- {part} -->\n{found[part]}" for part in every if part in found)
        RESULTS.write_text(f"{HEADER}\n{body}")


if __name__ == "__main__":
    main()
