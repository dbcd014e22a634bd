"""The fused kernels on a CUDA device: ceilings, checks against float64, times. `flashmem.bench.kernels` measures.

python -m benchmarks.gpu_kernels --out results/gpu_kernels
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashmem.bench.kernels import PARTS, PEERS, lines, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rows.jsonl goes")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this long")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile ahead; 0 compiles as needed")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[], help="measured before the parts")
    args = parser.parse_args()
    result = run(
        args.out, seconds=args.seconds, jobs=args.jobs, parts=args.parts, peers=args.peer,
        program="python -m benchmarks.gpu_kernels",
    )  # fmt: skip
    print(*lines(result), sep="\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
