"""Many sessions, one device budget: every open session is promised an equal share of the pool's slots."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import LSAConfig, ModelGeometry
from ..types import BudgetError


@dataclass(frozen=True, slots=True)
class SlotShare:
    """Slots that one session may count on; None means that the pool grows as needed."""

    slots: int | None
    working_pages: int
    """Slots kept for pages that a prefill chunk or a window opens."""
    record_bytes: int
    double_buffered: bool

    @classmethod
    def of(cls, config: LSAConfig, geometry: ModelGeometry, pool_slots: int, record_bytes: int) -> SlotShare:
        """Share of one session; raises BudgetError when it is too small for the always-kept pages."""
        page_tokens = config.page_chunks * geometry.csa_ratio
        # pages born between two selections, the second of which is made before the first one's window begins, stay
        longest = max(config.prefill_chunk, config.tau + config.lead)
        working = -(-longest // page_tokens) + 1
        slots = None if config.device_budget_bytes is None else pool_slots // config.max_sessions
        share = cls(slots, working, record_bytes, config.lead > 0)
        least = config.sink_pages + config.recency_pages + 1
        if (capacity := share.capacity) is not None and capacity < least:
            need = (working + least * (2 if share.double_buffered else 1)) * record_bytes * config.max_sessions
            raise BudgetError("device pool", need, config.device_budget_bytes or 0)
        return share

    @property
    def capacity(self) -> int | None:
        """Pages that a selection may hold; with overlapped copies, old and new selection coexist."""
        if self.slots is None:
            return None
        return (self.slots - self.working_pages) // (2 if self.double_buffered else 1)

    def holds(self, pages: int) -> bool:
        """Whether a selection of this many pages fits."""
        return self.capacity is None or pages <= self.capacity

    def admit(self, pages: int) -> None:
        """Raise BudgetError if a selection of this many pages cannot be held."""
        if not self.holds(pages):
            raise BudgetError("device pool", pages * self.record_bytes, max(0, self.capacity or 0) * self.record_bytes)
