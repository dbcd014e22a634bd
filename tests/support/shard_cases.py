"""A small geometry, a document of its shards and a published dump, with random content."""

from __future__ import annotations

from typing import Any

import torch

from flashmem.capture.format import Csr, Document, ShardMeta
from flashmem.config import ModelGeometry

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4", "num_hidden_layers": 4, "hidden_size": 6, "vocab_size": 320,
    "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16,
    "sliding_window": 32, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8, "moe_intermediate_size": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "partial_rotary_factor": 0.25,
    "layer_types": ["sliding_attention", *["compressed_sparse_attention"] * 3],
}  # fmt: skip
GEOMETRY = ModelGeometry.from_mapping(CONFIG)


def make_meta(**changes: Any) -> ShardMeta:
    values: dict[str, Any] = {
        "model": "abc", "geometry": GEOMETRY, "layers": (0, 2), "labels": (0, 1, 2), "dtype": "bfloat16", "tau": 8,
        "observe": 3, "settings": {"seed": 1, "lengths": (1, 2)},
    }  # fmt: skip
    return ShardMeta(**values | changes)


def make_document(rid: str = "a/b 1", *, tokens: int = 43, positions: tuple[int, ...] = (1, 22, 40)) -> Document:
    at = torch.tensor(positions)
    seen = (at + 1) // 4
    csr = Csr.from_rows([(torch.arange(n), torch.rand(n)) for n in seen.tolist()])
    return Document(
        rid=rid,
        tokens=tokens,
        prompt_tokens=20,
        source="s1",
        meta={"task": "niah", "length": tokens},
        positions=at,
        num_chunks=seen,
        observed=(at + 1).clamp_max(3),
        turns=torch.stack((torch.ones_like(at), torch.full_like(at, tokens)), dim=1),
        hidden={csa: torch.randn(len(at), 3, 6).bfloat16() for csa in (0, 2)},
        rows={csa: torch.randint(256, (tokens // 4, 20), dtype=torch.uint8) for csa in (0, 2)},
        mass=dict.fromkeys(range(3), csr),
        lightning=dict.fromkeys(range(3), csr),
        vote=csr,
        evidence=None if rid == "bare" else csr,
    )


FIRST, TOKENS = 37, 21  # the dump's first token stands at an odd place


def make_dump(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (TOKENS,), generator=generator)
    total = int(counts.sum())
    dump: dict[str, Any] = {
        "label_indices": torch.cat([torch.randperm(9, generator=generator)[:n] for n in counts.tolist()]).int(),
        "label_scores": torch.randint(2, 4, (total,), generator=generator).int(),
        "label_pointers": torch.tensor([0, *counts.cumsum(0).tolist()]).int(),
        "note": "text is a plain value",
    }
    for csa in (0, 2):
        dump[f"hidden_layer_{csa}"] = torch.randn(TOKENS, 6, generator=generator).bfloat16()
        dump[f"positions_layer_{csa}"] = torch.arange(FIRST, FIRST + TOKENS)
        dump[f"compk_layer_{csa}"] = torch.randint(256, (20, 20), generator=generator, dtype=torch.uint8)
        dump[f"logits_layer_{csa}_token_0"] = torch.randn(9)
    return dump
