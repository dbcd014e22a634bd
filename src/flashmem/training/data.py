"""Documents of shards as training, calibration and metrics read them: one history, several queries, one eligibility.

Shape letters: Q = queries, m = observed tokens, E = hidden size, N = chunks, P = pages, C = chunks of a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..capture.format import Document, ShardMeta
from ..indexer import MemoryIndexer
from ..policy import always_kept, eligible_chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class PageRules:
    """What is always kept, and how chunks make pages: the settings of `LSAConfig` that decide what can be won."""

    page_chunks: int
    sink_pages: int
    recency_pages: int

    def num_pages(self, num_chunks: int) -> int:
        return -(-num_chunks // self.page_chunks)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Queries:
    """Queries of one document with what they see and what they need; everything on one device."""

    rid: str
    rules: PageRules
    hidden: Mapping[int, torch.Tensor]
    """By CSA index, [Q, m, E]."""
    rows: Mapping[int, torch.Tensor]
    """By CSA index, index rows uint8 [N, I + 4]; N covers the last query's chunks."""
    positions: torch.Tensor
    """Int64 [Q, m] of the observed tokens."""
    seen: torch.Tensor
    """Bool [Q, m]: the token is there."""
    turns: torch.Tensor
    """Int64 [Q, 2]."""
    num_chunks: torch.Tensor
    """Int64 [Q]."""
    eligible: torch.Tensor
    """Bool [Q, N]: the chunk exists at the query and is on no always-kept page."""
    need: torch.Tensor
    """Float32 [Q, N], 0 outside `eligible`: what the window will need of each chunk, as chosen by the target."""
    evidence: torch.Tensor | None
    """Float32 [Q, N], 0 outside `eligible`: 1 for chunks that hold what the answer needs."""

    def __len__(self) -> int:
        return len(self.num_chunks)

    @property
    def num_pages(self) -> int:
        return self.rules.num_pages(self.eligible.shape[1])

    def to(self, device: torch.device) -> Queries:
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        evidence = None if self.evidence is None else self.evidence.to(device)
        hidden = {csa: x.to(device) for csa, x in self.hidden.items()}
        rows = {csa: x.to(device) for csa, x in self.rows.items()}
        return replace(self, evidence=evidence, hidden=hidden, rows=rows, **moved)

    def pick(self, index: torch.Tensor) -> Queries:
        """Some of the queries."""
        moved = {name: getattr(self, name)[index] for name in _TENSORS}
        evidence = None if self.evidence is None else self.evidence[index]
        return replace(self, evidence=evidence, **moved, hidden={csa: x[index] for csa, x in self.hidden.items()})

    def logits(self, indexer: MemoryIndexer) -> torch.Tensor:
        """Float32 chunk logits [Q, N] as the indexer serves them; chunks that do not exist yet are not masked."""
        layers, m = indexer.target_layers, min(indexer.config.observation_window, self.seen.shape[1])
        return indexer.batch_logits(
            {csa: self.hidden[csa][:, -m:] for csa in layers},
            {csa: self.rows[csa] for csa in layers},
            self.positions[:, -m:],
            self.seen[:, -m:],
        )

    def by_page(self, values_QN: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[Q, P, C]; `fill` stands where a page has no chunk."""
        missing = self.num_pages * self.rules.page_chunks - values_QN.shape[1]
        return F.pad(values_QN, (0, missing), value=fill).unflatten(1, (-1, self.rules.page_chunks))

    def eligible_pages(self) -> torch.Tensor:
        """Bool [Q, P]: pages that a policy may choose or leave."""
        return self.by_page(self.eligible, fill=False).any(-1)


_TENSORS = ("positions", "seen", "turns", "num_chunks", "eligible", "need")


def queries_of(
    document: Document,
    meta: ShardMeta,
    rules: PageRules,
    *,
    target: Mapping[str, float],
    layer_weights: Mapping[int, float] | None = None,
    layers: tuple[int, ...] | None = None,
) -> Queries:
    """A document's queries with their needs.

    `target` weighs the labels: 'mass' (summed over layers by `layer_weights`, all alike if empty), 'vote' and
    'evidence', each scaled so that a query's eligible chunks sum to 1. Raises ValueError where a label is missing.
    """
    layers = meta.layers if layers is None else layers
    if absent := sorted(set(layers) - set(meta.layers)):
        raise ValueError(f"the shards hold CSA indices {list(meta.layers)}, not {absent}")
    chunks, m = int(document.num_chunks.max()), meta.observe
    back = torch.arange(m - 1, -1, -1)
    eligible = torch.zeros(len(document), chunks, dtype=torch.bool)
    for query, count in enumerate(document.num_chunks.tolist()):
        always = always_kept(rules.num_pages(count), rules.sink_pages, rules.recency_pages)
        eligible[query, :count] = eligible_chunks(count, rules.page_chunks, always)
    evidence = None if document.evidence is None else document.evidence.dense(chunks) * eligible
    need = torch.zeros(eligible.shape)
    for kind, weight in target.items():
        label = _label(document, meta, kind, dict(layer_weights or {}), chunks) * eligible
        need += weight * label / label.sum(1, keepdim=True).clamp_min(1e-9)
    return Queries(
        rid=document.rid,
        rules=rules,
        hidden={csa: document.hidden[csa] for csa in layers},
        rows={csa: document.rows[csa][:chunks] for csa in layers},
        positions=document.positions[:, None] - back,
        seen=back < document.observed[:, None],
        turns=document.turns,
        num_chunks=document.num_chunks,
        eligible=eligible,
        need=need,
        evidence=evidence,
    )


def _label(document: Document, meta: ShardMeta, kind: str, weights: Mapping[int, float], chunks: int) -> torch.Tensor:
    if kind == "mass":
        if not document.mass:
            raise ValueError("these shards hold votes only; use target {'vote': 1}")
        if unknown := sorted(set(weights) - set(document.mass)):
            raise ValueError(f"layer_weights names CSA indices {unknown}; the shards have labels of {meta.labels}")
        parts = [weights.get(csa, 0.0) if weights else 1.0 for csa in document.mass]
        stacked = [w * csr.dense(chunks) for w, csr in zip(parts, document.mass.values(), strict=True) if w]
        return torch.stack(stacked).sum(0)
    if kind == "vote":
        return document.vote.dense(chunks)
    if document.evidence is None:
        raise ValueError(f"document {document.rid!r} has no evidence; the prompts must name it")
    return document.evidence.dense(chunks)


__all__ = ["PageRules", "Queries", "queries_of"]
