"""The shipped model in stock transformers: greedy answers that it writes itself, and its loss on books it never saw.

python -m benchmarks.demo_model --corpus corpus/ --out results/backbone/stock.json

An answer counts when it is the wanted text; where values come in any order, when the values are the wanted ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import common
from flashmem.training.backbone.batches import Source
from flashmem.training.backbone.gates import document, wilson

MODEL = common.ROOT / "src/flashmem/models/demo"


def answers(model: Any, tokenizer: Any, source: Source, kinds: Sequence[str], count: int, tokens: int) -> list[Any]:
    """One row per kind: first questions of `count` documents, answered by `generate`."""
    rows = []
    for kind in kinds:
        right, start, wrong = 0, time.perf_counter(), []
        for index in range(count):
            row = document(kind, source, tokens, f"stock/{index}")
            answer = row.answers[0]
            prompt = torch.from_numpy(row.ids[: answer.start].astype(np.int64))[None]
            made = model.generate(prompt, max_new_tokens=len(answer.weights) + 8, do_sample=False)[0, prompt.shape[1] :]
            got = tokenizer.decode(made, skip_special_tokens=True)
            wanted = tokenizer.decode(row.ids[answer.start : answer.stop].tolist(), skip_special_tokens=True)
            same = _values(got) == _values(wanted) if answer.also else got == wanted
            right += bool(same)
            if not same:
                wrong.append({"got": got, "wanted": wanted})
        interval = [round(value, 4) for value in wilson(right, count)]
        rows.append({"kind": kind, "tokens": tokens, "documents": count, "exact": right / count, "interval": interval})
        common.log(rows[-1], f"{time.perf_counter() - start:.0f} s")
        rows[-1]["wrong"] = wrong
    return rows


def _values(text: str) -> list[str]:
    return sorted(value.strip() for value in text.split(","))


@torch.no_grad()
def book_loss(model: Any, source: Source, passages: int, tokens: int) -> dict[str, Any]:
    """Mean loss per token, nats, over passages of held-out books."""
    generator = np.random.default_rng(0)
    losses = []
    for _ in range(passages):
        text, _ = source.corpus.passage(generator, tokens)
        ids = torch.from_numpy(text.astype(np.int64))[None]
        losses.append(float(model(ids, labels=ids).loss))
    characters = len(source.lexicon.tokenizer.decode(text.tolist())) / len(text)
    mean = float(np.mean(losses))
    return {
        "passages": passages,
        "tokens_each": tokens,
        "nats_per_token": round(mean, 4),
        "standard_error": round(float(np.std(losses, ddof=1) / passages**0.5), 4),
        "characters_per_token": round(characters, 2),
        "bits_per_character": round(mean / np.log(2) / characters, 3),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by flashmem.training.backbone.corpus")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", default=["single", "multikey", "multivalue", "multiquery", "vt", "ahead"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = Source.load(args.corpus, "test")
    result = {
        "dtype": "float32",
        "book_loss": book_loss(model, source, 12, 1024),
        "answers": answers(model, tokenizer, source, args.kinds, args.documents, args.tokens),
    }
    common.write_result(args.out, "demo_model", result, started)


if __name__ == "__main__":
    main()
