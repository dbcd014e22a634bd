"""The small backbone's tokenizer: byte-level BPE in which numbers are cut into groups of three digits.

A group of up to three digits is always one token, so a seven-digit value is three tokens and copying it is three
decisions. Sentences and their leading spaces or line breaks are pre-token boundaries: a document may be tokenised
sentence by sentence and put together again, which is how training rows are built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
PAD_ID, BOS_ID, EOS_ID = range(3)
NUMBER_REPEATS = 3_000
"""How often every number below 1000 is shown to the BPE trainer; enough to outrank any merge of prose."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096, number_repeats: int = NUMBER_REPEATS) -> Tokenizer:
    """Learn merges from texts and from all groups of one to three digits."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_numbers(texts, number_repeats), trainer)
    if missing := [n for n in digit_groups() if tokenizer.token_to_id(n) is None]:
        raise ValueError(f"{len(missing)} digit groups did not become tokens, {missing[0]!r} first: vocab too small")
    return tokenizer


def digit_groups() -> list[str]:
    """All strings of one to three digits, shortest first."""
    return [f"{value:0{width}d}" for width in (1, 2, 3) for value in range(10**width)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, given the file or its directory."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}")
    return Tokenizer.from_file(str(path))


def _with_numbers(texts: Iterable[str], repeats: int) -> Iterator[str]:
    yield from texts
    numbers = "\n".join(digit_groups())
    for _ in range(repeats):
        yield numbers


__all__ = ["BOS", "BOS_ID", "EOS", "EOS_ID", "PAD", "PAD_ID", "digit_groups", "load_tokenizer", "train_tokenizer"]
