"""Capture writes what the stock model shows, whole documents only, and goes on after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmem
from flashmem.backbone import random_model
from flashmem.capture.format import Document, ShardReader, file_name
from flashmem.capture.labels import Query, sample_queries, windows
from flashmem.capture.prompts import Evidence, Prompt
from flashmem.capture.runner import NATIVE, CaptureConfig, CaptureSummary, capture, engine_for, open_shards
from flashmem.kernels.index_rows import decode_index_rows, hadamard
from support.stock_labels import Seen, sums, vote, watch

LAYERS = "CHCWC"
CONFIG = CaptureConfig(layers=(0, 2), tau=8, observe=3, queries=7, max_new_tokens=20, vote_layers=2, prefill_chunk=40)


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def make_model() -> Any:
    model = random_model(LAYERS, seed=3)
    model.generation_config.eos_token_id = None
    return model


def run(
    directory: Path, prompts: list[Prompt], config: CaptureConfig = CONFIG, model: Any = None
) -> tuple[CaptureSummary, list[tuple[str, str]]]:
    events: list[tuple[str, str]] = []
    engine = engine_for(model or make_model(), config)
    try:
        with open_shards(directory, engine, config) as writer:
            summary = capture(engine, prompts, writer, config, lambda rid, what: events.append((rid, what)))
        assert not engine.sessions and engine.on_picks is None
    finally:
        engine.close()
    return summary, events


def assert_shows(document: Document, layers: list[Seen], config: CaptureConfig = CONFIG) -> None:
    """The document is what the stock model shows at these tokens."""
    assert document.tokens == len(layers[0].hidden_SE)
    for query, position in enumerate(document.positions.tolist()):
        for csa, layer in enumerate(layers):
            for table, wanted in ((document.mass, layer.attention_ST), (document.lightning, layer.lightning_ST)):
                found = table[csa].dense(document.total_chunks)[query]
                expected = torch.zeros(document.total_chunks)
                row = sums(wanted, position, config.tau)
                expected[: len(row)] = row
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        votes = vote(layers, position, config.tau, config.vote_p, config.vote_layers)
        assert torch.equal(document.vote.dense(document.total_chunks)[query, : len(votes)], votes)
        seen = int(document.observed[query])
        assert seen == min(config.observe, position + 1)
        for csa in document.hidden:
            hidden = document.hidden[csa][query]
            wanted = layers[csa].hidden_SE[position + 1 - seen : position + 1]
            torch.testing.assert_close(hidden[config.observe - seen :], wanted, rtol=0, atol=1e-4)
            assert not hidden[: config.observe - seen].any()
    for csa, rows in document.rows.items():
        keys = hadamard(layers[csa].keys_TI)
        torch.testing.assert_close(decode_index_rows(rows), keys, rtol=1 / 8, atol=2e-3)  # e4m3 rounds to 1/16


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model()


PROMPTS = [
    Prompt(rid="forced", tokens=ids(102, 1), response=ids(29, 2), meta={"task": "a"}),
    Prompt(rid="greedy", tokens=ids(75, 3)),
    Prompt(rid="tail", tokens=ids(90, 4), response=ids(5, 5), tail=20),
    Prompt(rid="tiny", tokens=ids(1, 6), response=ids(12, 7)),
]


@pytest.mark.parametrize("batch", [1, 3])
def test_labels_are_what_the_stock_model_shows(tmp_path: Path, stock: Any, batch: int) -> None:
    config = dataclasses.replace(CONFIG, batch=batch)
    summary, events = run(tmp_path, PROMPTS, config)
    assert sorted(events) == sorted((prompt.rid, "written") for prompt in PROMPTS)
    reader = ShardReader(tmp_path)
    reader.check()
    assert summary.written == len(reader) == 4
    assert summary.queries == sum(entry.queries for entry in reader.entries)
    assert summary.decoded == 29 + 20 + 25 + 12
    answer = stock.generate(torch.tensor([PROMPTS[1].tokens]), max_new_tokens=20, do_sample=False)[0].tolist()
    texts = {
        prompt.rid: [*prompt.tokens, *prompt.response] if prompt.response is not None else answer for prompt in PROMPTS
    }
    for document in reader:
        assert_shows(document, watch(stock, texts[document.rid]), config)
    assert [reader[rid].prompt_tokens for rid in ("forced", "greedy", "tail", "tiny")] == [102, 75, 70, 1]
    assert reader["forced"].meta == {"task": "a"}
    assert int(reader["forced"].vote.values.max()) >= 2


@pytest.mark.gpu
def test_labels_on_cuda_are_what_the_stock_model_shows(tmp_path: Path, stock: Any) -> None:
    run(tmp_path, [PROMPTS[0], PROMPTS[2]], dataclasses.replace(CONFIG, batch=2), make_model().cuda())
    for prompt in (PROMPTS[0], PROMPTS[2]):
        assert prompt.response is not None
        assert_shows(ShardReader(tmp_path)[prompt.rid], watch(stock, [*prompt.tokens, *prompt.response]))


def test_queries_stand_at_the_end_of_the_prompt_and_at_boundaries(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS[:1])
    positions = ShardReader(tmp_path)[0].positions.tolist()
    assert len(positions) == 7 and set(range(101, 130, 8)) <= set(positions) <= set(range(101, 130))


def test_query_sampling() -> None:
    def positions(steps: int, tau: int, count: int, rid: str = "a") -> list[int]:
        queries = sample_queries([(11, 11 + steps)], tau, count, 0, rid)
        assert all(query[1:] == (11, 11 + steps) for query in queries)
        return [query.position for query in queries]

    assert positions(0, 8, 5) == []
    assert positions(3, 8, 5) == [10, 11, 12]
    assert positions(30, 8, 4) == [10, 18, 26, 34]
    few = positions(300, 8, 4)
    assert few[0] == 10 and len(few) == 4 and all((p - 10) % 8 == 0 for p in few)
    many = positions(300, 64, 50)
    assert len(many) == 50 and many == sorted(set(many)) and many[-1] < 310
    assert many == positions(300, 64, 50) != positions(300, 64, 50, "b")


def test_queries_of_several_turns() -> None:
    turns = [(11, 14), (20, 41), (60, 61)]
    assert sample_queries(turns, 8, 3, 0, "a") == [(10, 11, 14), (19, 20, 41), (59, 60, 61)]
    assert [query.position for query in sample_queries(turns, 8, 5, 0, "a")] == [10, 19, 27, 35, 59]
    every = sample_queries(turns, 8, 99, 0, "a")
    assert [query.position for query in every] == [10, 11, 12, *range(19, 40), 59]
    assert windows(every[-2:], 10, 8) == [slice(29, 30), slice(49, 50)]
    assert windows([Query(19, 20, 41)], 10, 8) == [slice(9, 17)]


def test_labels_do_not_look_past_a_turn(tmp_path: Path) -> None:
    evidence = (Evidence((3, 9), (102, 104)), Evidence((40, 41), (120, 122)))
    prompt = Prompt(
        rid="t", tokens=ids(100, 1), response=ids(40, 2), turns=((102, 106), (120, 140)), evidence=evidence
    )  # fmt: skip
    run(tmp_path, [prompt], dataclasses.replace(CONFIG, tau=64, queries=3))
    document = ShardReader(tmp_path)[0]
    assert document.positions.tolist()[:2] == [101, 119] and document.evidence is not None
    assert document.turns.tolist()[:2] == [[102, 106], [120, 140]]
    assert [document.evidence.row(query)[0].tolist() for query in range(2)] == [[0, 1, 2], [10]]
    steps = [float(document.lightning[0].row(query)[1].sum()) for query in range(2)]
    assert all(0.8 * tokens < step <= tokens + 1e-3 for step, tokens in zip(steps, (4, 20), strict=True))
    bad = dataclasses.replace(prompt, rid="b", turns=((90, 95),))
    with pytest.raises(ValueError, match="turn"):
        run(tmp_path / "b", [bad])


def test_evidence_is_kept_where_the_window_needs_it(tmp_path: Path) -> None:
    evidence = (Evidence((3, 9)), Evidence((40, 41), (120, 122)))
    prompt = Prompt(rid="e", tokens=ids(100, 1), response=ids(40, 2), evidence=evidence)
    run(tmp_path, [prompt], dataclasses.replace(CONFIG, queries=40))
    document = ShardReader(tmp_path)[0]
    assert document.evidence is not None and len(document) == 40
    for query, position in enumerate(document.positions.tolist()):
        needed = [0, 1, 2] + ([10] if position + 1 <= 121 and position + 8 >= 120 else [])
        assert document.evidence.row(query)[0].tolist() == needed
    assert len({len(document.evidence.row(query)[0]) for query in range(40)}) == 2


def test_a_stop_token_ends_the_answer_and_nothing_is_written_for_an_empty_one(tmp_path: Path, stock: Any) -> None:
    prompt = PROMPTS[1]
    answer = stock.generate(torch.tensor([prompt.tokens]), max_new_tokens=20, do_sample=False)[0, 75:].tolist()
    model = make_model()
    stop = next(token for token in answer if token != answer[0])
    model.generation_config.eos_token_id = stop
    run(tmp_path / "one", [prompt], model=model)
    assert ShardReader(tmp_path / "one")[0].tokens == 75 + answer.index(stop)
    model.generation_config.eos_token_id = answer[0]
    summary, events = run(tmp_path / "two", [prompt, PROMPTS[0]], model=model)
    assert summary.empty == 1 and events == [("greedy", "empty"), ("forced", "written")]


class StopError(Exception):
    pass


def test_an_interrupted_capture_goes_on(tmp_path: Path) -> None:
    model, forwards = make_model(), 0

    def stop(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3 + 1 + 2 + 5:  # 'greedy' has been read and answered in part
            raise StopError

    model.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        run(tmp_path / "two", PROMPTS, model=model)
    assert ShardReader(tmp_path / "two").rids == ("forced",)
    path = tmp_path / "two" / file_name("forced")
    before = path.stat().st_mtime_ns
    summary, events = run(tmp_path / "two", PROMPTS)
    assert events[0] == ("forced", "there") and summary.there == 1 and summary.written == 3
    assert path.stat().st_mtime_ns == before
    run(tmp_path / "one", PROMPTS)
    for prompt in PROMPTS:
        name = file_name(prompt.rid)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_damaged_documents_are_captured_again(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS[:2])
    path = tmp_path / file_name("greedy")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    summary, events = run(tmp_path, PROMPTS[:2])
    assert events == [("forced", "there"), ("greedy", "damaged"), ("greedy", "written")]
    assert summary.written == 1 and path.read_bytes() == good


def test_other_prompts_settings_and_models_are_refused(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS[:1])
    with pytest.raises(ValueError, match="'forced' made from another prompt"):
        run(tmp_path, [dataclasses.replace(PROMPTS[0], tail=3)])
    with pytest.raises(ValueError, match="another tau: 8, not 9"):
        run(tmp_path, PROMPTS[:1], dataclasses.replace(CONFIG, tau=9))
    with pytest.raises(ValueError, match="another settings"):
        run(tmp_path, PROMPTS[:1], dataclasses.replace(CONFIG, seed=9))
    with pytest.raises(ValueError, match="another model"):
        run(tmp_path, PROMPTS[:1], model=random_model(LAYERS, seed=4))
    with pytest.raises(ValueError, match="leaves nothing of the prompt"):
        run(tmp_path / "two", PROMPTS[3:], dataclasses.replace(CONFIG, tail=1))
    with pytest.raises(ValueError, match="positions"):
        run(tmp_path / "three", PROMPTS[:1], model=random_model(LAYERS, max_position_embeddings=120))


def test_the_native_indexer_lies_beside_the_shards(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS[3:])
    native = flashmem.MemoryIndexer.from_pretrained(tmp_path / NATIVE)
    document = ShardReader(tmp_path)[0]
    assert native.target_layers == (0, 2)
    position = document.positions[-1:]
    logits = native.chunk_logits({csa: h[-1, -1:] for csa, h in document.hidden.items()}, document.rows, position)
    assert logits.shape == (document.total_chunks,)


def test_bfloat16_models_give_bfloat16_hidden_states(tmp_path: Path) -> None:
    run(tmp_path, PROMPTS[3:], model=make_model().bfloat16())
    reader = ShardReader(tmp_path)
    reader.check()
    assert reader.meta.dtype == "bfloat16" and reader[0].hidden[0].dtype is torch.bfloat16
