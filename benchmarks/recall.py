"""Recall end to end: facts hidden in random tokens, asked one by one of a saved memory under several policies.

A document is a row of facts `MAGIC k k v v v END` among random tokens; a question is `QRY k k`, its answer `v v v`.
The document is read once and saved; every policy opens that same memory for every question. The first answer token
comes from the question's prefill, which reads the whole history under every policy; the others are decoded from
resident pages only, with the selection that level 1 made at the question's last token. So the first token is no measure
of a policy: tokens are also counted one by one.

python -m benchmarks.recall --model MODEL_DIR --out results/recall/trial.json   (writes results/recall/trial.md too)
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from flashmem import Engine, LSAConfig, MemoryIndexer
from flashmem.backbone import load_model

BOS, MAGIC, QRY, END = 1, 2, 4, 5
KEY_TOKENS = range(16, 512)
VALUE_TOKENS = range(512, 1024)
KEY_LENGTH, VALUE_LENGTH = 2, 3
FACT_LENGTH = 2 + KEY_LENGTH + VALUE_LENGTH
MOST_FACTS, TOKENS_PER_FACT = 400, 40


@dataclass(frozen=True)
class Document:
    """A text and all facts in it: (key tokens, value tokens)."""

    ids: list[int]
    facts: list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Setting:
    """One policy as it is compared."""

    policy: str
    keep: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return "full" if self.keep is None else f"{self.policy} {100 * self.keep:.4g} %"


@dataclass(frozen=True)
class Bench:
    """What all policies share: a model with its indexer, and the size of a page."""

    model: Any
    indexer: MemoryIndexer
    page_chunks: int

    def engine(self, setting: Setting) -> Engine:
        config = LSAConfig(
            policy=setting.policy, keep=setting.keep, seed=setting.seed, page_chunks=self.page_chunks, recency_pages=1
        )  # fmt: skip
        return Engine(self.model, indexer=self.indexer, config=config)


def make_document(tokens: int, seed: int) -> Document:
    """Random tokens with distinct facts at random places; the same for the same arguments."""
    draw = random.Random(f"document {tokens} {seed}")
    ids = [draw.randrange(KEY_TOKENS.start, VALUE_TOKENS.stop) for _ in range(tokens)]
    ids[0] = BOS
    count = min(MOST_FACTS, tokens // TOKENS_PER_FACT)
    places = draw.sample(range((tokens - 1) // FACT_LENGTH), count)
    keys = draw.sample([(a, b) for a in KEY_TOKENS for b in KEY_TOKENS], count)
    facts = [(list(key), draw.choices(VALUE_TOKENS, k=VALUE_LENGTH)) for key in keys]
    for place, (key, value) in zip(places, facts, strict=True):
        first = 1 + place * FACT_LENGTH
        ids[first : first + FACT_LENGTH] = [MAGIC, *key, *value, END]
    return Document(ids, facts)


def read(bench: Bench, document: Document, memory: Path) -> dict[str, Any]:
    """Prefill a document once and save it."""
    engine = bench.engine(Setting("native", 0.135))
    with engine.session() as session:
        seconds = common.timed(lambda: session.append(document.ids, on_progress=_progress))
        engine.check()
        session.save(memory)
    fingerprint = engine.fingerprint()
    engine.close()
    return {"read_seconds": round(seconds, 1), "model_fingerprint": fingerprint}


def ask(
    bench: Bench, setting: Setting, asked: Sequence[tuple[list[int], list[int]]], memory: Path
) -> list[dict[str, Any]]:
    """Put each question to a freshly opened session; one row per question."""
    engine, rows = bench.engine(setting), []
    for key, value in asked:
        with engine.open(memory) as session:
            session.append([QRY, *key])
            stats = session.stats()
            answer = session.generate(max_new_tokens=VALUE_LENGTH)
            if not rows:
                engine.check()
        right = [got == wanted for got, wanted in zip(answer, value, strict=False)]
        rows.append(
            {
                "right": right + [False] * (VALUE_LENGTH - len(right)),
                "pages": stats["resident_pages"] / stats["pages"],
                "paper": stats["resident_bytes_paper"] / stats["full_bytes_paper"],
                "all_in": stats["device_bytes_all_in"] / stats["full_bytes_all_in"],
            }
        )
    engine.close()
    return rows


def summary(name: str, seeds: Sequence[int], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, intervals and resident shares of one policy, its seeds pooled."""
    exact = sum(all(row["right"]) for row in rows)
    low, high = common.wilson(exact, len(rows))
    return {
        "policy": name,
        "seeds": list(seeds),
        "asked": len(rows),
        "exact": exact,
        "exact_share": round(exact / len(rows), 4),
        "exact_interval": [round(low, 4), round(high, 4)],
        "right_tokens": [sum(row["right"][i] for row in rows) for i in range(VALUE_LENGTH)],
        "resident_pages_ratio": _mean(row["pages"] for row in rows),
        "resident_bytes_paper_ratio": _mean(row["paper"] for row in rows),
        "device_bytes_all_in_ratio": _mean(row["all_in"] for row in rows),
    }


def run(args: Any) -> dict[str, Any]:
    model, _ = load_model(args.model, device="cpu", dtype=torch.float32, device_map=None)
    bench = Bench(model, MemoryIndexer.native(model, layers=tuple(args.layers)), args.page_chunks)
    compared = [[Setting("all")]]
    for keep in args.keep:
        compared += [[Setting("native", keep)], [Setting("recency", keep)]]
        compared += [[Setting("random", keep, seed) for seed in args.seeds]]
    contexts = []
    for tokens in args.contexts:
        document = make_document(tokens, args.seed)
        asked = random.Random(f"questions {tokens} {args.seed}").sample(document.facts, args.questions)
        policies = []
        with tempfile.TemporaryDirectory() as directory:
            memory = Path(directory) / "document.mem"
            reading = read(bench, document, memory)
            for settings in compared:
                rows = [row for setting in settings for row in ask(bench, setting, asked, memory)]
                policies.append(summary(settings[0].name, [setting.seed for setting in settings], rows))
                common.log(f"{tokens:,} tokens, {settings[0].name}: {policies[-1]['exact']} of {len(rows)} exact")
        contexts.append({"context": tokens, "facts": len(document.facts), **reading, "policies": policies})
    return {
        "model": {"name": args.model.resolve().name, "parameters": common.num_parameters(model)},
        "dtype": "fp32",
        "indexer": {"kind": "native", "csa_indices": list(bench.indexer.target_layers)},
        "page_chunks": args.page_chunks,
        "always_kept_pages": {"sink": 1, "recency": 1},
        "questions": args.questions,
        "documents_per_context": 1,
        "interval": "Wilson, 95 %; the seeds of a policy are pooled and share their questions",
        "answer": "token 1 from the question's prefill over the whole history, tokens 2 and 3 from resident pages",
        "contexts": contexts,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as two tables."""
    contexts = result["contexts"]
    header = "| policy | " + " | ".join(f"{row['context']:,} tokens" for row in contexts) + " |"
    rule = "|---" * (len(contexts) + 1) + "|"
    columns = [row["policies"] for row in contexts]
    exact = [
        f"| {rows[0]['policy']} | " + " | ".join(_exact(row) for row in rows) + " |"
        for rows in zip(*columns, strict=True)
    ]
    share = [
        f"| {rows[0]['policy']} | " + " | ".join(_share(row) for row in rows) + " |"
        for rows in zip(*columns, strict=True)
    ]
    facts = ", ".join(f"{row['facts']} facts in {row['context']:,} tokens" for row in contexts)
    return "\n".join(
        [
            f"# Recall of {result['model']['name']}, end to end",
            "",
            f"Exact answers of {result['questions']} questions about one document per length ({facts}); Wilson 95 % "
            "intervals. Seeds of random are pooled: they share questions. Pages of "
            f"{result['page_chunks']} chunks, first and last page always kept, float32, native scores of CSA index "
            f"{', '.join(map(str, result['indexer']['csa_indices']))}.",
            "",
            header,
            rule,
            *exact,
            "",
            "Resident after the question's level 1, mean over questions: share of pages · resident / full bytes in the "
            "paper's accounting (HCA entries are always resident) · device / full bytes all-in (index rows, windows, "
            "compressor state, observed hidden states, page table and slack included).",
            "",
            header,
            rule,
            *share,
            "",
            f"{result['answer'][0].upper()}{result['answer'][1:]}. Right tokens, in order:",
            "",
            header,
            rule,
            *(
                f"| {rows[0]['policy']} | "
                + " | ".join(" / ".join(map(str, row["right_tokens"])) for row in rows)
                + " |"
                for rows in zip(*columns, strict=True)
            ),
            "",
        ]
    )


def _exact(row: dict[str, Any]) -> str:
    low, high = (100 * value for value in row["exact_interval"])
    return f"{row['exact']} of {row['asked']} ({low:.0f}-{high:.0f} %)"


def _share(row: dict[str, Any]) -> str:
    names = ("resident_pages_ratio", "resident_bytes_paper_ratio", "device_bytes_all_in_ratio")
    return " · ".join(f"{100 * row[name]:.1f} %" for name in names)


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 4)


def _progress(done: int, total: int) -> None:
    if done % 8192 == 0 or done == total:
        common.log(f"read {done:,} of {total:,} tokens")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model that knows the task")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16_384, 65_536], metavar="TOKENS")
    parser.add_argument("--questions", type=int, default=50, help="per context")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.135, 0.05], help="shares of pages to keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the random policy")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="CSA indices that level 1 reads")
    parser.add_argument("--page-chunks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of documents and questions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    result = run(args)
    common.write_result(args.out, "recall", result, started)
    args.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
