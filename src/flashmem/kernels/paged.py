"""Rows of many sessions where they lie in device memory, so that kernels read them in place.

Shape letters: L = layers, B = sessions, P = pages of the longest page table, R = pages of a region,
C = chunks per page, N = rows of the longest session, E = bytes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .index_rows import SCALE_BYTES
from .kv_codec import PlanarForm, get_planar

WIDEST_LOAD = 16
"""Bytes of the widest load of one thread; aligning rows further gains nothing."""


class PagedRows:
    """Row j of session b is row j % C of page `numbers_BP[b, j // C]` of its region; without numbers, of page j // C.

    A region is uint8 [R, page_bytes] in the given planar form; a strided slice of records is one. Interleaved rows
    [N, E] are pages of one chunk (`interleaved_form`).
    """

    def __init__(
        self,
        form: PlanarForm,
        regions: Sequence[Sequence[torch.Tensor]],
        counts_B: Sequence[int] | torch.Tensor,
        numbers_BP: torch.Tensor | None = None,
    ) -> None:
        """regions: per layer one for each session, or one that all sessions share.

        counts_B: rows that exist, no more than a session's pages hold; as a tensor (int32, on the device) it may change
        between launches and is not checked. Raises ValueError for what does not fit together.
        """
        if not regions or not regions[0]:
            raise ValueError("there must be at least one layer and one region")
        first = regions[0][0]
        batch = len(counts_B)
        strides = {region.stride(0) for layer in regions for region in layer if len(region) > 1} or {form.page_bytes}
        for layer in regions:
            if len(layer) not in (1, batch):
                raise ValueError(f"{len(layer)} regions for {batch} sessions; give 1 or {batch} per layer")
            for region in layer:
                _check_region(region, form, first.device)
        if len(strides) > 1:
            raise ValueError(f"regions must have one page stride, got {sorted(strides)}")
        if numbers_BP is not None and (numbers_BP.dim() != 2 or len(numbers_BP) != batch):
            raise ValueError(f"page numbers must be [{batch}, P], got {tuple(numbers_BP.shape)}")
        self.form = form
        self.regions: tuple[tuple[torch.Tensor, ...], ...]
        self.regions = tuple(tuple(layer) * (batch // len(layer)) for layer in regions)
        self.numbers_BP = None if numbers_BP is None else numbers_BP.contiguous()
        self.page_stride = strides.pop()
        capacities = [self._capacity(b) for b in range(batch)]
        self.max_rows = max(capacities, default=0)
        if not isinstance(counts_B, torch.Tensor):
            for count, capacity in zip(counts_B, capacities, strict=True):
                if not 0 <= count <= capacity:
                    raise ValueError(f"a session of {count} rows has room for {capacity}")
            self.max_rows = max(counts_B, default=0)
            counts_B = to_device(torch.tensor(counts_B, dtype=torch.int32), first.device)
        self.counts_B = counts_B
        addresses = [[region.data_ptr() for region in layer] for layer in self.regions]
        self.addresses_LB = to_device(torch.tensor(addresses, dtype=torch.int64), first.device)
        steps = (self.page_stride, form.data_bytes, form.page_chunks * form.data_bytes)
        self.alignment = math.gcd(WIDEST_LOAD, *steps, *(address for layer in addresses for address in layer))

    @classmethod
    def at(
        cls,
        form: PlanarForm,
        addresses_LB: torch.Tensor,
        counts_B: torch.Tensor,
        max_rows: int,
        numbers_BP: torch.Tensor | None = None,
    ) -> PagedRows:
        """Rows for kernels alone, at dense regions whose addresses (int64, on the device) may change between launches.

        Regions must start at multiples of `WIDEST_LOAD` bytes, as allocations do; no session may have more than
        `max_rows` rows. Neither is checked, and `read` does not work.
        """
        rows = cls.__new__(cls)
        rows.form, rows.regions, rows.page_stride = form, (), form.page_bytes
        rows.addresses_LB, rows.counts_B, rows.numbers_BP, rows.max_rows = addresses_LB, counts_B, numbers_BP, max_rows
        rows.alignment = math.gcd(WIDEST_LOAD, form.page_bytes, form.data_bytes, form.page_chunks * form.data_bytes)
        return rows

    def shared_by(self, batch: int, counts_B: torch.Tensor | None = None) -> PagedRows:
        """The rows of one session, without a table, for each of `batch` others.

        counts_B (int32, on the device) may let each see fewer; it is not checked.
        """
        if self.batch != 1 or self.numbers_BP is not None:
            raise ValueError(f"rows of one session without a page table can be shared, got {self.batch} sessions")
        counts_B = self.counts_B.expand(batch).contiguous() if counts_B is None else counts_B
        rows = PagedRows.at(self.form, self.addresses_LB.expand(-1, batch).contiguous(), counts_B, self.max_rows)
        rows.page_stride, rows.alignment = self.page_stride, self.alignment
        rows.regions = tuple(layer * batch for layer in self.regions)
        return rows

    @property
    def num_layers(self) -> int:
        return len(self.addresses_LB)

    @property
    def batch(self) -> int:
        return len(self.counts_B)

    @property
    def device(self) -> torch.device:
        return self.counts_B.device

    def read(self, layer: int = 0) -> torch.Tensor:
        """Rows uint8 [B, N, E] of one layer; those past a session's count repeat its row 0 (zeros if it has none)."""
        rows_N = torch.arange(self.max_rows, device=self.device)
        out = torch.zeros(self.batch, self.max_rows, self.form.row_bytes, dtype=torch.uint8, device=self.device)
        for b, region in enumerate(self.regions[layer]):
            count = int(self.counts_B[b])
            if count:
                there_N = torch.where(rows_N < count, rows_N, 0)
                pages_N = there_N // self.form.page_chunks
                if self.numbers_BP is not None:
                    pages_N = self.numbers_BP[b].long()[pages_N]
                out[b] = get_planar(self.form, region, pages_N, there_N % self.form.page_chunks)
        return out

    def valid(self) -> torch.Tensor:
        """Bool [B, N]: rows that exist."""
        return torch.arange(self.max_rows, device=self.device) < self.counts_B[:, None]

    def _capacity(self, b: int) -> int:
        if self.numbers_BP is not None:
            return self.numbers_BP.shape[1] * self.form.page_chunks
        return min(len(layer[b]) for layer in self.regions) * self.form.page_chunks


def interleaved_form(data_bytes: int, tail_bytes: int) -> PlanarForm:
    """Rows one after the other, each its data, then its tail."""
    return PlanarForm(1, data_bytes, tail_bytes, multiple=1)


def index_row_form(index_head_dim: int) -> PlanarForm:
    """Index rows uint8 [N, I + 4], as `index_rows` makes them."""
    return interleaved_form(index_head_dim, SCALE_BYTES)


def key_form(keys: torch.Tensor, index_head_dim: int) -> PlanarForm:
    """The form of keys of one tensor: index rows uint8 [N, I + 4], or exact keys [N, I]."""
    if keys.dtype is torch.uint8:
        return index_row_form(index_head_dim)
    return interleaved_form(keys.shape[-1] * keys.element_size(), 0)


def _check_region(region: torch.Tensor, form: PlanarForm, device: torch.device) -> None:
    if region.dtype is not torch.uint8 or region.dim() != 2 or region.shape[1] != form.page_bytes:
        raise ValueError(f"a region must be uint8 [R, {form.page_bytes}], got {region.dtype} {tuple(region.shape)}")
    if region.stride(1) != 1:
        raise ValueError(f"the bytes of a page must be dense, got strides {region.stride()}")
    if region.device != device:
        raise ValueError(f"regions lie on {device} and {region.device}")


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values from the CPU, without making the host wait for the device."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values if device.type == "cpu" else values.to(device)  # "cpu" and "cpu:1" are one place; torch would copy


def overwrite(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy CPU values of the same type and shape into a tensor, without making the host wait for the device."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def places(count: int, least: int) -> int:
    """Places for `count` things that grow while a session decodes: a power of two, at least `least`.

    More places are a kernel to compile or a graph to capture, and many histories begin at a round length: so the next
    power is taken when one in 64 more would need it, not with the first token after.
    """
    return max(least, 1 << max(0, count + count // 64 - 1).bit_length())


__all__ = ["PagedRows", "index_row_form", "interleaved_form", "key_form", "overwrite", "places", "to_device"]
