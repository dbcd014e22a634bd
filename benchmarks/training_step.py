"""One training step of a Memory Indexer: all queries of a document against all its chunks, and the published step.

The published step (public training code, train.py and dataloader.py) gives every query its own sampled chunks: gathered
rows [B, K, I + 4], K at most 2,048 (512 positives, three negatives each), dequantised in the forward, one product per
query, focal BCE on probabilities, the mean over layers, AdamW; autocast to bfloat16 covers the forward. It is written
anew here, with three things in its favour: queries are encoded by our code, rows lie on the device and are gathered
there (published: on the host, then copied), and nothing is padded.

What a step does differs, so two rates stand side by side: (query, chunk) pairs per second, each scored in all layers,
and queries per second. `published` samples chunks as published; `published, all chunks` is the work of our step, the
same queries against the same chunks. Peak memory is what PyTorch allocated; `step` is the part of it above what lies
there between steps (weights, optimiser, data). The share of peak counts the products that a step needs and not those
that are computed again: 2 H I per pair, layer and observed token forward, 2 H I backward to the token that won, and 6
per weight and token; it divides by the rate of a large square product of the same dtype in the same run.

python -m benchmarks.training_step --out results/indexer/training_step.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from flashmem.indexer import IndexerConfig, MemoryIndexer
from flashmem.kernels.index_rows import encode_index_rows
from flashmem.kernels.score_chunks.tiled import ELEMENT_BUDGET
from flashmem.training.config import TrainConfig
from flashmem.training.data import PageRules, Queries
from flashmem.training.loop import make_optimizer
from flashmem.training.losses import total_loss

LIMITS = {"pairs_per_second_ratio": 3.0, "same_work_peak_memory_ratio": 5.0}
"""Asked of our step at the published sizes."""

SIZES = {
    "published": {"hidden_size": 4096, "q_rank": 2048, "num_heads": 128, "head_dim": 128, "layers": (10, 12, 20)},
    "small": {"hidden_size": 256, "q_rank": 192, "num_heads": 16, "head_dim": 64, "layers": (0, 1, 2)},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shape:
    """How much a step works on."""

    chunks: int = 65_536
    queries: int = 64
    """Of the document, in our step."""
    batch: int = 512
    sampled: int = 2048
    """Chunks per query in the published step."""
    positives: int = 512
    page_chunks: int = 64


class PublishedStep(nn.Module):
    """The published loss of a batch: every query against its own rows, layer by layer."""

    def __init__(self, indexer: MemoryIndexer, gamma: float = 2.0) -> None:
        super().__init__()
        self.indexer, self.gamma = indexer, gamma

    def logits(
        self, csa: int, hidden_BE: torch.Tensor, positions_B: torch.Tensor, rows_BKC: torch.Tensor
    ) -> torch.Tensor:
        q_BHI, w_BH = self.indexer.layers[csa].queries(hidden_BE, positions_B)
        values_BKI = rows_BKC[..., :-4].contiguous().view(torch.float8_e4m3fn).float()
        keys_BKI = values_BKI * rows_BKC[..., -4:].contiguous().view(torch.float32)
        scores_BHK = torch.einsum("bhi,bki->bhk", q_BHI, keys_BKI).relu()
        return (scores_BHK * w_BH.unsqueeze(-1)).sum(1)

    def forward(
        self,
        hidden: dict[int, torch.Tensor],
        positions_B: torch.Tensor,
        rows: dict[int, torch.Tensor],
        index_BK: torch.Tensor,
        wanted_BK: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        losses = []
        for csa, hidden_BE in hidden.items():
            with torch.autocast(index_BK.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                logits_BK = self.logits(csa, hidden_BE, positions_B, rows[csa][index_BK])
            p_BK = logits_BK.float().sigmoid()
            right_BK = torch.where(wanted_BK > 0, p_BK, 1 - p_BK)
            plain_BK = F.binary_cross_entropy(p_BK, wanted_BK, reduction="none")
            losses.append(((1 - right_BK) ** self.gamma * plain_BK).mean())
        return torch.stack(losses).mean()


def make_indexer(name: str, device: str, observe: int = 1) -> MemoryIndexer:
    torch.manual_seed(0)
    config = IndexerConfig(**SIZES[name], observation_window=observe, query_dtype="fp32")  # type: ignore[arg-type]
    indexer = MemoryIndexer(config).to(device)
    indexer.offset.requires_grad_(False)
    return indexer


def make_queries(config: IndexerConfig, shape: Shape, device: str) -> Queries:
    """Random hidden states at the end of a random history; each query needs 32 chunks."""
    torch.manual_seed(1)
    rules = PageRules(page_chunks=shape.page_chunks, sink_pages=1, recency_pages=2)
    count, chunks, observe = shape.queries, shape.chunks, config.observation_window
    last = chunks * 4 + torch.arange(count)
    eligible = torch.zeros(count, chunks, dtype=torch.bool)
    eligible[:, shape.page_chunks : -2 * shape.page_chunks] = True
    need = torch.zeros(count, chunks).scatter_(1, torch.randint(chunks, (count, 32)), 1.0) * eligible
    return Queries(
        rid="random",
        rules=rules,
        hidden={csa: torch.randn(count, observe, config.hidden_size).bfloat16() for csa in config.layers},
        rows={csa: encode_index_rows(torch.randn(chunks, config.head_dim)) for csa in config.layers},
        positions=last[:, None] - torch.arange(observe - 1, -1, -1),
        seen=torch.ones(count, observe, dtype=torch.bool),
        turns=torch.tensor([[chunks * 4, chunks * 4 + count]]).expand(count, 2),
        num_chunks=torch.full((count,), chunks),
        eligible=eligible,
        need=need / need.sum(1, keepdim=True).clamp_min(1e-9),
        evidence=None,
    ).to(torch.device(device))


def our_step(name: str, shape: Shape, device: str, dtype: torch.dtype, observe: int) -> Callable[[], object]:
    indexer, config = make_indexer(name, device, observe), TrainConfig(page_chunks=shape.page_chunks)
    queries, optimizer = make_queries(indexer.config, shape, device), make_optimizer(indexer, config)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss, _ = total_loss(queries.logits(indexer), queries, config, generator)
        update(loss, indexer, optimizer)

    return step


def published_step(
    name: str, shape: Shape, device: str, dtype: torch.dtype, *, batch: int, sampled: int | None
) -> Callable[[], object]:
    """`sampled` None takes all chunks, of which as large a part is wanted."""
    module = PublishedStep(make_indexer(name, device))
    queries = make_queries(module.indexer.config, shape, device)
    hidden = {csa: x_QmE[:, -1].repeat(-(-batch // shape.queries), 1)[:batch] for csa, x_QmE in queries.hidden.items()}
    positions_B = queries.positions[:, -1].repeat(-(-batch // shape.queries))[:batch]
    if sampled is None:
        index_BK = torch.arange(shape.chunks, device=device).expand(batch, -1)
    else:
        index_BK = torch.randint(shape.chunks, (batch, sampled), device=device)
    wanted_BK = torch.zeros(index_BK.shape, device=device)
    wanted_BK[:, : index_BK.shape[1] * shape.positives // shape.sampled] = 1
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)

    def step() -> None:
        update(module(hidden, positions_B, queries.rows, index_BK, wanted_BK, dtype), module, optimizer)

    return step


def update(loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def run(
    names: list[str], shape: Shape, *, device: str, steps: int, observe: list[int], budgets: list[int], square: int
) -> dict[str, Any]:
    """All rows at each of the sizes, and the ratios at one observed token."""
    peak = {dtype: round(peak_flops(torch_dtype, device, square)) for dtype, torch_dtype in DTYPES.items()}
    result: dict[str, Any] = {
        "device": torch.device(device).type,
        "shape": {field: getattr(shape, field) for field in Shape.__dataclass_fields__},
        "steps": steps,
        "losses": dict(TrainConfig().losses),
        "element_budget": ELEMENT_BUDGET[torch.device(device).type],
        "measured_peak_flops": peak,
        "rows": [],
    }
    for name in names:
        check(name, shape, device)
        for dtype in DTYPES:
            common.log(f"{name}, {dtype} ...")
            rows = [
                measure(name, shape, device, dtype, steps, peak[dtype], system="published", batch=shape.batch,
                        sampled=shape.sampled),
                measure(name, shape, device, dtype, steps, peak[dtype], system="published, all chunks",
                        batch=shape.queries, sampled=None),
                *(measure(name, shape, device, dtype, steps, peak[dtype], system="ours", observe=m) for m in observe),
            ]  # fmt: skip
            for budget in budgets:
                with element_budget(device, budget):
                    rows.append(measure(name, shape, device, dtype, steps, peak[dtype], system="ours", observe=1))
            result["rows"] += rows
    result["ratios"] = [ratios(result["rows"], name, dtype) for name in names for dtype in DTYPES]
    result["limits"] = LIMITS
    return result


def measure(
    name: str,
    shape: Shape,
    device: str,
    dtype: str,
    steps: int,
    peak: float,
    *,
    system: str,
    observe: int = 1,
    batch: int = 0,
    sampled: int | None = None,
) -> dict[str, Any]:
    """One row; an error of memory is a row too."""
    row: dict[str, Any] = {"sizes": name, "system": system, "dtype": dtype, "observe": observe}
    if system == "ours":
        row |= {"queries": shape.queries, "chunks_per_query": shape.chunks}
        row["element_budget"] = ELEMENT_BUDGET[torch.device(device).type]
    else:
        row |= {"queries": batch, "chunks_per_query": sampled or shape.chunks}
    try:
        if system == "ours":
            step = our_step(name, shape, device, DTYPES[dtype], observe)
        else:
            step = published_step(name, shape, device, DTYPES[dtype], batch=batch, sampled=sampled)
        seconds, memory = timed_steps(step, device, steps)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"out_of_memory": str(error).split(". ")[0]}
    finally:
        step = None  # type: ignore[assignment]
        if device == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(seconds)
    pairs = row["queries"] * row["chunks_per_query"]
    flops = useful_flops(name, row["queries"], pairs, observe)
    return row | {
        "step_ms": common.spread(seconds),
        "pairs_per_second": round(pairs / median),
        "queries_per_second": round(row["queries"] / median, 2),
        "share_of_peak": round(flops / median / peak, 5),
        **memory,
    }


def useful_flops(name: str, queries: int, pairs: int, observe: int) -> int:
    config = IndexerConfig(**SIZES[name])  # type: ignore[arg-type]
    width, layers = config.num_heads * config.head_dim, len(config.layers)
    weights = config.q_rank * (config.hidden_size + width) + config.num_heads * config.hidden_size
    return layers * (2 * width * (observe + 1) * pairs + 6 * weights * queries * observe)


def timed_steps(step: Callable[[], object], device: str, steps: int) -> tuple[list[float], dict[str, int | None]]:
    """Seconds of each step after two for warmth, and bytes: the peak, and what lies there between steps."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):
        step()
    synchronize()
    rest = None
    if device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = [common.timed(step, synchronize) for _ in range(steps)]
    if rest is None:
        return seconds, {"peak_bytes": None, "step_bytes": None}
    peak = torch.cuda.max_memory_allocated()
    return seconds, {"peak_bytes": peak, "step_bytes": peak - rest}


def ratios(rows: list[dict[str, Any]], name: str, dtype: str) -> dict[str, Any]:
    """Ours over the published step, at one observed token and the default tiles."""
    chosen = [row for row in rows if (row["sizes"], row["dtype"], row["observe"]) == (name, dtype, 1)]
    published, same, ours = (
        next(row for row in chosen if row["system"] == system)
        for system in ("published", "published, all chunks", "ours")
    )

    def ratio(a: dict[str, Any], b: dict[str, Any], entry: str) -> float | None:
        return round(a[entry] / b[entry], 3) if a.get(entry) and b.get(entry) else None

    return {
        "sizes": name,
        "dtype": dtype,
        "pairs_per_second_ratio": ratio(ours, published, "pairs_per_second"),
        "queries_per_second_ratio": ratio(ours, published, "queries_per_second"),
        "peak_memory_ratio": ratio(published, ours, "peak_bytes"),
        "step_memory_ratio": ratio(published, ours, "step_bytes"),
        "same_work_time_ratio": ratio(ours, same, "pairs_per_second"),
        "same_work_peak_memory_ratio": ratio(same, ours, "peak_bytes"),
        "same_work_step_memory_ratio": ratio(same, ours, "step_bytes"),
    }


def check(name: str, shape: Shape, device: str) -> None:
    """Both steps score a chunk alike."""
    module = PublishedStep(make_indexer(name, device))
    queries = make_queries(module.indexer.config, shape, device)
    index_QK = torch.randint(shape.chunks, (shape.queries, 16), device=device)
    with torch.no_grad():
        per_layer = [
            module.logits(csa, queries.hidden[csa][:, -1], queries.positions[:, -1], queries.rows[csa][index_QK])
            for csa in module.indexer.target_layers
        ]
        torch.testing.assert_close(
            torch.stack(per_layer).amax(0), queries.logits(module.indexer).gather(1, index_QK), rtol=1e-3, atol=1e-3
        )


def peak_flops(dtype: torch.dtype, device: str, square: int) -> float:
    """The best of ten large square products."""
    a, b = (torch.randn(square, square, device=device, dtype=dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    a @ b
    return 2 * square**3 / min(common.timed(lambda: a @ b, synchronize) for _ in range(10))


@contextmanager
def element_budget(device: str, elements: int) -> Any:
    kept = ELEMENT_BUDGET[device]
    ELEMENT_BUDGET[device] = elements
    try:
        yield
    finally:
        ELEMENT_BUDGET[device] = kept


def main() -> None:
    parser = common.parser(__doc__, threads=2)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--observe", type=int, nargs="*", default=[1, 16], help="observed tokens of our step")
    parser.add_argument("--elements", type=int, nargs="*", default=[1 << 22, 1 << 23, 1 << 24, 1 << 25],
                        help="other tile sizes of our step, in products")  # fmt: skip
    for field in Shape.__dataclass_fields__.values():
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; see --device")
    torch.set_num_threads(args.threads)
    started = common.machine()
    shape = Shape(**{name: getattr(args, name) for name in Shape.__dataclass_fields__})
    square = 8192 if args.device == "cuda" else 512
    settings = {"device": args.device, "steps": args.steps, "observe": args.observe, "budgets": args.elements}
    result = run(args.sizes, shape, square=square, **settings)
    common.write_result(args.out, "training_step", result, started)
    for row in result["ratios"]:
        common.log(row)


if __name__ == "__main__":
    main()
