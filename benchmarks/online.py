"""Online CMD beside a training: what an update costs, against averaging the weights, and what memory it takes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable

import torch
from measure import ROUNDS, alone, in_turn, table
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trajkit

EMA = "`AveragedModel.update_parameters`, EMA"
ONLINE = "`OnlineCMD.update_parameters`"
REASSIGNED = "`OnlineCMD.update_parameters`, modes re-assigned"
PLACES = 4


def resnet18(width: int = 64) -> nn.Module:
    """The layers of ResNet18 for CIFAR-10, 11,173,962 weights with a width of 64, without what they compute."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)]
    inside = width
    for out in (width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width):
        layers += [nn.Conv2d(inside, out, 3, bias=False), nn.BatchNorm2d(out)]
        layers += [nn.Conv2d(out, out, 3, bias=False), nn.BatchNorm2d(out)]
        if inside != out:
            layers += [nn.Conv2d(inside, out, 1, bias=False), nn.BatchNorm2d(out)]
        inside = out
    return nn.Sequential(*layers, nn.Linear(8 * width, 10))


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def online() -> list[str]:
    model = resnet18()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    cmd, reassigned = trajkit.OnlineCMD(model, warmup=3), trajkit.OnlineCMD(model, warmup=3, reassign=True)
    updates: dict[str, Callable[[], None]] = {
        EMA: lambda: average.update_parameters(model),
        ONLINE: lambda: cmd.update_parameters(model),
        REASSIGNED: lambda: reassigned.update_parameters(model),
    }
    for _ in range(PLACES):
        moved(model)
        for update in updates.values():
            update()
    seconds = in_turn(3 * ROUNDS, updates)
    ratio = statistics.median(seconds[ONLINE]) / statistics.median(seconds[EMA])
    n = sum(parameter.numel() for parameter in model.parameters())
    taken = memory()
    return [
        f"## Online CMD: an update of {n:,} weights, float32 on the host, {torch.get_num_threads()} threads",
        "",
        *table(seconds, EMA),
        "",
        f"- An update takes {ratio:.2f} × what EMA takes.",
        "",
        f"Memory beyond the model, of {taken.pop('n'):,} weights, where what is always there weighs less:",
        "",
        *(f"- {what}: {floats:.2f} floats a weight." for what, floats in taken.items()),
    ]


def memory() -> dict[str, float]:
    """Floats a weight beyond the model, in a process of its own: what is held, and the peaks."""
    with tempfile.TemporaryDirectory() as folder:
        return alone(_MEMORY, folder)


_MEMORY = """
import ctypes, gc, os
sys.path.insert(0, os.getcwd())
import torch, trajkit
from online import moved, resnet18

def status(name):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept for the next allocation is nobody's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def train(model, cmd, epochs):
    for _ in range(epochs):
        moved(model)
        open("/proc/self/clear_refs", "w").write("5")
        start = status("VmRSS:")
        cmd.update_parameters(model)
    return peak() - start

small = torch.nn.Linear(300, 300)
train(small, trajkit.OnlineCMD(small, warmup=3), 5)  # what is loaded and compiled once
model = resnet18(128)
n = sum(parameter.numel() for parameter in model.parameters())
moved(model)
before = status("RssAnon:")
cmd = trajkit.OnlineCMD(model, warmup=4)
found = {"an update in the warm-up, at its peak": train(model, cmd, 3)}
found["held in the warm-up"] = status("RssAnon:") - before
found["the update that ends it, at its peak"] = train(model, cmd, 1)
found["an update after the warm-up, at its peak"] = train(model, cmd, 3)
found["held after the warm-up"] = status("RssAnon:") - before
print(json.dumps({"n": n} | {what: taken / 4 / n for what, taken in found.items()}))
"""
