"""Does the calibrated cut keep its promise? Cuts from one set of documents, what they do on another.

python -m benchmarks.indexer_calibration --indexer indexer --held-out shards-val --test shards-test \
    --out results/indexer/calibration.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from flashmem.capture.format import ShardReader
from flashmem.indexer import MemoryIndexer
from flashmem.training.calibration import Curve, budget_cut, conformal_cut, curves_of
from flashmem.training.compare import parse_weights
from flashmem.training.data import PageRules
from flashmem.training.metrics import bootstrap

MISSES = (0.1, 0.2, 0.3, 0.4)
SHARES = (0.06, 0.12, 0.25)


def observed(curves: Sequence[Curve], cut: float) -> dict[str, Any]:
    """Mean miss and resident share at a cut, with 95 % intervals over documents."""
    made: dict[str, Any] = {"documents": len(curves)}
    for name, values in (
        ("miss", [c.at(cut, c.loss) for c in curves]),
        ("share", [c.at(cut, c.share) for c in curves]),
    ):
        mean, low, high = bootstrap(np.array(values))
        made |= {name: round(mean, 4), f"{name}_interval": [round(low, 4), round(high, 4)]}
    return made


def rows(held_out: Sequence[Curve], test: Sequence[Curve]) -> list[dict[str, Any]]:
    """One row per promise: the cut, and what was seen on both sets."""
    made = []
    for promise, values, choose in (("miss", MISSES, conformal_cut), ("share", SHARES, budget_cut)):
        for value in values:
            try:
                cut = choose(held_out, value)
            except ValueError as error:
                made.append({"promise": promise, "at_most": value, "refused": str(error)})
                continue
            found = {"held_out": observed(held_out, cut), "test": observed(test, cut)}
            made.append({"promise": promise, "at_most": value, "cut": round(cut, 4), **found})
    return made


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--indexer", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--page-chunks", type=int, default=8)
    parser.add_argument("--recency-pages", type=int, default=8)
    parser.add_argument("--layer-weights", nargs="*", default=[], metavar="CSA=WEIGHT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    indexer = MemoryIndexer.from_pretrained(args.indexer)
    rules = PageRules(page_chunks=args.page_chunks, sink_pages=1, recency_pages=args.recency_pages)
    result: dict[str, Any] = {"indexer": indexer.fingerprint(), "page_chunks": args.page_chunks}
    for recall in ("need", "evidence"):
        held_out, test = (
            curves_of(ShardReader(path), indexer, rules, recall=recall, layer_weights=parse_weights(args.layer_weights))  # type: ignore[arg-type]
            for path in (args.held_out, args.test)
        )
        result[recall] = rows(held_out, test)
    common.write_result(args.out, "indexer_calibration", result, started)


if __name__ == "__main__":
    main()
