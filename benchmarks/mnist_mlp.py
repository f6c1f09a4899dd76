"""Record a real training: an MLP of 1.33 M weights on MNIST, 40 epochs by default.

    python benchmarks/mnist_mlp.py RUN [--epochs 40]

A run that is there is continued where it stops. The data is found through benchmarks/data.py.
"""

from __future__ import annotations

import argparse
import time

import torch
from models import mlp
from torch import nn

import trajkit
from data import mnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    images, labels = (torch.from_numpy(part) for part in mnist("train"))
    test_images, test_labels = (torch.from_numpy(part) for part in mnist("t10k"))
    torch.manual_seed(0)
    model = mlp(784, 1024, 512, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with trajkit.Recorder(model, arguments.run) as recorder:
        first = recorder.next_epoch
        if first:
            model.load_state_dict(trajkit.load_weights(arguments.run, first - 1))
        for epoch in range(first, arguments.epochs):
            began = time.perf_counter()
            for batch in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
            trained = time.perf_counter()
            recorder.record(epoch, {"test_accuracy": accuracy})
            recorded = time.perf_counter()
            print(f"epoch {epoch}: accuracy {accuracy:.4f}, {trained - began:.2f} s, record {recorded - trained:.3f} s")


if __name__ == "__main__":
    main()
