"""Shards with something to learn: a query's hidden state tells, through a fixed matrix, which chunk it will need."""

from __future__ import annotations

from pathlib import Path

import torch

from flashmem.capture.format import Csr, Document, ShardReader, ShardWriter
from flashmem.indexer import IndexerConfig, MemoryIndexer
from flashmem.kernels.index_rows import encode_index_rows
from support.shard_cases import GEOMETRY, make_meta

LAYERS, OBSERVE, TAU = (0, 2), 2, 8
HIDDEN, INDEX = GEOMETRY.hidden_size, GEOMETRY.index_head_dim


def learnable_document(index: int, chunks: int) -> Document:
    """Twelve queries in two answers; each needs one old chunk, named by the first hidden channels."""
    generator = torch.Generator().manual_seed(index)
    tokens = chunks * 4 + 3
    first = tokens - 24
    turns = [(first, first + 10), (first + 10, tokens - 1)]
    queries = [(p, turn) for turn in turns for p in range(turn[0] - 1, turn[1] - 1)][::2][:12]
    positions = torch.tensor([p for p, _ in queries])
    seen = (positions + 1) // 4
    signs = torch.randn(HIDDEN, INDEX, generator=torch.Generator().manual_seed(7)).sign()
    codes = torch.randn(chunks + 1, HIDDEN, generator=generator)[: tokens // 4]
    keys = codes @ signs
    needed = torch.randint(0, chunks - 12, (len(queries),), generator=generator)
    hidden = torch.zeros(len(queries), OBSERVE, HIDDEN)
    hidden[:, -1] = codes[needed]
    label = Csr.from_rows([(torch.tensor([n]), torch.tensor([2.0])) for n in needed.tolist()])
    noise = Csr.from_rows([(torch.tensor([n // 2]), torch.tensor([2.0])) for n in needed.tolist()])
    return Document(
        rid=f"d{index}",
        tokens=tokens,
        prompt_tokens=first,
        source=str(index),
        meta={"families": ["song", "number"]},
        positions=positions,
        num_chunks=seen,
        observed=torch.full((len(queries),), OBSERVE),
        turns=torch.tensor([turn for _, turn in queries]),
        hidden=dict.fromkeys(LAYERS, hidden),
        rows=dict.fromkeys(LAYERS, encode_index_rows(keys)),
        mass={0: noise, 1: label, 2: label},
        lightning=dict.fromkeys(range(3), label),
        vote=label,
        evidence=label,
    )


def start_indexer() -> MemoryIndexer:
    """An indexer that knows nothing."""
    config = IndexerConfig(
        hidden_size=HIDDEN, q_rank=8, num_heads=4, head_dim=INDEX, layers=LAYERS, rope=GEOMETRY.compress_rope,
        query_dtype="fp32",
    )  # fmt: skip
    torch.manual_seed(0)
    return MemoryIndexer(config)


def write_shards(directory: Path, documents: int = 6, *, chunks: int = 40, first: int = 0) -> ShardReader:
    meta = make_meta(layers=LAYERS, observe=OBSERVE, tau=TAU, dtype="float32")
    with ShardWriter(directory, meta) as writer:
        for index in range(first, first + documents):
            writer.write(learnable_document(index, chunks + 4 * (index % 3)))
    start_indexer().save_pretrained(directory / "native")
    return ShardReader(directory)
