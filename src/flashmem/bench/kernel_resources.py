"""Compile every variant of the fused kernels for Hopper without a GPU, and read what the compiler says of each.

Registers and stack bytes come from the machine code's resource table, spills and matrix instructions from its
disassembly. The kernels are compiled by the code that launches them, on tensors without memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ..kernels.hyper_connection import Connection, collapse, spread
from ..kernels.index_rows import SCALE_BYTES, encode_index_rows
from ..kernels.kv_codec import KVFormatSpec, encode_rows
from ..kernels.norm_rope import norm_rope
from ..kernels.pool_in_place import pool_in_place
from ..kernels.score_chunks import QueryFinish
from ..kernels.score_chunks import fused as score
from ..kernels.select_chunks import fused as select
from ..kernels.select_pages import select_pages
from ..kernels.sparse_attention import fused as attention
from . import kernel_cases
from .kernel_cases import PoolCase, ScoreCase

HOPPER = GPUTarget("cuda", 90, 32)
META = torch.device("meta")
INSTRUCTIONS = {
    "fp8_matrix": r"QGMMA",
    "wide_matrix": r"HGMMA",
    "old_matrix": r"HMMA|IMMA",
    "async_copies_16": r"LDGSTS\S*\.128",
    "async_copies_narrow": r"LDGSTS(?!\S*\.128)",
    "loads": r"LDG",
    "loads_16": r"LDG\S*\.128",
    "shared_stores": r"STS",
    "local_stores": r"STL",
    "local_loads": r"LDL",
    "barriers": r"BAR",
}


class CompileOnly:
    """A driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def compiled_kernels(function: Callable[[], object]) -> list[tuple[str, Any]]:
    """Kernels that a function would launch: (name, compiled kernel)."""
    found: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel.result() if hasattr(kernel, "result") else kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        function()
    finally:
        JITFunction.run = launch
    return found


def resources(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    names = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
    counts = {name: sum(1 for op in names if re.match(pattern, op)) for name, pattern in INSTRUCTIONS.items()}
    # every address of the table of local memory counts, whoever put it there
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "warps": warps,
        "programs_per_multiprocessor": min(
            65536 // (32 * warps * max(1, -(-registers // 8) * 8)), 227 * 1024 // (shared + 1024)
        ),
        "instructions": len(names),
        **counts,
        "most_common": dict(Counter(op.split(".")[0] for op in names).most_common(8)),  # type: ignore[dict-item]
    }


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of every variant that the GPU program checks and times."""
    case = ScoreCase(262_144, 8)
    for precision, all_tiles in kernel_cases.SCORE_TILES.items():
        for tiles in all_tiles:
            yield f"score pages {precision} {label(tiles)}", _score(case, precision, tiles)
    one = ScoreCase(262_144, 1, layers=1)
    yield "score pages fp8, one session and layer", _score(one, "fp8", kernel_cases.SCORE_TILES["fp8"][0])
    rows = ScoreCase(262_144, 8, planar=False)
    for precision in ("fp8", "fp16"):
        yield (
            f"score pages {precision} interleaved rows",
            _score(rows, precision, kernel_cases.SCORE_TILES[precision][0]),
        )
    for precision, all_tiles in kernel_cases.SCORE_TILES.items():
        for tiles in all_tiles:
            if tiles.run == 8:
                short = score.Tiles(tiles.chunks, 1, tiles.warps, tiles.stages)
                yield f"score ranks {precision} {label(short)}", _ranks(precision, short)
    for precision, all_tiles in kernel_cases.QUERY_TILES.items():
        for tiles in all_tiles:
            for heads, dim in ((kernel_cases.INDEX_HEADS, kernel_cases.INDEX_DIM), (16, 64)):
                yield f"score prefill {precision} {heads} heads {label(tiles)}", _queries(precision, tiles, heads, dim)
    for precision in kernel_cases.SCORE_TILES:
        yield f"finish and prepare queries {precision}", _prepare(precision)
    yield "top-k of 4096, ordered", lambda: _topk(4096, True)
    yield "top-k of 24576", lambda: _topk(24_576, False)
    yield "select pages of 4096", _pages
    yield "encode index rows", lambda: encode_index_rows(_bf16(1024, kernel_cases.INDEX_DIM), impl="fused")
    spec = KVFormatSpec("fp8", kernel_cases.HEAD_DIM, kernel_cases.ROPE_DIM)
    yield "encode fp8 entries", lambda: encode_rows(spec, _bf16(1024, kernel_cases.HEAD_DIM), impl="fused")
    for windows, tokens in kernel_cases.POOLED:
        yield f"pool {windows * tokens} slots in place", _pool_in_place(windows, tokens)
    for kind in ("queries", "entries", "results"):
        yield f"norm and rotate {kind}", _norm_rope(kind)
    for batch in (1, 8):
        yield f"collapse streams of {batch}", _collapse(batch)
    yield "spread streams", _spread
    for kv_format in ("fp8", "bf16"):
        for shares in (1, 8):
            for choice in kernel_cases.attend_tiles(shares):
                yield f"attend {kv_format} {label(choice)}", _attend(kv_format, choice)
    yield "attend window alone", _attend("bf16", kernel_cases.attend_tiles(1)[0], sources=1)


def label(tiles: Any) -> str:
    """The fields of a choice of tiles."""
    return " ".join(f"{name}={getattr(tiles, name)}" for name in tiles.__slots__)


def _score(case: ScoreCase, precision: Any, tiles: score.Tiles) -> Callable[[], object]:
    def launch() -> object:
        keys, (q, w) = case.keys(META), case.queries(META)
        return score.score_page_reductions(
            *score.prepare_queries(q, w, precision), keys, page_chunks=kernel_cases.PAGE_CHUNKS,
            temperature=kernel_cases.TEMPERATURE, threshold=0.0, mean=False, tiles=tiles,
        )  # fmt: skip

    return launch


def _ranks(precision: Any, tiles: score.Tiles) -> Callable[[], object]:
    def launch() -> object:
        q, w = ScoreCase(1, 8, layers=1, heads=kernel_cases.INDEX_HEADS).queries(META)
        return score.score_ranks(*score.prepare_queries(q, w, precision), PoolCase(24_576, 8).keys(META), tiles=tiles)

    return launch


def _queries(precision: Any, tiles: score.Tiles, heads: int, dim: int) -> Callable[[], object]:
    def launch() -> object:
        q, w = ScoreCase(1, 64, layers=1, heads=heads).queries(META)
        keys = {
            "fp16": torch.empty(4096, dim + SCALE_BYTES, dtype=torch.uint8, device=META),
            "bf16": _bf16(4096, dim),
            "fp32": torch.empty(4096, dim, device=META),
        }[precision]
        visible = torch.empty(64, dtype=torch.int32, device=META)
        return score.score_queries(*score.prepare_queries(q[..., :dim], w, precision), keys, visible, tiles=tiles)

    return launch


def _prepare(precision: Any) -> Callable[[], object]:
    heads, dim, table = kernel_cases.INDEX_HEADS, kernel_cases.INDEX_DIM, _bf16(8, kernel_cases.ROPE_DIM // 2)
    finish = QueryFinish((table, table), hadamard=True, weight_scale=0.01)
    return lambda: score.prepare_queries(_bf16(1, 8, 1, heads, dim), _bf16(1, 8, 1, heads), precision, finish)


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def _pool_in_place(windows: int, tokens: int) -> Callable[[], object]:
    rings = kernel_cases.full_rings(windows, tokens, 8, kernel_cases.HEAD_DIM, torch.bfloat16, META)
    return lambda: pool_in_place(*rings, impl="fused")


def _norm_rope(kind: str) -> Callable[[], object]:
    dim, rope = kernel_cases.HEAD_DIM, (_bf16(8, kernel_cases.ROPE_DIM // 2),) * 2
    if kind == "entries":
        return lambda: norm_rope(_bf16(8, dim), eps=1e-6, weight_D=_bf16(dim), rope=rope, impl="fused")
    x, norm = _bf16(8, 64, dim), {"eps": 1e-6} if kind == "queries" else {"inverse": True}
    return lambda: norm_rope(x, rope=rope, impl="fused", **norm)


def _collapse(batch: int) -> Callable[[], object]:
    streams, channels = kernel_cases.STREAMS, kernel_cases.STREAMS * kernel_cases.HIDDEN
    outputs = (2 + streams) * streams
    fn, base, scale, norm = (
        torch.empty(shape, device=META) for shape in ((outputs, channels), (outputs,), (3,), (kernel_cases.HIDDEN,))
    )
    connection = Connection(
        fn_OF=fn, base_O=base, scale_3=scale, norm_weight_E=norm, streams_eps=1e-6, mix_eps=1e-6, norm_eps=1e-6,
        sinkhorn_iterations=20,
    )  # fmt: skip
    return lambda: collapse(_bf16(batch, streams, kernel_cases.HIDDEN), connection, impl="fused")


def _spread() -> object:
    streams, hidden = kernel_cases.STREAMS, kernel_cases.HIDDEN
    post, comb = torch.empty(1, streams, device=META), torch.empty(1, streams, streams, device=META)
    return spread(_bf16(1, hidden), post, comb, _bf16(1, streams, hidden), impl="fused")


def _topk(count: int, ordered: bool) -> object:
    return select.topk_ranks(torch.empty(8, count, dtype=torch.uint32, device=META), 512, ordered=ordered)


def _pages() -> object:
    scores, (num_pages, least, most) = (
        torch.empty(8, 4096, device=META),
        torch.empty(3, 8, dtype=torch.int32, device=META),
    )
    above = torch.empty_like(scores, dtype=torch.int32)
    return select_pages(scores, num_pages, least, most, sink=1, recency=8, above_BP=above, impl="fused")


def _attend(kv_format: str, tiles: attention.Tiles, sources: int = 2) -> Callable[[], object]:
    def launch() -> object:
        q, both, sinks = PoolCase(24_576, 8, kv_format).attention(META)
        return attention.attend_rows_fused(q, both[:sources], sinks, kernel_cases.HEAD_DIM**-0.5, tiles)

    return launch


def _cuobjdump(option: str, name: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, name], check=True, capture_output=True, text=True).stdout


def compile_variant(name: str) -> None:
    """Compile one variant into Triton's cache."""
    triton.runtime.driver.set_active(CompileOnly())
    compiled_kernels(dict(variants())[name])
