"""Record the trainings that CMD is compared on: LeNet-5 and a small ResNet on CIFAR-10, an MLP on MNIST.

    python benchmarks/trainings.py CACHE [--only lenet5-adam] [--seeds 3]

Each is recorded by name, such as CACHE/trainings/lenet5-adam-0, and goes on where it was interrupted. Several such
processes share the work, each on one thread: start as many as there are cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import MODELS
from torch import Tensor, nn

import trajkit
from data import cifar10, mnist
from trajkit.errors import RunLockedError
from trajkit.store.format import METADATA
from trajkit.training.naive import OverwritingCMD, ReferencesOnly

BATCH = 128
WARMUP = 20
LEARNING_RATES = {
    ("lenet5", "adam"): 1e-3,
    ("lenet5", "sgd"): 0.01,
    ("resnet8", "adam"): 1e-3,
    ("resnet8", "sgd"): 0.05,
    ("mlp", "adam"): 1e-3,
    ("mlp", "sgd"): 0.05,
}
EPOCHS = {"lenet5": 100, "resnet8": 50, "mlp": 50}

EMBEDDINGS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, Path], Any]] = {
    "embedded": lambda model, optimizer, run: trajkit.EmbeddedCMD(model, optimizer, warmup=WARMUP, run=run),
    "embedded-centroid": lambda model, optimizer, run: trajkit.EmbeddedCMD(
        model, optimizer, warmup=WARMUP, run=run, references="centroid", decay=0.9, members=1.0
    ),
    "embedded-few": lambda model, optimizer, run: trajkit.EmbeddedCMD(
        model, optimizer, warmup=WARMUP, run=run, references="centroid", decay=0.9, members=0.05
    ),
    "overwriting": lambda model, _, run: OverwritingCMD(model, warmup=WARMUP, run=run),
    "references": lambda model, optimizer, run: ReferencesOnly(model, optimizer, warmup=WARMUP, run=run),
}


@dataclass(frozen=True)
class Training:
    """Which model is trained by which optimizer ("adam", "sgd", each also "-cosine"), and how CMD is embedded."""

    model: str
    optimizer: str
    seed: int
    embedding: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.optimizer, self.embedding, str(self.seed))))

    @property
    def epochs(self) -> int:
        return EPOCHS[self.model]

    @property
    def plain(self) -> Training:
        """The same without CMD."""
        return Training(self.model, self.optimizer, self.seed)

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        kind = self.optimizer.removesuffix("-cosine")
        rate = LEARNING_RATES[self.model, kind]
        if kind == "adam":
            return torch.optim.Adam(model.parameters(), rate)
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def rate(self, epoch: float) -> float:
        """What the learning rate is multiplied by."""
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2 if self.optimizer.endswith("-cosine") else 1.0


def every_training(seeds: int) -> Iterator[Training]:
    """Those of the table of embedded CMD first, then the others, one seed after the other."""
    for embedding in (None, *EMBEDDINGS):
        yield from (Training("lenet5", "adam", seed, embedding) for seed in range(seeds))
    for seed in range(seeds):
        for model in EPOCHS:
            for optimizer in ("adam", "adam-cosine", "sgd", "sgd-cosine"):
                yield Training(model, optimizer, seed)


@dataclass(frozen=True)
class Images:
    """Pixels of a data set, as uint8, and how a batch of them is made."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    crop: bool

    @classmethod
    def of(cls, model: str, cache: Path) -> Images:
        if model == "mlp":
            parts = [mnist(split) for split in ("train", "t10k")]
            train, test = ((torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in parts)
            return cls(train, test, crop=False)
        images, labels = map(torch.from_numpy, cifar10("train", cache))
        padded = nn.functional.pad(images, (4, 4, 4, 4))
        test_images, test_labels = map(torch.from_numpy, cifar10("test", cache))
        return cls((padded, labels), (_normalised(test_images), test_labels), crop=True)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in random order, of images that are cropped from a margin of 4 pixels and flipped at random."""
        images, labels = self.train
        windows = images.unfold(2, 32, 1).unfold(3, 32, 1) if self.crop else None
        for chosen in torch.randperm(len(labels)).split(BATCH):
            if windows is None:
                yield images[chosen], labels[chosen]
                continue
            down, right = torch.randint(0, 9, (2, len(chosen)))
            batch = windows[chosen, :, down, right]
            flip = torch.rand(len(chosen)) < 0.5
            yield _normalised(torch.where(flip[:, None, None, None], batch.flip(3), batch)), labels[chosen]


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    spread = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]
    return ((images / 255 - mean) / spread).contiguous(memory_format=torch.channels_last)  # a fifth faster by it


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """On the test images, between 0 and 1."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(*(part.split(1000) for part in test), strict=True)]
    model.train()
    return float(sum(right)) / len(test[1])


def train(training: Training, cache: Path) -> None:
    """Record a training, or the rest of it; with CMD embedded, from where the plain one was after the warm-up."""
    path, plain = run_of(cache, training), run_of(cache, training.plain)
    torch.manual_seed(training.seed)
    model = MODELS[training.model]()
    optimizer = training.optimizer_of(model)
    with trajkit.Recorder(model, path) as recorder:
        warm = plain.with_suffix(".warm.pt")
        if recorder.next_epoch >= training.epochs or (training.embedding and not warm.exists()):
            return
        images = Images.of(training.model, cache)
        embedding = EMBEDDINGS[training.embedding](model, optimizer, plain) if training.embedding else None
        state = path.with_suffix(".pt")
        if not state.exists() and embedding is not None:
            for epoch in range(WARMUP):
                model.load_state_dict(trajkit.load_weights(plain, epoch))
                embedding.step()
            state = warm
        first = _load(state, model, optimizer, embedding) if state.exists() else 0
        for epoch in range(first, training.epochs):
            began = time.perf_counter()
            _train_epoch(training, epoch, model, optimizer, images)
            if embedding is not None:
                embedding.step()
            found = accuracy(model, images.test)
            if epoch >= recorder.next_epoch:
                share = {"embedded": embedding.share} if hasattr(embedding, "share") else {}
                recorder.record(epoch, {"test_accuracy": found, **share}, wait=True)
            _save(path.with_suffix(".pt"), epoch + 1, model, optimizer, embedding)
            if epoch + 1 == WARMUP and embedding is None:
                _save(warm, WARMUP, model, optimizer, None)
            print(f"{training.name} {epoch}: {found:.4f}, {time.perf_counter() - began:.1f} s", flush=True)


def run_of(cache: Path, training: Training) -> Path:
    return cache / "trainings" / training.name


def recorded(cache: Path, model: str, optimizer: str, embedding: str | None = None) -> list[trajkit.Run]:
    """The runs of all seeds that are complete."""
    found = []
    for seed in itertools.count():
        training = Training(model, optimizer, seed, embedding)
        if not (run_of(cache, training) / METADATA).exists():  # a recorder without an epoch leaves an empty folder
            return found
        run = trajkit.open_run(run_of(cache, training))
        if run.last_epoch == training.epochs - 1:
            found.append(run)
    return found


def one_of_each(cache: Path) -> list[Path]:
    """A complete run of each kind of training, with CMD embedded or not."""
    kinds = {(each.model, each.optimizer, each.embedding) for each in every_training(seeds=1)}
    found = [recorded(cache, *kind) for kind in sorted(kinds, key=str)]
    return [Path(runs[0].path) for runs in found if runs]


def _train_epoch(
    training: Training, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images
) -> None:
    steps = math.ceil(len(images.train[1]) / BATCH)
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for step, (x, y) in enumerate(images.epoch()):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * training.rate(epoch + step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def _save(path: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, embedding: Any) -> None:
    state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if embedding is not None:
        state["embedding"] = embedding.state_dict()
    torch.save(state | {"random": torch.get_rng_state()}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, embedding: Any) -> int:
    state = torch.load(path, weights_only=False)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if "embedding" in state:
        embedding.load_state_dict(state["embedding"])
    torch.set_rng_state(state["random"])
    return int(state["epoch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--only", default="", help="the start of a training's name")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for training in every_training(arguments.seeds):
        if training.name.startswith(arguments.only):
            try:
                train(training, arguments.cache)
            except RunLockedError:
                print(f"{training.name} is recorded by another process", flush=True)


if __name__ == "__main__":
    main()
