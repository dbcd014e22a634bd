"""Rows written in place in Triton: one program per session finds its row and stores its bytes.

Shape letters: B = sessions, E = bytes of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..paged import PagedRows
from ..triton_parts import row_starts


def put_rows_fused(rows: PagedRows, index_B: torch.Tensor, bytes_BE: torch.Tensor) -> None:
    if not len(index_B):
        return
    form, numbers = rows.form, rows.numbers_BP
    _put_kernel[(len(index_B),)](
        bytes_BE.contiguous(), index_B, rows.addresses_LB, index_B if numbers is None else numbers,
        0 if numbers is None else numbers.shape[1],
        TABLE=numbers is not None, PAGE_CHUNKS=form.page_chunks, PAGE_STRIDE=rows.page_stride,
        DATA_BYTES=form.data_bytes, TAIL_BYTES=form.tail_bytes, BLOCK=triton.next_power_of_2(form.row_bytes),
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_width"])
def _put_kernel(
    bytes_ptr, index_ptr, addresses_ptr, numbers_ptr, table_width,
    TABLE: tl.constexpr, PAGE_CHUNKS: tl.constexpr, PAGE_STRIDE: tl.constexpr, DATA_BYTES: tl.constexpr,
    TAIL_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    # one row, as a block: the interpreter takes no mask that is made with a scalar
    row = tl.load(index_ptr + b) + tl.zeros([BLOCK], tl.int64)
    base = tl.load(addresses_ptr + b)
    at = tl.arange(0, BLOCK)
    inside = (row >= 0) & (at < DATA_BYTES + TAIL_BYTES)
    data, tail = row_starts(
        base, tl.maximum(row, 0), inside, numbers_ptr + b * table_width,
        TABLE, PAGE_CHUNKS, PAGE_STRIDE, DATA_BYTES, TAIL_BYTES,
    )  # fmt: skip
    values = tl.load(bytes_ptr + b.to(tl.int64) * (DATA_BYTES + TAIL_BYTES) + at, mask=inside, other=0)
    target = tl.where(at < DATA_BYTES, data + at, tail + (at - DATA_BYTES))
    tl.store(target.to(tl.pointer_type(tl.uint8)), values, mask=inside)


__all__ = ["put_rows_fused"]
