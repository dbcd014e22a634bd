"""The skeleton that `decode` and `capacity` run, and what it and its sessions take on one device.

The model has the true geometry, random weights, and as many experts a layer as fit: attention, the indexers, the caches
and the page store do what they do in the real model, the experts do less. No number of bytes is written here:
`weight_bytes` counts a model on the device "meta", `session_memory` is the accounting's formula with the slots that the
scheduler promises. `flashmem bench capacity --plan` prints both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ..accounting.bytes import kept_pages, kv_report
from ..backbone import skeleton_model
from ..config import KVFormat, LSAConfig, ModelGeometry
from ..lookahead import SlotShare
from ..policy import AllPages, Budget
from ..store.device import free_bytes
from ..types import PageLimits, PageView, Policy, Scorer, Selection

Mode = Literal["full", "lsa"]
MODES: tuple[Mode, ...] = ("full", "lsa")
_FORMAT_OF_DTYPE: Mapping[torch.dtype, KVFormat] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_MORE_POSITIONS = 1 << 16
"""Beyond the model's longest text, so that a full context can be decoded from."""


@dataclass(kw_only=True, slots=True)
class ChurnPolicy(Budget):
    """Hold a budget and replace a share of it in every window, at random; scores are computed and not looked at.

    Random weights have no reason to keep or to change pages: here the share is a setting, and level 1 costs what it
    costs.
    """

    churn: float = 0.1
    scorer: Scorer = "native"
    name: str = "churn"

    def __post_init__(self) -> None:
        Budget.__post_init__(self)
        if not 0 <= self.churn <= 1:
            raise ValueError(f"churn must lie in 0..1, got {self.churn}")

    def select(self, view: PageView) -> Selection:
        draw, always = random.Random(f"{view.seed} {view.cycle}"), set(view.always)
        room, previous = self.room(view), set(view.previous) - always
        others = view.num_pages - len(always) - len(previous)
        moved = min(others, max(room - len(previous), round(self.churn * room)))
        kept = draw.sample(sorted(previous), min(len(previous), room - moved))
        return Selection(tuple(sorted({*always, *kept, *_draw(draw, moved, view.num_pages, always | previous)})))

    def limits(self, view: PageView) -> PageLimits:
        """Those of a budget, so that level 1 costs on the device what it costs."""
        return PageLimits(self.room(view), self.room(view))

    def chosen(self, view: PageView, pages: tuple[int, ...], above: int) -> Selection:
        return self.select(view)


def _draw(draw: random.Random, count: int, num_pages: int, but: set[int]) -> list[int]:
    """Different pages, none of `but`: by trial where most pages will do, which takes no time that grows with them."""
    if 2 * (count + len(but)) > num_pages:
        return draw.sample([page for page in range(num_pages) if page not in but], count)
    found: set[int] = set()
    while len(found) < count:
        if (page := draw.randrange(num_pages)) not in but:
            found.add(page)
    return sorted(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """What is run: a geometry with few experts, and how its sessions page."""

    geometry: ModelGeometry
    device: torch.device
    experts: int = 8
    dtype: torch.dtype = torch.bfloat16
    keep: float = 0.1
    churn: float = 0.1
    """Share of the selected pages that every window replaces."""
    tau: int = 64
    lead: int = 0
    kv_format: KVFormat = "fp8"
    page_chunks: int = 64
    kernels: Literal["reference", "fused"] = "reference"
    cuda_graphs: bool = False
    fill_tokens: int = 2048
    """Tokens that a prefill may write at a time: sessions are promised slots for their pages. A synthetic history uses
    more slots at a time where it can."""

    @property
    def longer(self) -> ModelGeometry:
        """The geometry with room for the tokens that are decoded."""
        return replace(self.geometry, max_positions=self.geometry.max_positions + _MORE_POSITIONS)

    def model(self) -> Any:
        return skeleton_model(self.longer, num_experts=self.experts, dtype=self.dtype, device=self.device)

    def weight_bytes(self) -> int:
        model = skeleton_model(self.longer, num_experts=self.experts, dtype=self.dtype, device="meta")
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def config(self, mode: Mode, context_tokens: int, sessions: int, memory: SessionMemory) -> LSAConfig:
        """Settings of an engine that holds this many sessions and no more."""
        exact = _FORMAT_OF_DTYPE[self.dtype]
        pages = memory.selected_pages
        policy: Policy = AllPages() if mode == "full" else ChurnPolicy(pages=pages, churn=self.churn)
        return LSAConfig(
            policy=policy, page_chunks=self.page_chunks, tau=self.tau, lead=self.lead if mode == "lsa" else 0,
            kv_format="auto" if self.kv_format == exact else self.kv_format, prefill_chunk=self.fill_tokens,
            device_budget_bytes=sessions * memory.slots * memory.record_bytes, max_sessions=sessions,
            kernels=self.kernels, cuda_graphs=self.cuda_graphs,
        )  # fmt: skip

    def session_memory(self, mode: Mode, context_tokens: int, decoded_tokens: int) -> SessionMemory:
        """What one session takes after `decoded_tokens` steps, by the formulas."""
        g, tokens = self.geometry, context_tokens + decoded_tokens
        chunks = tokens // g.csa_ratio
        pages = -(-chunks // self.page_chunks)
        defaults = LSAConfig(
            page_chunks=self.page_chunks, tau=self.tau, lead=self.lead if mode == "lsa" else 0,
            prefill_chunk=self.fill_tokens,
        )  # fmt: skip
        share = SlotShare.of(defaults, g, 0, 0)
        selected = pages
        if mode == "lsa":
            selected = kept_pages(
                pages, self.keep, sink_pages=defaults.sink_pages, recency_pages=defaults.recency_pages
            )
        slots = share.working_pages + selected * (2 if share.double_buffered else 1)
        report = kv_report(
            g, tokens, kv_format=self.kv_format, state_format=_FORMAT_OF_DTYPE[self.dtype],
            page_chunks=self.page_chunks, resident_pages=selected,
            hca_capacity=tokens // g.hca_ratio * 3 // 2, row_capacity=chunks * 3 // 2,  # they grow by halves
        )  # fmt: skip
        beside = report.all_in.device_bytes - report.all_in.device["pages"]
        return SessionMemory(
            mode=mode, context_tokens=context_tokens, pages=pages, selected_pages=selected, slots=slots,
            record_bytes=report.record_bytes, pool_bytes=slots * report.record_bytes, beside_bytes=beside,
            host_bytes=report.all_in.host_bytes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionMemory:
    """Bytes of one session, by tier."""

    mode: Mode
    context_tokens: int
    pages: int
    selected_pages: int
    slots: int
    """Selected pages and those that a window or a chunk of history opens."""
    record_bytes: int
    pool_bytes: int
    beside_bytes: int
    """On the device beside the pool: index rows, HCA entries, windows, rings."""
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.pool_bytes + self.beside_bytes

    def sessions(self, device_budget_bytes: int, host_budget_bytes: int) -> int:
        """Sessions that both budgets hold."""
        return min(device_budget_bytes // self.device_bytes, host_budget_bytes // max(1, self.host_bytes))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "device_bytes": self.device_bytes}


def default_budgets(skeleton: Skeleton) -> tuple[int, int]:
    """Bytes for KV on the device, of what the weights leave free, and for mirrors in main memory.

    The rest is for what a step computes with: three tenths on the device, a fifth in main memory.
    """
    host = free_bytes(torch.device("cpu"))
    if skeleton.device.type == "cuda":
        device = torch.cuda.mem_get_info(skeleton.device)[1] - skeleton.weight_bytes()
    else:
        device = (host - skeleton.weight_bytes()) // 2
    return max(0, device * 7 // 10), host * 8 // 10


def plan(
    skeleton: Skeleton, contexts: list[int], decoded_tokens: int, device_budget_bytes: int, host_budget_bytes: int
) -> dict[str, Any]:
    """The memory arithmetic: weights, and per context and mode what a session takes and how many fit."""
    rows = []
    for context in contexts:
        for mode in MODES:
            memory = skeleton.session_memory(mode, context, decoded_tokens)
            fit = memory.sessions(device_budget_bytes, host_budget_bytes)
            rows.append({**memory.as_json(), "sessions_fit": fit})
    return {
        "weight_bytes": skeleton.weight_bytes(),
        "kv_device_budget_bytes": device_budget_bytes,
        "host_budget_bytes": host_budget_bytes,
        "rows": rows,
    }


def describe(skeleton: Skeleton) -> dict[str, Any]:
    """What a result file says about the model."""
    g = skeleton.geometry
    return {
        "layers": g.num_layers,
        "csa_layers": len(g.csa_layers),
        "hidden_size": g.hidden_size,
        "experts": skeleton.experts,
        "experts_of_the_real_model": g.num_experts,
        "weights": "random",
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "kv_format": skeleton.kv_format,
        "page_chunks": skeleton.page_chunks,
        "keep": skeleton.keep,
        "churn": skeleton.churn,
        "tau": skeleton.tau,
        "lead": skeleton.lead,
        "kernels": skeleton.kernels,
        "cuda_graphs": skeleton.cuda_graphs,
        "history": "synthetic",
    }


__all__ = ["MODES", "ChurnPolicy", "Mode", "SessionMemory", "Skeleton", "default_budgets", "describe", "plan"]
