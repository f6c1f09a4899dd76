"""Kill recordings by the thousand and look at what each kill left: `python benchmarks/soak.py --kills 10000`.

Prints a summary as JSON, and ends with an error at the first kill that lost or tore anything; the folder is then left
as it was found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from kills import KILLS_A_RUN, WAYS, Toll, kill_fitters, kill_recorders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000, help="of recordings; one in 20 more, of fits")
    parser.add_argument("--folder", type=Path, help="on the disk to be tried; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="loops at a time")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="trajkit-soak-"))

    def new(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    began = time.perf_counter()
    toll, fits, fits_done, shown = Toll(), 0, 0, 0
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rounds = {}
        for number, start in enumerate(range(0, arguments.kills, KILLS_A_RUN)):
            kills = min(KILLS_A_RUN, arguments.kills - start)
            seed = arguments.seed * 1_000_003 + number
            rounds[pool.submit(kill_recorders, new(f"recorded{number}"), kills, WAYS[number % len(WAYS)], seed)] = 0
            if number % 4 == 3:
                rounds[pool.submit(kill_fitters, new(f"fitted{number}"), 10, seed)] = 10
        for done in as_completed(rounds):
            if rounds[done]:
                fits, fits_done = fits + rounds[done], fits_done + done.result()
            else:
                toll += done.result()
            if toll.kills >= shown + 500:
                shown = toll.kills
                print(f"{toll.kills} of {arguments.kills} kills, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    elapsed = time.perf_counter() - began
    if arguments.folder is None:
        shutil.rmtree(folder)
    summary = {
        "kills of recordings": toll.kills,
        "by phase": dict(toll.phases.most_common()),
        "epochs recorded": toll.epochs,
        "kills of fits": fits,
        "fits and updates saved": fits_done,
        "failures": 0,
        "elapsed_s": round(elapsed, 1),
        "kills per second": round((toll.kills + fits) / elapsed, 1),
        "seed": arguments.seed,
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
