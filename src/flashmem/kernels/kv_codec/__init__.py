"""KV entries as bytes: exact ("fp32", "bf16") or "fp8" in the layout of DeepSeek-V4.

An fp8 entry of a head of D channels with r trailing rotary channels is D - r e4m3 values, r bf16 values, and one ue8m0
byte (a power of two, its exponent biased by 127) per block of 64 values, padded with zero bytes to a multiple of 8:
584 bytes at D = 512, r = 64. A scale is the smallest power of two that keeps its block within the e4m3 range.

Two forms. *Rows* [N, E]: data, then scales. *Page-planar*: the data of all C entries of a page, then all their scales;
index keys use the same form with their own widths.
Shape letters: N = entries, D = channels, E = bytes of an entry, R = pages in a region, P = bytes of a page, C = chunks
per page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .reference import (
    BLOCK,
    decode_fp8_reference,
    encode_fp8_reference,
    get_plane_reference,
    put_plane_reference,
)

Format = Literal["fp32", "bf16", "fp8"]
Impl = Literal["reference", "fused"]

FP8_PAGE_MULTIPLE = 576
"""An fp8 page is padded to a multiple of this many bytes."""
ALIGNMENT = 16
"""Every region starts at a multiple of this many bytes."""

_EXACT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PlanarForm:
    """A page of C rows as two planes: C x data bytes, then C x tail bytes, then padding."""

    page_chunks: int
    data_bytes: int
    tail_bytes: int
    multiple: int = ALIGNMENT

    @property
    def row_bytes(self) -> int:
        return self.data_bytes + self.tail_bytes

    @property
    def page_bytes(self) -> int:
        return -(-self.page_chunks * self.row_bytes // self.multiple) * self.multiple


@dataclass(frozen=True, slots=True)
class KVFormatSpec:
    """Sizes of one KV format at one head geometry."""

    format: Format
    head_dim: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.format not in ("fp32", "bf16", "fp8"):
            raise ValueError(f"format must be 'fp32', 'bf16' or 'fp8', got {self.format!r}")
        if not 0 <= self.rope_dim < self.head_dim:
            raise ValueError(f"rope_dim must lie in 0..{self.head_dim - 1}, got {self.rope_dim}")

    @property
    def exact_dtype(self) -> torch.dtype | None:
        """The raw dtype of an exact format; None for fp8."""
        return _EXACT_DTYPES.get(self.format)

    @property
    def data_bytes(self) -> int:
        if self.exact_dtype is not None:
            return self.head_dim * self.exact_dtype.itemsize
        return self.head_dim + self.rope_dim

    @property
    def scale_bytes(self) -> int:
        """Scale bytes of an entry with their padding."""
        if self.exact_dtype is not None:
            return 0
        return -(-(self.head_dim - self.rope_dim) // (8 * BLOCK)) * 8

    @property
    def entry_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes

    def planar(self, page_chunks: int) -> PlanarForm:
        """The page-planar form: 37,440 bytes for 64 fp8 entries of 584."""
        multiple = ALIGNMENT if self.exact_dtype is not None else FP8_PAGE_MULTIPLE
        return PlanarForm(page_chunks, self.data_bytes, self.scale_bytes, multiple)

    def page_bytes(self, page_chunks: int) -> int:
        return self.planar(page_chunks).page_bytes


def encode_rows(spec: KVFormatSpec, kv: torch.Tensor, *, impl: Impl | None = None) -> torch.Tensor:
    """Pack entries [..., D] into rows uint8 [..., E].

    Values are not checked: in fp8, infinities and NaN come back in their own places, and the other values of such a
    block are lost to rounding or saturation. The fused version (Triton) gives the same bytes; it is for fp8 with an
    even number of plain channels, and changes nothing for exact formats.
    """
    if impl not in (None, "reference", "fused"):
        raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")
    if not kv.is_floating_point() or kv.shape[-1] != spec.head_dim:
        raise ValueError(f"entries must be floating point [..., {spec.head_dim}], got {kv.dtype} {tuple(kv.shape)}")
    if not kv.numel():  # torch cannot reinterpret the bytes of an empty tensor
        return kv.new_empty((*kv.shape[:-1], spec.entry_bytes), dtype=torch.uint8)
    if spec.exact_dtype is not None:
        return kv.to(spec.exact_dtype).contiguous().view(torch.uint8)
    encode = encode_fp8_reference
    if impl == "fused":
        from .fused import encode_fp8_fused  # needs triton

        encode = encode_fp8_fused
    rows_NE = encode(kv.reshape(-1, spec.head_dim), spec.rope_dim, spec.scale_bytes)
    return rows_NE.view(*kv.shape[:-1], spec.entry_bytes)


def decode_rows(spec: KVFormatSpec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpack rows uint8 [..., E] into entries [..., D] of the given dtype."""
    if rows.dtype is not torch.uint8 or rows.shape[-1] != spec.entry_bytes:
        raise ValueError(f"rows must be uint8 [..., {spec.entry_bytes}], got {rows.dtype} {tuple(rows.shape)}")
    if not rows.numel():
        return rows.new_empty((*rows.shape[:-1], spec.head_dim), dtype=dtype)
    if spec.exact_dtype is not None:
        return rows.contiguous().view(spec.exact_dtype).to(dtype)
    kv_ND = decode_fp8_reference(rows.reshape(-1, spec.entry_bytes), spec.head_dim, spec.rope_dim)
    return kv_ND.to(dtype).view(*rows.shape[:-1], spec.head_dim)


def put_planar(
    form: PlanarForm,
    region_RP: torch.Tensor,
    slots_N: torch.Tensor,
    offsets_N: torch.Tensor,
    rows_NE: torch.Tensor,
) -> None:
    """Write rows to `region[slots, offsets]`; the region is uint8 [R, P] and may be a strided slice of records."""
    _check_region(form, region_RP)
    if rows_NE.shape != (slots_N.shape[0], form.row_bytes):
        raise ValueError(f"rows must be [{slots_N.shape[0]}, {form.row_bytes}], got {tuple(rows_NE.shape)}")
    if not rows_NE.shape[0]:
        return
    data = form.page_chunks * form.data_bytes
    put_plane_reference(region_RP[:, :data], 0, slots_N, offsets_N, rows_NE[:, : form.data_bytes])
    if form.tail_bytes:
        tail = region_RP[:, : data + form.page_chunks * form.tail_bytes]
        put_plane_reference(tail, data, slots_N, offsets_N, rows_NE[:, form.data_bytes :])


def get_planar(form: PlanarForm, region_RP: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Read rows [..., E] from `region[slots, offsets]` (two int64 tensors of one shape)."""
    _check_region(form, region_RP)
    if not slots.numel():
        return region_RP.new_empty((*slots.shape, form.row_bytes))
    slots_N, offsets_N = slots.reshape(-1), offsets.reshape(-1)
    rows = get_plane_reference(region_RP, 0, form.data_bytes, slots_N, offsets_N)
    if form.tail_bytes:
        data = form.page_chunks * form.data_bytes
        tail = get_plane_reference(region_RP, data, form.tail_bytes, slots_N, offsets_N)
        rows = torch.cat((rows, tail), dim=-1)
    return rows.view(*slots.shape, form.row_bytes)


def get_planar_pages(form: PlanarForm, region_RP: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Read all rows [..., C, E] of the pages `region[slots]`."""
    _check_region(form, region_RP)
    shape = (*slots.shape, form.page_chunks)
    if not slots.numel():
        return region_RP.new_empty((*shape, form.row_bytes))
    data = form.page_chunks * form.data_bytes
    rows = get_plane_reference(region_RP, 0, data, slots.reshape(-1), None).view(*shape, form.data_bytes)
    if form.tail_bytes:
        tail = get_plane_reference(region_RP, data, form.page_chunks * form.tail_bytes, slots.reshape(-1), None)
        rows = torch.cat((rows, tail.view(*shape, form.tail_bytes)), dim=-1)
    return rows


def _check_region(form: PlanarForm, region_RP: torch.Tensor) -> None:
    if region_RP.dtype is not torch.uint8 or region_RP.dim() != 2 or region_RP.shape[1] != form.page_bytes:
        raise ValueError(
            f"a region must be uint8 [R, {form.page_bytes}], got {region_RP.dtype} {tuple(region_RP.shape)}"
        )


def exact_spec(dtype: torch.dtype, head_dim: int, rope_dim: int = 0) -> KVFormatSpec:
    """The format of entries that stay in the compute dtype, bf16 or fp32."""
    return KVFormatSpec("fp32" if dtype is torch.float32 else "bf16", head_dim, rope_dim)


__all__ = [
    "ALIGNMENT",
    "FP8_PAGE_MULTIPLE",
    "KVFormatSpec",
    "PlanarForm",
    "decode_rows",
    "encode_rows",
    "exact_spec",
    "get_planar",
    "get_planar_pages",
    "put_planar",
]
