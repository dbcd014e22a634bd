"""Shapes and tiles of the fused kernels, for the programs that compile, check and time them.

Shape letters: L = layers, B = sessions, M = observed tokens, H = heads, I = index_head_dim, N = chunks, P = pages,
D = head_dim, W = window, K = picks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels.index_rows import SCALE_BYTES, encode_index_rows
from ..kernels.kv_codec import KVFormatSpec, PlanarForm, encode_rows, put_planar
from ..kernels.paged import PagedRows, index_row_form
from ..kernels.score_chunks import PageScores
from ..kernels.score_chunks.fused import Precision, prepare_queries, score_page_reductions
from ..kernels.score_chunks.fused import Tiles as ScoreTiles
from ..kernels.sparse_attention import EntrySource
from ..kernels.sparse_attention.fused import Tiles as AttendTiles

PAGE_CHUNKS = 64
RECORD_BYTES = 938_304
"""All regions of one page of V4-Flash."""
INDEX_HEADS, MEMORY_HEADS, INDEX_DIM = 64, 128, 128
HEADS, HEAD_DIM, ROPE_DIM, WINDOW, TOP_K = 64, 512, 64, 128, 512
STREAMS, HIDDEN = 4, 4096
TARGET_LAYERS = 3
TEMPERATURE, THRESHOLD = 0.25, 0.0
RESIDENT_CHUNKS, BATCHES = (6144, 12_288, 24_576), (1, 8, 32, 64)
"""Of level 2; as many sessions in attention."""

SCORE_TILES = {
    "fp8": [
        ScoreTiles(128, 8, 4, 3), ScoreTiles(128, 8, 4, 4), ScoreTiles(128, 8, 8, 3), ScoreTiles(128, 16, 4, 3),
        ScoreTiles(64, 8, 4, 3), ScoreTiles(64, 16, 4, 4), ScoreTiles(64, 16, 4, 6), ScoreTiles(256, 4, 8, 3),
    ],
    "fp8x2": [ScoreTiles(128, 8, 4, 3), ScoreTiles(64, 8, 4, 4), ScoreTiles(64, 16, 4, 4)],
    "fp16": [ScoreTiles(64, 8, 4, 3), ScoreTiles(64, 16, 4, 4), ScoreTiles(128, 8, 8, 3), ScoreTiles(64, 8, 8, 4)],
}  # fmt: skip
"""Tiles worth timing, by precision."""

QUERY_TILES = {
    "fp16": [ScoreTiles(128, 4, 4, 3), ScoreTiles(128, 4, 8, 3), ScoreTiles(64, 8, 4, 3), ScoreTiles(64, 8, 4, 4)],
    "bf16": [ScoreTiles(128, 4, 4, 3), ScoreTiles(128, 4, 8, 3), ScoreTiles(64, 8, 4, 3), ScoreTiles(64, 8, 4, 4)],
    "fp32": [ScoreTiles(32, 8, 4, 1)],
}  # fmt: skip
"""Tiles of a prefill's scores, by precision: index rows in fp16, else exact keys."""

ATTEND_TILES = [(64, 32, 8), (64, 16, 8), (64, 64, 8), (32, 32, 8), (32, 32, 4), (16, 32, 4)]
"""Heads, keys, warps."""
SHARES = {1: (8, 10, 20), 8: (4, 8, 16), 32: (2, 4, 8), 64: (1, 2, 4)}
"""Programs that share the keys of one session, by the size of the batch."""


@dataclass(frozen=True, slots=True)
class ScoreCase:
    """Index rows of L layers and B sessions of up to N chunks."""

    chunks: int
    batch: int
    layers: int = TARGET_LAYERS
    heads: int = MEMORY_HEADS
    planar: bool = True

    @property
    def key_bytes(self) -> int:
        return self.layers * self.batch * self.chunks * (INDEX_DIM + SCALE_BYTES)

    @property
    def flops(self) -> int:
        return self.layers * self.batch * self.chunks * self.heads * INDEX_DIM * 2

    def keys(self, device: torch.device, *, seed: int = 0) -> PagedRows:
        """Random rows, each session its own, all of the same length."""
        form = index_form(self.planar)
        size = (self.chunks // form.page_chunks, form.page_bytes)
        draw = generator(device, seed)
        regions = []
        for _ in range(self.layers):
            layer = []
            for _ in range(self.batch):
                region = torch.empty(size, dtype=torch.uint8, device=device)
                if device.type != "meta":
                    fill_index_rows(form, region, draw)
                layer.append(region)
            regions.append(layer)
        return PagedRows(form, regions, [self.chunks] * self.batch)

    def queries(self, device: torch.device, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        draw = generator(device, seed + 1)
        shape = (self.layers, self.batch, 1, self.heads)
        q = randn(*shape, INDEX_DIM, device=device, draw=draw)
        return q, randn(*shape, device=device, draw=draw) * (INDEX_DIM * self.heads) ** -0.5


@dataclass(frozen=True, slots=True)
class PoolCase:
    """Resident pages of B sessions in one pool of records: index keys and KV entries of one layer."""

    chunks: int
    batch: int
    kv_format: str = "fp8"

    @property
    def pages(self) -> int:
        return -(-self.chunks // PAGE_CHUNKS)

    def table(self, device: torch.device, *, seed: int = 0) -> torch.Tensor:
        """Slots [B, P], every session's pages scattered over the pool."""
        slots = torch.randperm(self.batch * self.pages, generator=torch.Generator().manual_seed(seed))
        return slots.view(self.batch, self.pages).to(device)

    def keys(self, device: torch.device, *, seed: int = 0) -> PagedRows:
        form = index_form(planar=True)
        region = self._region(form.page_bytes, device)
        if device.type != "meta":
            fill_index_rows(form, region, generator(device, seed))
        return PagedRows(form, [[region]], [self.chunks] * self.batch, self.table(device, seed=seed))

    def entries(self, device: torch.device, *, seed: int = 0) -> tuple[PagedRows, KVFormatSpec]:
        spec = KVFormatSpec(self.kv_format, HEAD_DIM, ROPE_DIM)  # type: ignore[arg-type]
        form = spec.planar(PAGE_CHUNKS)
        region = self._region(form.page_bytes, device)
        if device.type != "meta":
            fill_entries(spec, form, region, generator(device, seed))
        return PagedRows(form, [[region]], [self.chunks] * self.batch, self.table(device, seed=seed)), spec

    def attention(
        self, device: torch.device, *, picks: int = TOP_K, seed: int = 0
    ) -> tuple[torch.Tensor, list[EntrySource], torch.Tensor]:
        """Queries in bf16, a window and picked entries, and sinks."""
        draw = generator(device, seed + 2)
        q = randn(self.batch, HEADS, HEAD_DIM, device=device, draw=draw).bfloat16()
        rows, spec = self.entries(device, seed=seed)
        window_spec = KVFormatSpec("bf16", HEAD_DIM, ROPE_DIM)
        rings = randn(self.batch, WINDOW, HEAD_DIM, device=device, draw=draw).bfloat16()
        window = PagedRows(
            window_spec.planar(WINDOW), [[ring.view(1, -1).view(torch.uint8) for ring in rings]], [WINDOW] * self.batch
        )
        order = torch.stack(
            [
                torch.randperm(self.chunks, generator=torch.Generator().manual_seed(seed + b))[:picks]
                for b in range(self.batch)
            ]
        )
        sources = [EntrySource(window, window_spec), EntrySource(rows, spec, order.to(device))]
        return q, sources, randn(HEADS, device=device, draw=draw)

    def _region(self, page_bytes: int, device: torch.device) -> torch.Tensor:
        """One region of whole records, so that page addresses are as far apart as in a pool."""
        records = torch.empty(self.batch * self.pages, RECORD_BYTES, dtype=torch.uint8, device=device)
        return records[:, :page_bytes]


def page_scores_fused(
    q: torch.Tensor, w: torch.Tensor, keys: PagedRows, precision: Precision, tiles: ScoreTiles | None = None
) -> PageScores:
    """All of level 1 from queries to page scores."""
    return PageScores(
        *score_page_reductions(
            *prepare_queries(q, w, precision), keys, page_chunks=PAGE_CHUNKS, temperature=TEMPERATURE,
            threshold=THRESHOLD, mean=False, tiles=tiles,
        )
    )  # fmt: skip


def attention_bytes(batch: int, picks: int, kv_format: str) -> int:
    """Bytes that decode attention must read and write: window, picked entries, queries, result."""
    entry = KVFormatSpec(kv_format, HEAD_DIM, ROPE_DIM).entry_bytes  # type: ignore[arg-type]
    return batch * (WINDOW * 2 * HEAD_DIM + picks * entry + 2 * HEADS * HEAD_DIM * 2)


def attention_flops(batch: int, picks: int) -> int:
    return 4 * batch * HEADS * HEAD_DIM * (WINDOW + picks)


def attend_tiles(shares: int) -> list[AttendTiles]:
    return [AttendTiles(heads, keys, shares, warps) for heads, keys, warps in ATTEND_TILES]


def index_form(planar: bool, dim: int = INDEX_DIM) -> PlanarForm:
    """Index rows in pages, values first, or one after the other."""
    return PlanarForm(PAGE_CHUNKS, dim, SCALE_BYTES) if planar else index_row_form(dim)


POOLED = ((2, 4), (1, 128))
"""Windows of a ring and tokens of a window: CSA, HCA."""


def fill_index_rows(
    form: PlanarForm, region: torch.Tensor, draw: torch.Generator | None, count: int | None = None
) -> None:
    """Random rows in the first `count` places of a region, by default in all."""
    for n in _places(form, region, count, 1 << 18):
        rows = encode_index_rows(randn(len(n), form.data_bytes, device=region.device, draw=draw))
        put_planar(form, region, n // form.page_chunks, n % form.page_chunks, rows)


def fill_entries(spec: KVFormatSpec, form: PlanarForm, region: torch.Tensor, draw: torch.Generator | None) -> None:
    for n in _places(form, region, None, 1 << 16):
        rows = encode_rows(spec, randn(len(n), spec.head_dim, device=region.device, draw=draw))
        put_planar(form, region, n // form.page_chunks, n % form.page_chunks, rows)


def _places(form: PlanarForm, region: torch.Tensor, count: int | None, step: int) -> Iterator[torch.Tensor]:
    count = len(region) * form.page_chunks if count is None else count
    for first in range(0, count, step):
        yield torch.arange(first, min(first + step, count), device=region.device)


def generator(device: torch.device, seed: int) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def randn(*shape: int, device: torch.device, draw: torch.Generator | None) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, device=device)


def full_rings(
    windows: int, tokens: int, sessions: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Arguments of `pool_in_place` for sessions that all complete a window of `tokens`."""
    draw, width = generator(device, 3), windows * channels
    shapes = [(sessions, windows * tokens, width)] * 2 + [(sessions, width)] * 2
    values = [randn(*shape, device=device, draw=draw).to(dtype) for shape in shapes]
    rows = torch.arange(sessions, device=device)
    return (*values, randn(tokens, width, device=device, draw=draw), rows, torch.full_like(rows, 3 * tokens - 1))
