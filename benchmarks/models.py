"""The models that benchmarks train, and the layers of a large one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Module:
    """Fully connected layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for inside, out in itertools.pairwise(widths):
        layers += [nn.Linear(inside, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5() -> nn.Module:
    """LeNet-5 for CIFAR-10 with max pooling and ReLU, 62,006 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and what goes past them."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        stride = 1 if inside == out else 2
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.past = nn.Sequential()
        if stride == 2:
            self.past = nn.Sequential(nn.Conv2d(inside, out, 1, 2, bias=False), nn.BatchNorm2d(out))

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.past(images))


def resnet8() -> nn.Module:
    """ResNet-8 for CIFAR-10 whose first layer has a stride of 2, so that 2 cores train it; 78,042 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16, 16), Residual(16, 32), Residual(32, 64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lenet5,
    "resnet8": resnet8,
    "mlp": lambda: mlp(784, 256, 128, 10),
}
