"""The words in names of checkpoints: of time, of what never counts, and of copies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Kind = Literal["epoch", "step", "count"]
"""What a number after a word of time counts; after ``checkpoint``, ``ckpt`` or ``revision`` the name does not say."""

LETTERS = r"[^\W\d_]"

TIME_WORDS: Mapping[Kind, str] = {
    "epoch": rf"{LETTERS}*epoch|ep(?!s)",
    "step": rf"{LETTERS}*step|n?iter|iteration",
    "count": rf"{LETTERS}*checkpoint|{LETTERS}*ckpt|chkpt|revision",
}
"""Words before a number that counts; also with a plural s."""

A_TIME_WORD = re.compile(rf"(?:{'|'.join(TIME_WORDS.values())})s?")
BEFORE_TIME = re.compile(r"(epoch|ep|step|iter|iteration)s?")
"""Words after a number that may count: ``10000_steps``, ``12epoch``."""

SETTINGS = rf"{LETTERS}*(?:num|max|min|total|warmup|decay)|n|every|per"
"""Before a word of time: the number after it is a setting of the training, as in ``max_steps=1000``."""

THOUSANDS = {"": 1, "k": 10**3, "m": 10**6}
"""What a letter after a number of steps stands for: ``step_20k``."""

UNITS = re.compile(r"[kmbtgdxe]|bits?|px|bn|mb|gb")
"""Letters after a number that make a size of it: ``7b``, ``8bit``, ``512x512``."""

NEVER_AFTER = re.compile(
    # metrics
    r"acc|accuracy|loss|val|valid|validation|eval|test|score|f|auc|map|ap|iou|miou|dice|psnr|ssim|fid|bleu|rouge|wer|cer"
    r"|ppl|perplexity|mse|mae|rmse|err|error|top|reward|return|metric|precision|recall|kappa|elo|bpb|nll|kl|lpips"
    # versions, seeds and settings
    r"|v|ver|version|seed|fold|cv|split|trial|exp|experiment|run|bs|batch|batchsize|lr|wd|alpha|beta|gamma|temp|dropout"
    r"|stage|phase|level|task|client|group|id|avg|ave|average|mean|tokens?|toks|samples?"
    # sizes and parts
    r"|size|dims?|layers?|heads?|hidden|width|depth|rank|world|gpus?|nodes?|workers?|shard|part|of|num|patch|img|res"
    r"|resolution|crop|class|classes|cls|fp|bf|u?int|float|bits?"
    # models and datasets
    r"|resnet|resnext|wrn|wideresnet|vgg|densenet|mobilenet|efficientnet|inception|vit|deit|swin|bert|roberta|gpt|llama"
    r"|mistral|qwen|gemma|phi|opt|pythia|olmo|bloom|falcon|unet|yolo|cifar|imagenet|mnist|coco|voc"
    # a letter says nothing, but for a generator
    r"|[a-fh-z]"
)
"""Words before a number that is a metric, a version, a seed, a size, or part of a name of a model or a dataset."""

NEVER_BEFORE = re.compile(r"tokens?|toks|samples?|images?|imgs|params|class|classes|way|shot|bit")

NOUNS = re.compile(
    r"model|weights?|net|network|state|params|snapshot|saved?|dump|episode|round|update|generator|agent|policy|actor"
    r"|critic|encoder|decoder"
)
"""Words that a number may stand directly after: ``model12`` counts, ``resnet50`` does not."""

COPY_WORDS = re.compile(rf"(?<!{LETTERS})(best|last|latest|final|newest|bestmodel|modelbest)(?!{LETTERS})")
