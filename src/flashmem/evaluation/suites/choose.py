"""From a suite's name and what the user said to its items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...accounting.models import shipped_model
from ...training.backbone.tasks import Lexicon
from ...training.backbone.tokenizer import BOS_ID
from ..items import ItemSet
from . import mini, multi_turn, official, perplexity, ruler

OWN = (mini.SUITE, multi_turn.SUITE, perplexity.SUITE, ruler.SUITE)
SUITES = (*OWN, *official.LOADERS)


def make(
    suite: str,
    *,
    lengths: Sequence[int],
    n: int,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    per_document: int | None = None,
    corpus: Path | None = None,
    text: Path | None = None,
    model: str | Path | None = None,
    data: Path | None = None,
) -> ItemSet:
    """Generate or load a suite; options that it does not take are refused.

    Raises ValueError for an unknown suite or option, or a missing file, naming what to get and where to put it.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known are {', '.join(SUITES)}")
    given = {"tasks": tasks, "per-document": per_document, "corpus": corpus, "text": text, "data": data}
    if strays := sorted(name for name, value in given.items() if value is not None and name not in _TAKES[suite]):
        raise ValueError(f"suite {suite} takes no --{', --'.join(strays)}")
    if suite in official.LOADERS:
        if data is None:
            raise ValueError(f"suite {suite} is read from published files: name their folder with --data")
        return official.LOADERS[suite](data)
    common: dict[str, Any] = {"n": n, "seed": seed}
    if suite == ruler.SUITE:
        essays = None if text is None else text.read_text(encoding="utf-8").split()
        made = {"filler": "prose" if text is None else text.name}
        return ruler.generate(
            _tokenizer(model), lengths, names=tasks, essays=essays, data=data, made=made, **common
        )  # fmt: skip
    if suite == perplexity.SUITE and text is not None:
        tokenizer = _tokenizer(model)
        return perplexity.generate(
            perplexity.corpus_of(text, tokenizer), lengths, first_token=tokenizer.bos_token_id,
            made={"filler": text.name}, **common,
        )  # fmt: skip
    lexicon = Lexicon.load(shipped_model())
    filler, told = mini.filler(corpus, lexicon)
    if suite == perplexity.SUITE:
        return perplexity.generate(filler, lengths, first_token=BOS_ID, made=told, **common)
    if per_document is not None:
        common["per_document"] = per_document
    if suite == multi_turn.SUITE:
        return multi_turn.generate(lexicon, filler, lengths, made=told, **common)
    return mini.generate(lexicon, filler, lengths, names=tasks or tuple(mini.TASKS), made=told, **common)


_TAKES = {
    mini.SUITE: ("tasks", "per-document", "corpus"),
    multi_turn.SUITE: ("per-document", "corpus"),
    perplexity.SUITE: ("corpus", "text"),
    ruler.SUITE: ("tasks", "text", "data"),
    **dict.fromkeys(official.LOADERS, ("data",)),
}


def _tokenizer(model: str | Path | None) -> Any:
    from transformers import AutoTokenizer  # takes seconds, and most suites do without

    return AutoTokenizer.from_pretrained(str(model or shipped_model()))


__all__ = ["SUITES", "make"]
