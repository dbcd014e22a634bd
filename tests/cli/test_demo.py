"""The demo end to end on the shipped model at a small context, and its parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from typer.testing import Result

import flashmem
from cli.conftest import Run
from flashmem.accounting import shipped_model
from flashmem.cli.demo import document as document_module
from flashmem.cli.demo.compare import Comparison, Exactness, Reply, Setting, _ask, _is_right
from flashmem.cli.demo.document import LEAST_TOKENS, Asked, Document, make_document
from flashmem.cli.demo.picture import WIDTH, pages_of, terminal_lines, write_png
from flashmem.cli.demo.report import as_json, print_report
from flashmem.config import LSAConfig
from flashmem.training.backbone.tasks import Lexicon
from flashmem.training.backbone.tokenizer import load_tokenizer

KINDS = ["one number", "four values", "sixteen keys", "variables", "an update", "two hops", "a song"]


@pytest.fixture(scope="module")
def document() -> Document:
    return make_document(shipped_model(), 4096, seed=0)


@pytest.fixture(scope="module")
def decode() -> Callable[[Any], str]:
    return load_tokenizer(shipped_model()).decode


class TestDocument:
    def test_same_seed_same_document(self, document: Document) -> None:
        assert make_document(shipped_model(), 4096, seed=0) == document
        assert make_document(shipped_model(), 4096, seed=1).ids != document.ids

    def test_length_and_kinds(self, document: Document) -> None:
        assert len(document.ids) == 4096
        assert [asked.kind for asked in document.questions] == KINDS

    def test_questions_are_the_same_at_every_length(self, document: Document) -> None:
        longer = make_document(shipped_model(), 8192, seed=0)
        assert [asked.prompt for asked in longer.questions] == [asked.prompt for asked in document.questions]

    def test_evidence_is_where_it_is_said_to_be(self, document: Document, decode: Callable[[Any], str]) -> None:
        told = {
            asked.kind: [decode(document.ids[first:last]).strip() for first, last in asked.evidence]
            for asked in document.questions
        }
        answers = {asked.kind: decode(asked.answer).strip() for asked in document.questions}
        assert told["one number"][0].endswith(f"is: {answers['one number']}.")
        assert {re.findall(r"\d+", fact)[0] for fact in told["four values"]} == set(answers["four values"].split(", "))
        assert ", ".join(told["sixteen keys"]) == answers["sixteen keys"]
        assert len(told["variables"]) == 5 and told["variables"][-1].startswith(f"VAR {answers['variables'][-4:]}")
        assert told["an update"][0].endswith(f"is now {answers['an update']}.")
        assert f"{told['two hops'][0][-7:-1].split()[-1]}:" in answers["two hops"] and len(told["two hops"]) == 2
        assert told["a song"][0].endswith(f"goes: {answers['a song']}.")

    def test_two_answers_are_longer_than_a_window(self, document: Document) -> None:
        long = {asked.kind for asked in document.questions if len(asked.answer) > LSAConfig().tau}
        assert long == {"sixteen keys", "a song"}

    def test_everything_asked_for_is_of_the_test_split(self, document: Document, decode: Callable[[Any], str]) -> None:
        asked = {question.kind: question for question in document.questions}
        lexicon = Lexicon.load(shipped_model())
        lines = decode(asked["sixteen keys"].answer).split(",")
        for key, value in (line.split(":") for line in lines):
            first, second = (lexicon.text(f" {word}")[0] for word in key.split())
            assert Lexicon.is_test(0, first, second) and Lexicon.is_test(2, int(value))
        numbers = f"{decode(asked['one number'].answer)},{decode(asked['four values'].answer)}"
        assert all(Lexicon.is_test(2, int(number)) for number in numbers.split(","))

    def test_too_short_a_context_is_refused(self) -> None:
        with pytest.raises(ValueError, match=f"at least {LEAST_TOKENS} tokens, got 2047"):
            make_document(shipped_model(), 2047, seed=0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command at its smallest context, with two of the seven questions: what it printed as JSON."""
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    make = document_module.make_document

    def with_two_questions(*args: Any) -> Document:
        document = make(*args)
        return replace(document, questions=(document.questions[0], document.questions[4]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_module, "make_document", with_two_questions)
        result = run_demo("--context", "2K", "--picture", picture, "--json")
    return json.loads(result.stdout)


def run_demo(*args: object) -> Result:
    from typer.testing import CliRunner

    from flashmem.cli import app

    result = CliRunner().invoke(app, ["demo", *map(str, args)])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.slow
class TestCommand:
    def test_full_attention_answers_right(self, done: dict[str, Any]) -> None:
        assert done["right"]["full attention"] == len(done["questions"]) == 2
        for question in done["questions"]:
            assert question["answers"]["full attention"]["text"] == question["expected"]

    def test_settings_differ_in_pages_only(self, done: dict[str, Any]) -> None:
        assert (done["context_tokens"], done["page_chunks"], done["read_stats"]["tokens"]) == (2048, 4, 2048)
        for question in done["questions"]:
            full, lsa, recency = (question["answers"][name] for name in ("full attention", "LSA", "recency"))
            assert full["stats"]["resident_pages"] == full["stats"]["pages"]
            assert 0 < len(lsa["cycles"][0]) < full["stats"]["pages"] / 3
            most = max(map(len, lsa["cycles"]))
            assert all(len(pages) == most for pages in recency["cycles"])

    def test_all_pages_are_mirrored_when_read(self, done: dict[str, Any]) -> None:
        stats = done["read_stats"]
        assert stats["tiers"]["host"]["pages"] == stats["pages"] == 128

    def test_exactness(self, done: dict[str, Any]) -> None:
        exact = done["exactness"]
        assert exact["equal_to_transformers"] == exact["tokens"] > 0
        assert exact["equal_when_opened"] == exact["continued_tokens"] > 0

    def test_picture(self, done: dict[str, Any]) -> None:
        written = Path(done["picture"]).read_bytes()
        assert written.startswith(b"\x89PNG") and 10_000 < len(written) < 200_000


def test_a_reply_tells_the_pages_of_every_cycle(text_model: Path) -> None:
    config = LSAConfig(policy="native", keep=0.3, page_chunks=4, tau=4)
    engine = flashmem.Engine.from_pretrained(text_model, config=config, device="cpu")
    with engine.session() as session:
        session.append("All happy families are alike. " * 10)
        memory = session.snapshot()
    asked = Asked(kind="one number", prompt=[1, 2, 3], answer=[4] * 6, any_order=False, evidence=())
    reply = _ask(engine, memory, asked)["LSA"]
    assert reply.stats["tokens"] == 300 + 3 + 13  # six and eight to spare, of which the last one has not run
    assert len(reply.cycles) == 4  # at the question's end and after 4, 8 and 12 steps
    assert all(6 <= len(pages) <= 7 for pages in reply.cycles)  # 0.3 of 19 or 20, and the page that grows
    assert reply.cycles[-1] != reply.cycles[0]
    engine.close()


def test_where_the_order_is_free_values_may_come_in_any() -> None:
    tokenizer = load_tokenizer(shipped_model())
    answer = tokenizer.encode(" 111, 222").ids
    fixed = Asked(kind="four values", prompt=[], answer=answer, any_order=False, evidence=())
    free = replace(fixed, any_order=True)
    for text, as_fixed, as_free in (
        ("111, 222", True, True), ("222, 111", False, True), ("222, 222", False, False), ("111", False, False),
    ):  # fmt: skip
        assert (_is_right(text, fixed, tokenizer), _is_right(text, free, tokenizer)) == (as_fixed, as_free)


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--context", "1K"), "at least 2048 tokens, got 1024"),
            (("--context", "x"), "'x' is not a size"),
            (("--keep", "2"), "keep must lie in (0, 1], got 2"),
            (("--picture", "no/such/place.png"), "no directory no/such"),
        ],
    )
    def test_is_one_line_and_status_2(self, run: Run, args: tuple[str, ...], message: str) -> None:
        result = run("demo", *args)
        assert result.exit_code == 2
        assert result.stdout == "" and message in result.stderr


def comparison_of(num_pages: int, document: Document) -> Comparison:
    """A comparison as if it had been run: full attention right, LSA right and in two cycles, recency wrong."""

    def reply(right: bool, *cycles: list[int]) -> Reply:
        held = {"pages": 1, "bytes": 4096}
        stats = {
            "pages": num_pages, "resident_pages": len(cycles[0]), "pages_moved": 1, "resident_bytes_paper": 10,
            "full_bytes_paper": 100, "device_bytes_all_in": 20, "full_bytes_all_in": 110,
            "tiers": dict.fromkeys(("device", "host", "disk", "saved"), held),
        }  # fmt: skip
        return Reply(text="word " * 80 if right else "wrong", right=right, cycles=list(cycles), stats=stats)

    count = len(document.questions)
    return Comparison(
        config=LSAConfig(page_chunks=16, keep=0.1),
        page_tokens=64,
        settings=[
            Setting(name="full attention", replies=[reply(True, list(range(num_pages)))] * count),
            Setting(name="LSA", replies=[reply(True, [0, 5, num_pages - 1], [0, num_pages - 1])] * count),
            Setting(name="recency", replies=[reply(False, [0, num_pages - 2, num_pages - 1])] * count),
        ],
        expected=["word " * 80] * count,
        questions=[f"Question {number}?" for number in range(count)],
        read_stats={"tiers": {"host": {"pages": num_pages, "bytes": 4096}}},
        read_seconds=1.0,
        ask_seconds=1.0,
        exactness=Exactness(tokens=1, equal_to_transformers=1, continued_tokens=1, equal_when_opened=1),
    )


def small(spans: tuple[tuple[int, int], ...]) -> Document:
    asked = Asked(kind="one number", prompt=[1], answer=[1], any_order=False, evidence=spans)
    return Document(ids=[1] * 100, questions=(asked, asked))


class TestPictures:
    def test_pages_of_spans(self) -> None:
        assert pages_of([(0, 64), (63, 65), (300, 301)], 64) == [0, 1, 4]

    def test_every_page_has_a_column_where_there_is_room(self) -> None:
        document = small(((5 * 64, 5 * 64 + 3), (7 * 64, 7 * 64 + 3)))
        lsa = comparison_of(10, document).settings[1]
        lines = [line.plain for line in terminal_lines(document, lsa, 64)]
        assert lines == [
            "1. cycle 1  █····◆·◇·█",
            "   cycle 2  █····◇·◇·█",
            "2. cycle 1  █····◆·◇·█",
            "   cycle 2  █····◇·◇·█",
        ]

    @pytest.mark.parametrize("num_pages", [7, 68, 69, 257, 4097])
    def test_width(self, num_pages: int, capsys: pytest.CaptureFixture[str]) -> None:
        document = small(((64, 65),))
        comparison = comparison_of(num_pages, document)
        for line in terminal_lines(document, comparison.settings[1], 64):
            assert len(line) == min(WIDTH, 12 + num_pages)
        print_report(document, comparison, indexer="native")
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= WIDTH
        assert "2 of 2" in printed and "0 of 2" in printed and "paper accounting" in printed and "all-in" in printed

    def test_right_is_green_and_wrong_is_red(self) -> None:
        document = small(((5 * 64, 5 * 64 + 3),))
        (line, *_) = terminal_lines(document, comparison_of(10, document).settings[1], 64)
        assert isinstance(line, Text)
        assert [span.style for span in line.spans if "green" in str(span.style)] == ["bold green"]

    def test_png_is_small_and_the_same_each_time(self, tmp_path: Path) -> None:
        document = small(((64, 65),))
        for name in ("a.png", "b.png"):
            write_png(tmp_path / name, document, comparison_of(257, document))
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert (tmp_path / "a.png").stat().st_size < 200_000

    def test_json_shape(self) -> None:
        document = small(((64, 65),))
        values = as_json(document, comparison_of(10, document), seed=3, indexer="native", picture=None)
        assert json.loads(json.dumps(values)) == values
        assert values["right"] == {"full attention": 2, "LSA": 2, "recency": 0}
        assert values["questions"][0]["evidence_pages"] == [1]
        assert values["questions"][0]["answers"].keys() == values["right"].keys()
        assert values.keys() == {
            "context_tokens", "seed", "indexer", "keep", "page_chunks", "tau", "read_seconds", "ask_seconds",
            "read_stats", "questions", "right", "exactness", "picture",
        }  # fmt: skip
