"""What must hold of every policy that is compared: the whole budget is full, the oracle is never below random, and the
bytes that are told are the bytes that are held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.config import KVFormat
from flashmem.engine import Session
from flashmem.evaluation import decoding, policies
from flashmem.evaluation.decoding import Answer, decode
from flashmem.evaluation.items import Document, Item, ItemSet
from flashmem.evaluation.runner import RunConfig, run_items
from flashmem.evaluation.samples import read_samples
from flashmem.policy import always_kept
from flashmem.types import PageView

TAU = 4
WHOLE = ("lsa@1", "native@1", "recency@1", "random@1", "carry-over@1", "oracle@1")
LENGTHS = (15, 16, 17, 211, 256)
"""Tokens around a page of 16, within a page, and at the end of one; 256 also ends an HCA entry."""


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = make_engine("auto")
    yield made
    made.check()
    made.close()


def make_engine(kv_format: KVFormat | Literal["auto"]) -> Engine:
    config = LSAConfig(keep=0.25, page_chunks=4, tau=TAU, prefill_chunk=128, recency_pages=1, kv_format=kv_format)
    return Engine(random_model("CHC", seed=2, eos_token_id=None), config=config)


def test_the_whole_budget_answers_as_full_attention_does(engine: Engine, tmp_path: Path) -> None:
    """Whoever spends it; over three windows, at page boundaries, and where there is hardly a page."""
    documents = tuple(Document(id=str(length), content=tokens(length, length)) for length in LENGTHS)
    asked = tuple(
        Item(
            id=document.id, task="a", length=256, document=document.id, question=tokens(5, 1), answers=("1",),
            scorer="all", max_new_tokens=2 * TAU + 3,
        )
        for document in documents
    )  # fmt: skip
    items = ItemSet(suite="test", documents=documents, items=asked, sha256="3" * 64)
    contenders = policies.parse_policies(["full", *WHOLE], seeds=1)
    rows = read_samples(run_items(engine, items, contenders, tmp_path, RunConfig()))
    by_item: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["id"], {})[row["policy"]] = row
    assert by_item.keys() == {str(length) for length in LENGTHS}
    for made in by_item.values():
        full = made.pop("full")
        assert full["new_tokens"] == 2 * TAU + 3 and full["bytes"]["paper"] == full["bytes"]["full_paper"]
        assert made.keys() == set(WHOLE)
        for policy, row in made.items():
            assert row["prediction"] == full["prediction"], policy
            assert row["bytes"]["paper"] == row["bytes"]["full_paper"], policy
            assert [cycle["pages"] for cycle in row["cycles"]] == [cycle["pages"] for cycle in full["cycles"]], policy
            assert row["mass_recall"] is None or row["mass_recall"] == pytest.approx(1), policy


@st.composite
def boundaries(draw: st.DrawFn) -> tuple[PageView, torch.Tensor, int]:
    """A view without scores, the attention that every page will be given, and a budget."""
    pages = draw(st.integers(1, 40))
    sink, recency = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    always = always_kept(pages, sink, recency)
    view = PageView(
        num_pages=pages, page_chunks=4, num_chunks=4 * pages, always=always, logits_N=torch.zeros(4 * pages)
    )
    masses = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]) | st.floats(0, 100), min_size=pages, max_size=pages))
    return view, torch.tensor(masses, dtype=torch.float64), draw(st.integers(0, pages))


@settings(deadline=None)
@given(boundaries(), st.integers(0, 5))
def test_the_oracle_is_never_below_another_at_equal_budget(
    boundary: tuple[PageView, torch.Tensor, int], seed: int
) -> None:
    """In the attention it keeps; `random` with every seed, and every other policy that is matched."""
    view, mass_P, budget = boundary
    reference = policies.Reference(budgets=[budget], masses=[mass_P], stale=mass_P.float().repeat_interleave(4).neg())
    kept: dict[str, float] = {}
    names = ["full", "lsa", "oracle@match", "random@match", "recency@match", "native@match", "carry-over@match"]
    for contender in policies.parse_policies(names, seeds=seed + 1):
        if contender.matched:
            pages = policies.build(contender, LSAConfig(keep=0.5), 4, reference).select(view).pages
            assert len(pages) == min(view.num_pages, max(budget, len(view.always))), contender
            assert set(view.always) <= set(pages)
            kept[contender.key] = float(mass_P[list(pages)].sum())
    assert len(kept) == 4 + seed + 1
    assert all(mass <= kept["oracle@match#0"] * (1 + 1e-6) for mass in kept.values()), kept


@pytest.mark.parametrize("kv_format", ["fp32", "fp8"])
@pytest.mark.parametrize("policy", ["full", "lsa", "lsa+rescue", "random@0.4"])
def test_bytes_by_formula_are_bytes_held_in_every_window(
    kv_format: KVFormat, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noted at the start of every cycle, counted there from the tensors, in all formats and lengths."""
    counted: list[tuple[int, int]] = []
    note = decoding._Watcher._note

    def count(self: Any, step: int) -> None:
        note(self, step)
        counted.append(held(self.session))

    monkeypatch.setattr(decoding._Watcher, "_note", count)
    engine = make_engine(kv_format)
    (contender,) = policies.parse_policies([policy], seeds=1)
    for length in LENGTHS:
        with engine.session() as session:
            session.append(tokens(length, length))
            snapshot = session.snapshot()
        chosen = policies.build(contender, engine.config, engine.geometry.csa_ratio, policies.Reference())
        with engine.resume(snapshot, policy=chosen, rescue=contender.rescue) as session:
            answer: Answer = decode(engine, [session], [3 * TAU + 2])[0]
        assert [(cycle["paper"], cycle["all_in"]) for cycle in answer.cycles] == counted
        assert len(answer.cycles) >= 4
        counted.clear()
    engine.close()


def held(session: Session) -> tuple[int, int]:
    """Bytes on the device, from the tensors that hold them: entries of resident chunks and HCA, and everything."""
    pages, pool, geometry = session.pages, session.engine.store.pool, session.engine.geometry
    chunks = sum(min(4, pages.num_chunks - 4 * page) for page in pages.resident)
    if session.engine.layout.kv_format == "fp8":  # rotary channels in bf16, scales of 64 others padded to 8 bytes
        rotary = geometry.compress_rope.dim
        scales = math.ceil((geometry.head_dim - rotary) / 64)
        entry = geometry.head_dim + rotary + 8 * math.ceil(scales / 8) + geometry.index_head_dim + 4
    else:
        entry = 4 * (geometry.head_dim + geometry.index_head_dim)
    hca = sum(rows.get(session.state.num_hca_entries()).nbytes for rows in session.state.entries.values())
    slots = [slot for slot, owner in pool.owner_of.items() if owner == pages.owner]
    device = sum(part[slot].nbytes for part in pool.parts for slot in slots) + 16 * len(pages.resident)
    return chunks * len(geometry.csa_layers) * entry + hca, device + session.state.nbytes() + pages.index_row_bytes
