"""`ruler`: the thirteen tasks of RULER, made by lm_eval's generators for any tokenizer and length.

Needs `pip install flashmem[eval]`. Where RULER scatters needles in essays, which are not ours to ship, text of our own
stands in unless a file is given; SQuAD and HotpotQA come from their official files in a folder.

A row is one document with one question at its end. `length` counts the tokens of prompt and answer, as in RULER; a
task that cannot fill a length (words and documents run out) is refused below nine tenths of it.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ... import prose
from ..items import Document, Item, ItemSet

SUITE = "ruler"
LEAST_FILLED, STEP_TOKENS = 0.9, 1500
"""A row may fall short of its length by a tenth, or by about the 500 words that essays grow by."""
EXAMPLE_TOKENS = 500
"""What variable tracking's worked example must fit."""

Row = dict[str, Any]
Generator = Callable[["Made"], list[Row]]


@dataclass(frozen=True, slots=True)
class Made:
    """What a generator is given."""

    tokenizer: Any
    length: int
    count: int
    essays: Sequence[str]
    """Words."""
    data: Path | None
    """Folder of SQuAD's and HotpotQA's files."""


@dataclass(frozen=True, slots=True)
class RulerTask:
    """A task: its generator, where its question begins, tokens of its answer, and what joins prompt and prefix."""

    rows: Generator
    question: str
    max_new_tokens: int
    delimiter: str = " "
    scorer: str = "all"


def generate(
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    n: int = 100,
    seed: int = 0,
    names: Sequence[str] | None = None,
    essays: Sequence[str] | None = None,
    data: str | Path | None = None,
    made: Mapping[str, Any] | None = None,
) -> ItemSet:
    """`n` items per task and length. Raises ValueError for unknown tasks, missing files and lengths not reached."""
    names = tuple(TASKS) if names is None else names
    if unknown := sorted(set(names) - TASKS.keys()):
        raise ValueError(f"unknown tasks {', '.join(unknown)}; known are {', '.join(TASKS)}")
    words = list(essays) if essays is not None else _own_words(max(lengths))
    folder = None if data is None else Path(data)
    documents: list[Document] = []
    items: list[Item] = []
    for length in lengths:
        for name in names:
            with _seeded(f"{SUITE}/{seed}/{name}/{length}"):
                rows = TASKS[name].rows(Made(tokenizer, length, n, words, folder))
            for index, row in enumerate(rows):
                document, item = _item(name, row, length, index)
                documents.append(document)
                items.append(item)
    arguments = {"lengths": list(lengths), "n": n, "seed": seed, "tasks": list(names)}
    return ItemSet(suite=SUITE, documents=tuple(documents), items=tuple(items), made=arguments | dict(made or {}))


def _item(name: str, row: Row, length: int, index: int) -> tuple[Document, Item]:
    task = TASKS[name]
    if length - row["length"] > max((1 - LEAST_FILLED) * length, STEP_TOKENS):
        raise ValueError(f"{name} at {length:,} tokens: its material ends at {row['length']:,}; ask for less")
    at = row["input"].rindex(task.question)
    document = Document(id=f"{length}/{name}-{index}", content=row["input"][:at])
    question = row["input"][at:] + task.delimiter + row["gen_prefix"]
    item = Item(
        id=document.id, task=name, length=length, document=document.id, question=question,
        answers=tuple(map(str, row["outputs"])), scorer=task.scorer, max_new_tokens=task.max_new_tokens,
        evidence=_evidence(document, row["outputs"]) if name.startswith("niah") else (),
    )  # fmt: skip
    return document, item


def _evidence(document: Document, values: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Characters of the needles: the sentence around each value."""
    assert isinstance(document.content, str)
    spans = []
    for value in values:
        at = document.content.index(value)
        spans.append((document.content.rindex("One of the", 0, at), at + len(value)))
    return tuple(spans)


def _niah(haystack: str, key: str, value: str, **counts: int) -> RulerTask:
    def rows(made: Made) -> list[Row]:
        prepare, utils = _lm_eval("prepare_niah"), _lm_eval("niah_utils")
        text = list(made.essays) if haystack == "essay" else prepare.get_haystack(haystack)
        with _replaced(prepare, cached_sent_tokenize=_sentences):
            return list(
                prepare.generate_samples(
                    text,
                    made.tokenizer,
                    max_seq_length=made.length,
                    type_haystack=haystack,
                    type_needle_k=key,
                    type_needle_v=value,
                    template=utils.TEMPLATE,
                    num_samples=made.count,
                    **counts,
                )
            )

    return RulerTask(rows, "\nWhat ", 128)


def _vt(made: Made) -> list[Row]:
    module = _lm_eval("vt_utils")
    chains = module.sys_vartrack_w_noise_random
    with _silent():
        _check_fits("vt", made, module.generate_input_output(5, 1, 4, is_icl=True)[0], 30, EXAMPLE_TOKENS)
        _check_fits("vt", made, module.generate_input_output(10, 1, 4)[0], 30 + EXAMPLE_TOKENS, made.length)
        (example,) = chains(tokenizer=made.tokenizer, num_samples=1, max_seq_length=EXAMPLE_TOKENS, incremental=5)
        rows = chains(
            tokenizer=made.tokenizer, num_samples=made.count, max_seq_length=made.length, icl_example=example
        )  # fmt: skip
    return list(rows)


def _cwe(made: Made) -> list[Row]:
    common = _lm_eval("cwe_utils")
    common.RNG.seed(random.getrandbits(64))  # its own generator: else samples depend on what ran before
    _check_fits("cwe", made, common.generate_input_output(10, made.length)[1], 120, made.length)
    return list(
        common.sys_word_pair_random(num_samples=made.count, max_seq_length=made.length, tokenizer=made.tokenizer)
    )  # fmt: skip


def _fwe(made: Made) -> list[Row]:
    return list(
        _lm_eval("fwe_utils").sys_kwext(
            tokenizer=made.tokenizer, max_seq_length=made.length, num_samples=made.count
        )
    )  # fmt: skip


def _qa(name: str, file: str, where: str) -> Generator:
    def rows(made: Made) -> list[Row]:
        folder = made.data or Path("DIR")
        path = folder / file
        if made.data is None or not path.is_file():
            raise ValueError(f"{path} is missing: get {file} ({where}), and name its folder with --data")
        questions = _lm_eval("qa_utils")
        read = questions.read_squad if name == "squad" else questions.read_hotpotqa
        with _replaced(questions, download_json=lambda _: json.loads(path.read_text(encoding="utf-8"))):
            qas, docs = read.__wrapped__()  # the cache would keep another folder's
        order = random.sample(range(len(qas)), len(qas))
        return list(
            questions.generate_samples(
                tokenizer=made.tokenizer,
                docs=docs,
                qas=[qas[index] for index in order],
                num_samples=min(made.count, len(qas)),
                max_seq_length=made.length,
            )
        )

    return rows


_QA_QUESTION = "\n\nAnswer the question based on the given documents."
TASKS: dict[str, RulerTask] = {
    "niah_single_1": _niah("repeat", "words", "numbers"),
    "niah_single_2": _niah("essay", "words", "numbers"),
    "niah_single_3": _niah("essay", "words", "uuids"),
    "niah_multikey_1": _niah("essay", "words", "numbers", num_needle_k=4),
    "niah_multikey_2": _niah("needle", "words", "numbers"),
    "niah_multikey_3": _niah("needle", "uuids", "uuids"),
    "niah_multivalue": _niah("essay", "words", "numbers", num_needle_v=4),
    "niah_multiquery": _niah("essay", "words", "numbers", num_needle_q=4),
    "vt": RulerTask(_vt, "\nQuestion: Find all", 30),
    "cwe": RulerTask(_cwe, "\nQuestion: What are the 10", 120, delimiter="\n\n"),
    "fwe": RulerTask(_fwe, "\nQuestion: Do not provide", 50),
    "qa_1": RulerTask(
        _qa("squad", "dev-v2.0.json", "SQuAD 2.0's development set"), _QA_QUESTION, 32, scorer="part"
    ),
    "qa_2": RulerTask(
        _qa("hotpot", "hotpot_dev_distractor_v1.json", "HotpotQA's development set with distractors"), _QA_QUESTION, 32,
        scorer="part",
    ),
}  # fmt: skip
OFFLINE = tuple(name for name in TASKS if not name.startswith("qa"))
"""Tasks that need no file."""


def _lm_eval(module: str) -> Any:
    """A module of lm_eval's RULER; an optional dependency, hence imported here."""
    try:
        nltk = import_module("nltk")
        with _replaced(nltk, download=lambda *_, **__: False):  # importing would fetch a sentence splitter; ours does
            return import_module(f"lm_eval.tasks.ruler.{module}")
    except ImportError as error:
        raise ValueError(f"the ruler suite needs lm_eval: pip install 'flashmem[eval]' ({error})") from error


def _check_fits(name: str, made: Made, smallest: str, spare_tokens: int, length: int) -> None:
    """Raise ValueError where not even the smallest row fits: the generators would look for a smaller one for ever."""
    tokens = len(made.tokenizer(smallest)["input_ids"]) + spare_tokens
    if tokens > 0.95 * length:  # rows differ by some tokens
        raise ValueError(f"{name}: its smallest row is {tokens:,} tokens with this tokenizer, of {length:,} at most")


def _own_words(length: int) -> list[str]:
    """More words than a haystack of this many tokens takes."""
    words: list[str] = []
    for sentence in prose.sentences(SUITE):
        words += sentence.split()
        if len(words) > length + 1000:
            break
    return words


def _sentences(text: str) -> list[str]:
    """Sentences of English, without a model that would have to be downloaded."""
    pieces = text.replace("! ", "!\0").replace("? ", "?\0").replace(". ", ".\0").split("\0")
    return [piece for piece in pieces if piece]


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """The global generators, which lm_eval draws from, seeded for a while."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


@contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module that reach for the network, replaced for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def _silent() -> Iterator[None]:
    """lm_eval prints every step of its search to stdout, which is for answers."""
    with redirect_stdout(io.StringIO()):
        yield


__all__ = ["OFFLINE", "SUITE", "TASKS", "generate"]
