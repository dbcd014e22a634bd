"""Index keys as bytes: Hadamard rotation, then e4m3 values with one float32 scale per key.

A row is I value bytes followed by 4 scale bytes: 132 bytes at I = 128, the layout that Memory Indexer checkpoints
are trained on. Shape letters: N = chunks, I = index_head_dim.
"""

from __future__ import annotations

import torch

from .reference import (
    decode_index_rows_reference,
    encode_index_rows_reference,
    hadamard_reference,
    split_index_rows_reference,
)

SCALE_BYTES = 4


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension by a normalised Hadamard matrix, in float32; its own inverse.

    Sylvester order; where the dimension is no power of two, the matrix is block-diagonal with the largest
    power-of-two block that divides it.
    """
    return hadamard_reference(x)


def encode_index_rows(keys_NI: torch.Tensor) -> torch.Tensor:
    """Pack unrotated index keys [..., I] into rows uint8 [..., I + 4]."""
    if not keys_NI.is_floating_point():
        raise ValueError(f"index keys must be floating point, got {keys_NI.dtype}")
    if not keys_NI.numel():  # torch cannot reinterpret the bytes of an empty tensor
        return keys_NI.new_empty((*keys_NI.shape[:-1], keys_NI.shape[-1] + SCALE_BYTES), dtype=torch.uint8)
    return encode_index_rows_reference(keys_NI)


def decode_index_rows(rows_NR: torch.Tensor) -> torch.Tensor:
    """Unpack rows uint8 [..., I + 4] into float32 keys [..., I], still in the Hadamard basis."""
    _check(rows_NR)
    if not rows_NR.numel():
        return rows_NR.new_empty((*rows_NR.shape[:-1], rows_NR.shape[-1] - SCALE_BYTES), dtype=torch.float32)
    return decode_index_rows_reference(rows_NR)


def split_index_rows(rows_NR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values e4m3 [..., I] and float32 scales [...] of rows uint8 [..., I + 4]; a key is their product."""
    _check(rows_NR)
    if not rows_NR.numel():
        values = rows_NR.new_empty((*rows_NR.shape[:-1], rows_NR.shape[-1] - SCALE_BYTES), dtype=torch.float8_e4m3fn)
        return values, rows_NR.new_empty(rows_NR.shape[:-1], dtype=torch.float32)
    return split_index_rows_reference(rows_NR)


def _check(rows_NR: torch.Tensor) -> None:
    if rows_NR.dtype is not torch.uint8 or rows_NR.shape[-1] <= SCALE_BYTES:
        raise ValueError(f"rows must be uint8 [..., I + 4], got {rows_NR.dtype} {tuple(rows_NR.shape)}")


__all__ = ["SCALE_BYTES", "decode_index_rows", "encode_index_rows", "hadamard", "split_index_rows"]
