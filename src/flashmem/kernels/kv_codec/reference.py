"""The definition of the KV entry formats and of the page-planar form.

Shape letters: N = entries, D = channels of a head, E = bytes of an entry, R = pages in a region, C = chunks per page.
"""

from __future__ import annotations

import torch

BLOCK = 64
"""Channels that share one scale."""
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # keeps the scale of an all-zero block finite

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def encode_fp8_reference(kv_ND: torch.Tensor, rope_dim: int, scale_bytes: int) -> torch.Tensor:
    """Entries [N, D] to bytes [N, E]: e4m3 values, bf16 rotary values, one power-of-two scale byte per block, zeros."""
    nope = kv_ND.shape[-1] - rope_dim
    blocks = torch.nn.functional.pad(kv_ND[:, :nope].float(), (0, -nope % BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(dim=-1).nan_to_num(nan=E4M3_MAX).clamp_min(SMALLEST_AMAX)
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # mantissa in [0.5, 1): ceil(log2(x)) without rounding
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    inverse = ((127 - exponent) << 23).view(
        torch.float32
    )  # an exponent field shifted into place: an exact power of two
    scaled = (blocks * inverse.unsqueeze(-1)).flatten(-2)[:, :nope]
    values = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    rotary = kv_ND[:, nope:].bfloat16().contiguous().view(torch.uint8)
    scales = torch.nn.functional.pad((exponent + 127).to(torch.uint8), (0, scale_bytes - exponent.shape[-1]))
    return torch.cat((values, rotary, scales), dim=-1)


def decode_fp8_reference(rows_NE: torch.Tensor, head_dim: int, rope_dim: int) -> torch.Tensor:
    """Bytes [N, E] to float32 entries [N, D]."""
    nope = head_dim - rope_dim
    num_blocks = -(-nope // BLOCK)
    values = rows_NE[:, :nope].contiguous().view(torch.float8_e4m3fn).float()
    first_scale = nope + 2 * rope_dim
    scales = (rows_NE[:, first_scale : first_scale + num_blocks].int() << 23).view(torch.float32)
    values = values * scales.repeat_interleave(BLOCK, dim=-1)[:, :nope]
    if not rope_dim:
        return values
    return torch.cat((values, _aligned(rows_NE[:, nope:first_scale]).view(torch.bfloat16).float()), dim=-1)


def put_plane_reference(
    region_RP: torch.Tensor, first: int, slots_N: torch.Tensor, offsets_N: torch.Tensor, rows_NW: torch.Tensor
) -> None:
    """Write rows of W bytes to `first + offset * W` of the given pages."""
    width = rows_NW.shape[-1]
    size, word = _word(width, first, region_RP)
    count = (region_RP.shape[1] - first) // width  # whole rows that fit from `first` on
    plane = region_RP[:, first : first + count * width].view(word).unflatten(-1, (count, width // size))
    plane[slots_N, offsets_N] = _aligned(rows_NW).view(word)


def get_plane_reference(
    region_RP: torch.Tensor, first: int, width: int, slots_N: torch.Tensor, offsets_N: torch.Tensor | None
) -> torch.Tensor:
    """Read `width` bytes at `first + offset * width` of the given pages (offset 0 without offsets): [N, width].

    The region is seen as one overlapping row per word, so that a plain index_select copies whole rows: five times as
    fast on a CPU as indexing with two tensors.
    """
    size, word = _word(width, first, region_RP)
    words = region_RP[:, first:].view(word)
    stride, step = words.stride(0), width // size
    starts_N = slots_N * stride if offsets_N is None else slots_N * stride + offsets_N * step
    last = (words.shape[0] - 1) * stride + words.shape[1] - step
    rows = words.as_strided((last + 1, step), (1, 1)).index_select(0, starts_N)
    return rows.view(torch.uint8)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """A copy that any wider dtype can view: a single row counts as contiguous wherever it starts."""
    return rows.clone(memory_format=torch.contiguous_format)


def _word(width: int, first: int, region_RP: torch.Tensor) -> tuple[int, torch.dtype]:
    """The widest integer that divides a row and all its addresses."""
    steps = (width, first, region_RP.stride(0), region_RP.storage_offset(), region_RP.shape[1])
    return next((size, word) for size, word in _WORDS if all(step % size == 0 for step in steps))
