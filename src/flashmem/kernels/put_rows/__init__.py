"""Write one row of each session where it lies: what a decode step stores.

Shape letters: B = sessions, E = bytes of a row.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..paged import PagedRows
from .reference import put_rows_reference

Impl = Literal["reference", "fused"]


def put_rows(rows: PagedRows, index_B: torch.Tensor, bytes_BE: torch.Tensor, *, impl: Impl | None = None) -> None:
    """Store `bytes_BE` (uint8) as row `index_B[b]` (int64, on the device) of each session b; nothing where it is -1.

    `rows` has one layer. Counts do not matter: a row may be written before it counts.
    """
    if rows.num_layers != 1 or bytes_BE.shape != (rows.batch, rows.form.row_bytes) or bytes_BE.dtype is not torch.uint8:
        raise ValueError(
            f"rows must be uint8 [{rows.batch}, {rows.form.row_bytes}] for one layer, got {bytes_BE.dtype} "
            f"{tuple(bytes_BE.shape)} for {rows.num_layers}"
        )
    if index_B.shape != (rows.batch,) or index_B.dtype is not torch.int64:
        raise ValueError(f"index_B must be int64 [{rows.batch}], got {index_B.dtype} {tuple(index_B.shape)}")
    impl = impl or "reference"
    if impl == "reference":
        put_rows_reference(rows, index_B, bytes_BE)
    elif impl == "fused":
        from .fused import put_rows_fused  # needs triton

        put_rows_fused(rows, index_B, bytes_BE)
    else:
        raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["put_rows"]
