"""The device pool: slots for records, and the copies between them and host memory.

Two streams touch a slot: the compute stream (whatever stream is current when a method is called) reads and writes it
in model code, the side stream copies records in and out. The rules, which keep both from ever meeting:

* A copy into a slot waits for the compute stream as it was when the slot was last given back.
* Model code may use a slot that was copied in only after `wait` on the ticket of that copy.
* A slot that is given back carries a ticket of all copies enqueued so far; who takes it for model code waits for it.

On CPU devices copies are immediate and tickets empty. Methods must be called from one thread at a time.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch

from flashmem.types import BudgetError

from .copies import Copies, Run, best_copies
from .layout import RecordLayout

POISON = 0xFF
"""A NaN in every format."""

Ticket = tuple[torch.cuda.Event | None, ...]
"""One event per part: what was enqueued on a stream up to a moment."""


class DevicePool:
    """One uint8 tensor [slots, part_bytes] per device; a record has the same slot number on all of them.

    With a budget the pool has exactly floor(budget / record_bytes) slots from the start; without one it grows, by
    reallocation. Slots are handed out lowest first, so that neighbouring records often go to neighbouring slots.
    `poison` fills slots with NaN bytes whenever they are taken or given back (for tests).
    """

    def __init__(self, layout: RecordLayout, budget_bytes: int | None, *, poison: bool = False) -> None:
        self.layout = layout
        self.budget_bytes = budget_bytes
        self.poison = poison
        slots = 0 if budget_bytes is None else budget_bytes // layout.record_bytes
        if budget_bytes is not None and not slots:
            raise BudgetError("device", layout.record_bytes, budget_bytes)
        self.parts = [self._new_part(slots, index) for index in range(len(layout.parts))]
        self.owner_of: dict[int, int] = {}
        self.copies: Copies = best_copies(layout.devices)
        self._free = list(range(slots))  # a heap
        self._busy: dict[int, Ticket] = {}  # free slots and the copies that may still use them
        self._sides = [_SideStream(device) for device in layout.devices]
        self._given_back: Ticket = self._now()
        self.copied_out: Ticket = (None,) * len(self.parts)
        """Ticket of the newest copy to host memory."""

    @property
    def num_slots(self) -> int:
        return self.parts[0].shape[0]

    @property
    def allocated_bytes(self) -> int:
        return self.num_slots * self.layout.record_bytes

    @property
    def used_bytes(self) -> int:
        return len(self.owner_of) * self.layout.record_bytes

    @property
    def available(self) -> int | None:
        """Slots that can still be taken; None without a budget."""
        return None if self.budget_bytes is None else len(self._free)

    def spare_bytes(self) -> int:
        """Bytes that all devices have free beside the pool, what torch holds for later included."""
        return sum(free_bytes(device) + _cached_bytes(device) for device in self.layout.devices)

    def take(self, count: int, owner: int) -> list[int]:
        """Slots for model code to write, zeroed (so that no session finds another one's bytes in them).

        Raises BudgetError and changes nothing when they do not fit.
        """
        slots = self._take(count, owner)
        for ticket in {self._busy.pop(slot) for slot in slots if slot in self._busy}:
            self.wait(ticket)
        self._fill(slots, POISON if self.poison else 0)
        return slots

    def take_for_copy(self, count: int, owner: int) -> list[int]:
        """Slots that `copy_in` will fill; raises BudgetError and changes nothing when they do not fit."""
        slots = self._take(count, owner)  # poisoned when they were given back
        for slot in slots:
            self._busy.pop(slot, None)  # side streams run in order
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Free slots that enqueued model code may still read and enqueued copies may still use."""
        for slot in slots:
            del self.owner_of[slot]
        copies = tuple(side.now() for side in self._sides)
        if self.poison:
            self.wait(copies)
            self._fill(slots, POISON)
        self._busy.update(dict.fromkeys(slots, copies))
        for slot in slots:
            heapq.heappush(self._free, slot)
        self.wait(self._given_back)  # chains the marks, in case two compute streams give slots back
        self._given_back = self._now()

    def copy_in(self, runs: Sequence[Run]) -> Ticket:
        """Enqueue copies of host records into slots on the side streams; the ticket says when they are done."""
        return self._copy_in(self._given_back, self.parts, runs)

    def copy_to(self, parts: Sequence[torch.Tensor], runs: Sequence[Run]) -> Ticket:
        """Enqueue copies of host records into tensors like the pool's, after what the compute streams hold now."""
        return self._copy_in(self._now(), parts, runs)

    def copy_out(self, runs: Sequence[Run]) -> Ticket:
        """Copy slots into host records on the side streams, after what the compute streams hold now.

        Copies to memory that is not pinned are done when this returns.
        """
        for side, event in zip(self._sides, self._now(), strict=True):
            side.wait(event)
        for part, pool, side in zip(self.layout.parts, self.parts, self._sides, strict=True):
            with side.current():
                self.copies.to_host(part, pool, runs, side.handle)
        self.copied_out = tuple(side.now() for side in self._sides)
        return self.copied_out

    def wait(self, ticket: Ticket) -> None:
        """Let the compute streams wait for a ticket."""
        for event, device in zip(ticket, self.layout.devices, strict=True):
            if event is not None:
                torch.cuda.current_stream(device).wait_event(event)

    def wait_host(self, ticket: Ticket) -> None:
        """Block until a ticket is done."""
        for event in ticket:
            if event is not None:
                event.synchronize()

    def side_stream(self, part: int) -> AbstractContextManager[object]:
        """Make the copy stream of a part current: what is enqueued then, by a test say, comes before later copies."""
        return self._sides[part].current()

    def record_to_cpu(self, slot: int) -> torch.Tensor:
        """A copy of one slot as a host record, uint8 [record_bytes]."""
        return torch.cat([part[slot].cpu() for part in self.parts])

    def close(self) -> None:
        """Wait for all copies and drop the pool."""
        for side in self._sides:
            side.synchronize()
        self.parts = [part.new_empty((0, part.shape[1])) for part in self.parts]
        self.owner_of, self._free, self._busy = {}, [], {}

    def check(self) -> None:
        """Raise if a slot is lost or held twice, or the budget is exceeded."""
        if sorted([*self._free, *self.owner_of]) != list(range(self.num_slots)):
            raise RuntimeError(
                f"device: {len(self._free)} free and {len(self.owner_of)} used of {self.num_slots} slots"
            )
        if len({part.shape[0] for part in self.parts}) != 1:
            raise RuntimeError(f"device: parts differ in slots: {[part.shape[0] for part in self.parts]}")
        if self.budget_bytes is not None and self.allocated_bytes > self.budget_bytes:
            raise RuntimeError(f"device: {self.allocated_bytes:,} bytes exceed the budget {self.budget_bytes:,}")
        if stray := self._busy.keys() - set(self._free):
            raise RuntimeError(f"device: slots {sorted(stray)} are busy but not free")

    def _copy_in(self, after: Ticket, pools: Sequence[torch.Tensor], runs: Sequence[Run]) -> Ticket:
        for side, event in zip(self._sides, after, strict=True):
            side.wait(event)
        for part, pool, side in zip(self.layout.parts, pools, self._sides, strict=True):
            with side.current():
                self.copies.to_device(part, pool, runs, side.handle)
        return tuple(side.now() for side in self._sides)

    def _take(self, count: int, owner: int) -> list[int]:
        if count > len(self._free):
            if self.budget_bytes is not None:
                size = self.layout.record_bytes
                raise BudgetError("device", count * size, len(self._free) * size)
            self._grow(count - len(self._free))
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self.owner_of.update(dict.fromkeys(slots, owner))
        return slots

    def _grow(self, missing: int) -> None:
        """Move to a larger allocation; for its duration the device holds both."""
        before = self.num_slots
        after = max(before + missing, before + before // 2, 4)
        self.wait(tuple(side.now() for side in self._sides))  # copies in flight write to the old allocation
        grown = [self._new_part(after, index) for index in range(len(self.parts))]
        for old, new in zip(self.parts, grown, strict=True):
            new[:before].copy_(old)
        self.parts = grown
        self._free.extend(range(before, after))  # still a heap: these are larger than all others
        self._given_back = self._now()  # copies into the new allocation come after the move

    def _new_part(self, slots: int, index: int) -> torch.Tensor:
        part = self.layout.parts[index]
        try:
            pool = torch.empty(slots, part.num_bytes, dtype=torch.uint8, device=part.device)
        except RuntimeError as error:  # torch has no narrower one for the CPU
            raise BudgetError(f"device ({part.device})", slots * part.num_bytes, free_bytes(part.device)) from error
        return pool.fill_(POISON) if self.poison else pool

    def _fill(self, slots: Sequence[int], value: int) -> None:
        for first, last in _neighbours(sorted(slots)):
            for pool in self.parts:
                pool[first : last + 1].fill_(value)

    def _now(self) -> Ticket:
        """A ticket of everything the compute streams hold now."""
        return tuple(_record(device) for device in self.layout.devices)


def _neighbours(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of every run of neighbours among sorted slots."""
    for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0]):
        found = [slot for _, slot in run]
        yield found[0], found[-1]


def free_bytes(device: torch.device) -> int:
    """Bytes that a device has free: the main memory's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cached_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 0


class _SideStream:
    """The copy stream of one device; on a CPU device there is none and everything is immediate."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def current(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def handle(self) -> int:
        """CUDA's name of the stream."""
        return 0 if self._stream is None else self._stream.cuda_stream

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None and self._stream is not None:
            self._stream.wait_event(event)

    def now(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _record(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


__all__ = ["POISON", "DevicePool", "Ticket", "free_bytes"]
