"""Policies compared on the same items, on the same prefill, at the same bytes."""

from __future__ import annotations

from .items import Document, Item, ItemSet, read_items, write_items
from .policies import STANDARD, parse_policies
from .runner import RunConfig, read_samples, run_items

__all__ = [
    "STANDARD",
    "Document",
    "Item",
    "ItemSet",
    "RunConfig",
    "parse_policies",
    "read_items",
    "read_samples",
    "run_items",
    "write_items",
]
