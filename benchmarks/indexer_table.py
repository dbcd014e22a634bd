"""The table of Memory Indexers and baselines (`flashmem.training.compare`), with machine and commit.

python -m benchmarks.indexer_table shards-test --indexer ours=run-0/indexer --indexer ours=run-1/indexer --best ours \\
    --page-chunks 8 --recency-pages 8 --layer-weights 1=0.25 2=0.75 --out results/indexer/table.json
"""

from __future__ import annotations

import torch

from benchmarks import common
from flashmem.training import compare


def main() -> None:
    parser = common.parser(__doc__)
    compare.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    result = compare.run(args)
    common.write_result(args.out, "indexer", result, started)
    args.out.with_suffix(".md").write_text(compare.markdown(result))


if __name__ == "__main__":
    main()
