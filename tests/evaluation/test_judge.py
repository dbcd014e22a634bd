"""Verdicts of a judge behind an HTTP endpoint of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flashmem.evaluation import judge, metrics
from flashmem.evaluation.judge import JudgeError, chat_endpoint, judge_run


class Judge(BaseHTTPRequestHandler):
    """Says yes where the given answer names Bremen."""

    seen: ClassVar[list[tuple[str | None, dict[str, Any]]]] = []
    reply: ClassVar[str | None] = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        given = body["messages"][0]["content"].split("Given answer:")[1]
        said = self.reply or ("Yes." if "Bremen" in given else "no, it does not")
        data = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def base_url() -> Iterator[str]:
    Judge.seen, Judge.reply = [], None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    extra = {"question": "Where do I live?", "question_type": "knowledge-update", "abstain": False}
    held = {"paper": 1, "full_paper": 10, "all_in": 2, "full_all_in": 10}
    rows = [
        {
            "id": f"m{index}", "task": "knowledge-update", "length": 0, "document": "d", "policy": policy, "seed": 0,
            "prediction": said, "answers": ["In Bremen"], "score": 0.0, "correct": False, "extra": extra, "bytes": held,
            "cycles": [], "evidence_recall": None, "mass_recall": None, "moved_bytes": 0, "widened": 0, "early": 0,
        }
        for policy, said in (("full", "Bremen, of course"), ("lsa", "Kiel"))
        for index in range(2)
    ]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"suite": "longmemeval-s", "policies": [{"label": "full"}, {"label": "lsa"}], "samples": 4}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "environments.json").write_text("[]")
    return tmp_path


def test_verdicts_stand_in_for_scores_and_are_asked_once(out: Path, base_url: str) -> None:
    ask = chat_endpoint(base_url, "my-judge", "secret")
    assert judge_run(out, ask, judge="my-judge") == {"asked": 4, "right": 2}
    key, body = Judge.seen[0]
    assert key == "Bearer secret" and (body["model"], body["temperature"]) == ("my-judge", 0)
    asked = body["messages"][0]["content"]
    assert "Question: Where do I live?\nCorrect answer: In Bremen\nGiven answer: Bremen, of course" in asked
    assert "what is true now" in asked

    made = metrics.compute(out)
    assert made["judge"] == "my-judge"
    assert {cell["policy"]: cell["score"] for cell in made["cells"]} == {"full": 1.0, "lsa": 0.0}
    assert judge_run(out, ask, judge="my-judge") == {"asked": 0, "right": 0}
    assert len(Judge.seen) == 4
    with pytest.raises(ValueError, match="two judges do not mix"):
        judge_run(out, ask, judge="another")


def test_kinds_of_questions_are_asked_in_their_own_way() -> None:
    def question(**extra: Any) -> str:
        return judge.question_for(
            {"extra": {"question": "Q", **extra}, "answers": ["A"], "prediction": "P"},
        )  # fmt: skip

    assert "cannot be answered" in question(question_type="multi-session", abstain=True)
    assert "taken into account: A" in question(question_type="single-session-preference")
    assert "off by one" in question(question_type="temporal-reasoning")
    assert "off by one" not in question(question_type="multi-session")


def test_a_judge_that_fails_is_an_error(out: Path, base_url: str) -> None:
    Judge.reply = "maybe"
    with pytest.raises(JudgeError, match="'maybe' instead of yes or no"):
        judge_run(out, chat_endpoint(base_url, "j"), judge="j")
    with pytest.raises(JudgeError, match="404"):
        judge_run(out, chat_endpoint(base_url + "/elsewhere", "j"), judge="j")
    with pytest.raises(ValueError, match="must begin with http"):
        chat_endpoint("localhost:8000", "j")
    with pytest.raises(ValueError, match="holds no samples"):
        judge_run(out / "nothing", chat_endpoint(base_url, "j"), judge="j")
