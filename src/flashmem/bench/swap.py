"""Page swaps: the store's copies beside one pinned copy of as many bytes, and beside a gather on the CPU.

The pool is as full as a session of the given context leaves it; every round replaces a share of its pages, at random
slots, by pages at random places of the mirror. Times are of the whole swap as the host sees it: slots are taken, copies
are found and enqueued, and waited for. Bytes are checked before anything is timed.

`swap` uses batched copies where CUDA has them, `one_by_one` is the store as it is. Where there are no batches
(`page_copies` says so, and it is so on a CPU), both are the same code: what they differ by is then what this
measurement cannot see.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..accounting.bytes import kept_pages
from ..config import KVFormat, ModelGeometry
from ..store import PageStore, RecordLayout, Run
from ..store.copies import Copies, LoopedCopies
from . import report

CHURNS = (0.05, 0.1, 0.25, 0.5, 1.0)
WARM_UP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapCase:
    """A session's pages of one model."""

    geometry: ModelGeometry
    context_tokens: int
    keep: float = 0.1
    kv_format: KVFormat = "fp8"
    page_chunks: int = 64

    @property
    def num_pages(self) -> int:
        return max(1, self.context_tokens // (self.geometry.csa_ratio * self.page_chunks))

    @property
    def resident_pages(self) -> int:
        return kept_pages(self.num_pages, self.keep)

    def layout(self, device: torch.device) -> RecordLayout:
        g = self.geometry
        return RecordLayout(
            g, page_chunks=self.page_chunks, kv_format=self.kv_format,
            target_layers=tuple(g.csa_layers[csa] for csa in g.default_targets()),
            device_of_layer=dict.fromkeys(range(g.num_layers), device),
        )  # fmt: skip


def run(
    case: SwapCase, *, device: torch.device, churns: Sequence[float] = CHURNS, rounds: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Measure swaps in and out at each churn, a share of the resident pages; by turns within each churn."""
    bench = _Swaps(case, device, seed)
    try:
        bench.check()
        rows = [row for churn in churns for row in bench.measure(churn, rounds)]
        name = bench.store.pool.copies.name
    finally:
        bench.close()
    return {
        "context_tokens": case.context_tokens,
        "record_bytes": bench.record_bytes,
        "pages": case.num_pages,
        "resident_pages": case.resident_pages,
        "device": device.type,
        "page_copies": name,
        "pinned": bench.pinned,
        "rounds": rounds,
        "bytes_equal": True,  # else `check` has raised
        "rows": rows,
    }


class _Swaps:
    """A full mirror, a full pool, and the ways to bring pages in and out."""

    def __init__(self, case: SwapCase, device: torch.device, seed: int) -> None:
        layout = case.layout(device)
        self.case, self.device, self.record_bytes = case, device, layout.record_bytes
        self.draw = random.Random(seed)
        self.store = PageStore(
            layout, dtype=torch.bfloat16, device_budget_bytes=case.resident_pages * layout.record_bytes,
            host_budget_bytes=case.num_pages * layout.record_bytes, disk_path=None, disk_budget_bytes=None,
        )  # fmt: skip
        self.pinned = self.store.host.pinned
        self.homes = self.store.host.take(case.num_pages)
        self.slots = self.store.pool.take(case.resident_pages, 0)
        size = (case.resident_pages, layout.record_bytes)
        self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.area = torch.empty(size, dtype=torch.uint8, device=device)
        base = torch.randint(0, 256, (layout.record_bytes,), dtype=torch.uint8)
        for home in self.homes:
            row = self.store.host.row(home)
            torch.add(base, home % 251, out=row)
            row[:8] = torch.tensor([home]).view(torch.uint8)  # no two records are equal

    def close(self) -> None:
        self.store.pool.give_back(self.slots)
        self.store.host.give_back(self.homes)
        self.store.close()

    def pages(self, churn: float) -> int:
        return min(self.case.resident_pages, max(1, math.ceil(round(churn * self.case.resident_pages, 9))))

    def plan(self, pages: int) -> tuple[list[int], list[int]]:
        """Slots to be replaced and homes to come, each in order, as a flip and a prefetch name them."""
        return sorted(self.draw.sample(self.slots, pages)), sorted(self.draw.sample(self.homes, pages))

    # ---- ways

    def swap_in(self, slots: list[int], homes: list[int], copies: Copies | None = None) -> None:
        """What a window boundary does: slots are taken anew, lowest first, and filled."""
        pool = self.store.pool
        taken = pool.take_for_copy(len(slots), 0)
        assert taken == slots
        self._with(copies, lambda: pool.copy_in(self.store.host.runs(taken, homes)))

    def swap_out(self, slots: list[int], homes: list[int], copies: Copies | None = None) -> None:
        self._with(copies, lambda: self.store.pool.copy_out(self.store.host.runs(slots, homes)))

    def _with(self, copies: Copies | None, enqueue: Callable[[], Any]) -> None:
        pool = self.store.pool
        usual, pool.copies = pool.copies, copies or pool.copies
        try:
            pool.wait_host(enqueue())
        finally:
            pool.copies = usual

    def gather_in(self, slots: list[int], homes: list[int]) -> None:
        """Gather on the CPU, one copy, scatter on the device."""
        count = len(slots)
        for place, home in enumerate(homes):
            self.staging[place].copy_(self.store.host.row(home))
        self.area[:count].copy_(self.staging[:count], non_blocking=True)
        words, area = (x.view(torch.int64) for x in (self.store.pool.parts[0], self.area[:count]))  # not byte by byte
        words.index_copy_(0, torch.tensor(slots, device=self.device), area)
        report.synchronizer(self.device)()

    # ---- checks and times

    def check(self) -> None:
        """Every way moves the bytes that it should; raises AssertionError."""
        pool, half = self.store.pool, self.pages(0.5)
        for way in ("swap", "one_by_one", "gather"):
            slots, homes = self.plan(half)
            if way == "gather":
                self.gather_in(slots, homes)
            else:
                pool.give_back(slots)
                self.swap_in(slots, homes, None if way == "swap" else LoopedCopies())
            for slot, home in zip(slots, homes, strict=True):
                assert torch.equal(pool.record_to_cpu(slot), self.store.host.row(home)), "a swap in changed bytes"
        for copies in (None, LoopedCopies()):
            slots, homes = self.plan(half)
            kept = [self.store.host.row(home).clone() for home in homes]
            wanted = [pool.record_to_cpu(slot) for slot in slots]
            self.swap_out(slots, homes, copies)
            for record, home, old in zip(wanted, homes, kept, strict=True):
                assert torch.equal(record, self.store.host.row(home)), "a swap out changed bytes"
                self.store.host.row(home).copy_(old)

    def measure(self, churn: float, rounds: int) -> list[dict[str, Any]]:
        """One row per direction."""
        pages = self.pages(churn)
        size = pages * self.record_bytes
        looped = LoopedCopies()
        area, staging = self.area[:pages], self.staging[:pages]
        ways: dict[str, dict[str, Callable[[list[int], list[int]], object]]] = {
            "in": {
                "swap": self.swap_in,
                "one_by_one": lambda slots, homes: self.swap_in(slots, homes, looped),
                "gather_and_copy": self.gather_in,
                "peak": lambda slots, homes: area.copy_(staging, non_blocking=True),
            },
            "out": {
                "swap": self.swap_out,
                "one_by_one": lambda slots, homes: self.swap_out(slots, homes, looped),
                "peak": lambda slots, homes: staging.copy_(area, non_blocking=True),
            },
        }
        seconds: dict[tuple[str, str], list[float]] = {(to, name): [] for to in ways for name in ways[to]}
        runs: list[Run] = []
        for turn in range(rounds + WARM_UP):
            # in any order: whoever comes next finds other bytes in the caches
            for (to, name), found in self.draw.sample(list(seconds.items()), len(seconds)):
                slots, homes = self.plan(pages)
                runs = self.store.host.runs(slots, homes)
                if to == "in" and name in ("swap", "one_by_one"):
                    self.store.pool.give_back(slots)
                way = ways[to][name]
                took = report.timed(lambda: way(slots, homes), report.synchronizer(self.device))  # noqa: B023
                if turn >= WARM_UP:
                    found.append(took)
        return [self._row(to, churn, pages, len(runs), size, {n: seconds[to, n] for n in ways[to]}) for to in ways]

    def _row(
        self, to: str, churn: float, pages: int, runs: int, size: int, seconds: dict[str, list[float]]
    ) -> dict[str, Any]:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        row: dict[str, Any] = {
            "direction": to,
            "churn": churn,
            "pages": pages,
            "runs_of_last_round": runs,
            "bytes": size,
            "gb_per_s": {name: round(size / value / 1e9, 2) for name, value in median.items()},
            "milliseconds": {name: report.spread(values) for name, values in seconds.items()},
            "peak_ratio": round(median["peak"] / median["swap"], 4),
            "one_by_one_peak_ratio": round(median["peak"] / median["one_by_one"], 4),
        }
        if "gather_and_copy" in median:
            row["over_gather_ratio"] = round(median["gather_and_copy"] / median["swap"], 3)
        return row


__all__ = ["CHURNS", "SwapCase", "run"]
