"""Time and memory of a long prefill of a random 5 M-parameter model on the CPU.

python -m benchmarks.prefill --out results/prefill.json
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import common
from flashmem import Engine, LSAConfig


def run(tokens: int, config: LSAConfig) -> dict[str, Any]:
    """Prefill random tokens once, check the store, and report."""
    model = common.v4_shaped_model()
    parameters, idle = common.num_parameters(model), common.peak_rss_bytes()
    engine = Engine(model, config=config)
    ids = torch.randint(0, engine.geometry.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    session, marks = engine.session(), [(0, time.perf_counter())]

    def on_progress(done: int, total: int) -> None:
        if done // 8192 > marks[-1][0] // 8192 or done == total:
            marks.append((done, time.perf_counter()))
            common.log(f"{done:,} of {total:,} tokens after {marks[-1][1] - marks[0][1]:.1f} s")

    session.append(ids, on_progress=on_progress)
    seconds = time.perf_counter() - marks[0][1]
    peak = common.peak_rss_bytes()
    engine.check()
    report = session.report()
    return {
        "model": {"layers": common.V4_SHAPED["layers"], "parameters": parameters},
        "tokens": tokens,
        "config": {name: value for name, value in asdict(config).items() if value is not None},
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "seconds_to_token": {str(done): round(at - marks[0][1], 2) for done, at in marks[1:]},
        "peak_rss_bytes": peak,
        "peak_rss_before_engine_bytes": idle,
        "accounting": {
            "paper_full_bytes": report.paper.full_bytes,
            "paper_resident_bytes": report.paper.resident_bytes,
            "all_in_full_bytes": report.all_in.full_bytes,
            "all_in_device_bytes": report.all_in.device_bytes,
            "all_in_host_bytes": report.all_in.host_bytes,
        },
        "allocated_bytes": engine.store.allocated_bytes(),
        "limits": {"seconds": 360, "peak_rss_bytes": 4 << 30},
        "within_limits": seconds < 360 and peak < 4 << 30,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--prefill-chunk", type=int, default=LSAConfig().prefill_chunk)
    parser.add_argument("--keep", type=float, default=0.1, help="share of pages to keep resident after the prefill")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    config = LSAConfig(policy="native", keep=args.keep, prefill_chunk=args.prefill_chunk)
    common.write_result(args.out, "prefill", run(args.tokens, config), started)


if __name__ == "__main__":
    main()
