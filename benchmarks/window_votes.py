"""Shards with the published vote taken over whole windows, from the lightning probabilities that the shards hold.

The published label counts, at every token, the layers whose top-p set holds a chunk, and wants 3 of 21. A model with
three CSA layers gives no such majority; here one layer is enough (3 of 21 is less than one of three), and the top-p set
is that of a window's summed probability, since shards keep sums and no tokens.

python -m benchmarks.window_votes shards-train --out shards-votes
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from flashmem.capture.format import Csr, Document, ShardReader, ShardWriter


def window_vote(document: Document, p: float, layers: int) -> Csr:
    """Chunks in the top-p set of at least so many layers, and how many; the set includes the chunk that crosses p."""
    rows = []
    for query in range(len(document)):
        chosen = [_top_p(*csr.row(query), p) for csr in document.lightning.values()]
        chunks, counts = torch.cat(chosen).unique(return_counts=True)
        rows.append((chunks[counts >= layers], counts[counts >= layers]))
    return Csr.from_rows(rows)


def _top_p(chunks: torch.Tensor, values: torch.Tensor, p: float) -> torch.Tensor:
    order = values.argsort(descending=True, stable=True)
    share = values[order].cumsum(0) / values.sum().clamp_min(1e-12)
    count = int((share <= p).sum().clamp_min(1)) + 1
    return chunks[order[:count]]


def convert(source: Path, out: Path, p: float, layers: int) -> int:
    """Write the shards anew with window votes; returns the number of votes."""
    shards, votes = ShardReader(source), 0
    with ShardWriter(out, dataclasses.replace(shards.meta, vote_p=p, vote_layers=layers)) as writer:
        for document in shards:
            vote = window_vote(document, p, layers)
            votes += len(vote.chunks)
            writer.write(dataclasses.replace(document, vote=vote))
    shutil.copytree(source / "native", out / "native", dirs_exist_ok=True)
    return votes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--p", type=float, default=0.6)
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args(argv)
    print(f"{convert(args.shards, args.out, args.p, args.layers):,} votes")


if __name__ == "__main__":
    main()
