"""Bytes of a session's KV cache, per tier and per component.

Two accountings, always reported together and always named:

* `paper`: resident CSA entries with their index keys, and all HCA entries. This is the column that
  FlashMemory-DeepSeek-V4 (arXiv 2606.09079) prints in "GB" that are GiB; nothing else is counted.
* `all_in`: everything a session holds, on every tier: whole records, the full index rows of the target layers, HCA
  entries, windows, compressor rings, observed hidden states, page table, and slots or rows allocated but unused.

Its `full_bytes` is what a system without paging holds on the device for the same tokens in the same formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config import KVFormat, ModelGeometry

_EXACT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2}
_SCALE_BLOCK = 64  # fp8 values that share one ue8m0 scale byte
_SCALE_ALIGNMENT = 8  # scales of an entry are padded to this
_FP8_PAGE_MULTIPLE = 576  # a page of fp8 entries is padded to a multiple of this, as DeepSeek-V4's kernels want it
_ALIGNMENT = 16  # every other region of a record
_INDEX_SCALE_BYTES = 4  # one float32 scale per fp8 index key
_PAGE_TABLE_BYTES = 16  # page and slot of what is resident, int64 each


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperReport:
    """The published accounting: resident CSA entries, their index keys, and all HCA entries."""

    full_bytes: int
    resident_bytes: int
    full_components: Mapping[str, int] = field(repr=False)
    resident_components: Mapping[str, int] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Resident over full; 1 where there is nothing to keep."""
        return self.resident_bytes / self.full_bytes if self.full_bytes else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AllInReport:
    """Every byte of a session, per tier and component."""

    full_bytes: int
    full_components: Mapping[str, int] = field(repr=False)
    device: Mapping[str, int] = field(repr=False)
    host: Mapping[str, int] = field(repr=False)
    disk: Mapping[str, int] = field(repr=False)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def ratio(self) -> float:
        """Device bytes over full bytes; above 1 for contexts shorter than the fixed state is worth."""
        return self.device_bytes / self.full_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class KVReport:
    """Both accountings of one context."""

    context_tokens: int
    kv_format: KVFormat
    page_chunks: int
    num_pages: int
    resident_pages: int
    resident_chunks: int
    record_bytes: int
    paper: PaperReport
    all_in: AllInReport


def kv_report(
    geometry: ModelGeometry,
    context_tokens: int,
    *,
    keep: float | None = None,
    kv_format: KVFormat = "fp8",
    state_format: KVFormat = "bf16",
    page_chunks: int = 64,
    num_targets: int | None = None,
    observation_window: int = 1,
    sink_pages: int = 1,
    recency_pages: int = 2,
    resident_pages: int | None = None,
    host_pages: int | None = None,
    disk_pages: int = 0,
    slack_pages: int = 0,
    hca_capacity: int | None = None,
    row_capacity: int | None = None,
) -> KVReport:
    """Bytes of one session of `context_tokens` tokens.

    Either `keep`, the share of pages to be resident, or `resident_pages`, as measured. What is left out is predicted:
    full pages are mirrored on the host (`host_pages`), and nothing is allocated beyond need (`slack_pages` of the
    device pool; `hca_capacity` entries per HCA layer; `row_capacity` index rows per target layer).
    `state_format` is the model's dtype, in which windows and rings are held; `num_targets` counts target layers.
    The last page must be among the resident ones, as it is with every policy.
    Raises ValueError for counts that contradict each other.
    """
    num_targets = len(geometry.default_targets()) if num_targets is None else num_targets
    _check(context_tokens >= 0, f"context_tokens must not be negative, got {context_tokens}")
    _check(
        0 <= num_targets <= len(geometry.csa_layers),
        f"num_targets must lie in 0..{len(geometry.csa_layers)}, got {num_targets}",
    )
    _check(state_format in _EXACT_BYTES, f"state_format must be 'fp32' or 'bf16', got {state_format!r}")
    chunks, hca_entries = context_tokens // geometry.csa_ratio, context_tokens // geometry.hca_ratio
    pages = -(-chunks // page_chunks)
    if resident_pages is None:
        _check(keep is not None, "either keep or resident_pages must be given")
        assert keep is not None
        resident_pages = kept_pages(pages, keep, sink_pages=sink_pages, recency_pages=recency_pages)
    _check(0 <= resident_pages <= pages, f"resident_pages must lie in 0..{pages}, got {resident_pages}")
    host_pages = chunks // page_chunks if host_pages is None else host_pages
    hca_capacity = hca_entries if hca_capacity is None else hca_capacity
    row_capacity = chunks if row_capacity is None else row_capacity
    _check(
        hca_capacity >= hca_entries, f"hca_capacity {hca_capacity} is below the {hca_entries} entries of the context"
    )
    _check(row_capacity >= chunks, f"row_capacity {row_capacity} is below the {chunks} chunks of the context")

    unfilled = pages * page_chunks - chunks  # places of the last page that hold no chunk yet
    resident_chunks = resident_pages * page_chunks - unfilled if resident_pages else 0
    hca = len(geometry.hca_layers) * kv_entry_bytes(geometry, kv_format)
    full = {**_entries(geometry, chunks, kv_format), "hca": hca_entries * hca}
    resident = {**_entries(geometry, resident_chunks, kv_format), "hca": hca_entries * hca}
    state = {
        "window": window_bytes(geometry, state_format),
        "compressor": compressor_bytes(geometry, state_format),
    }
    record = record_bytes(geometry, kv_format, page_chunks=page_chunks, num_targets=num_targets)
    row = geometry.index_head_dim + _INDEX_SCALE_BYTES
    device = {
        "pages": resident_pages * record,
        "index_rows": chunks * num_targets * row,
        "hca": hca_entries * hca,
        **state,
        "hidden": num_targets * observation_window * geometry.hidden_size * _EXACT_BYTES[state_format],
        "page_table": resident_pages * _PAGE_TABLE_BYTES,
        "slack": slack_pages * record
        + (hca_capacity - hca_entries) * hca
        + (row_capacity - chunks) * num_targets * row,
    }
    return KVReport(
        context_tokens=context_tokens,
        kv_format=kv_format,
        page_chunks=page_chunks,
        num_pages=pages,
        resident_pages=resident_pages,
        resident_chunks=resident_chunks,
        record_bytes=record,
        paper=PaperReport(
            full_bytes=sum(full.values()),
            resident_bytes=sum(resident.values()),
            full_components=full,
            resident_components=resident,
        ),
        all_in=AllInReport(
            full_bytes=sum(full.values()) + sum(state.values()),
            full_components={**full, **state},
            device=device,
            host={"pages": host_pages * record},
            disk={"pages": disk_pages * record},
        ),
    )


def kept_pages(num_pages: int, keep: float, *, sink_pages: int = 1, recency_pages: int = 2) -> int:
    """Pages that a fixed budget keeps: the share `keep`, rounded up, and never less than sink and recency."""
    _check(0 < keep <= 1, f"keep must lie in (0, 1], got {keep}")
    share = math.ceil(round(keep * num_pages, 9))  # rounded first: 0.1 * 30 is 3.0000000000000004
    return min(num_pages, max(share, sink_pages + recency_pages))


def kv_entry_bytes(geometry: ModelGeometry, kv_format: KVFormat) -> int:
    """Bytes of one KV entry: 584 for DeepSeek-V4 in fp8.

    The fp8 layout is one byte per channel without rotary embedding, two per channel with it, and one scale byte per
    64 channels, padded to 8.
    """
    if kv_format in _EXACT_BYTES:
        return geometry.head_dim * _EXACT_BYTES[kv_format]
    rope = geometry.compress_rope.dim
    plain = geometry.head_dim - rope
    return plain + 2 * rope + _round_up(-(-plain // _SCALE_BLOCK), _SCALE_ALIGNMENT)


def key_entry_bytes(geometry: ModelGeometry, kv_format: KVFormat) -> int:
    """Bytes of one index key: 132 for DeepSeek-V4 in fp8, one byte per channel and a float32 scale."""
    if kv_format in _EXACT_BYTES:
        return geometry.index_head_dim * _EXACT_BYTES[kv_format]
    return geometry.index_head_dim + _INDEX_SCALE_BYTES


def kv_page_bytes(geometry: ModelGeometry, kv_format: KVFormat, page_chunks: int) -> int:
    """Bytes of one layer's KV entries in a record: 37,440 for 64 chunks of DeepSeek-V4 in fp8."""
    multiple = _ALIGNMENT if kv_format in _EXACT_BYTES else _FP8_PAGE_MULTIPLE
    return _round_up(page_chunks * kv_entry_bytes(geometry, kv_format), multiple)


def key_page_bytes(geometry: ModelGeometry, kv_format: KVFormat, page_chunks: int) -> int:
    """Bytes of one layer's index keys in a record: 8,448 for 64 chunks of DeepSeek-V4 in fp8."""
    return _round_up(page_chunks * key_entry_bytes(geometry, kv_format), _ALIGNMENT)


def record_bytes(geometry: ModelGeometry, kv_format: KVFormat, *, page_chunks: int = 64, num_targets: int) -> int:
    """Bytes of one page over all CSA layers: 938,304 for V4-Flash in fp8 with 64 chunks and 3 target layers.

    In fp8 the keys of the target layers are left out: those layers keep all their keys on the device as index rows.
    """
    layers = len(geometry.csa_layers)
    key_layers = layers if kv_format in _EXACT_BYTES else layers - num_targets
    return layers * kv_page_bytes(geometry, kv_format, page_chunks) + key_layers * key_page_bytes(
        geometry, kv_format, page_chunks
    )


def window_bytes(geometry: ModelGeometry, state_format: KVFormat) -> int:
    """Bytes of the sliding windows of all layers; K is V."""
    return geometry.num_layers * geometry.sliding_window * geometry.head_dim * _EXACT_BYTES[state_format]


def compressor_bytes(geometry: ModelGeometry, state_format: KVFormat) -> int:
    """Bytes of the compressor rings: projections of the tokens that the next entry of each layer still needs.

    A CSA entry spans two groups of csa_ratio tokens, in two channel halves each, for the entry and for its index key;
    an HCA entry spans hca_ratio tokens. Every token holds a value and a gate.
    """
    csa = 2 * geometry.csa_ratio * 2 * 2 * (geometry.head_dim + geometry.index_head_dim)
    hca = geometry.hca_ratio * 2 * geometry.head_dim
    values = len(geometry.csa_layers) * csa + len(geometry.hca_layers) * hca
    return values * _EXACT_BYTES[state_format]


def _entries(geometry: ModelGeometry, chunks: int, kv_format: KVFormat) -> dict[str, int]:
    layers = len(geometry.csa_layers)
    return {
        "csa_kv": layers * chunks * kv_entry_bytes(geometry, kv_format),
        "index_keys": layers * chunks * key_entry_bytes(geometry, kv_format),
    }


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


__all__ = [
    "AllInReport",
    "KVReport",
    "PaperReport",
    "compressor_bytes",
    "kept_pages",
    "key_entry_bytes",
    "key_page_bytes",
    "kv_entry_bytes",
    "kv_page_bytes",
    "kv_report",
    "record_bytes",
    "window_bytes",
]
