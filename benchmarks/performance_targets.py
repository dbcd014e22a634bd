"""What was aimed at on the device, and where `performance_page` finds what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Values = dict[str, float]
"""By case."""
LEAST_KEY_BYTES = 100e6


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one or several numbers of a result file."""

    what: str
    file: str
    bound: float
    values: Callable[..., Values]
    """Takes the results of `file` and, if there is one, of `beside`."""
    why: str = ""
    """What keeps the cases that fall short from it."""
    at_most: bool = False
    form: str = ".2f"
    beside: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,) if self.beside is None else (self.file, self.beside)

    @property
    def text(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:{self.form}}"

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _peers(bench: str, peer: str, least_chunks: int = 0, least_batch: int = 1) -> Callable[[Row], Values]:
    """A peer's time over ours, by case."""

    def values(result: Row) -> Values:
        return {
            _case(row): row["ratio"]
            for row in result["rows"]
            if row["bench"] == bench and row.get("peer") == peer and "ratio" in row
            and row.get("chunks", 0) >= least_chunks and row.get("batch", 1) >= least_batch
        }  # fmt: skip

    return values


def _case(row: Row) -> str:
    parts = [f"{row['chunks']:,} chunks" if "chunks" in row else "", row.get("kv_format") or row.get("precision") or ""]
    batch = row.get("batch")
    return " ".join(part for part in (f"B={batch}" if batch else "", *parts) if part)


def _scoring_share(result: Row) -> Values:
    """Page scoring in fp8 from planar pages, its own tiles, of many bytes."""
    return {
        _case(row) + f" x {row['layers']} layers": row["share_of_copy_bandwidth"]
        for row in result["rows"]
        if row["bench"] == "score pages" and row["precision"] == "fp8" and row["tiles"] == "default" and row["planar"]
        and row["bytes"] >= LEAST_KEY_BYTES
    }  # fmt: skip


def _attention_share(result: Row) -> Values:
    return {
        _case(row): row["share_of_copy_bandwidth"]
        for row in result["rows"]
        if row["bench"] == "attend" and row["batch"] == 64 and row["tiles"] == "default"
    }


def _swaps(name: str) -> Callable[[Row], Values]:
    return lambda result: {
        f"{row['pages']} pages {row['direction']}": row[name] for row in result["rows"] if name in row
    }


def _lsa(name: str, *batches: int) -> Callable[[Row], Values]:
    """A number of LSA's rows, of all batches if none is named."""
    return lambda result: {
        f"B={row['batch']}": row[name]
        for row in result["rows"]
        if row["mode"] == "lsa" and name in row and (not batches or row["batch"] in batches)
    }


def _full_over_resident(decode: Row, kernels: Row) -> Values:
    """Level 2 of all CSA layers over the whole history, over that of the resident tenth.

    Steps of both modes differ in level 2 alone: the difference, and what the kernels take for the resident chunks.
    """
    steps = {(row["mode"], row["batch"]): row["step_ms"]["median"] for row in decode["rows"] if "step_ms" in row}
    found = {}
    for row in kernels["rows"]:
        # index rows meet float16 queries in a step, whose picks need no order
        if row["bench"] != "level 2" or (row["chunks"], row["precision"], row["ordered"]) != (24_576, "fp16", False):
            continue
        batch, resident = row["batch"], decode["model"]["csa_layers"] * row["warm_us"] / 1e3
        if batch >= 8 and {("full", batch), ("lsa", batch)} <= steps.keys():
            found[f"B={batch}"] = (resident + steps["full", batch] - steps["lsa", batch]) / resident
    return found


def _prefill(result: Row) -> Values:
    return {
        f"{row['tokens']:,} tokens": row["seconds_ratio"]
        for row in result["ratios"]
        if row["path"] == "stock, in pieces" and row.get("over") == "flashmem, fused" and "seconds_ratio" in row
    }


KERNELS, PEERS, SHARE, TENTHS = "gpu_kernels.json", "gpu_kernels-peers.jsonl", ".0%", ".1f"
GROUPS, FORMULA = "DeepGEMM per session, layer and 64 heads", "published formula"
CAPACITY = (("256K", 1.8, 2.0), ("512K", 2.3, 3.0), ("1M", 3.2, 4.0))
TARGETS = (
    Target(
        "K1, page scoring in fp8, 100 MB of keys and more: share of the copy bandwidth", KERNELS, 0.85, _scoring_share,
        "One session, few chunks or one layer: each of its programs has few tiles to spread its first wait over.",
        form=SHARE,
    ),
    Target(
        "K1, logits of a layer: DeepGEMM with its rows added / ours, 8 sessions and more", PEERS, 1.0,
        _peers("score logits peer", "DeepGEMM, rows added", least_batch=8),
    ),
    Target(
        "K1, level 1, three layers to selected pages: DeepGEMM and torch / ours", PEERS, 1.5,
        _peers("level 1 peer", "DeepGEMM and torch"),
        "With that many keys level 1 is scoring alone, and both read them at nearly the device's rate.",
    ),
    Target(
        "K1, scores: DeepGEMM per session, layer and 64 heads / ours", PEERS, 4.0, _peers("score pages peer", GROUPS),
        "Replayed in a graph the peer's many launches cost little.",
    ),
    Target(
        "K1, one request: the published formula in torch / ours, 262,144 chunks", PEERS, 35.0,
        _peers("score peer", FORMULA, 262_144), "One session does not fill the device; fp16 multiplies wider keys.",
        form=TENTHS,
    ),
    Target(
        "K1, one request: the same compiled / ours, 262,144 chunks", PEERS, 10.0,
        _peers("score peer", f"{FORMULA}, compiled", 262_144), form=TENTHS,
    ),
    Target(
        "K2, scores and top-512: DeepGEMM and torch.topk / ours", PEERS, 3.0,
        _peers("level 2 peer", "DeepGEMM and torch.topk"),
        "With many rows scoring is most of the time on both sides, and both read keys at about the same rate.",
    ),
    Target(
        "K2, scores and top-512: decoding, torch products and torch.topk / ours", KERNELS, 3.0,
        _peers("level 2 peer", "decode, torch products, torch.topk"), form=TENTHS,
    ),
    Target(
        "K2, level 2 at 1M by the difference of steps: whole history / resident tenth", "decode-1m.json", 6.0,
        _full_over_resident, form=TENTHS, beside=KERNELS,
    ),
    Target(
        "K3, attention: gather and SDPA / ours", PEERS, 8.0,
        _peers("attend peer", "gather and SDPA (it knows no sink)"), form=".0f",
    ),
    Target(
        "K3, attention: gather and torch products, compiled / ours", PEERS, 4.0,
        _peers("attend peer", "gather and torch products, compiled"),
        "Loads, decoding and products of a block follow each other in one program; the log says what was tried.",
    ),
    Target(
        "K3, attention, 64 sessions: share of the copy bandwidth", PEERS, 0.4, _attention_share,
        "As above: the chain within a program seems to bound it, not bytes.", form=SHARE,
    ),
    Target(
        "K4, swaps: share of one pinned copy's rate", "swap.json", 0.9, _swaps("peak_ratio"),
        "Few pages travel in about the time that the host needs to name them.", form=SHARE,
    ),
    Target(
        "K4, swaps in: gather on the CPU and one copy / ours", "swap.json", 10.0, _swaps("over_gather_ratio"),
        "The gather runs on the host's threads, 8 here; it took longer on another host (`results/before/swap.json`).",
        form=TENTHS,
    ),
    Target(
        "Decode with swaps / without, 8 sessions and more at 1M", "decode-1m.json", 1.03,
        _lsa("windows_over_plain_steps_ratio", 8, 32), at_most=True, form=".3f",
    ),
    Target(
        "One session at 1M: LSA's step / full residency's", "decode-1m.json", 1.0, _lsa("mean_step_time_ratio", 1),
        at_most=True, form=".3f",
    ),
    *(
        Target(f"{context}, equal bytes for KV: {what}, LSA / full", f"capacity-{context.lower()}.json", bound, values)
        for context, throughput, sessions in CAPACITY
        for what, bound, values in (
            ("throughput", throughput, _lsa("throughput_ratio")), ("sessions", sessions, _lsa("sessions_ratio")),
        )
    ),
    Target(
        "Prefill of the small model: stock in pieces at its longest / ours", "prefill_stock.json", 10.0, _prefill,
        form=TENTHS,
    ),
    Target(
        "The same in float32, 2,048 tokens a piece, at the longest that stock was tried", "prefill_stock-float32.json",
        10.0, _prefill, "Scores in float32 run on no matrix unit, and short pieces wait for the host.", form=TENTHS,
    ),
)  # fmt: skip


__all__ = ["TARGETS", "Target"]
