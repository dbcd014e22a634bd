"""Rows in pages with NaN bytes all around them, for tests of kernels that read in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashmem.kernels.index_rows import SCALE_BYTES, encode_index_rows
from flashmem.kernels.kv_codec import KVFormatSpec, PlanarForm, encode_rows, put_planar
from flashmem.kernels.paged import PagedRows, index_row_form

POISON = 0xFF
"""A NaN in every format."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def interleaved_index_rows(
    counts: Sequence[int], dim: int, device: torch.device, *, layers: int = 1, seed: int = 0
) -> PagedRows:
    """Each session's index rows in a tensor of its own, longer than its count."""
    regions = []
    for layer in range(layers):
        regions.append([])
        for b, count in enumerate(counts):
            rows = torch.full((count + 5, dim + SCALE_BYTES), POISON, dtype=torch.uint8)
            rows[:count] = encode_index_rows(draw(count, dim, seed=seed + 100 * layer + b))
            regions[-1].append(rows.to(device))
    return PagedRows(index_row_form(dim), regions, counts)


def pooled(
    form: PlanarForm, rows: Sequence[torch.Tensor], device: torch.device, *, seed: int = 0, before: int = 32
) -> PagedRows:
    """The rows of all sessions in scattered pages of one pool of records, with other bytes around each page."""
    counts = [len(x) for x in rows]
    pages = max(1, -(-max(counts) // form.page_chunks))
    records = torch.full((len(rows) * pages + 3, before + form.page_bytes + 48), POISON, dtype=torch.uint8)
    region = records[:, before : before + form.page_bytes]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    table = order[: len(rows) * pages].view(len(rows), pages)
    for numbers, session_rows in zip(table, rows, strict=True):
        at = torch.arange(len(session_rows))
        put_planar(form, region, numbers[at // form.page_chunks], at % form.page_chunks, session_rows)
    on_device = records.to(device)[:, before : before + form.page_bytes]
    return PagedRows(form, [[on_device]], counts, table.to(device))


def pooled_index_rows(
    counts: Sequence[int], dim: int, device: torch.device, *, page_chunks: int = 16, seed: int = 0
) -> PagedRows:
    form = PlanarForm(page_chunks, dim, SCALE_BYTES)
    rows = [encode_index_rows(draw(count, dim, seed=seed + b)) for b, count in enumerate(counts)]
    return pooled(form, rows, device, seed=seed)


def pooled_exact_keys(
    counts: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device, *, page_chunks: int = 16, seed: int = 0
) -> PagedRows:
    form = PlanarForm(page_chunks, dim * dtype.itemsize, 0)
    rows = [draw(count, dim, seed=seed + b).to(dtype).view(torch.uint8) for b, count in enumerate(counts)]
    rows = [x.reshape(-1, form.data_bytes) for x in rows]
    return pooled(form, rows, device, seed=seed)


def pooled_entries(
    spec: KVFormatSpec, counts: Sequence[int], device: torch.device, *, page_chunks: int = 16, seed: int = 0
) -> PagedRows:
    rows = [encode_rows(spec, draw(count, spec.head_dim, seed=seed + b)) for b, count in enumerate(counts)]
    return pooled(spec.planar(page_chunks), rows, device, seed=seed)
