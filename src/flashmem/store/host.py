"""The host mirror: complete pages in main memory, pinned where a CUDA device copies from it."""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from .layout import RecordLayout
from .records import RecordStore

SLAB_STEP_BYTES = 1 << 30
"""A slab grows the mirror by half of its size, but by no more than this beyond what is needed."""
FIRST_SLAB_RECORDS = 16


class HostMirror(RecordStore):
    """Records in slabs of exact size: torch's own pinned allocator would round each to a power of two.

    With `shared_dir` (for example below /dev/shm) slab i is the file `slab-i` there, mapped shared, so that the
    processes of one node hold one copy. They must take and give back records in the same order, one of them is the
    `writer`, and the caller puts a barrier between a commit and the other processes' next read. The writer removes
    the files on close.
    """

    tier = "host"

    def __init__(
        self,
        layout: RecordLayout,
        budget_bytes: int | None,
        *,
        shared_dir: str | None = None,
        writer: bool = True,
    ) -> None:
        super().__init__(layout.record_bytes, budget_bytes)
        self.pinned = any(device.type == "cuda" for device in layout.devices)
        self.writer = writer
        self._pinned_slabs: list[torch.Tensor] = []
        # also for a mirror that nobody closed: memory must not be unmapped while it is pinned
        self._unpin = weakref.finalize(self, _unpin, self._pinned_slabs)
        self._shared_dir = None if shared_dir is None else Path(shared_dir)
        if self._shared_dir is not None and not self._shared_dir.is_dir():
            raise ValueError(f"the shared directory of the host mirror does not exist: {shared_dir}")

    def close(self) -> None:
        """Unpin and drop all slabs; no copy may be in flight."""
        self._unpin()
        if self._shared_dir is not None and self.writer:
            for index in range(len(self.slabs)):
                self._slab_path(index).unlink(missing_ok=True)
        super().close()

    def _grow(self, missing: int) -> None:
        most = SLAB_STEP_BYTES // self.record_bytes
        count = self._step(max(missing, min(FIRST_SLAB_RECORDS, self._room())), most)
        slab = self._map(count * self.record_bytes)
        if self.pinned:
            if self._shared_dir is None:
                slab.zero_()  # all threads find its memory; pinning alone would, page by page, on one
            _pin(slab)
            self._pinned_slabs.append(slab)
        self._append_slab(slab.view(count, self.record_bytes))

    def _room(self) -> int:
        """Records that the budget still lets us allocate."""
        if self.budget_bytes is None:
            return FIRST_SLAB_RECORDS
        return self.budget_bytes // self.record_bytes - self.num_records

    def _map(self, num_bytes: int) -> torch.Tensor:
        if self._shared_dir is None:
            large = self.pinned and sys.platform == "linux"
            return torch.frombuffer(_map_large(num_bytes) if large else mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        handle = os.open(self._slab_path(len(self.slabs)), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(handle, 0, num_bytes)  # fails here rather than with a bus error on first touch
            return torch.frombuffer(mmap.mmap(handle, num_bytes), dtype=torch.uint8)
        finally:
            os.close(handle)

    def _slab_path(self, index: int) -> Path:
        assert self._shared_dir is not None
        return self._shared_dir / f"slab-{index}"


def _map_large(num_bytes: int) -> mmap.mmap:
    """Private memory of large pages where the kernel has some to give: found and pinned faster than small ones.

    A forked process does not get it: the kernel would copy what is pinned.
    """
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # a kernel without large pages knows no such advice; the memory is good all the same
            mapped.madvise(advice)
    return mapped


def _pin(slab: torch.Tensor) -> None:
    code = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0))
    if code != 0:
        _forget_cuda_error()
        raise MemoryError(f"pinning {slab.nbytes:,} bytes of host memory failed with CUDA error {code}")


def _unpin(slabs: list[torch.Tensor]) -> None:
    if slabs:
        torch.cuda.synchronize()  # copies may be in flight
    for slab in slabs:
        code = int(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr()))
        if code != 0:
            _forget_cuda_error()
            raise RuntimeError(f"unpinning {slab.nbytes:,} bytes of host memory failed with CUDA error {code}")
    slabs.clear()


def _forget_cuda_error() -> None:
    """CUDA keeps the last error for whoever asks next: ask here, so that no later kernel is blamed for it."""
    with suppress(torch.AcceleratorError):
        torch.zeros(1, device="cuda")


__all__ = ["HostMirror"]
