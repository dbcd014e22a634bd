"""When a session scores, selects, prefetches and flips, and how sessions share the device pool."""

from .cycle import Cycle, CycleStats
from .level_1 import Choice, choose
from .scheduler import SlotShare

__all__ = ["Choice", "Cycle", "CycleStats", "SlotShare", "choose"]
