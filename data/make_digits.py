"""Record the run `data/digits` anew: python data/make_digits.py DIRECTORY

See data/README.md. The seed is fixed; on another machine the last digits of the weights differ.
"""

from __future__ import annotations

import sys

import torch

from trajkit.demo import record_digits

if __name__ == "__main__":
    torch.set_num_threads(1)
    run = record_digits(sys.argv[1], epochs=40, seed=0)
    print(f"{run.path}: {len(run.epochs)} epochs, {run.size_bytes} bytes, {run.metrics[39]}")
