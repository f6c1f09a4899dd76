"""A Lightning fit with averaged weights, whose trained weights are recorded; needs trajkit[lightning].

    python examples/lightning_fit.py runs/lightning

`EMAWeightAveraging` validates and saves the average; the run holds the weights that are trained, and averages of its
epochs can be made at any time. Started again, it goes on from the last checkpoint, in `runs/lightning-checkpoints`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trajkit
from trajkit.training.callbacks.lightning import RecorderCallback

EPOCHS = 4


class Product(pl.LightningModule):
    """Learns the product of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(path: str) -> None:
    pl.seed_everything(0)
    x = torch.randn(256, 2)
    data = TensorDataset(x, x.prod(dim=1, keepdim=True))
    checkpoints = Path(f"{path}-checkpoints")
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[
            RecorderCallback(path),
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(checkpoints, save_last=True),
        ],
    )
    last = checkpoints / "last.ckpt"
    trainer.fit(
        Product(),
        DataLoader(data, batch_size=32, shuffle=True),
        DataLoader(data, batch_size=64),
        ckpt_path=last if last.exists() else None,
    )
    run = trajkit.open_run(path)
    print(f"{run.path}: epochs {run.epochs.tolist()}, last val_loss {run.metrics[EPOCHS - 1]['val_loss']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
