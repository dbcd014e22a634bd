"""Bytes and FLOPs as formulas: what a context costs before a model is loaded, and what a session should measure."""

from __future__ import annotations

from .bytes import (
    AllInReport,
    KVReport,
    PaperReport,
    kept_pages,
    key_entry_bytes,
    kv_entry_bytes,
    kv_report,
    record_bytes,
)
from .flops import FlopsReport, StepFlops, flops_report
from .models import MODEL_NAMES, resolve_geometry, shipped_model

__all__ = [
    "MODEL_NAMES",
    "AllInReport",
    "FlopsReport",
    "KVReport",
    "PaperReport",
    "StepFlops",
    "flops_report",
    "kept_pages",
    "key_entry_bytes",
    "kv_entry_bytes",
    "kv_report",
    "record_bytes",
    "resolve_geometry",
    "shipped_model",
]
