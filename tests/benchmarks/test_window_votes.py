from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.window_votes import _top_p, convert

from flashmem.capture.format import ShardReader
from support.learnable_shards import write_shards


def test_top_p_includes_the_chunk_that_crosses() -> None:
    chunks, values = torch.tensor([3, 5, 9, 11]), torch.tensor([0.1, 0.5, 0.3, 0.1])
    assert _top_p(chunks, values, 0.6).tolist() == [5, 9]
    assert _top_p(chunks, values, 0.85).tolist() == [5, 9, 3]
    assert _top_p(chunks[:0], values[:0], 0.6).tolist() == []


def test_shards_with_window_votes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "a", 2)
    assert convert(tmp_path / "a", tmp_path / "b", 0.6, 1) == sum(len(doc) for doc in shards)
    made = ShardReader(tmp_path / "b")
    made.check()
    assert made.meta.vote_layers == 1 and made[0].vote.values.tolist() == [3.0] * len(made[0])
    assert (tmp_path / "b" / "native").is_dir()
