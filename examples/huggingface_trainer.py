"""A tiny GPT-2, trained by the Hugging Face Trainer and recorded by a callback; needs trajkit[transformers].

    python examples/huggingface_trainer.py runs/gpt2

Nothing is downloaded. Started again, it goes on from the last checkpoint, `runs/gpt2-checkpoints/checkpoint-<step>`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import trajkit
from trajkit.training.callbacks.huggingface import RecorderCallback


def sequences(n: int) -> list[dict[str, torch.Tensor]]:
    """Numbers that are to be counted on."""
    ids = [(torch.arange(12) * (number % 4 + 1) + number) % 31 for number in range(n)]
    return [{"input_ids": row, "labels": row} for row in ids]


def main(path: str) -> None:
    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    checkpoints = f"{path}-checkpoints"
    arguments = TrainingArguments(
        checkpoints,
        num_train_epochs=4,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=sequences(64),
        eval_dataset=sequences(8),
        callbacks=[RecorderCallback(path)],
    )
    last = get_last_checkpoint(checkpoints) if Path(checkpoints).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    run = trajkit.open_run(path)
    print(f"{run.path}: epochs {run.epochs.tolist()}, last eval_loss {run.metrics[4]['eval_loss']:.3f}")
    trainer.model.load_state_dict(trajkit.load_weights(run, 2))  # any epoch, for from here on


if __name__ == "__main__":
    main(sys.argv[1])
