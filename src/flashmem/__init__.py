"""flashmem: DeepSeek-V4 on ultra-long context with a fraction of the KV cache on the device."""

from .attach import LSACache, attach, detach
from .config import LSAConfig, ModelGeometry
from .engine import Engine, Session
from .indexer import MemoryIndexer
from .types import BudgetError, DamagedError, FlashmemError, PageView, Policy, Selection

__all__ = [
    "BudgetError",
    "DamagedError",
    "Engine",
    "FlashmemError",
    "LSACache",
    "LSAConfig",
    "MemoryIndexer",
    "ModelGeometry",
    "PageView",
    "Policy",
    "Selection",
    "Session",
    "attach",
    "detach",
]
