"""FLOPs of one decoded token, counted alike for full attention and for Lookahead Sparse Attention.

A multiply-add is two FLOPs. Norms, softmax and rotary embeddings are left out: they are below one percent. The ratio
of two totals is the whole-model ratio; the ratio of two `scoring` terms is not, and is never called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..config import ModelGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of one decoded token by what they are spent on."""

    constant: int
    """Projections, experts, router, compressors, hyper-connections and head: the same for every context."""
    window: int
    """Attention to the sliding window."""
    attend: int
    """Attention to the picked CSA entries."""
    scoring: int
    """The Lightning Indexer over the chunks that it scores."""
    dense_hca: int
    """Attention to all HCA entries."""
    level1: int
    """The Memory Indexer's work of one cycle, spread over the cycle's steps."""

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsReport:
    """Full attention beside LSA at one context."""

    full: StepFlops
    lsa: StepFlops

    @property
    def ratio(self) -> float:
        return self.lsa.total / self.full.total


def flops_report(
    geometry: ModelGeometry,
    context_tokens: int,
    *,
    resident_chunks: int,
    tau: int = 64,
    num_targets: int | None = None,
    observation_window: int = 1,
    indexer_heads: int | None = None,
    indexer_rank: int | None = None,
) -> FlopsReport:
    """FLOPs per decoded token with all chunks on the device, and with `resident_chunks` of them.

    The Memory Indexer has twice the backbone's index heads and query rank unless said otherwise: 128 and 2048 on
    V4-Flash, as published.
    Raises ValueError if more chunks are resident than exist.
    """
    chunks = context_tokens // geometry.csa_ratio
    if not 0 <= resident_chunks <= chunks:
        raise ValueError(f"resident_chunks must lie in 0..{chunks}, got {resident_chunks}")
    if tau < 1:
        raise ValueError(f"tau must be at least 1, got {tau}")
    level1 = level1_flops(
        geometry,
        chunks,
        num_targets=len(geometry.default_targets()) if num_targets is None else num_targets,
        observation_window=observation_window,
        heads=2 * geometry.index_heads if indexer_heads is None else indexer_heads,
        rank=2 * geometry.q_lora_rank if indexer_rank is None else indexer_rank,
    )
    return FlopsReport(
        full=_step(geometry, context_tokens, chunks, level1=0),
        lsa=_step(geometry, context_tokens, resident_chunks, level1=level1 // tau),
    )


def constant_flops(geometry: ModelGeometry) -> Mapping[str, int]:
    """FLOPs of a token that no context changes, by module."""
    g, layers = geometry, geometry.num_layers
    csa, hca = len(g.csa_layers), len(g.hca_layers)
    attention_width = g.num_heads * g.head_dim
    projections = (
        g.hidden_size * g.q_lora_rank
        + g.q_lora_rank * attention_width
        + g.hidden_size * g.head_dim  # one K = V head
        + attention_width * g.o_lora_rank  # o_groups blocks, each [attention_width / o_groups, o_lora_rank]
        + g.o_groups * g.o_lora_rank * g.hidden_size
    )
    experts = (g.num_experts_per_token + g.num_shared_experts) * 3 * g.hidden_size * g.moe_intermediate_size
    index_queries = g.q_lora_rank * g.index_heads * g.index_head_dim + g.hidden_size * g.index_heads
    compressors = csa * 4 * g.hidden_size * (g.head_dim + g.index_head_dim) + hca * 2 * g.hidden_size * g.head_dim
    # Twice a layer, m streams of width E are read into (2 + m) m weights; these collapse, spread and mix the streams.
    streams = g.hc_mult * g.hidden_size
    hyper = 2 * layers * (2 + g.hc_mult) * g.hc_mult * (streams + g.hidden_size)
    return {
        "experts": 2 * layers * experts,
        "attention_projections": 2 * layers * projections,
        "head": 2 * g.hidden_size * g.vocab_size,
        "index_queries": 2 * csa * index_queries,
        "compressors": 2 * compressors,
        "router": 2 * layers * g.hidden_size * g.num_experts,
        "hyper_connections": 2 * hyper,
    }


def scoring_flops(heads: int, dim: int) -> int:
    """Scoring one chunk in one layer: 16,512 with 64 heads of 128. A dot product, relu and weight per head."""
    return heads * (2 * dim + 2)


def level1_flops(
    geometry: ModelGeometry, chunks: int, *, num_targets: int, observation_window: int, heads: int, rank: int
) -> int:
    """One run of the Memory Indexer: its queries and its scores over all chunks, at every target layer."""
    width = heads * geometry.index_head_dim
    query = 2 * (geometry.hidden_size * rank + rank * width + geometry.hidden_size * heads)
    return num_targets * observation_window * (query + chunks * scoring_flops(heads, geometry.index_head_dim))


def _step(geometry: ModelGeometry, context_tokens: int, scored_chunks: int, *, level1: int) -> StepFlops:
    g = geometry
    attend_one = g.num_heads * 2 * (2 * g.head_dim)  # scores, then values
    csa, hca = len(g.csa_layers), len(g.hca_layers)
    return StepFlops(
        constant=sum(constant_flops(g).values()),
        window=g.num_layers * min(g.sliding_window, context_tokens) * attend_one,
        attend=csa * min(g.index_topk, scored_chunks) * attend_one,
        scoring=csa * scored_chunks * scoring_flops(g.index_heads, g.index_head_dim),
        dense_hca=hca * (context_tokens // g.hca_ratio) * attend_one,
        level1=level1,
    )


__all__ = ["FlopsReport", "StepFlops", "constant_flops", "flops_report", "level1_flops", "scoring_flops"]
