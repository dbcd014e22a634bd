"""Recall at a budget, calibration of the cut, and the table of indexers and baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmem.capture.format import ShardReader
from flashmem.indexer import MemoryIndexer
from flashmem.policy import ThresholdPolicy
from flashmem.training import metrics
from flashmem.training.calibration import Curve, budget_cut, calibrate, conformal_cut, curve, curves_of
from flashmem.training.compare import Setup, compare, main, parse_indexers
from flashmem.training.data import PageRules, Queries, queries_of
from flashmem.types import PageView
from support.learnable_shards import TAU, start_indexer, write_shards

RULES = PageRules(page_chunks=4, sink_pages=1, recency_pages=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return write_shards(tmp_path_factory.mktemp("shards"))


def read(shards: ShardReader, index: int = 0) -> Queries:
    return queries_of(shards[index], shards.meta, RULES, target={"mass": 1.0}, layer_weights={1: 1.0})


def test_recall_by_hand(shards: ShardReader) -> None:
    queries = read(shards)
    scores = metrics.random_pages(3)(queries)
    found = metrics.recalls(scores, queries, (0.3, 0.5, 1.0))
    for query in range(len(queries)):
        view = metrics.page_view(queries, query)
        ranked = sorted(
            (page for page in range(view.num_pages) if page not in view.always),
            key=lambda page: (-float(scores[query, page]), page),
        )
        need = queries.by_page(queries.need)[query].sum(-1)
        for column, keep in enumerate((0.3, 0.5, 1.0)):
            kept = ranked[: max(0, math.ceil(round(keep * view.num_pages, 9)) - len(view.always))]
            total = float(need.sum())
            expected = float(need[kept].sum()) / total if total else math.nan
            np.testing.assert_allclose(found.need_QG[query, column], expected, rtol=1e-5)
    assert np.nanmin(found.need_QG[:, 2]) == pytest.approx(1)  # everything stays


def test_oracle_beats_everything_and_random_is_in_proportion(shards: ShardReader) -> None:
    means = {}
    scorers = {"oracle": metrics.oracle, "recency": metrics.recency, "carry-over": metrics.carry_over(TAU)}
    scorers |= {f"random {seed}": metrics.random_pages(seed) for seed in range(40)}
    for name, scorer in scorers.items():
        tables = [metrics.recalls(scorer(read(shards, i)), read(shards, i), (0.3, 0.6)).need_QG for i in range(6)]
        means[name] = metrics.document_means(tables).mean(0)
    assert all((means["oracle"] >= other).all() for other in means.values())
    random = np.mean([means[f"random {seed}"] for seed in range(40)], axis=0)
    assert 0 < random[0] < random[1] < 0.65


def test_only_moments_of_level_1_are_served(shards: ShardReader) -> None:
    queries = metrics.served(read(shards), TAU)
    offsets = (queries.positions[:, -1] - queries.turns[:, 0] + 1).tolist()
    assert offsets and all(offset % TAU == 0 for offset in offsets) and offsets.count(0) == 2


def test_calibration_error_of_known_probabilities() -> None:
    generator = np.random.default_rng(0)
    probability = generator.random(60_000)
    right = generator.random(60_000) < probability
    assert metrics.calibration_error(probability, right) < 0.02
    assert metrics.calibration_error(np.full(1000, 0.9), np.zeros(1000, bool)) == pytest.approx(0.9)


def test_bootstrap_covers_the_mean() -> None:
    values = np.array([0.0, 1.0, 1.0, math.nan])
    mean, low, high = metrics.bootstrap(values)
    assert mean == pytest.approx(2 / 3) and low < mean <= high == 1
    assert all(map(math.isnan, metrics.bootstrap(np.array([math.nan]))))


def test_the_curve_is_what_the_threshold_policy_does(shards: ShardReader) -> None:
    """A cut on the curve leaves out, and keeps, what the served policy does with that threshold."""
    indexer, queries = start_indexer().eval(), metrics.served(read(shards), TAU)
    made = curve(queries, indexer, "need")
    assert made is not None
    logits = queries.logits(indexer).detach()
    for cut in (made.cuts[0] - 1, *np.quantile(made.cuts, [0.1, 0.37, 0.5, 0.9]), made.cuts[-1] + 1):
        missed, share = [], []
        for query, count in enumerate(queries.num_chunks.tolist()):
            view = metrics.page_view(queries, query)
            served = PageView(
                num_pages=view.num_pages, page_chunks=4, num_chunks=count, always=view.always,
                logits_N=logits[query, :count] - float(cut),
            )  # fmt: skip
            pages = ThresholdPolicy(floor_pages=0).select(served).pages
            need = queries.by_page(queries.need)[query].sum(-1)
            share.append(len(pages) / view.num_pages)
            if float(need.sum()):
                missed.append(1 - float(need[list(pages)].sum() / need.sum()))
        assert made.at(cut, made.loss) == pytest.approx(np.mean(missed), abs=1e-5)
        assert made.at(cut, made.share) == pytest.approx(np.mean(share), abs=1e-9)


def random_curve(generator: np.random.Generator) -> Curve:
    cuts = np.sort(generator.normal(size=20))
    loss = np.concatenate(([0.0], np.sort(generator.random(20)) * generator.random()))
    return Curve(100, cuts, loss, np.linspace(1, 0.1, 21))


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.4]))
def test_conformal_cut_is_the_highest_that_holds(seed: int, alpha: float) -> None:
    curves = [random_curve(np.random.default_rng(seed + i)) for i in range(12)]
    cut = conformal_cut(curves, alpha)

    def risk(at: float) -> float:
        return sum(c.at(at, c.loss) for c in curves) / 13 + 1 / 13

    assert risk(cut) <= alpha
    higher = [x for c in curves for x in c.cuts if x > cut]
    assert not higher or risk(min(higher)) > alpha


def test_conformal_promise_holds_on_fresh_documents() -> None:
    """Over many draws of calibration and test documents, the mean miss stays within alpha."""
    misses = []
    for trial in range(400):
        generator = np.random.default_rng(trial)
        curves = [random_curve(generator) for _ in range(21)]
        cut = conformal_cut(curves[:20], 0.15)
        misses.append(curves[20].at(cut, curves[20].loss))
    assert 0.05 < np.mean(misses) <= 0.15 + 2 * np.std(misses) / 20


def test_too_few_documents_promise_nothing() -> None:
    with pytest.raises(ValueError, match=r"5 documents cannot promise a miss of at most 0\.1: at least 9"):
        conformal_cut([random_curve(np.random.default_rng(i)) for i in range(5)], 0.1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_budget_cut_is_the_lowest_that_holds(share: float) -> None:
    curves = [random_curve(np.random.default_rng(i)) for i in range(7)]
    cut = budget_cut(curves, share)
    assert np.mean([c.at(cut, c.share) for c in curves]) <= share
    lower = [x for c in curves for x in c.cuts if x < cut]
    assert np.mean([c.at(np.nextafter(max(lower), -9), c.share) for c in curves]) > share
    with pytest.raises(ValueError, match="always-kept pages alone"):
        budget_cut(curves, 0.05)


def test_calibrated_indexers_cut_at_one_half(shards: ShardReader, tmp_path: Path) -> None:
    curves = curves_of(shards, start_indexer(), RULES, recall="evidence")
    bounds = sorted({c.chunks for c in curves})
    made, buckets = calibrate(start_indexer(), curves, share=0.6, buckets=bounds[1:])
    assert [bucket.chunks for bucket in buckets] == bounds[1:]
    assert sum(bucket.documents for bucket in buckets) == len(curves)
    made.save_pretrained(tmp_path)
    again = MemoryIndexer.from_pretrained(tmp_path)
    assert again.config.length_offsets == tuple((bucket.chunks, -bucket.cut) for bucket in buckets)
    queries = metrics.served(read(shards), TAU)
    offset = again.config.length_offset(queries.need.shape[1])
    torch.testing.assert_close(queries.logits(again), queries.logits(start_indexer()) + offset)
    assert again.config.length_offset(10**6) == -buckets[-1].cut
    with pytest.raises(ValueError, match="either"):
        calibrate(start_indexer(), curves)
    with pytest.raises(ValueError, match=r"no calibration document has 1\.\.2 chunks"):
        calibrate(start_indexer(), curves, share=0.6, buckets=[2, 1000])


def test_the_table_compares_on_the_same_documents(shards: ShardReader, tmp_path: Path) -> None:
    start_indexer().save_pretrained(tmp_path / "x")
    out = tmp_path / "table.json"
    main([str(shards.directory), "--indexer", f"a={tmp_path / 'x'}", "--indexer", f"a={tmp_path / 'x'}",
          "--best", "a", "--page-chunks", "4", "--layer-weights", "1=1", "--out", str(out)])  # fmt: skip
    result = json.loads(out.read_text())
    rows = {(r["scorer"], r["recall"], r["group"], r["length"]): r for r in result["rows"]}
    assert {name for name, *_ in rows} == {
        "a", "native m=1", "native m=2", "carry-over", "recency", "random", "oracle",
    }  # fmt: skip
    assert {"all", "lookahead", "one thing", "song", "number"} <= {group for _, _, group, _ in rows}
    for (name, recall, group, length), row in rows.items():
        best = rows["oracle", "need", group, length]["15%"][0]
        if recall == "need" and row["15%"][0] is not None:
            assert row["15%"][0] <= best + 1e-6, name
    same = {r["to"]: r for r in result["differences"] if r["recall"] == "need" and r["group"] == "all"}
    assert same["native m=2"]["area"] == [0, 0, 0]  # the very indexer that the shards carry as native
    assert same["oracle"]["area"][0] <= 0 and result["seeds"] == {"a": 2}
    assert "| native m=1 |" in out.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="name=path"):
        parse_indexers(["x"])


def test_compare_without_families(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 2)
    setup = Setup(RULES, TAU, layer_weights={1: 1.0})
    result = compare(shards, {}, setup)
    assert result["documents"] == 2 and "differences" not in result
