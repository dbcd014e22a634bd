"""Policies on one prefill, on a random model: budgets, resuming, shards, and what full residency means."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.engine import Session
from flashmem.evaluation import policies
from flashmem.evaluation.decoding import decode
from flashmem.evaluation.items import Document, Item, ItemSet
from flashmem.evaluation.runner import RunConfig, run_items
from flashmem.evaluation.samples import read_samples
from flashmem.policy import AllPages, BudgetPolicy, RandomPolicy, RecencyPolicy
from flashmem.types import PageView, Selection

STANDARD = policies.parse_policies(policies.STANDARD)
TOKENS = 420
KEEP, TAU = 0.25, 4


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = LSAConfig(keep=KEEP, page_chunks=4, tau=TAU, prefill_chunk=128)
    made = Engine(random_model("CHC", seed=2, eos_token_id=None), config=config)
    yield made
    made.check()
    made.close()


@pytest.fixture(scope="module")
def items() -> ItemSet:
    """Two documents, two tasks, three questions each; answers of three cycles."""
    documents = tuple(Document(id=name, content=tokens(TOKENS, seed)) for seed, name in enumerate("de"))
    asked = tuple(
        Item(
            id=f"{document.id}-{task}-{index}", task=task, length=TOKENS, document=document.id,
            question=tokens(7 + index, 10 * index), answers=("1",), scorer="all", max_new_tokens=2 * TAU + 3,
            evidence=((16 * index, 16 * index + 20),),
        )
        for document in documents
        for task in ("a", "b")
        for index in range(3)
    )  # fmt: skip
    return ItemSet(suite="test", documents=documents, items=asked, sha256="0" * 64)


@pytest.fixture(scope="module")
def run(engine: Engine, items: ItemSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """The directory of a complete run, and its settings."""
    out = tmp_path_factory.mktemp("whole")
    config = RunConfig(batch=2, memories=str(tmp_path_factory.mktemp("memories")))
    run_items(engine, items, STANDARD, out, config)
    return out, config


@pytest.fixture(scope="module")
def whole(run: tuple[Path, RunConfig]) -> list[dict[str, Any]]:
    return read_samples(run[0] / "samples.jsonl")


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what no two runs have in common."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def of(rows: list[dict[str, Any]], policy: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows if row["policy"] == policy and row["seed"] == 0}


def test_every_item_has_every_policy(whole: list[dict[str, Any]], items: ItemSet) -> None:
    assert len(whole) == len(items.items) * len(STANDARD)
    assert len({(row["id"], row["policy"], row["seed"]) for row in whole}) == len(whole)
    assert all(
        len(row["cycles"]) == 3 and row["new_tokens"] == 2 * TAU + 3 for row in whole if "rescue" not in row["policy"]
    )
    assert all(row["context_tokens"] == TOKENS + len(item.question) for item in items.items for row in whole
               if row["id"] == item.id)  # fmt: skip


def test_matched_policies_hold_what_lsa_held(whole: list[dict[str, Any]]) -> None:
    lsa = of(whole, "lsa")
    for contender in STANDARD:
        if contender.matched:
            for row in (row for row in whole if (row["policy"], row["seed"]) == (contender.label, contender.seed)):
                assert row["cycles"] == lsa[row["id"]]["cycles"], (contender, row["id"])
    assert all(row["bytes"]["paper"] < 0.4 * row["bytes"]["full_paper"] for row in lsa.values())


def test_the_first_token_is_the_prefills(whole: list[dict[str, Any]], items: ItemSet) -> None:
    for item in items.items:
        assert len({row["prediction"].split()[0] for row in whole if row["id"] == item.id}) == 1


def test_the_oracle_keeps_most_attention_at_equal_budget(whole: list[dict[str, Any]]) -> None:
    oracle, full = of(whole, "oracle@match"), of(whole, "full")
    for row in whole:
        assert full[row["id"]]["mass_recall"] == pytest.approx(1)
        if "@match" in row["policy"]:
            assert row["mass_recall"] <= oracle[row["id"]]["mass_recall"] + 1e-9
    mean = {p: sum(row["mass_recall"] for row in of(whole, p).values()) for p in ("oracle@match", "random@match")}
    assert mean["oracle@match"] > 1.3 * mean["random@match"]


def test_native_stands_in_for_the_missing_indexer(whole: list[dict[str, Any]]) -> None:
    """The engine has no trained indexer: lsa and native@match are then the same policy."""
    lsa, native = of(whole, "lsa"), of(whole, "native@match")
    assert [row["prediction"] for row in lsa.values()] == [row["prediction"] for row in native.values()]


def test_evidence_recall_counts_pages(whole: list[dict[str, Any]], engine: Engine, items: ItemSet) -> None:
    """Evidence of item 0 lies on pages 0 and 1: the sink and, with recency, one that is gone."""
    row = of(whole, "recency@match")["d-a-0"]
    assert row["evidence_recall"] == 0.5
    assert of(whole, "full")["d-a-2"]["evidence_recall"] == 1
    assert row["depth"] == 0 and of(whole, "full")["d-a-2"]["depth"] == pytest.approx(32 / TOKENS, abs=1e-4)


def test_an_interrupted_run_goes_on(
    engine: Engine,
    items: ItemSet,
    run: tuple[Path, RunConfig],
    whole: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(run[0], tmp_path / "out")
    path = tmp_path / "out" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    cut = 10 * len(STANDARD) + 5  # in the last group but one, which has two questions, and in the middle of a line
    path.write_text("".join(lines[:cut]) + lines[cut][:40])
    appended: list[int] = []
    append = Session.append

    def noted(self: Session, content: Any, **more: Any) -> None:
        appended.append(len(content))
        append(self, content, **more)

    monkeypatch.setattr(Session, "append", noted)
    run_items(engine, items, STANDARD, tmp_path / "out", run[1])
    assert sorted(map(json.dumps, lasting(read_samples(path)))) == sorted(map(json.dumps, lasting(whole)))
    assert appended == [len(item.question) for item in items.items[-3:]]  # no document, and no group that was complete


def test_shards_are_parts_of_the_whole(
    engine: Engine, items: ItemSet, run: tuple[Path, RunConfig], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    few = policies.parse_policies(["full", "lsa", "recency@match"])
    shards = [replace(run[1], shard=(index, 3)) for index in range(3)]
    parts = [read_samples(run_items(engine, items, few, tmp_path, config)) for config in shards]
    assert [len(part) for part in parts] == [18, 18, 0]
    found = {(row["id"], row["policy"]): (row["prediction"], row["cycles"]) for part in parts for row in part}
    expected = {(row["id"], row["policy"]): (row["prediction"], row["cycles"]) for row in whole}
    assert found == {key: expected[key] for key in found} and len(found) == 36


def test_another_run_does_not_mix_in(engine: Engine, items: ItemSet, tmp_path: Path) -> None:
    few = policies.parse_policies(["recency@0.2"])
    run_items(engine, items, few, tmp_path, RunConfig(limit=1))
    assert len(read_samples(tmp_path / "samples.jsonl")) == 2
    with pytest.raises(ValueError, match=r"another run: limit, samples differ"):
        run_items(engine, items, few, tmp_path, RunConfig(limit=2))


@pytest.mark.parametrize("policy", [RecencyPolicy(keep=1.0), RandomPolicy(keep=1.0), BudgetPolicy(keep=1.0)])
def test_the_whole_budget_is_full(engine: Engine, items: ItemSet, policy: Any) -> None:
    """Bit for bit: the same pages give the same logits whoever chose them."""
    with engine.session() as session:
        session.append(items.documents[0].content)
        snapshot = session.snapshot()
    with engine.resume(snapshot, policy=AllPages()) as full, engine.resume(snapshot, policy=policy) as other:
        for token in tokens(TAU + 3, 5):
            assert torch.equal(engine.decode([full], [token]), engine.decode([other], [token]))
        assert full.pages.resident == other.pages.resident == tuple(range(full.pages.num_pages))


@pytest.mark.parametrize("contender", STANDARD[:3], ids=lambda contender: contender.label)
def test_bytes_by_formula_are_bytes_held(engine: Engine, items: ItemSet, contender: policies.Contender) -> None:
    with engine.session() as session:
        session.append(items.documents[0].content)
        snapshot = session.snapshot()
    policy = policies.build(contender, engine.config, engine.geometry.csa_ratio, policies.Reference())
    with engine.resume(snapshot, policy=policy) as session:
        pages, layout = session.pages, engine.layout
        chunks = sum(min(4, pages.num_chunks - 4 * page) for page in pages.resident)
        hca = sum(rows.get(session.state.num_hca_entries()).nbytes for rows in session.state.entries.values())
        paper = chunks * len(layout.csa_layers) * (layout.kv_entry_bytes + layout.key_entry_bytes) + hca
        device = len([slot for slot, owner in engine.store.pool.owner_of.items() if owner == pages.owner])
        device = (
            device * layout.record_bytes + 16 * len(pages.resident) + session.state.nbytes() + pages.index_row_bytes
        )
        (answer,) = decode(engine, [session], [2])
    assert (answer.cycles[0]["paper"], answer.cycles[0]["all_in"]) == (paper, device)


def test_masses_are_the_attention_of_every_cycle(engine: Engine, items: ItemSet) -> None:
    with engine.session() as session:
        session.append(items.documents[0].content)
        snapshot = session.snapshot()
    masses: list[torch.Tensor] = []
    with engine.resume(snapshot, policy=AllPages()) as session:
        decode(engine, [session], [TAU + 4], masses=[masses])  # that many steps less one
    assert engine.on_picks is None
    assert len(masses) == 2
    heads, layers = engine.geometry.num_heads, len(engine.geometry.csa_layers)
    for mass, steps in zip(masses, (TAU, 3), strict=True):
        assert bool((mass >= 0).all()) and 0 < float(mass.sum()) < heads * layers * steps


def test_conversations_keep_a_session_per_policy(engine: Engine, tmp_path: Path) -> None:
    """The second turn goes on from what each policy answered to the first one; LSA brings back what it needs."""
    turns = tuple(
        Item(
            id=f"c-{turn}", task=f"turn {turn}", length=TOKENS, document="d", question=tokens(9, 40 + turn),
            answers=("1",), scorer="all", max_new_tokens=TAU + 2, conversation="c",
        )
        for turn in (1, 2)
    )  # fmt: skip
    items = ItemSet(
        suite="test", documents=(Document(id="d", content=tokens(TOKENS, 3)),), items=turns, sha256="1" * 64
    )
    contenders = policies.parse_policies(["full", "lsa", "recency@match", "oracle@match"])
    rows = read_samples(run_items(engine, items, contenders, tmp_path))
    assert len(rows) == 2 * len(contenders)
    for policy in ("full", "lsa", "recency@match", "oracle@match"):
        first, second = (of([row for row in rows if row["id"] == item.id], policy)[item.id] for item in turns)
        assert first["context_tokens"] == TOKENS + 9
        assert second["context_tokens"] == TOKENS + 9 + first["new_tokens"] + 9
        assert len(second["cycles"]) == 2

    with engine.session() as session:  # the same by hand, under LSA
        session.append(items.documents[0].content)
        for item in turns:
            answer = session.generate(item.question, max_new_tokens=TAU + 2)
            assert of(rows, "lsa")[item.id]["prediction"] == " ".join(map(str, answer))
    for row in (row for row in rows if "@match" in row["policy"]):
        assert [c["selected"] for c in row["cycles"]] == [c["selected"] for c in of(rows, "lsa")[row["id"]]["cycles"]]
        assert row["mass_recall"] is not None


def test_a_stale_policy_is_one_window_late(
    engine: Engine, items: ItemSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the scores of every boundary, and the rule on those of the boundary before."""
    seen: list[PageView] = []

    def noted(self: BudgetPolicy, view: PageView) -> Selection:
        seen.append(view)
        return select(self, view)

    with engine.session() as session:
        session.append(items.documents[0].content)
        document_N = engine.indexer.chunk_logits(
            {csa: session.state.observed(session.cycle.layers[csa]) for csa in engine.indexer.target_layers},
            {csa: session.pages.index_rows(session.cycle.layers[csa]) for csa in engine.indexer.target_layers},
            session.state.observed_positions(),
        )
        session.append(items.items[0].question)
        asked = session.snapshot()
    select = BudgetPolicy.select
    (contender,) = policies.parse_policies(["lsa-stale"])
    policy = policies.build(contender, engine.config, 4, policies.Reference(stale=document_N))
    assert isinstance(policy, policies.Stale)
    monkeypatch.setattr(BudgetPolicy, "select", noted)
    scores = []
    with engine.resume(asked, policy=policy) as session:
        for token in tokens(2 * TAU + 1, 6):
            engine.decode([session], [token])
            if session.cycle.steps == 1:
                scores.append(policy.before_N)
                late = seen[-1]
                before_N = document_N if len(scores) == 1 else scores[-2]
                assert late.logits_N is not None and torch.equal(late.logits_N[: len(before_N)], before_N)
                assert bool((late.logits_N[len(before_N) :] == -math.inf).all()) and late.num_chunks > len(before_N)
                assert session.cycle.selection.pages == select(BudgetPolicy(keep=KEEP), late).pages
    assert len(scores) == 3 and not torch.equal(scores[0], scores[1][: len(scores[0])])
    monkeypatch.undo()

    few = policies.parse_policies(["full", "lsa", "carry-over@match", "lsa-stale"])
    rows = read_samples(run_items(engine, items, few, tmp_path, RunConfig(batch=2)))
    lsa, late, carried = (of(rows, policy) for policy in ("lsa", "lsa-stale", "carry-over@match"))
    assert [row["bytes"] for row in late.values()] == [row["bytes"] for row in lsa.values()]
    for item in items.items:  # in the first window both go by the scores at the end of the document
        first = [row[item.id]["prediction"].split()[: TAU + 1] for row in (late, carried)]
        assert first[0] == first[1]
    assert any(row["prediction"] != lsa[key]["prediction"] for key, row in late.items())


def test_what_is_late_must_be_scores_of_the_indexer(engine: Engine) -> None:
    (contender,) = policies.parse_policies(["lsa-stale"])
    with pytest.raises(ValueError, match="lacks the scores"):
        policies.build(contender, engine.config, 4, policies.Reference())
    other = replace(engine.config, policy="recency")
    with pytest.raises(ValueError, match="'recency' does not go by the Memory Indexer"):
        policies.build(contender, other, 4, policies.Reference(stale=torch.zeros(3)))


def test_given_continuations_are_scored_token_by_token(engine: Engine, tmp_path: Path) -> None:
    target = tokens(TAU + 3, 8)
    item = Item(
        id="p", task="perplexity", length=TOKENS, document="d", question=(), answers=(), scorer="all",
        max_new_tokens=len(target), target=target,
    )  # fmt: skip
    content = tokens(TOKENS, 4)
    items = ItemSet(suite="test", documents=(Document(id="d", content=content),), items=(item,), sha256="2" * 64)
    rows = read_samples(run_items(engine, items, policies.parse_policies(["full", "lsa"]), tmp_path))
    assert [len(row["losses"]) for row in rows] == [len(target)] * 2
    assert rows[0]["losses"][0] == rows[1]["losses"][0] and rows[0]["losses"][-1] != rows[1]["losses"][-1]
    assert len(rows[1]["cycles"]) == 2 and "score" not in rows[0]
    engine.close()
    model = engine.backbone.model  # stock again
    logits = model(torch.tensor([[*content, *target]])).logits[0, TOKENS - 1 : -1].log_softmax(-1)
    expected = -logits[torch.arange(len(target)), list(target)]
    assert rows[0]["losses"] == pytest.approx(expected.tolist(), abs=2e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["best"], "unknown policy 'best'"),
        (["lsa@match"], "unknown policy 'lsa@match'"),
        (["full", "recency@match"], "need 'lsa'"),
        (["lsa", "oracle@match"], "needs 'full'"),
        (["recency@0"], "share must lie in"),
        (["full", "full"], "named twice"),
    ],
)
def test_policies_that_cannot_be(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policies.parse_policies(names)


def test_seeds_belong_to_random_policies() -> None:
    keys = [contender.key for contender in policies.parse_policies(["lsa", "random@match", "random-10%"], seeds=2)]
    assert keys == ["lsa#0", "random@match#0", "random@match#1", "random-10%#0", "random-10%#1"]


def test_the_papers_own_baselines() -> None:
    """8,192 tokens are 512 pages of 16: everything beyond is drawn, one page in ten."""
    view = PageView(num_pages=1512, page_chunks=4, num_chunks=6048, always=(0, 1510, 1511), logits_N=None)
    config, reference = LSAConfig(page_chunks=4), policies.Reference()
    tail, drawn, again, other = (
        policies.build(contender, config, 4, reference).select(view).pages
        for contender in policies.parse_policies(["recency-tail", "random-10%"], seeds=2)[:2]
        + policies.parse_policies(["random-10%"], seeds=2)
    )
    assert tail == (0, *range(1000, 1512))
    assert len(drawn) == 512 + 1 + 100 and set(tail) <= set(drawn)
    assert drawn == again != other
