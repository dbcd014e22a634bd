"""What must hold on a CUDA device, in one run: exactness, copies under load, memory, copy rates, tests, sanitizer.

Every part runs in a process of its own with a limit of time, so that none can spoil another; each says whether it
passed, and the file is written anew after every part, also when one crashes or takes too long. Parts that time
something run one by one; the others follow together. The program ends with 1 if a part did not pass. `--seconds` bounds
the whole run.

python -m benchmarks.gpu_checks --out results/gpu_checks.json    (with PYTHONPATH=src where flashmem is not installed)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from flashmem import Engine, LSAConfig, Session
from flashmem.accounting import resolve_geometry
from flashmem.backbone import random_model
from flashmem.bench import synthetic
from flashmem.store import PageStore, RecordLayout

TOLERANCE = 1e-4
LAYER_SCHEDULES = ("WCHCHCC", "CHC", "wcHC", "WWCHCHC", "HCWC")
FLASH_RECORD_BYTES = 938_304
NEVER = 1 << 30  # a window that does not end: no level 1 but ours
LEAST_GAP = 2e-5
"""Relative gap at the edge of a top-k below which two correct sums in float32 may pick different chunks."""
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


# ---- tests


def run_tests(args: Any) -> dict[str, Any]:
    """The tests that need a CUDA device; files without any are not even collected."""
    return run_pytest(_tests_with("mark.gpu", "."), "-m", "gpu")


def run_kernel_tests(args: Any) -> dict[str, Any]:
    """The tests of Triton kernels, which CI runs in the interpreter, compiled; the fused decode step among them."""
    return run_pytest(_tests_with("triton_device", "kernels", "e2e", "lookahead"), "-m", "not gpu")


def _tests_with(word: str, *directories: str) -> list[str]:
    tests = common.ROOT / "tests"
    files = sorted(path for name in directories for path in (tests / name).rglob("test_*.py"))
    return [str(path.relative_to(common.ROOT)) for path in files if word in path.read_text()]


def run_pytest(files: list[str], *words: str) -> dict[str, Any]:
    """A run of pytest for every file, some at a time: most of it is compilation, on one core each.

    It passes if every run did: something passed in each, and nothing was skipped.
    """
    at_a_time = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(max_workers=at_a_time) as threads:
        results = list(threads.map(lambda file: _run_file(file, *words), files))
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result["counts"])
    return {
        "command": " ".join(["python", *_PYTEST, *words, "FILE"]),
        "processes": min(at_a_time, len(files)),
        "counts": dict(counts),
        "failures": [line for result in results for line in result["failures"]],
        "files": {file: {k: result[k] for k in _OF_A_FILE} for file, result in zip(files, results, strict=True)},
        "tail": {file: result["tail"] for file, result in zip(files, results, strict=True) if result["tail"]},
        "passed": bool(results) and all(result["passed"] for result in results),
    }


_PYTEST = ("-m", "pytest", "-v", "-rfEs", "-p", "no:cacheprovider")
_OF_A_FILE = ("counts", "exit_status", "seconds", "passed")


def _run_file(file: str, *words: str) -> dict[str, Any]:
    started = time.monotonic()
    status, output = run_aloud([sys.executable, *_PYTEST, *words, file])
    lines = output.strip().splitlines() or [""]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    return {
        "counts": counts,
        "exit_status": status,
        "seconds": round(time.monotonic() - started, 1),
        "failures": [common.without_paths(line) for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))],
        "tail": [] if status == 0 else tail(output),
        "passed": status == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped"),
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
    chosen = [text_without_races(model, length + 40, 100 * seed + i) for i, length in enumerate(lengths)]
    texts = [text for text, _ in chosen]
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
        "closest_race": min(gap for _, gap in chosen),
        "largest_difference": max(differences),
        "greedy_tokens_equal": generated == stock,
    }


def text_without_races(model: Any, length: int, seed: int, attempts: int = 30) -> tuple[list[int], float]:
    """Random tokens in which every top-k of the stock model is decided by more than rounding, and the closest decision.

    Without this, two correct implementations may pick different chunks, and say so in their logits.
    """
    best: tuple[list[int], float] = ([], -1.0)
    for attempt in range(attempts):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        text = torch.randint(0, 256, (length,), generator=generator).tolist()
        best = max(best, (text, closest_race(model, text)), key=lambda item: item[1])
        if best[1] > LEAST_GAP:
            break
    return best


@torch.no_grad()
def closest_race(model: Any, ids: list[int]) -> float:
    """Least relative gap between the last chunk that a Lightning Indexer of the stock model picks and the next one."""
    gaps = [float("inf")]

    def on_scores(module: Any, inputs: Any, scores: torch.Tensor) -> None:
        topk = model.config.index_topk
        visible_S1 = (torch.arange(scores.shape[1], device=scores.device)[:, None] + 1) // 4
        there = torch.arange(scores.shape[2], device=scores.device) < visible_S1
        if scores.shape[2] > topk:
            best = scores[0].float().masked_fill(~there, float("-inf")).topk(topk + 1, dim=-1).values
            gap = (best[:, -2] - best[:, -1]) / best[:, 0].abs().clamp_min(1e-9)
            gaps.append(float(gap[visible_S1[:, 0] > topk].amin()))

    scorers = [module for name, module in model.named_modules() if name.endswith("indexer.scorer")]
    handles = [scorer.register_forward_hook(on_scores) for scorer in scorers]
    model(torch.tensor([ids], device=model.model.embed_tokens.weight.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return min(gaps)


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


LATE_COPIES, LATE_MODEL = 1, 2
CYCLES = 500_000_000  # about 0.3 seconds, several steps long
WARM_UP = 3
"""Windows, a round of turns, in which kernels are loaded: that waits for the device, late copies included."""
PINNED_SIZES, PINNED_BLOCKS = [2**power for power in range(13)], 32


def run_copies_under_load(args: Any) -> dict[str, Any]:
    """Decode while the next window's pages are copied in, against a twin that waits for its copies.

    Both sessions hold the same history and see the same windows, chosen at random. By turns the copies start late, the
    model's stream is behind, or neither; the host waits for nothing but what a step itself needs. Logits must be the
    twin's, unused slots are filled with NaN, and now and then each resident page is compared with its home.
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
    plan = _windows(ours.pages.num_pages, WARM_UP + args.load_windows, args.window_steps)
    _allocate_pinned(args.device)
    mine, overlapped = [], 0
    for turn, (wanted, tokens) in enumerate(plan):
        _delay(engine, turn % 3, args.device)
        ours.pages.prefetch(_with_open(ours, wanted))
        mine.append(engine.decode([ours], tokens[:1]))
        if turn % 3 == LATE_COPIES:
            _wait_for_model(args.device)
            overlapped += turn >= WARM_UP and _copies_run(ours)
        mine += [engine.decode([ours], [token]) for token in tokens[1:]]
        ours.pages.flip()  # at once: the next step must wait for the copies by itself
        if turn % 5 == 4:
            engine.store.check()
    theirs = []
    for wanted, tokens in plan:
        first = twin.pages.num_pages - 1
        theirs += [engine.decode([twin], [token]) for token in tokens]
        _synchronize(args.device)
        born = range(first, twin.pages.num_pages)
        twin.pages.prefetch(_with_open(twin, sorted({*wanted, *born})))
        _synchronize(args.device)
        twin.pages.flip()
    _synchronize(args.device)
    engine.store.check()
    differences = [_difference(a, b) for a, b in zip(mine, theirs, strict=True)]
    largest = max(differences) if all(value == value for value in differences) else float("nan")
    traffic, record, same = ours.pages.traffic, engine.layout.record_bytes, ours.pages.resident == twin.pages.resident
    engine.close()
    late = len(range(WARM_UP + LATE_COPIES, WARM_UP + args.load_windows, 3))
    return {
        "tokens": args.load_tokens,
        "record_bytes": record,
        "windows": args.load_windows,
        "windows_of_warmth": WARM_UP,
        "steps_per_window": args.window_steps,
        "pages_copied_in": traffic.pages_to_device,
        "bytes_copied_in": traffic.bytes_to_device,
        "windows_with_late_copies": late,
        "of_these_copies_still_ran_after_a_whole_step": overlapped,
        "resident_pages_equal": same,
        "largest_difference_to_twin": largest if largest == largest else "NaN: an unused slot was read",
        "passed": same and largest <= TOLERANCE and (torch.device(args.device).type == "cpu" or overlapped == late),
    }


def _allocate_pinned(device: str) -> None:
    """Let torch keep pinned blocks for the indices of many steps: allocating one waits for the whole device."""
    if torch.device(device).type == "cuda":
        blocks = [torch.empty(size, dtype=torch.int64).pin_memory() for size in PINNED_SIZES * PINNED_BLOCKS]
        del blocks


def _windows(pages: int, windows: int, steps: int) -> list[tuple[list[int], list[int]]]:
    """Pages and tokens of every window, at random."""
    draw = random.Random(1)
    last = pages - 1
    return [
        (sorted({0, *draw.sample(range(last), max(1, last // 5))}), [draw.randrange(256) for _ in range(steps)])
        for _ in range(windows)
    ]


def _with_open(session: Session, wanted: list[int]) -> list[int]:
    return sorted({*wanted, session.pages.num_pages - 1})


def _delay(engine: Engine, which: int, device: str) -> None:
    """Let the copies start late, or the model's stream be behind the host."""
    if torch.device(device).type != "cuda":
        return
    if which == LATE_COPIES:
        with engine.store.pool.side_stream(0):
            torch.cuda._sleep(CYCLES)
    elif which == LATE_MODEL:
        torch.cuda._sleep(CYCLES)


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
    warm = Engine(model, config=config)  # cuBLAS takes its workspace at the first product, and keeps it
    warm.session().generate(list(range(200)), max_new_tokens=3)
    warm.close()
    del warm
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
    weights = [part for scorer in engine.scorers.values() for part in scorer.state_dict().values()]
    indexers = {part.data_ptr(): part.nbytes for part in weights}  # one indexer may be there under two names
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
    slots, homes = store.pool.take_for_copy(records, 0), store.host.take(records)
    rows, runs = [store.host.row(home) for home in homes], store.host.runs(slots, homes)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pool = torch.empty(size, dtype=torch.uint8, device=device)
    for index, row in enumerate(rows):
        row.random_(generator=torch.Generator().manual_seed(index))

    def wait_for(function: Callable[[], object]) -> float:
        return common.timed(function, lambda: _synchronize(args.device))

    def copy_in() -> None:
        store.pool.wait_host(store.pool.copy_in(runs))

    def copy_out() -> None:
        store.pool.wait_host(store.pool.copy_out(runs))

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


def _wait_for_model(device: str) -> None:
    """Wait for the model's stream alone."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream().synchronize()


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# ---- compute-sanitizer


KERNEL_TESTS = (
    "attend_fused.py::test_numbers_of_picks",
    "attend_fused.py::test_all_entries_of_each_session",
    "encode_fused.py::test_index_rows_are_the_same_bytes",
    "encode_fused.py::test_fp8_entries_are_the_same_bytes",
    "finish_queries.py::test_level_2_takes_projections",
    "norm_rope.py::test_norms_and_rotations",
    "pool_in_place.py::test_it_pools_as_defined",
    "prefill_fused.py::test_index_rows_and_unfinished_queries",
    "prefill_fused.py::test_picked_entries",
    "hyper_connection.py::test_nothing_beyond_the_values_is_read",
    "put_rows.py::test_rows_go_through_page_tables",
    "score_fused.py::test_exact_keys",
    "score_fused.py::test_fp8_products_are_exact",
    "score_fused.py::test_page_reductions",
    "select_pages.py::test_it_selects_what_the_budget_policy_selects",
    "topk_fused.py::test_level_2_reads_pages_in_place",
    "topk_ranks.py::test_a_row_that_is_cut_twice",
)
"""Every kernel at least once, and few cases: each is compiled anew and then runs many times slower."""
PROGRESS = r"\s*\d+\.\d\d s  |tests/.*PASSED"


def sanitize(tool: str, part: str) -> Callable[[Any], dict[str, Any]]:
    """Run one part of the target, or tests of the kernels, under one tool: memcheck sees reads and writes outside of
    allocations, racecheck hazards in shared memory."""
    # without torch's caching every tensor is an allocation of its own
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    words = ["--tool", tool, "--error-exitcode", "9", "python", "-m"]
    if part == "kernels":
        words += ["pytest", "-v", "-p", "no:cacheprovider", *(f"tests/kernels/test_{name}" for name in KERNEL_TESTS)]
    else:
        words += ["benchmarks.gpu_sanitizer_target", part]

    def run(args: Any) -> dict[str, Any]:
        found = next((path for name in SANITIZER if (path := shutil.which(name))), None)
        result = {"command": " ".join(["compute-sanitizer", *words]), "environment": environment}
        if found is None:
            return {**result, "why": "compute-sanitizer is not installed", "passed": False}
        command = [found, *(sys.executable if word == "python" else word for word in words)]
        status, output = run_aloud(command, environment)
        return {
            **result,
            "exit_status": status,
            "summary": [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line],
            "progress": [
                line.strip() for line in output.splitlines() if re.match(r"\s*\d+\.\d\d s  |tests/.*PASSED", line)
            ],
            "tail": [] if status == 0 else tail(output),
            "passed": status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", output) is not None,
        }

    return run


# ---- the run


PARTS: dict[str, tuple[Callable[[Any], dict[str, Any]], int]] = {
    "copy_rates": (run_copy_rates, 90),
    "copies_under_load": (run_copies_under_load, 120),
    "exactness": (run_exactness, 300),
    "memory": (run_memory, 300),
    "tests": (run_tests, 500),
    "kernel_tests": (run_kernel_tests, 500),
    **{
        f"{tool}_{part}": (sanitize(tool, part), 500)
        for part in ("store", "decode", "fused", "kernels")
        for tool in ("memcheck", "racecheck")
    },
}
"""Each with the seconds that it may take."""
TIMED = ("copy_rates", "copies_under_load")
"""These measure time, or rely on it: they have the device to themselves."""


def tail(output: str, lines: int = 25) -> list[str]:
    """The end of a program's output, without absolute paths."""
    return [common.without_paths(line) for line in output.strip().splitlines()[-lines:]]


def run_aloud(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a program; returns its status and output. Lines are passed on as they come: whoever kills us keeps them."""
    process = subprocess.Popen(
        command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    return process.wait(), "".join(lines)


def run_alone(name: str, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own; whatever becomes of it is a result."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu_checks", *sys.argv[1:], "--alone", name, "--out", str(out)]
        return run_process(command, out, seconds)


def run_together(names: list[str], end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run parts at the same time; their results come as each is done."""
    with ThreadPoolExecutor(max_workers=len(PARTS)) as threads:
        running = {threads.submit(run_alone, name, min(PARTS[name][1], end - time.monotonic())): name for name in names}
        for future in as_completed(running):
            yield running[future], future.result()


def run_process(command: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run a program that writes its result to `out`; where it does not, the result says why, with its last lines."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pytest and compute-sanitizer have children of their own
        output, _ = process.communicate()
        result = {"passed": False, "why": f"it took more than {seconds:.0f} s", "tail": tail(output)}
    else:
        if out.is_file():
            result = json.loads(out.read_text())
        else:
            result = {"passed": False, "why": f"it ended with status {process.returncode}", "tail": tail(output)}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=570, help="what the whole run may take")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help="cpu runs exactness, copies and rates without a GPU")
    parser.add_argument("--geometries", type=int, default=8, help="random geometries of the exactness part")
    parser.add_argument("--load-tokens", type=int, default=65_536)
    parser.add_argument("--load-windows", type=int, default=30)
    parser.add_argument("--window-steps", type=int, default=12)
    parser.add_argument("--memory-tokens", type=int, default=16_384)
    parser.add_argument("--records", type=int, default=384)
    parser.add_argument("--copy-rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        result = PARTS[args.alone][0](args)
        args.out.write_text(json.dumps(result))
        return 0
    started, end = common.machine(), time.monotonic() + args.seconds
    results: dict[str, dict[str, Any]] = {}
    passed = False
    for together in [[name] for name in args.parts if name in TIMED] + [[n for n in args.parts if n not in TIMED]]:
        for name, result in run_together(together, end):
            results[name] = result
            common.log(f"{name}: {'passed' if result['passed'] else 'FAILED'} after {result['seconds']} s")
            complete = len(results) == len(args.parts)
            passed = complete and all(part["passed"] for part in results.values())
            summary = {"allow_tf32": False, "complete": complete, "passed": passed}
            ordered = {part: results[part] for part in PARTS if part in results}
            common.write_result(args.out, "gpu_checks", {**summary, **ordered}, started)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
