"""Rows written in place: where they belong, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from flashmem.kernels.kv_codec import KVFormatSpec
from flashmem.kernels.paged import PagedRows, index_row_form
from flashmem.kernels.put_rows import put_rows
from support.paged_cases import POISON, pooled_entries


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("page_chunks", [1, 4])
def test_rows_go_through_page_tables(impl: str, page_chunks: int, triton_device: torch.device) -> None:
    spec, counts, index = KVFormatSpec("fp8", 96, 32), [9, 1, 4, 17], [8, -1, 0, 5]
    rows = pooled_entries(spec, counts, triton_device, page_chunks=page_chunks)
    before, new = rows.read(), torch.randint(0, 256, (4, spec.entry_bytes), dtype=torch.uint8, device=triton_device)
    record = rows.regions[0][0].untyped_storage()
    bytes_before = torch.tensor([], dtype=torch.uint8, device=triton_device).set_(record).clone()
    put_rows(rows, torch.tensor(index, device=triton_device), new, impl=impl)
    wanted = before.clone()
    for b, row in enumerate(index):
        if row >= 0:
            wanted[b, row] = new[b]
    read = rows.read()
    for b, count in enumerate(counts):
        assert torch.equal(read[b, :count], wanted[b, :count])
    changed = torch.tensor([], dtype=torch.uint8, device=triton_device).set_(record) != bytes_before
    assert changed.sum() == (wanted != before)[[0, 2, 3]].sum() - sum(
        int((wanted[b, counts[b] :] != before[b, counts[b] :]).sum()) for b in (0, 2, 3)
    )


def test_rows_go_to_addresses(triton_device: torch.device) -> None:
    regions = [torch.full((count, 20), POISON, dtype=torch.uint8, device=triton_device) for count in (3, 5)]
    addresses = torch.tensor([[region.data_ptr() for region in regions]], device=triton_device)
    counts = torch.zeros(2, dtype=torch.int32, device=triton_device)
    rows, new = PagedRows.at(index_row_form(16), addresses, counts, 5), torch.arange(40, dtype=torch.uint8).view(2, 20)
    put_rows(rows, torch.tensor([2, 4], device=triton_device), new.to(triton_device), impl="fused")
    for region, row in zip(regions, new, strict=True):
        assert torch.equal(region[-1].cpu(), row) and bool((region[:-1] == POISON).all())


def test_what_does_not_fit_is_refused() -> None:
    rows = pooled_entries(KVFormatSpec("fp32", 8, 4), [3], torch.device("cpu"), page_chunks=4)
    with pytest.raises(ValueError, match=r"must be uint8 \[1, 32\]"):
        put_rows(rows, torch.tensor([0]), torch.zeros(1, 31, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be int64 \[1\]"):
        put_rows(rows, torch.tensor([0.0]), torch.zeros(1, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown impl"):
        put_rows(rows, torch.tensor([0]), torch.zeros(1, 32, dtype=torch.uint8), impl="fast")
