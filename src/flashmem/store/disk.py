"""The disk tier, and the page file of a saved memory."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from flashmem.types import BudgetError, DamagedError

from .layout import Region
from .records import Records, RecordStore

STEP_BYTES = 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTier(RecordStore):
    """Records in one memory-mapped file that grows on demand.

    The file has no name (it is unlinked as soon as it is open), so that it goes away however the process ends.
    """

    tier = "disk"

    def __init__(self, record_bytes: int, directory: str, budget_bytes: int | None) -> None:
        super().__init__(record_bytes, budget_bytes)
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.directory, prefix="flashmem-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"disk_path {directory} cannot be written: {error}") from error

    def close(self) -> None:
        super().close()
        self._file.close()

    def _grow(self, missing: int) -> None:
        before = self.num_records
        for count in dict.fromkeys((self._step(missing, STEP_BYTES // self.record_bytes), missing)):
            if self._allocate(before, count):
                break
        else:
            state = os.statvfs(self.directory)
            free = state.f_bavail * state.f_frsize
            raise BudgetError(f"disk (no space left in {self.directory})", missing * self.record_bytes, free)
        mapped = mmap.mmap(self._file.fileno(), (before + count) * self.record_bytes)
        self._starts, self.slabs = [0], [torch.frombuffer(mapped, dtype=torch.uint8).view(-1, self.record_bytes)]

    def _allocate(self, before: int, count: int) -> bool:
        """Claim blocks for `count` more records, so that a later write cannot fail; False when the disk is full."""
        handle = self._file.fileno()
        try:
            os.posix_fallocate(handle, before * self.record_bytes, count * self.record_bytes)
        except OSError as error:
            os.ftruncate(handle, before * self.record_bytes)
            if error.errno in _FULL:
                return False
            raise
        return True


class MappedRecords(Records):
    """Read-only records of a saved memory's page file, each verified the first time it is read.

    `path` holds `count` records from byte `offset` on; `crcs` are their crc32. Raises DamagedError naming the file, and
    the record when one does not match. Several sessions may share one instance.
    """

    def __init__(self, path: str | Path, *, offset: int, count: int, record_bytes: int, crcs: Sequence[int]) -> None:
        super().__init__(record_bytes)
        self.path = Path(path)
        if len(crcs) != count:
            raise DamagedError(f"{path}: {len(crcs)} checksums for {count} records")
        needed, there = offset + count * record_bytes, self.path.stat().st_size
        if there < needed:
            raise DamagedError(f"{path}: truncated, {needed:,} bytes expected, {there:,} there")
        self._crcs = list(crcs)
        self._verified = [False] * count
        if count:
            with self.path.open("rb") as file:  # a private map: torch wants writable memory, the file stays as it is
                mapped = mmap.mmap(file.fileno(), needed, access=mmap.ACCESS_COPY)
            flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset, count=count * record_bytes)
            self._append_slab(flat.view(count, record_bytes))

    def row(self, record: int) -> torch.Tensor:
        self._verify(record)
        return super().row(record)

    def verify(self, records: Iterable[int]) -> None:
        for record in records:
            self._verify(record)

    def read(self, region: Region, records_N: torch.Tensor, offsets_N: torch.Tensor | None = None) -> torch.Tensor:
        self.verify(records_N.unique().tolist())
        return super().read(region, records_N, offsets_N)

    def _verify(self, record: int) -> None:
        if self._verified[record]:
            return
        if zlib.crc32(super().row(record).numpy().data) != self._crcs[record]:
            raise DamagedError(f"{self.path}: page record {record} does not match its checksum")
        self._verified[record] = True


__all__ = ["DiskTier", "MappedRecords"]
