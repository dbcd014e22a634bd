"""JSON lines in, token ids and evidence out; bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flashmem.capture.prompts import Evidence, PromptFile, encode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Words and single characters, with a first special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz. ", "key", "is", "the", "seven"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>").save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in records))
    return path


def test_tokens_pass_through(tmp_path: Path) -> None:
    record = {
        "id": 7, "tokens": [1, 2, 3], "response_tokens": [4, 5], "tail": 1, "meta": {"task": "x"},
        "evidence": [[0, 2], {"span": [2, 3], "answer": [3, 5]}],
    }  # fmt: skip
    file = PromptFile(lines(tmp_path / "p.jsonl", record, "", {"id": "b", "tokens": [1]}))
    assert file.rids == ["7", "b"] and len(file) == 2
    prompt, other = file.read(None)
    assert (prompt.rid, prompt.tokens, prompt.response, prompt.tail) == ("7", (1, 2, 3), (4, 5), 1)
    assert prompt.evidence == (Evidence((0, 2)), Evidence((2, 3), (3, 5))) and prompt.meta == {"task": "x"}
    assert other.response is None and other.evidence is None and other.tail is None
    assert (
        prompt.source()
        != other.source()
        == next(iter(file.read(None))).source().replace(prompt.source(), other.source())
    )


def test_character_spans_count_through_prompt_and_response(tokenizer: Any) -> None:
    text = "the key is seven . the a"
    record = {"id": "t", "prompt": text, "response": "key is seven"}
    start = text.index("key")
    spans = [[start, start + 6], [start + 1, start + 2], {"span": [11, 16], "answer": [len(text) + 7, len(text) + 12]}]
    prompt = encode(record | {"evidence": spans}, tokenizer)
    assert prompt.tokens[0] == 0 and len(prompt.tokens) == 8  # <s> the key is seven . the a
    assert prompt.response is not None and len(prompt.response) == 3
    assert prompt.evidence == (Evidence((2, 4)), Evidence((2, 3)), Evidence((4, 5), (10, 11)))
    for span in ([3, 4], [5, 5], [90, 99]):
        with pytest.raises(ValueError, match="holds no token"):
            encode(record | {"evidence": [span]}, tokenizer)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        encode({"id": "t", "prompt": "x"}, None)


BAD = [
    ("{", "not JSON"),
    ([], "must be an object"),
    ({"id": "a"}, "one of prompt and tokens"),
    ({"id": "a", "prompt": "x", "tokens": [1]}, "one of prompt and tokens"),
    ({"tokens": [1]}, "needs an id"),
    ({"id": "", "tokens": [1]}, "id must have"),
    ({"id": "a", "tokens": [1], "respnse": 1}, "unknown entries respnse"),
    ({"id": "a", "tokens": [1], "response": "x"}, "both be text or both tokens"),
    ({"id": "a", "prompt": "x", "response": "x", "response_tokens": [1]}, "both response"),
    ({"id": "a", "tokens": ["x"]}, "tokens is malformed"),
    ({"id": "a", "prompt": 3}, "prompt is malformed"),
    ({"id": "a", "tokens": [1], "tail": True}, "tail is malformed"),
    ({"id": "a", "tokens": [1], "meta": 1}, "meta is malformed"),
    ({"id": "a", "tokens": [1], "evidence": [[1]]}, "evidence is malformed"),
    ({"id": "a", "tokens": [1], "evidence": [{"answer": [0, 1]}]}, "evidence is malformed"),
    ({"id": "good", "tokens": [1]}, "appears twice"),
]


@pytest.mark.parametrize(("record", "match"), BAD)
def test_bad_lines_are_named_before_anything_runs(tmp_path: Path, record: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: .*{match}"):
        PromptFile(lines(tmp_path / "p.jsonl", {"id": "good", "tokens": [1]}, record))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": []}, "prompt is empty"),
        ({"response_tokens": []}, "response is empty"),
        ({"tail": 3}, "tail must lie in 0..2"),
        ({"evidence": [[2, 4]]}, r"evidence \[2, 4\] is not within 3 tokens"),
        ({"evidence": [[1, 1]]}, "evidence"),
    ],
)
def test_impossible_prompts_are_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    file = PromptFile(lines(tmp_path / "p.jsonl", {"id": "a", "tokens": [1, 2, 3]} | changes))
    with pytest.raises(ValueError, match=rf"p\.jsonl:1: document 'a': .*{match}"):
        list(file.read(None))


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prompts"):
        PromptFile(lines(tmp_path / "p.jsonl", "", " "))
    (tmp_path / "b.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        PromptFile(tmp_path / "b.jsonl")
