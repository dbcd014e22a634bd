from __future__ import annotations

from pathlib import Path

from benchmarks.indexer_calibration import MISSES, SHARES, rows

from flashmem.training.calibration import curves_of
from flashmem.training.data import PageRules
from support.learnable_shards import start_indexer, write_shards


def test_promises_are_met_where_they_were_made(tmp_path: Path) -> None:
    rules = PageRules(page_chunks=4, sink_pages=1, recency_pages=1)
    held_out, test = (
        curves_of(write_shards(tmp_path / name, 6, first=first), start_indexer(), rules, recall="need")
        for name, first in (("held-out", 0), ("test", 6))
    )
    made = rows(held_out, test)
    assert [row["at_most"] for row in made] == [*MISSES, *SHARES]
    assert "refused" in made[0]  # six documents promise nothing below one in seven
    for row in made:
        if "cut" in row:
            assert row["held_out"][row["promise"]] <= row["at_most"] + 1e-4
            assert 0 <= row["test"]["miss"] <= 1 and row["test"]["documents"] == 6
