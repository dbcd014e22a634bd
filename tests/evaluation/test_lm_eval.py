"""The model `flashmem` in lm_eval, and RULER's generators for our own runner; both need lm_eval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from flashmem import Engine, LSAConfig
from flashmem.evaluation import parse_policies
from flashmem.evaluation.items import ItemSet
from flashmem.evaluation.lm_eval import FlashmemLM
from flashmem.evaluation.runner import RunConfig, run_items
from flashmem.evaluation.samples import read_samples
from flashmem.evaluation.suites import ruler

LENGTH = 1536
TASKS = ("niah_single_1", "niah_multikey_1", "vt")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine.demo(config=LSAConfig(policy="native", keep=0.5, page_chunks=8))
    yield made
    made.close()


@pytest.fixture(scope="module")
def items(engine: Engine) -> ItemSet:
    return ruler.generate(engine.tokenizer, [LENGTH], n=1, names=TASKS)


def prompt_of(items: ItemSet, index: int) -> str:
    item = items.items[index]
    (document,) = (document for document in items.documents if document.id == item.document)
    assert isinstance(document.content, str) and isinstance(item.question, str)
    return document.content + item.question


def test_generators_fill_the_length_and_hide_the_answers(engine: Engine, items: ItemSet) -> None:
    for index, item in enumerate(items.items):
        prompt = prompt_of(items, index)
        tokens = len(engine.tokenizer(prompt)["input_ids"])
        least = 300 if item.task == "niah_multikey_1" else 0.85 * LENGTH  # essays grow by 500 words
        assert least < tokens + item.max_new_tokens <= LENGTH + 64, item.id
        assert all(answer in prompt for answer in item.answers)
        assert isinstance(item.question, str) and not any(answer in item.question for answer in item.answers[:1])
    assert [len(item.answers) for item in items.items] == [1, 1, 5]
    (first, last) = items.items[0].evidence[0]
    assert items.items[0].answers[0] in str(items.documents[0].content)[first:last]


def test_the_same_seed_gives_the_same_items_in_any_order(engine: Engine, items: ItemSet) -> None:
    again = ruler.generate(engine.tokenizer, [LENGTH], n=1, names=TASKS[::-1])
    assert {item.id: item for item in again.items} == {item.id: item for item in items.items}
    other = ruler.generate(engine.tokenizer, [LENGTH], n=1, names=TASKS[:1], seed=1)
    assert other.documents[0] != items.documents[0]


def test_questions_from_files_name_the_file(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dev-v2\.0\.json is missing: get dev-v2\.0\.json \(SQuAD"):
        ruler.generate(engine.tokenizer, [1024], n=1, names=["qa_1"], data=tmp_path)
    with pytest.raises(ValueError, match="vt: its smallest row is"):
        ruler.generate(engine.tokenizer, [512], n=1, names=["vt"])
    with pytest.raises(ValueError, match="unknown tasks qa_3"):
        ruler.generate(engine.tokenizer, [1024], names=["qa_3"])


@pytest.mark.slow
def test_lm_evals_model_and_our_runner_answer_alike(engine: Engine, items: ItemSet, tmp_path: Path) -> None:
    frozen = ItemSet(suite="ruler", documents=items.documents, items=items.items, sha256="0" * 64)
    rows = read_samples(run_items(engine, frozen, parse_policies(["full", "lsa"]), tmp_path, RunConfig()))
    lm = FlashmemLM(engine=engine)
    arguments = [{"max_gen_toks": item.max_new_tokens, "until": [], "do_sample": False} for item in items.items]
    requests = [SimpleNamespace(args=(prompt_of(items, i), arguments[i])) for i in range(len(items.items))]
    assert lm.generate_until(requests) == [row["prediction"] for row in rows if row["policy"] == "lsa"]
    assert all(stats["resident_pages"] < stats["pages"] for stats in lm.stats)


def test_lm_eval_finds_the_model() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("flashmem") is FlashmemLM


def test_what_is_not_offered_is_refused(engine: Engine) -> None:
    lm = FlashmemLM(engine=engine)
    with pytest.raises(NotImplementedError, match="tasks that generate"):
        lm.loglikelihood([])
    sampled: Any = SimpleNamespace(args=("x", {"do_sample": True, "temperature": 1.0}))
    with pytest.raises(ValueError, match="greedily"):
        lm.generate_until([sampled])
    with pytest.raises(ValueError, match="unknown model_args: keeep"):
        FlashmemLM(keeep=0.1)


def test_until_ends_an_answer(engine: Engine) -> None:
    lm = FlashmemLM(engine=engine)
    prompt = "The sky is blue. VAR A123 = 45678.\nQuestion: Which variables hold 45678?\nAnswer:"
    (whole,) = lm.generate_until([SimpleNamespace(args=(prompt, {"max_gen_toks": 6}))])
    stop = whole[2:4]
    (cut,) = lm.generate_until([SimpleNamespace(args=(prompt, {"max_gen_toks": 6, "until": [stop]}))])
    assert stop and cut == whole.split(stop)[0]
