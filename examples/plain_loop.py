"""A training loop of one's own that records every epoch, and goes on where it stopped when it is started again.

python examples/plain_loop.py runs/plain
trajkit record runs/plain -- python examples/plain_loop.py      # the same: the command names the run
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import trajkit

EPOCHS = 5


def main(path: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(256, 4)
    y = x.prod(dim=1, keepdim=True)
    with trajkit.Recorder(model, path) as recorder:
        if recorder.next_epoch > 0:
            model.load_state_dict(trajkit.load_weights(recorder.path, recorder.next_epoch - 1))
        for epoch in range(recorder.next_epoch, EPOCHS):
            for batch in torch.randperm(256).split(32):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
            recorder.record(epoch, {"loss": loss})  # copies the weights and returns; they are committed meanwhile
    run = trajkit.open_run(recorder.path)
    print(f"{run.path}: epochs {run.epochs.tolist()}, last loss {run.metrics[EPOCHS - 1]['loss']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
