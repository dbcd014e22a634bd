"""Where a page's bytes are, and moving them: device pool, host mirror, disk tier, saved files."""

from __future__ import annotations

from .batch import DecodeBatch
from .copies import Run
from .device import DevicePool
from .disk import DiskTier, MappedRecords
from .history import History
from .host import HostMirror
from .layout import RecordLayout, RecordPart, Region
from .records import Records
from .tiered import PageStore, SessionPages

__all__ = [
    "DecodeBatch",
    "DevicePool",
    "DiskTier",
    "History",
    "HostMirror",
    "MappedRecords",
    "PageStore",
    "RecordLayout",
    "RecordPart",
    "Records",
    "Region",
    "Run",
    "SessionPages",
]
