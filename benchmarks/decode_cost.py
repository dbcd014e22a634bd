"""Decode step time at a short and at a long context with the same number of resident pages, level 1 left out.

Three sessions of one engine take turns in blocks of steps, so that whatever else the machine does meets all of them:
the short context, the long one, and, as a control that shows what the measurement can see, the long one with all its
pages resident. Histories are synthetic; the store is checked before and after.

python -m benchmarks.decode_cost --out results/decode_cost.json
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks import common
from flashmem import Engine, LSAConfig, Session
from flashmem.bench import synthetic
from flashmem.policy import BudgetPolicy

LIMIT = 1.5
NEVER = 1 << 30  # a window that does not end: no level 1


def run(short: int, long: int, resident_pages: int, rounds: int, block: int, device: str) -> dict[str, Any]:
    """Measure on `device`; contexts in tokens, `rounds` blocks of `block` steps for each session."""
    policy = BudgetPolicy(pages=resident_pages, scorer="native", name="native")
    model = common.v4_shaped_model().to(device)
    engine = Engine(model, config=LSAConfig(policy=policy, tau=NEVER))
    sessions = [engine.session() for _ in range(3)]
    for session, tokens in zip(sessions, (short, long, long), strict=True):
        common.log(f"filling {tokens:,} tokens")
        synthetic.fill(engine, session, tokens)
    control = sessions[2].pages
    control.prefetch(range(control.num_pages))
    control.flip()
    engine.check()
    resident = [len(session.pages.resident) for session in sessions]
    assert resident == [resident_pages, resident_pages, control.num_pages], resident
    cycles = [session.cycle.stats.cycles for session in sessions]

    wall, cpu = _measure(engine, sessions, rounds, block)

    engine.check()
    assert cycles == [session.cycle.stats.cycles for session in sessions], "level 1 ran inside the measurement"
    ratio = _median(wall[1]) / _median(wall[0])
    return {
        "model": {"layers": common.V4_SHAPED["layers"], "parameters": common.num_parameters(model)},
        "device": torch.device(device).type,
        "page_chunks": engine.config.page_chunks,
        "resident_pages": resident_pages,
        "steps": rounds * block,
        "rows": [
            {
                "context": tokens,
                "pages": session.pages.num_pages,
                "resident_pages": [before, len(session.pages.resident)],
                "hca_entries": session.state.num_hca_entries(),
                "step_ms": common.spread([second for steps in wall_blocks for second in steps]),
                "step_cpu_ms": common.spread([second for steps in cpu_blocks for second in steps]),
            }
            for tokens, session, before, wall_blocks, cpu_blocks in zip(
                (short, long, long), sessions, resident, wall, cpu, strict=True
            )
        ],
        "step_time_ratio": round(ratio, 4),
        "step_cpu_time_ratio": round(_median(cpu[1]) / _median(cpu[0]), 4),
        "step_time_ratio_by_block": _ratios(wall[1], wall[0]),
        "all_resident_step_time_ratio": round(_median(wall[2]) / _median(wall[0]), 4),
        "limit_ratio": LIMIT,
        "within_limit": ratio <= LIMIT,
    }


Blocks = list[list[float]]
"""Seconds of every step, block by block."""


def _measure(engine: Engine, sessions: list[Session], rounds: int, block: int) -> tuple[list[Blocks], list[Blocks]]:
    """Wall and CPU seconds by session; the order of turns rotates, and the first round is for warmth."""
    synchronize = torch.cuda.synchronize if engine.backbone.input_device.type == "cuda" else lambda: None
    wall: list[Blocks] = [[] for _ in sessions]
    cpu: list[Blocks] = [[] for _ in sessions]
    for turn in range(rounds + 1):
        for offset in range(len(sessions)):
            which = (turn + offset) % len(sessions)
            wall_steps, cpu_steps = [], []
            for _ in range(block):
                synchronize()
                began = time.perf_counter(), time.process_time()
                engine.decode([sessions[which]], [7])
                synchronize()
                wall_steps.append(time.perf_counter() - began[0])
                cpu_steps.append(time.process_time() - began[1])
            if turn:
                wall[which].append(wall_steps)
                cpu[which].append(cpu_steps)
    return wall, cpu


def _median(blocks: Blocks) -> float:
    return statistics.median(second for steps in blocks for second in steps)


def _ratios(blocks: Blocks, others: Blocks) -> dict[str, float]:
    """Spread of the ratio of medians over neighbouring blocks."""
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(blocks, others, strict=True))
    return {
        "min": round(ratios[0], 4),
        "median": round(statistics.median(ratios), 4),
        "max": round(ratios[-1], 4),
    }


def main() -> None:
    parser = common.parser(__doc__, threads=1)
    parser.add_argument("--short", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--long", type=int, default=131_072, metavar="TOKENS")
    parser.add_argument("--resident-pages", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--block", type=int, default=16, help="steps of one session before the next one's turn")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    result = run(args.short, args.long, args.resident_pages, args.rounds, args.block, args.device)
    common.write_result(args.out, "decode_cost", result, started)
    common.log(f"step time ratio {result['step_time_ratio']}, in CPU time {result['step_cpu_time_ratio']}")


if __name__ == "__main__":
    main()
