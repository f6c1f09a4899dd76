"""Numbers in the names of checkpoints: which of them count epochs or steps, and which never do.

A number counts after a word of time, such as ``epoch3``, ``step=1200`` or ``checkpoint-500``. A number that stands by
itself (``model_12``) may count, which `trajkit.checkpoints.labels` decides. What belongs to a metric, a version, a
dtype, a size or a seed never counts, and no more does a date or a commit hash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .words import (
    A_TIME_WORD,
    BEFORE_TIME,
    COPY_WORDS,
    LETTERS,
    NEVER_AFTER,
    NEVER_BEFORE,
    NOUNS,
    SETTINGS,
    THOUSANDS,
    TIME_WORDS,
    UNITS,
    Kind,
)

HIDDEN = "\0"
"""Stands in a name for what no label is taken from."""
SEPARATOR = rf"(?:[^\w{HIDDEN}]|_)"
"""Pattern of a character between words and numbers."""

AFTER_TIME = {
    kind: re.compile(
        rf"(?<!{LETTERS})(?P<word>{words})(?P<plural>s?)(?P<between>{SEPARATOR}{{0,3}})"
        rf"(?P<digits>[0-9]{{1,18}})(?!\d|\.\d)(?P<glued>{LETTERS}*)"
    )
    for kind, words in TIME_WORDS.items()
}
"""Patterns of a word of time and its number, by what that counts."""
TOTAL = re.compile(rf"(?<!{LETTERS})(?:{SETTINGS}){SEPARATOR}?$")
"""End of the text before a word of time whose number is a setting."""
SHARD = re.compile(rf"{SEPARATOR}*of{SEPARATOR}*\d")
"""After the number of a file among several that make up one checkpoint: ``00001-of-00004``."""
PART = re.compile(rf"\d+{SEPARATOR}*of{SEPARATOR}*\d+")
"""The same with its number."""
TOKEN = re.compile(rf"(?P<letters>{LETTERS}+)|(?P<digits>[0-9]+)|(?P<hidden>{HIDDEN}+)|(?P<separator>.)", re.DOTALL)
MOST_DIGITS = 18
"""Digits of a label, which has 64 bits."""

# What is hidden in a name before labels are looked for.
HASH = re.compile(r"(?<![^\W_])(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,64}(?![^\W_])")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
POWER = re.compile(r"\d+(?:\.\d+)?e[-+]?\d+(?![^\W_])")
DECIMAL = re.compile(r"\d+(?:\.\d+)+")
DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d(?P<gap>[-_.]?)(?:0[1-9]|1[0-2])(?P=gap)(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[-_.](?:0?[1-9]|[12]\d|3[01])[-_.](?:19|20)\d\d)(?!\d)"
    r"(?:[-_t +](?:[01]\d|2[0-3])(?P<colon>[-_:.h]?)[0-5]\d(?:(?P=colon)[0-5]\d(?:[-+]\d\d)?)?(?!\d))?"
)
BEFORE_DATE = re.compile(rf"(epoch|step|iter|iteration){SEPARATOR}?$")
"""End of the text before a number that is no date, however much it looks like one."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)*")
"""A number with its sign, whatever it is; the form of a name has # for it."""

# What libraries call the files in a checkpoint folder: the folder's name is what tells checkpoints apart.
FIXED_NAME = re.compile(
    r"[a-z_]*model\.(safetensors|bin)|.*\.index\.json|(pytorch_)?model[-_]\d+-of-\d+\.(safetensors|bin)"
    r"|mp_rank_\d+(_\d+)*(_model_states\.pt)?|model_optim_rng\.pt|consolidated\.\d+\.pth|pytorch_model_fsdp_\d+"
    r"|model_world_size_\d+_rank_\d+\.pt"
)
# What is no part of the form of a name.
SUFFIXES = re.compile(r"(\.(pt|pth|ckpt|chkpt|bin|safetensors|pkl|tar|zip|h5|hdf5|model|weights))+$")

# What trainers say of themselves beside the weights. Only the global step is sure to rise from file to file.
GLOBAL_STEP = "global_step"
STEP = (GLOBAL_STEP, "step", "iteration", "iter", "iter_num")
EPOCH = ("epoch", *STEP)
"""Fields that say an epoch, or else a step."""


@dataclass(frozen=True)
class Said:
    """The epoch and the step that a checkpoint says of itself, None where it does not."""

    epoch: int | None = None
    step: int | None = None


NOTHING_SAID = Said()


@dataclass(frozen=True)
class Bare:
    """The numbers of a name that stand by themselves, and the `form` of the name: all its numbers replaced by #."""

    form: str
    numbers: tuple[int, ...]


def counted_in(name: str, folder: bool = False) -> dict[Kind, tuple[int, ...]]:
    """Return the different numbers after words of time in a name, by what they count.

    folder: take no plural (``bert-epochs3``), which says how long a training was, unless it is all of the name.
    """
    text = _hidden(name)
    found: dict[Kind, tuple[int, ...]] = {}
    for kind in TIME_WORDS:
        matches = [(match, value) for match, value in _after_time(text, kind)]
        single = [value for match, value in matches if not match["plural"]]
        plural = [] if folder and not _is_all(text, matches) else [value for _, value in matches]
        if values := single or plural:
            found[kind] = tuple(dict.fromkeys(values))
    return found


def names_a_time_alone(name: str) -> bool:
    """Return whether a name is a word of time and its number, and nothing else, such as ``epoch_3``."""
    text = _hidden(name)
    return any(_is_all(text, list(_after_time(text, kind))) for kind in TIME_WORDS)


def bare_in(name: str) -> Bare:
    """Return the numbers of a name that stand by themselves and do not belong to what never counts."""
    text = SUFFIXES.sub("", _hidden(name))
    return Bare(NUMBER.sub("#", text), tuple(value for _, value in _bare(text)))


def is_copy(name: str) -> bool:
    """Return whether a name says best, last or the like: such a file is a copy where others have numbers."""
    return COPY_WORDS.search(name.lower()) is not None


def stands_for(path: Path) -> Path:
    """Return the path whose name tells a checkpoint from others, not a file that has the same name in each folder."""
    while FIXED_NAME.fullmatch(path.name) and path.parent.name:
        path = path.parent
    return path


def natural(path: Path) -> list[list[list[int | str]]]:
    """Return a key to sort by: the name cut into text and numbers, so that 9 comes before 10, then its folders' names.

    Numbers that never count, such as a metric, decide only where nothing else does, and hashes never.
    """
    names = [part.lower() for part in reversed(stands_for(path).parts)]
    return [[_cut(name, counting=True) for name in names], [_cut(name, counting=False) for name in names]]


def number_in(fields: Any, *names: str) -> int | None:
    """Return the first of the named fields that holds an integer, or the text of one; None where none does."""
    for name in names if isinstance(fields, Mapping) else ():
        value = fields.get(name)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value, re.ASCII):
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
            return value
    return None


def said_in(fields: Any) -> Said:
    """Return the epoch and the step among the fields of a checkpoint; a negative one, left by an end, says none."""
    epoch, step = (number_in(fields, *names) for names in (("epoch",), STEP))
    return Said(*(None if number is None or number < 0 else number for number in (epoch, step)))


def _hidden(name: str) -> str:
    """Return a name in small letters with hashes, dates and powers of ten hidden."""
    text = name.lower()
    for pattern in (UUID, HASH, POWER):
        text = pattern.sub(HIDDEN, text)
    # 20240105 is a number of steps where the name says so.
    return DATE.sub(lambda match: match[0] if BEFORE_DATE.search(text[: match.start()]) else HIDDEN, text)


def _after_time(text: str, kind: Kind) -> Iterator[tuple[re.Match[str], int]]:
    """Yield the numbers after words of time of one kind, in a name as `_hidden` gives it."""
    for match in AFTER_TIME[kind].finditer(text):
        rest = text[match.end("digits") :]
        unit = match["glued"] if UNITS.fullmatch(match["glued"]) else ""
        thousands = THOUSANDS.get(unit) if kind == "step" else None if unit else 1
        is_part = kind == "count" and (SHARD.match(rest) or NEVER_BEFORE.fullmatch(_next_word(rest)))
        is_setting = TOTAL.search(text[: match.start("word")]) or TOTAL.search(_before_word(match["word"]))
        is_negative = re.search(r"[=:]-$", match["between"])
        if thousands is not None and not is_part and not is_setting and not is_negative:
            yield match, int(match["digits"]) * thousands


def _before_word(word: str) -> str:
    """Return what is glued before the word of time itself, such as ``max`` in ``maxstep``."""
    return re.sub(r"(epoch|step|iter|iteration|checkpoint|ckpt)$", "", word)


def _is_all(text: str, matches: list[tuple[re.Match[str], int]]) -> bool:
    left = text
    for match, _ in matches:
        left = left.replace(match[0], "")
    return bool(matches) and re.sub(rf"{SEPARATOR}|global", "", left) == ""


def _bare(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Yield the numbers that stand by themselves, in a name as `_hidden` gives it."""
    shown = DECIMAL.sub(lambda match: HIDDEN * len(match[0]), text)
    shown = PART.sub(lambda match: HIDDEN * len(match[0]), shown)
    tokens = list(TOKEN.finditer(shown))
    for position, match in enumerate(tokens):
        if match.lastgroup != "digits" or len(match[0]) > MOST_DIGITS:
            continue
        before, after = tokens[:position][-1:], tokens[position + 1 : position + 2]
        owner, next_word = _word(tokens, position, -1), _word(tokens, position, 1)
        has_time_word = BEFORE_TIME.fullmatch(next_word) is not None
        is_glued = _is(before, "letters") and not NOUNS.fullmatch(owner)
        is_unit = _is(after, "letters") and not has_time_word
        if is_glued or is_unit or _is(before, "hidden") or _is(after, "hidden"):
            continue
        if NEVER_AFTER.fullmatch(owner) or A_TIME_WORD.fullmatch(owner) or NEVER_BEFORE.fullmatch(next_word):
            continue
        if has_time_word or not _may_be_hash(match[0]):
            yield match, int(match[0])


def _is(tokens: list[re.Match[str]], kind: str) -> bool:
    return bool(tokens) and tokens[0].lastgroup == kind


def _word(tokens: list[re.Match[str]], position: int, step: int) -> str:
    """Return the word before or after a number, "" where another number or nothing stands there."""
    position += step
    while 0 <= position < len(tokens) and tokens[position].lastgroup == "separator":
        position += step
    found = 0 <= position < len(tokens) and tokens[position].lastgroup == "letters"
    return tokens[position][0] if found else ""


def _may_be_hash(digits: str) -> bool:
    """Return whether digits may be an abbreviated hash without a letter: long, not padded and not round."""
    return len(digits) > 6 and not digits.startswith("0") and not digits.endswith("00")


def _next_word(text: str) -> str:
    match = re.match(rf"{SEPARATOR}*({LETTERS}+)", text)
    return match[1] if match else ""


def _cut(name: str, counting: bool) -> list[int | str]:
    """Return a name cut into text and numbers, always text first; only numbers that may count, where so asked."""
    text = UUID.sub(HIDDEN, HASH.sub(HIDDEN, name))
    if not counting:
        return [int(part) if part.isascii() and part.isdigit() else part for part in re.split(r"([0-9]+)", text)]
    text = SUFFIXES.sub("", _hidden(name))
    spans = {match.span("digits"): value for kind in TIME_WORDS for match, value in _after_time(text, kind)}
    spans |= {match.span(): value for match, value in _bare(text)}
    parts: list[int | str] = []
    end = 0
    for (start, stop), value in sorted(spans.items()):
        parts += [NUMBER.sub("#", text[end:start]), value]
        end = stop
    return [*parts, NUMBER.sub("#", text[end:])]
