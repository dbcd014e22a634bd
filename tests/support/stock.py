"""Random geometries, and the stock model as judge of a session: nothing of flashmem's engine is used here.

Shape letters: S = tokens, T = chunks, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from flashmem.backbone import random_model
from flashmem.types import PageView, Scorer, Selection

CSA_RATIO = 4
GEOMETRIES: dict[str, dict[str, Any]] = {
    "four-csa": {"layers": "WCHCHCC", "seed": 1},
    "odd-heads": {"layers": "CHC", "seed": 2, "num_attention_heads": 6, "index_n_heads": 17, "o_groups": 3},
    "hash-moe": {"layers": "wcHC", "seed": 7, "hc_mult": 3},
    "yarn": {
        "layers": "HCWC",
        "seed": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
}


TINY: dict[str, Any] = {
    "layers": "CH", "seed": 3, "hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "head_dim": 16,
    "partial_rotary_factor": 0.5, "q_lora_rank": 16, "n_routed_experts": 2, "o_lora_rank": 8, "sliding_window": 8,
    "index_topk": 6,
}  # fmt: skip
"""For thousands of steps."""


def make_model(name: str) -> Any:
    """A fresh model of a geometry; two calls give the same weights."""
    arguments = dict(TINY if name == "tiny" else GEOMETRIES[name])
    return random_model(arguments.pop("layers"), **arguments)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class FixedPages:
    """A policy that always wants the same pages; it remembers what it was shown."""

    pages: frozenset[int] = frozenset()
    name: str = "fixed"
    scorer: Scorer = "none"
    views: list[PageView] = field(default_factory=list)

    def select(self, view: PageView) -> Selection:
        self.views.append(view)
        there = {page for page in self.pages if page < view.num_pages}
        return Selection(tuple(sorted({*view.always, *there})))


class Stock:
    """The unmodified model, run without a cache over all tokens at once.

    With `allowed`, bool [S, T], scores of chunks that a query may not see become -inf in every Lightning Indexer; a
    pick of such a chunk (where fewer than top-k are left) is no pick.
    """

    def __init__(self, name: str) -> None:
        self.model = make_model(name)
        self.allowed: torch.Tensor | None = None
        for layer in self.model.model.layers:
            if hasattr(indexer := getattr(layer.self_attn.compressor, "indexer", None), "scorer"):
                self._mask_scores(indexer)

    @torch.no_grad()
    def logits(self, ids: list[int], allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits [S, V]."""
        self.allowed = allowed
        try:
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            self.allowed = None  # tests share this model, in any order, and call it themselves

    def _mask_scores(self, indexer: Any) -> None:
        masked: list[torch.Tensor] = []

        def on_scores(module: Any, inputs: Any, scores: torch.Tensor) -> torch.Tensor:
            if self.allowed is not None:
                scores = scores.masked_fill(~self.allowed, float("-inf"))
            masked[:] = [scores]
            return scores

        def on_picks(module: Any, inputs: Any, picks: torch.Tensor) -> torch.Tensor:
            gone = masked[0].gather(-1, picks.clamp_min(0)) == float("-inf")
            return picks.masked_fill(gone, -1)

        indexer.scorer.register_forward_hook(on_scores)
        indexer.register_forward_hook(on_picks)


@dataclass
class Timeline:
    """The contract about what a query may see, written down without an engine.

    Appended tokens see every chunk. A decoded token sees the pages of its window's selection, and every chunk from the
    page on that was open when the window's selection was made (with `lead`, that many steps before the window).
    """

    page_chunks: int
    pages: frozenset[int]
    tau: int = 64
    lead: int = 0
    sink: int = 1
    recency: int = 2
    position: int = 0
    steps: int = 0
    window: tuple[frozenset[int], int] = (frozenset(), 0)
    early: tuple[frozenset[int], int] | None = None
    rows: list[tuple[frozenset[int], int] | None] = field(default_factory=list)

    def append(self, count: int) -> None:
        self.position += count
        self.rows += [None] * count
        self.window, self.early, self.steps = self._select(), None, 0

    def decode(self, count: int = 1) -> None:
        for _ in range(count):
            if self.steps == self.tau:
                self.window, self.early, self.steps = self.early or self._select(), None, 0
            elif self.lead and self.steps == self.tau - self.lead:
                self.early = self._select()
            self.rows.append(self.window)
            self.position += 1
            self.steps += 1

    def select_again(self) -> None:
        """A window starts here, as after an append: an append has failed."""
        self.window, self.early, self.steps = self._select(), None, 0

    def allowed(self) -> torch.Tensor:
        """Bool [S, T]; causality is the model's own business."""
        page_T = torch.arange(self.position // CSA_RATIO) // self.page_chunks
        out = torch.ones(self.position, len(page_T), dtype=torch.bool)
        for row, window in zip(out, self.rows, strict=True):
            if window is not None:
                selected, first_open = window
                row[:] = torch.isin(page_T, torch.tensor(sorted(selected), dtype=torch.int64)) | (page_T >= first_open)
        return out

    def _select(self) -> tuple[frozenset[int], int]:
        chunks = self.position // CSA_RATIO
        count = -(-chunks // self.page_chunks)
        always = {p for p in range(count) if p < self.sink or p >= count - self.recency}
        return frozenset(always | {p for p in self.pages if p < count}), chunks // self.page_chunks


class InjectedError(RuntimeError):
    pass


@contextmanager
def failing_layer(model: Any, layer: int, *, after: int = 0) -> Iterator[None]:
    """Let the MoE block of a layer raise, after it has worked `after` times."""
    block = model.model.layers[layer].mlp
    calls = 0

    def fail(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise InjectedError(f"layer {layer}")

    handle = block.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
