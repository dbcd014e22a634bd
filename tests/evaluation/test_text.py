"""Items of text: characters of evidence become tokens, chat templates go around document and question."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.evaluation import asking
from flashmem.evaluation.items import Document, Item

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A random model with a tokenizer that takes every pair of letters `ab` as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: index for index, name in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = Engine(
        random_model("CHC", seed=3, eos_token_id=None), PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        config=LSAConfig(page_chunks=4, keep=0.5),
    )  # fmt: skip
    yield made
    made.close()


def read(engine: Engine, content: str, tmp_path: object, *, chat: bool = False) -> asking.Reading:
    document = Document(id="d", content=content)
    with asking.read_document(
        engine, document, tmp_path, keep=False, chat=chat, tell=lambda *_: None  # type: ignore[arg-type]
    ) as reading:  # fmt: skip
        return reading


def test_evidence_in_characters_becomes_tokens(engine: Engine, tmp_path: object) -> None:
    content = "abab" * 10 + "Größe ab"
    reading = read(engine, content, tmp_path)
    assert reading.starts is not None and len(reading.starts) == 20 + 7 + 1 + 1  # two bytes each for ö and ß
    assert reading.tokens_of([(0, 2)]) == {0}
    assert reading.tokens_of([(1, 3)]) == {0, 1}
    at = content.index("Größe")
    assert reading.tokens_of([(at, at + 5)]) == set(range(20, 27))
    assert reading.tokens_of([(len(content) - 2, len(content))]) == {28}


def test_the_chat_template_goes_around_both(engine: Engine, tmp_path: object) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        read(engine, "ab", tmp_path, chat=True)
    engine.tokenizer.chat_template = TEMPLATE
    try:
        reading = read(engine, "xab" * 20, tmp_path, chat=True)
        item = Item(
            id="i", task="t", length=0, document="d", question=" Who?", answers=("x",), scorer="all", max_new_tokens=2,
            extra={"answer_prefix": "It is"},
        )  # fmt: skip
        snapshot = asking._asked(engine, reading, item)
    finally:
        engine.tokenizer.chat_template = None
    ids = snapshot.state["ids"].tolist()
    assert engine.tokenizer.decode(ids) == "<user>" + "xab" * 20 + " Who?</><assistant>It is"
    first = len("<user>") + 1  # letters before the first `ab`, each a token
    assert reading.tokens_of([(1, 3)]) == {first}


def test_ids_take_no_chat_template(engine: Engine, tmp_path: object) -> None:
    engine.tokenizer.chat_template = TEMPLATE
    try:
        with pytest.raises(ValueError, match="these documents are token ids"):
            asking._document_ids(engine, (1, 2, 3), asking.chat_frame(engine)[0])
    finally:
        engine.tokenizer.chat_template = None
