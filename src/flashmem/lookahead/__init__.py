"""When a session scores, selects, prefetches and flips, and how sessions share the device pool."""

from .cycle import Cycle, CycleStats
from .scheduler import SlotShare

__all__ = ["Cycle", "CycleStats", "SlotShare"]
