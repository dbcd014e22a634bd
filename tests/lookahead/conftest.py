"""Engines of these tests fill unused device memory with NaN: what must not be read would show in the logits."""

from __future__ import annotations

import functools

import pytest

import flashmem.engine
from flashmem.store import PageStore


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashmem.engine, "PageStore", functools.partial(PageStore, poison=True))
