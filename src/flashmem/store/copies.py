"""How slots and host records are copied: neighbours together, and many in one call where CUDA has such a call.

A copy is enqueued on the current stream of the pool's device and never waits; what must come before it is the pool's
business (`device`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .layout import RecordPart

FIRST_WITH_BATCHES = 12_080
"""First CUDA version (1000 x major + 10 x minor) with cudaMemcpyBatchAsync."""
BATCH_PIECES = 32
"""Pieces per call: the first ones are copied while the addresses of the next are put together."""


class Run(NamedTuple):
    """Neighbouring slots and neighbouring records of one slab, in the same order."""

    slot: int
    slab: torch.Tensor
    """Host records, uint8 [records, record_bytes]."""
    row: int
    """First record in the slab."""
    length: int
    """Slots, and records."""
    pinned: bool


class Copies(Protocol):
    """Copies the bytes of one part between its pool [slots, part_bytes] and the runs' records."""

    name: str

    def to_device(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        """Enqueue copies into the slots; `stream` is the handle of the current stream."""

    def to_host(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        """Enqueue copies into the records; those into memory that is not pinned are done when this returns."""


class LoopedCopies:
    """A copy by torch for every piece."""

    name = "one by one"

    def to_device(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        for run in pieces(part, runs):
            pool[run.slot : run.slot + run.length].copy_(_records(part, run), non_blocking=True)

    def to_host(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        for run in pieces(part, runs):
            _records(part, run).copy_(pool[run.slot : run.slot + run.length], non_blocking=run.pinned)


class BatchedCopies:
    """Calls of cudaMemcpyBatchAsync for the pinned pieces; the others as in `LoopedCopies`.

    `runtime` is `cuda.bindings.runtime`. Copies of a batch have no order among themselves, and need none: slots and
    records occur once. Sources are read in the order of the stream, since an older copy may still write them.
    """

    name = "batched"

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._attributes = runtime.cudaMemcpyAttributes()
        self._attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        self._others = LoopedCopies()

    def to_device(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        batched, others = _split(runs, stream)
        for device, host, sizes in self._batches(part, pool, batched):
            self._enqueue(device, host, sizes, stream)
        self._others.to_device(part, pool, others, stream)

    def to_host(self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run], stream: int) -> None:
        batched, others = _split(runs, stream)
        for device, host, sizes in self._batches(part, pool, batched):
            self._enqueue(host, device, sizes, stream)
        self._others.to_host(part, pool, others, stream)

    def _batches(
        self, part: RecordPart, pool: torch.Tensor, runs: Sequence[Run]
    ) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Addresses in the pool and in host memory, and bytes, some pieces at a time."""
        found = list(pieces(part, runs))
        first, size = pool.data_ptr(), part.num_bytes
        for begin in range(0, len(found), BATCH_PIECES):
            some = found[begin : begin + BATCH_PIECES]
            device = [first + run.slot * size for run in some]
            host = [run.slab.data_ptr() + run.row * run.slab.shape[1] + part.begin for run in some]
            yield device, host, [run.length * size for run in some]

    def _enqueue(self, targets: list[int], sources: list[int], sizes: list[int], stream: int) -> None:
        error, *_ = self._runtime.cudaMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), [self._attributes], [0], 1, stream
        )
        if int(error):
            raise RuntimeError(f"cudaMemcpyBatchAsync of {len(sizes)} pieces, {sum(sizes):,} bytes: {error.name}")


def best_copies(devices: Sequence[torch.device]) -> Copies:
    """Batched on CUDA where the package cuda-bindings and the driver know how, else one by one."""
    runtime = _batching_runtime() if any(device.type == "cuda" for device in devices) else None
    return LoopedCopies() if runtime is None else BatchedCopies(runtime)


def pieces(part: RecordPart, runs: Sequence[Run]) -> Iterator[Run]:
    """Runs whose bytes of this part are contiguous: as they are where the part is the whole record, else in records."""
    for run in runs:
        if run.length == 1 or part.num_bytes == run.slab.shape[1]:
            yield run
        else:
            for i in range(run.length):
                yield run._replace(slot=run.slot + i, row=run.row + i, length=1)


def _split(runs: Sequence[Run], stream: int) -> tuple[list[Run], list[Run]]:
    """Runs for batches, and the others: memory that is not pinned, or a part without a stream, on no CUDA device."""
    batched = [run for run in runs if run.pinned and stream]
    return batched, [run for run in runs if not (run.pinned and stream)]


def _records(part: RecordPart, run: Run) -> torch.Tensor:
    """The run's bytes of a part, uint8 [count, part_bytes], a view."""
    return run.slab[run.row : run.row + run.length, part.begin : part.end]


def _batching_runtime() -> Any:
    """`cuda.bindings.runtime` where it and the driver have batched copies; None elsewhere."""
    try:
        from cuda.bindings import runtime  # optional: only some builds of torch bring it
    except ImportError:
        return None
    return _usable(runtime)


def _usable(runtime: Any) -> Any:
    """The runtime, or None if it or the driver is too old."""
    if not hasattr(runtime, "cudaMemcpyBatchAsync"):
        return None
    (error, driver), (_, built_for) = runtime.cudaDriverGetVersion(), runtime.cudaRuntimeGetVersion()
    # a driver runs what was built for its major version; the call changed its form with version 13
    enough = not int(error) and driver >= max(FIRST_WITH_BATCHES, built_for // 1000 * 1000)
    return runtime if enough else None


__all__ = ["BatchedCopies", "Copies", "LoopedCopies", "Run", "best_copies", "pieces"]
