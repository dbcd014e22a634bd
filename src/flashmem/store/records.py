"""Records in host memory or behind a mapped file: the part that the tiers below the device share.

A tier is a list of slabs, each uint8 [records, record_bytes]; record ids count through the slabs in order.
Shape letters: N = things asked for, E = bytes of a row, C = chunks per page.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import torch

from flashmem.kernels.kv_codec import get_planar, get_planar_pages
from flashmem.kernels.paged import to_device
from flashmem.types import BudgetError

from .copies import Run
from .layout import Region


class Records:
    """Readable records."""

    def __init__(self, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.slabs: list[torch.Tensor] = []
        self._starts: list[int] = []  # first record of each slab

    @property
    def num_records(self) -> int:
        return self._starts[-1] + self.slabs[-1].shape[0] if self.slabs else 0

    def row(self, record: int) -> torch.Tensor:
        """One record, uint8 [record_bytes], a view."""
        slab = bisect_right(self._starts, record) - 1
        return self.slabs[slab][record - self._starts[slab]]

    def verify(self, records: Iterable[int]) -> None:
        """Raise DamagedError if one of these records is damaged, for tiers that can tell."""

    def runs(self, slots: Sequence[int], records: Sequence[int]) -> list[Run]:
        """What to copy between slots and records, pair by pair."""
        return [
            Run(slot, self.row(record).unsqueeze(0), 0, 1, False) for slot, record in zip(slots, records, strict=True)
        ]

    def read(self, region: Region, records_N: torch.Tensor, offsets_N: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [N, E] of single chunks, or [N, C, E] of whole pages without offsets; ids are int64 on the CPU."""
        if not records_N.numel():
            chunks = () if offsets_N is not None else (region.form.page_chunks,)
            return torch.empty((0, *chunks, region.form.row_bytes), dtype=torch.uint8)
        if len(self.slabs) == 1:
            return read_rows(region, region.of_records(self.slabs[0]), records_N, offsets_N)
        slab_N = torch.bucketize(records_N, torch.tensor(self._starts), right=True) - 1
        pieces = []
        for slab in slab_N.unique().tolist():
            at = (slab_N == slab).nonzero().squeeze(1)
            rows = region.of_records(self.slabs[slab])
            offsets = None if offsets_N is None else offsets_N[at]
            pieces.append((at, read_rows(region, rows, records_N[at] - self._starts[slab], offsets)))
        return merge_rows(pieces)

    def _append_slab(self, slab: torch.Tensor) -> None:
        self._starts.append(self.num_records)
        self.slabs.append(slab)


class StackedRecords(Records):
    """The first `count` records of a source that never changes, followed by records of its own."""

    def __init__(self, record_bytes: int, base: Records | None, count: int, more: torch.Tensor) -> None:
        super().__init__(record_bytes)
        self._base, self._count, self._more = base, count, Records(record_bytes)
        if len(more):
            self._more._append_slab(more)

    @property
    def num_records(self) -> int:
        return self._count + self._more.num_records

    def row(self, record: int) -> torch.Tensor:
        source, first = self._source(record < self._count)
        return source.row(record - first)

    def verify(self, records: Iterable[int]) -> None:
        for record in records:
            source, first = self._source(record < self._count)
            source.verify([record - first])

    def read(self, region: Region, records_N: torch.Tensor, offsets_N: torch.Tensor | None = None) -> torch.Tensor:
        below_N = records_N < self._count
        pieces = []
        for below in below_N.unique().tolist() or [False]:
            source, first = self._source(below)
            at = (below_N == below).nonzero().squeeze(1)
            offsets = None if offsets_N is None else offsets_N[at]
            pieces.append((at, source.read(region, records_N[at] - first, offsets)))
        return merge_rows(pieces)

    def _source(self, below: bool) -> tuple[Records, int]:
        """Where a record is, and the number of its first record here."""
        if not below:
            return self._more, self._count
        assert self._base is not None
        return self._base, 0


class RecordStore(Records):
    """Records that can be taken and given back within a budget; subclasses say where new bytes come from."""

    tier: str
    pinned = False
    """Whether a device can copy from and to these records by itself."""

    def __init__(self, record_bytes: int, budget_bytes: int | None) -> None:
        super().__init__(record_bytes)
        self.budget_bytes = budget_bytes
        self._free: list[int] = []  # a heap: lowest first keeps a session's records together
        self._used: set[int] = set()

    @property
    def allocated_bytes(self) -> int:
        return self.num_records * self.record_bytes

    @property
    def used_bytes(self) -> int:
        return len(self._used) * self.record_bytes

    @property
    def available(self) -> int | None:
        """Records that can still be taken; None without a budget."""
        return None if self.budget_bytes is None else self.budget_bytes // self.record_bytes - len(self._used)

    def used_records(self) -> list[int]:
        return sorted(self._used)

    def take(self, count: int) -> list[int]:
        """Take `count` records, lowest ids first; raises BudgetError and changes nothing when they do not fit."""
        available = self.available
        if available is not None and count > available:
            raise BudgetError(self.tier, count * self.record_bytes, available * self.record_bytes)
        if (missing := count - len(self._free)) > 0:
            before = self.num_records
            self._grow(missing)
            for record in range(before, self.num_records):
                heapq.heappush(self._free, record)
        records = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(records)
        return records

    def give_back(self, records: Iterable[int]) -> None:
        for record in records:
            self._used.remove(record)
            heapq.heappush(self._free, record)

    def runs(self, slots: Sequence[int], records: Sequence[int]) -> list[Run]:
        """What to copy between slots and records; pairs that follow each other in slots and in a slab are one run."""
        made: list[Run] = []
        begin = end = first = last = -1  # the slab at hand: its first record and the one after its last
        slab = None
        for slot, record in zip(slots, records, strict=True):
            if made and slot == last + 1 and record == first + made[-1].length and record < end:
                made[-1] = made[-1]._replace(length=made[-1].length + 1)
            else:
                if slab is None or not begin <= record < end:
                    index = bisect_right(self._starts, record) - 1
                    slab, begin = self.slabs[index], self._starts[index]
                    end = begin + slab.shape[0]
                made.append(Run(slot, slab, record - begin, 1, self.pinned))
                first = record
            last = slot
        return made

    def close(self) -> None:
        self.slabs, self._starts, self._free, self._used = [], [], [], set()

    def check(self) -> None:
        """Raise if a record is lost or held twice, or the budget is exceeded."""
        if sorted([*self._free, *self._used]) != list(range(self.num_records)):
            raise RuntimeError(f"{self.tier}: {len(self._free)} free and {len(self._used)} used of {self.num_records}")
        if self.budget_bytes is not None and self.allocated_bytes > self.budget_bytes:
            raise RuntimeError(f"{self.tier}: {self.allocated_bytes:,} bytes exceed the budget {self.budget_bytes:,}")

    def _step(self, missing: int, most: int) -> int:
        """Records to add when `missing` are needed: half of what is there, at most `most`, within the budget."""
        count = max(missing, min(self.num_records // 2, most))
        if self.budget_bytes is not None:
            count = min(count, self.budget_bytes // self.record_bytes - self.num_records)
        return count

    def _grow(self, missing: int) -> None:
        raise NotImplementedError


def read_rows(
    region: Region, rows_RP: torch.Tensor, slots_N: torch.Tensor, offsets_N: torch.Tensor | None
) -> torch.Tensor:
    """Rows [N, E] at slots and offsets of a region, or all rows [N, C, E] of the slots."""
    if offsets_N is None:
        return get_planar_pages(region.form, rows_RP, slots_N)
    return get_planar(region.form, rows_RP, slots_N, offsets_N)


def merge_rows(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One tensor from pieces (where, rows) that together name every place once; `where` is int64 on the CPU."""
    where = torch.cat([at for at, _ in pieces])
    rows = torch.cat([rows for _, rows in pieces])
    if bool((where[1:] > where[:-1]).all()):
        return rows
    return rows.index_select(0, to_device(where.argsort(), rows.device))  # whole rows; a scatter would go by bytes


__all__ = ["RecordStore", "Records", "StackedRecords", "merge_rows", "read_rows"]
