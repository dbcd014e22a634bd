"""What must hold on a CUDA device, measured in one run: tests, exactness, copies under load, memory, copy rates.

Every part says whether it passed; the program ends with 1 if one did not.

python -m benchmarks.gpu_checks --out results/gpu_checks.json
"""

from __future__ import annotations

import gc
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common, synthetic
from flashmem import Engine, LSAConfig, Session
from flashmem.accounting import resolve_geometry
from flashmem.backbone import random_model
from flashmem.store import PageStore, RecordLayout

TOLERANCE = 1e-4
LAYER_SCHEDULES = ("WCHCHCC", "CHC", "wcHC", "WWCHCHC", "HCWC")
FLASH_RECORD_BYTES = 938_304
NEVER = 1 << 30  # a window that does not end: no level 1 but ours


# ---- tests


def run_tests(args: Any) -> dict[str, Any]:
    """The tests that need a CUDA device, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    return {
        "command": "python -m pytest -q -m gpu tests",
        "counts": counts,
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "passed": done.returncode == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped"),
    }


# ---- exactness


def run_exactness(args: Any) -> dict[str, Any]:
    """Contract 1: with all pages resident, logits and greedy tokens of stock transformers on the same device."""
    rows = [_exactness(LAYER_SCHEDULES[i % len(LAYER_SCHEDULES)], i, args.device) for i in range(args.geometries)]
    worst = max(row["largest_difference"] for row in rows)
    return {
        "dtype": "fp32",
        "tolerance": TOLERANCE,
        "largest_difference": worst,
        "geometries": rows,
        "passed": worst <= TOLERANCE and all(row["greedy_tokens_equal"] for row in rows),
    }


def _exactness(layers: str, seed: int, device: str) -> dict[str, Any]:
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 3])
    sizes = {
        "hidden_size": draw.choice([64, 96, 128]),
        "num_attention_heads": groups * draw.choice([2, 3, 4]),
        "o_groups": groups,
        "head_dim": draw.choice([32, 48, 64]),
        "index_n_heads": draw.choice([16, 17, 24]),
        "index_head_dim": draw.choice([16, 32]),
        "index_topk": draw.choice([4, 8, 16]),
        "sliding_window": draw.choice([8, 32, 40]),
        "hc_mult": draw.choice([1, 2, 3, 4]),
    }
    model = random_model(layers, seed=seed, **sizes).to(device)
    chunk, page = draw.choice([37, 129, 250, 512]), draw.choice([4, 16, 64])
    lengths = [draw.randrange(1, 400) for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 256, (length + 40,), generator=generator).tolist() for length in lengths]
    engine = Engine(model, config=LSAConfig(policy="all", page_chunks=page, prefill_chunk=chunk, tau=16))
    sessions, differences = [engine.session() for _ in texts], []
    with torch.no_grad():
        wanted = [model(torch.tensor([text], device=device), use_cache=False).logits[0].float() for text in texts]
    for session, text, length, row in zip(sessions, texts, lengths, wanted, strict=True):
        session.append(text[:length])
        differences.append(_difference(session.next_logits, row[length - 1]))
    for step in range(40):  # a ragged batch, fed the same tokens
        places = [length + step for length in lengths]
        logits = engine.decode(sessions, [text[place] for text, place in zip(texts, places, strict=True)])
        differences += [_difference(a, b[place]) for a, b, place in zip(logits, wanted, places, strict=True)]
    engine.check()
    prompt = texts[0]
    ours = engine.session()
    ours.append(prompt)
    generated = list(ours.stream(max_new_tokens=12))
    engine.close()
    stock = _greedy(model, prompt, len(generated))
    return {
        "layers": layers,
        **sizes,
        "prefill_chunk": chunk,
        "page_chunks": page,
        "prompts": lengths,
        "largest_difference": max(differences),
        "greedy_tokens_equal": generated == stock,
    }


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The stock model's greedy continuation, each token from a whole forward."""
    ids = list(prompt)
    device = model.model.embed_tokens.weight.device
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _difference(a: torch.Tensor | None, b: torch.Tensor) -> float:
    assert a is not None
    return float((a - b).abs().max())


# ---- copies under load


def run_copies_under_load(args: Any) -> dict[str, Any]:
    """Decode while the next window's pages are copied in, against a twin that waits for its copies.

    Both sessions hold the same history and the same windows, chosen at random; logits must agree, unused slots are
    filled with NaN, and after every window each resident page is compared with its home byte by byte.
    """
    model = random_model(
        "WCHCHCC", seed=5, head_dim=256, hidden_size=256, num_attention_heads=8, index_head_dim=64, index_n_heads=16,
        index_topk=64, sliding_window=64,
    ).to(args.device)  # fmt: skip
    config = LSAConfig(policy="recency", keep=0.1, tau=NEVER)
    engine = Engine(model, config=config)
    engine.store.pool.poison = True
    ours, twin = engine.session(), engine.session()
    for session in (ours, twin):
        synthetic.fill(engine, session, args.load_tokens, seed=9)
    draw, overlapped, largest = random.Random(1), 0, 0.0
    token_draw = random.Random(2)
    for _ in range(args.load_windows):
        last = ours.pages.num_pages - 1
        wanted = sorted({0, last, *draw.sample(range(last), max(1, last // 5))})
        ours.pages.prefetch(wanted)  # copies run while `ours` decodes
        tokens = [token_draw.randrange(256) for _ in range(args.window_steps)]
        mine = [engine.decode([ours], [tokens[0]])]
        overlapped += _copies_run(ours)
        mine += [engine.decode([ours], [token]) for token in tokens[1:]]
        theirs = [engine.decode([twin], [token]) for token in tokens]
        _synchronize(args.device)
        twin.pages.prefetch(sorted({*wanted, *range(last, twin.pages.num_pages)}))  # and pages born in the window
        _synchronize(args.device)
        for session in (ours, twin):
            session.pages.flip()
        largest = max(largest, _difference(torch.cat(mine), torch.cat(theirs)))
        engine.store.check()  # bytes of every resident page against its home
    traffic, record = ours.pages.traffic, engine.layout.record_bytes
    engine.close()
    finite = largest == largest  # NaN would show that an unused slot was read
    return {
        "tokens": args.load_tokens,
        "record_bytes": record,
        "windows": args.load_windows,
        "steps_per_window": args.window_steps,
        "pages_copied_in": traffic.pages_to_device,
        "bytes_copied_in": traffic.bytes_to_device,
        "windows_with_copies_still_running_after_a_step_was_enqueued": overlapped,
        "largest_difference_to_twin": largest,
        "passed": finite and largest <= TOLERANCE,
    }


def _copies_run(session: Session) -> bool:
    """Whether the copies of the running prefetch are not done yet."""
    pending = session.pages._pending
    assert pending is not None
    return any(event is not None and not event.query() for event in pending.ticket)


# ---- memory


MEMORY_CASES: tuple[dict[str, Any], ...] = (
    {"dtype": torch.float32, "kv_format": "auto", "page_chunks": 64},
    {"dtype": torch.float32, "kv_format": "fp8", "page_chunks": 64},
    {"dtype": torch.bfloat16, "kv_format": "auto", "page_chunks": 16},
    {"dtype": torch.bfloat16, "kv_format": "fp8", "page_chunks": 64},
    {"dtype": torch.bfloat16, "kv_format": "fp8", "page_chunks": 64, "device_budget_bytes": 32 << 20},
    {"dtype": torch.float32, "kv_format": "auto", "page_chunks": 64, "device_budget_bytes": 64 << 20},
)
ALLOCATOR_BLOCK = 512
SMALL_TENSORS = 1 << 20
"""Bytes allowed beside the formula: page tables of the batch, the next logits, rounding to blocks of 512 bytes."""


def run_memory(args: Any) -> dict[str, Any]:
    """`memory_allocated` against the accounting's formula, beside the store's own count."""
    rows = [_memory(case, args.memory_tokens) for case in MEMORY_CASES]
    return {"tokens": args.memory_tokens, "cases": rows, "passed": all(row["passed"] for row in rows)}


def _memory(case: dict[str, Any], tokens: int) -> dict[str, Any]:
    model = random_model(
        "WCHCHCC", seed=3, dtype=case["dtype"], head_dim=256, hidden_size=256, num_attention_heads=8,
        index_head_dim=128, index_n_heads=16, index_topk=64, sliding_window=64,
    ).cuda()  # fmt: skip
    budget = case.get("device_budget_bytes")
    config = LSAConfig(
        policy="native", keep=0.1, kv_format=case["kv_format"], page_chunks=case["page_chunks"],
        device_budget_bytes=budget,
    )  # fmt: skip
    before = _allocated()
    engine = Engine(model, config=config)
    session = engine.session()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(4)).tolist()
    session.append(ids)
    for token in ids[:8]:
        engine.decode([session], [token])
    measured, peak = _allocated() - before, torch.cuda.max_memory_allocated() - before
    engine.check()
    held = session.report().all_in.device
    pool = engine.store.pool
    indexers = {id(part): part.nbytes for scorer in engine.scorers.values() for part in scorer.state_dict().values()}
    formula = {
        **{name: size for name, size in held.items() if name != "page_table"},  # the tables are lists on the host
        "free_slots": pool.allocated_bytes - pool.used_bytes,
        "indexer_weights": sum(indexers.values()),
    }
    predicted = sum(formula.values())
    engine.close()
    return {
        "dtype": str(case["dtype"]).removeprefix("torch."),
        "kv_format": engine.layout.kv_format,
        "page_chunks": case["page_chunks"],
        "device_budget_bytes": budget,
        "pool_bytes": held["pages"] + formula["free_slots"],
        "formula": formula,
        "formula_bytes": predicted,
        "measured_bytes": measured,
        "measured_minus_formula": measured - predicted,
        "measured_ratio": round(measured / predicted, 5),
        "peak_bytes_during_prefill": peak,
        "passed": 0 <= measured - predicted <= SMALL_TENSORS
        and (budget is None or held["pages"] + formula["free_slots"] <= budget),
    }


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


# ---- copy rates


def run_copy_rates(args: Any) -> dict[str, Any]:
    """Records through the store's copies, both ways, beside one pinned copy of as many bytes in the same run."""
    geometry, device = resolve_geometry("deepseek-v4-flash"), torch.device(args.device)
    targets = tuple(geometry.csa_layers[csa] for csa in geometry.default_targets())
    layout = RecordLayout(
        geometry, page_chunks=64, kv_format="fp8", target_layers=targets,
        device_of_layer=dict.fromkeys(range(geometry.num_layers), device),
    )  # fmt: skip
    assert layout.record_bytes == FLASH_RECORD_BYTES, layout.record_bytes
    records, size = args.records, args.records * layout.record_bytes
    store = PageStore(
        layout, dtype=torch.bfloat16, device_budget_bytes=size, host_budget_bytes=size, disk_path=None,
        disk_budget_bytes=None,
    )  # fmt: skip
    slots, homes = store.pool.take(records, 0), store.host.take(records)
    rows, pinned = [store.host.row(home) for home in homes], store.host.pinned
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pool = torch.empty(size, dtype=torch.uint8, device=device)
    for index, row in enumerate(rows):
        row.random_(generator=torch.Generator().manual_seed(index))

    def wait_for(function: Callable[[], object]) -> float:
        return common.timed(function, lambda: _synchronize(args.device))

    def copy_in() -> None:
        store.pool.wait_host(store.pool.copy_in(slots, rows))

    def copy_out() -> None:
        store.pool.wait_host(store.pool.copy_out(slots, rows, pinned=pinned))

    cases: dict[str, Callable[[], object]] = {
        "host_to_device": copy_in,
        "host_to_device_peak": lambda: pool.copy_(host, non_blocking=True),
        "device_to_host": copy_out,
        "device_to_host_peak": lambda: host.copy_(pool, non_blocking=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(args.copy_rounds + 2):  # by turns; the first two are for warmth
        for name, function in cases.items():
            took = wait_for(function)
            if turn >= 2:
                seconds[name].append(took)
    same = all(torch.equal(store.pool.record_to_cpu(slot), row) for slot, row in zip(slots, rows, strict=True))
    store.pool.give_back(slots)
    store.host.give_back(homes)
    store.close()
    rates = {name: size / statistics.median(values) / 1e9 for name, values in seconds.items()}
    ratios = {way: rates[way] / rates[f"{way}_peak"] for way in ("host_to_device", "device_to_host")}
    return {
        "record_bytes": layout.record_bytes,
        "records": records,
        "bytes": size,
        "rounds": args.copy_rounds,
        "gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "milliseconds": {name: common.spread(values) for name, values in seconds.items()},
        "host_to_device_peak_ratio": round(ratios["host_to_device"], 4),
        "device_to_host_peak_ratio": round(ratios["device_to_host"], 4),
        "bytes_equal": same,
        "passed": same,
    }


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "exactness": run_exactness,
    "copies_under_load": run_copies_under_load,
    "memory": run_memory,
    "copy_rates": run_copy_rates,
    "tests": run_tests,
}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda", help="cpu runs exactness, copies and rates without a GPU")
    parser.add_argument("--geometries", type=int, default=8, help="random geometries of the exactness part")
    parser.add_argument("--load-tokens", type=int, default=65_536)
    parser.add_argument("--load-windows", type=int, default=40)
    parser.add_argument("--window-steps", type=int, default=12)
    parser.add_argument("--memory-tokens", type=int, default=16_384)
    parser.add_argument("--records", type=int, default=384)
    parser.add_argument("--copy-rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    started, result = common.machine(), {}
    for name in args.parts:
        common.log(f"{name} ...")
        result[name] = PARTS[name](args)
        common.log(f"{name}: {'passed' if result[name]['passed'] else 'FAILED'}")
        common.write_result(args.out, "gpu_checks", {"allow_tf32": False, **result}, started)
    return 0 if all(part["passed"] for part in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
