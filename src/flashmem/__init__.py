"""flashmem: DeepSeek-V4 on ultra-long context with a fraction of the KV cache on the device.

Public names load on first use: formulas and `flashmem kv` do without torch and transformers, which take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LSAConfig, ModelGeometry

if TYPE_CHECKING:
    from .attachment import LSACache, attach, detach
    from .engine import Engine, Session
    from .indexer import MemoryIndexer
    from .types import BudgetError, DamagedError, FlashmemError, PageView, Policy, Selection

_MODULE_OF = {
    "BudgetError": "types",
    "DamagedError": "types",
    "Engine": "engine",
    "FlashmemError": "types",
    "LSACache": "attachment",
    "MemoryIndexer": "indexer",
    "PageView": "types",
    "Policy": "types",
    "Selection": "types",
    "Session": "engine",
    "attach": "attachment",
    "detach": "attachment",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


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
