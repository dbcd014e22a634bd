"""The shipped model's decode loop: fused kernels against the reference engine, then end to end at long contexts.

python -m benchmarks.shipped_decode --out results/shipped_decode.json

Agreement. The reference engine (PyTorch, float32) answers the questions of mini-table1 greedily. Every other engine
reads the same documents, and is fed the reference's tokens: at each step its own best token is compared, and its
distribution by KL divergence, over as many tokens as the task gives an answer. In float32 every token must be the
reference's, which by induction means that decoding greedily gives the same answers; in bfloat16 the share of equal
tokens and the mean divergence have bounds, and PyTorch in bfloat16 is a row beside the kernels. Intervals are
bootstrapped over documents.

Lengths. A context of random tokens is read once; then the same session decodes with all pages resident and with the
model's own LSA settings. Contexts leave room below the model's longest text for what is decoded.

Exit status 1 where a bound is broken. On a CPU everything runs on the reference kernels, which tests the program only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import common
from flashmem import Engine, LSAConfig, Session
from flashmem.accounting.models import shipped_model
from flashmem.bench import report
from flashmem.cli.sizes import parse_tokens
from flashmem.config import KVFormat, ModelDefaults
from flashmem.evaluation import Document, Item, stats
from flashmem.evaluation.suites.choose import make
from flashmem.policy import AllPages

SUITE = "mini-table1"
ROOM = 1024
"""Tokens that a context leaves free."""
LEAST_AGREEMENT, MOST_DIVERGENCE = 0.95, 0.02
"""Bounds in bfloat16: share of tokens, and mean nats per token."""
BATCH = 16


@dataclass(frozen=True)
class Variant:
    """An engine that is compared with the reference."""

    name: str
    dtype: str
    kv_format: KVFormat = "auto"
    fused: bool = True

    @property
    def exact(self) -> bool:
        return self.dtype == "float32" and self.kv_format == "auto"


VARIANTS = (
    Variant("float32", "float32"),
    Variant("bfloat16, PyTorch", "bfloat16", fused=False),
    Variant("bfloat16", "bfloat16"),
    Variant("bfloat16, fp8 records", "bfloat16", "fp8"),
)


def settings(device: torch.device, *, fused: bool = True, **changes: Any) -> LSAConfig:
    """The model's own, on the fused kernels and in graphs where the device has them."""
    config = replace(ModelDefaults.of(shipped_model()).config(), **{"prefill_chunk": 2048} | changes)
    if not fused or device.type != "cuda":
        return config
    return replace(config, kernels="fused", prefill_kernels="fused", cuda_graphs=True)


def load(config: LSAConfig, device: torch.device, dtype: str) -> Engine:
    return Engine.from_pretrained(shipped_model(), config=config, device=device, dtype=dtype)


# ---- agreement


class Batch(NamedTuple):
    """Questions that were answered together."""

    fed: list[list[int]]
    log_SQV: torch.Tensor
    """Log-probabilities of every step, on the CPU."""
    inside_SQ: torch.Tensor
    """Steps within the length of an answer."""


@torch.no_grad()
def follow(
    engine: Engine, document: Document, items: Sequence[Item], truth: Sequence[Batch] | None = None
) -> Iterator[Batch]:
    """Batches of questions that are fed the tokens of the same batches of `truth`, or their own best ones."""
    with engine.session() as read:
        read.append(str(document.content))
        snapshot = read.snapshot()
    for number, at in enumerate(range(0, len(items), BATCH)):
        asked, log_SQV = items[at : at + BATCH], list[torch.Tensor]()
        fed: list[list[int]] = [[] for _ in asked]
        with ExitStack() as stack:
            sessions = [stack.enter_context(engine.resume(snapshot)) for _ in asked]
            for session, item in zip(sessions, asked, strict=True):
                session.append(str(item.question))
            limits = torch.tensor([item.max_new_tokens for item in asked])
            for step in range(int(limits.max())):
                log_QV = torch.stack([_logits(session) for session in sessions]).log_softmax(-1)
                log_SQV.append(log_QV.cpu())
                best = log_QV.argmax(-1).tolist() if truth is None else [row[step] for row in truth[number].fed]
                for row, token in zip(fed, best, strict=True):
                    row.append(token)
                engine.decode(sessions, best)
        yield Batch(fed, torch.stack(log_SQV), torch.arange(len(log_SQV))[:, None] < limits)


def _logits(session: Session) -> torch.Tensor:
    assert session.next_logits is not None
    return session.next_logits


def agreement(
    device: torch.device, tokens: int, questions: int, variants: Sequence[Variant]
) -> Iterator[dict[str, Any]]:
    """A row per variant; `passed` says whether its bounds hold."""
    suite = make(SUITE, lengths=[tokens], n=questions, per_document=max(1, questions // 4))
    asked = [(d, items) for d in suite.documents if (items := [item for item in suite.items if item.document == d.id])]
    reference = load(settings(device, fused=False), device, "float32")
    truth = [list(follow(reference, *pair)) for pair in asked]
    reference.close()
    for variant in variants:
        engine = load(settings(device, fused=variant.fused, kv_format=variant.kv_format), device, variant.dtype)
        equal: list[np.ndarray[Any, Any]] = []  # by document, of every token of every answer
        divergence: list[np.ndarray[Any, Any]] = []
        for pair, wanted in zip(asked, truth, strict=True):
            compared = [_compared(a, b) for a, b in zip(wanted, follow(engine, *pair, wanted), strict=True)]
            equal.append(np.concatenate([same for same, _ in compared]))
            divergence.append(np.concatenate([nats for _, nats in compared]))
        kernels, graphs = engine.config.kernels, engine.config.cuda_graphs
        engine.close()
        del engine
        report.release(device)
        about = {"variant": variant.name, "kernels": kernels, "cuda_graphs": graphs}
        yield about | _row(variant, equal, divergence)


def _compared(wanted: Batch, found: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Whether best tokens are equal, and KL(wanted || found), of the tokens of all answers, flat."""
    a, b, inside = wanted.log_SQV, found.log_SQV, wanted.inside_SQ
    nats = (a.exp() * (a - b)).sum(-1)
    return (a.argmax(-1) == b.argmax(-1))[inside].numpy(), nats[inside].numpy()


def _row(
    variant: Variant, equal: Sequence[np.ndarray[Any, Any]], divergence: Sequence[np.ndarray[Any, Any]]
) -> dict[str, Any]:
    all_equal, all_nats = np.concatenate(equal), np.concatenate(divergence)
    share, nats = float(all_equal.mean()), float(all_nats.mean())
    bounds = bool(all_equal.all()) if variant.exact else share >= LEAST_AGREEMENT and nats <= MOST_DIVERGENCE
    return {
        "documents": len(equal),
        "tokens": len(all_equal),
        "equal_tokens": int(all_equal.sum()),
        "agreement": round(share, 6),
        "agreement_interval": _interval(equal),
        "kl_nats": nats,
        "kl_interval": _interval(divergence),
        "kl_p99": float(np.quantile(all_nats, 0.99)),
        "kl_max": float(all_nats.max()),
        "passed": bounds,
    }


def _interval(by_document: Sequence[np.ndarray[Any, Any]]) -> tuple[float, float]:
    """Of the mean over all tokens."""
    documents = [number for number, values in enumerate(by_document) for _ in values]
    return stats.percentile_interval(stats.bootstrap_means(np.concatenate(by_document).tolist(), documents))


# ---- lengths


@torch.no_grad()
def lengths(device: torch.device, contexts: Sequence[int], windows: int, dtype: str) -> Iterator[dict[str, Any]]:
    """A row per context and mode; LSA's with its ratios to full residency."""
    for context in contexts:
        engine = load(settings(device, prefill_chunk=16_384), device, dtype)
        draw = torch.Generator().manual_seed(context)
        ids = torch.randint(engine.geometry.vocab_size, (context - ROOM,), generator=draw).tolist()
        with engine.session() as session:
            seconds = report.timed(partial(session.append, ids), report.synchronizer(device))
            snapshot = session.snapshot()
        about = {"context": context, "tokens": len(ids), "read_seconds": round(seconds, 3)}
        about["read_tokens_per_second"] = round(len(ids) / seconds, 1)
        with engine.resume(snapshot, policy=AllPages()) as session:
            full = _decoded(engine, session, windows, device)
        yield about | {"mode": "full"} | full
        with engine.resume(snapshot) as session:
            lsa = _decoded(engine, session, windows, device)
        ratios = {name: round(lsa[name] / full[name], 4) for name in ("mean_step_ms", "device_bytes")}
        yield about | {"mode": "lsa"} | lsa | {"ratio_to_full": ratios}
        engine.close()
        del engine, session, snapshot
        report.release(device)


def _decoded(engine: Engine, session: Session, windows: int, device: torch.device) -> dict[str, Any]:
    """Whole windows, after one for warmth; a step waits for the one before, as whoever reads its token does."""
    tau, took = engine.config.tau, []
    token = int(_logits(session).argmax())
    for _ in range((windows + 1) * tau):
        took.append(report.timed(partial(engine.decode, [session], [token]), report.synchronizer(device)))
        token = int(_logits(session).argmax())
    held, measured = session.stats(), took[tau:]
    return {
        "step_ms": report.spread(measured),
        "mean_step_ms": round(1e3 * sum(measured) / len(measured), 4),
        "tokens_per_second": round(len(measured) / sum(measured), 2),
        "pages": held["pages"],
        "resident_pages": held["resident_pages"],
        "device_bytes": held["device_bytes_all_in"],
        "bytes_moved": held["bytes_moved"],
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--agreement-context", default="16K", help="tokens of the documents that are asked about")
    parser.add_argument("--questions", type=int, default=16, help="per task, about four documents; 0: lengths only")
    parser.add_argument("--contexts", default="128K,512K,1M", help="with commas; none: agreement only")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="of the long contexts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started, device = common.machine(), torch.device(args.device)
    tokens = parse_tokens(args.agreement_context)
    contexts = [] if args.contexts == "none" else [parse_tokens(text) for text in args.contexts.split(",")]
    compared: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    bounds = {"least_agreement": LEAST_AGREEMENT, "most_divergence": MOST_DIVERGENCE}
    result: dict[str, Any] = {
        "complete": False,
        "device": str(device),
        "agreement": {"context": tokens, "questions_per_task": args.questions, **bounds, "rows": compared},
        "lengths": {"dtype": args.dtype, "windows": args.windows, "rows": measured},
    }
    parts = (
        (compared, agreement(device, tokens, args.questions, VARIANTS) if args.questions else ()),
        (measured, lengths(device, contexts, args.windows, args.dtype)),
    )
    for rows, made in parts:
        for row in made:
            rows.append(row)
            report.log(" ".join(f"{name}={value}" for name, value in row.items()))
            common.write_result(args.out, "shipped_decode", result, started)
    common.write_result(args.out, "shipped_decode", result | {"complete": True}, started)
    return 0 if all(row["passed"] for row in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
