"""Ask a model whether answers are right, through any endpoint that speaks OpenAI's chat completions.

For LongMemEval, whose references are often sentences. Verdicts are kept beside the samples, one line each, and stand in
for the scores of the samples that they name. The questions to the judge are worded by us.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..types import FlashmemError
from .samples import is_answer, read_samples

VERDICTS = "judged.jsonl"
TIMEOUT_S = 120
_RIGHT = (
    "A question, the correct answer and somebody's answer follow. Is the given answer right? It is right if it says "
    "what the correct answer says, in whatever words, or leads to it in full; a part of it is not enough."
)
_HINTS = {
    "temporal-reasoning": " A number of days, weeks or months that is off by one counts as right.",
    "knowledge-update": " An answer that also mentions what was true before is right if it gives what is true now.",
}
_PREFERENCE = (
    "A question, what a good answer would take into account, and somebody's answer follow. Does the given answer use "
    "what is known about the person correctly? It need not mention every point."
)
_ABSTAIN = (
    "A question that cannot be answered, the reason why, and somebody's answer follow. Does the given answer recognise "
    "that the question cannot be answered from what is known?"
)


class JudgeError(FlashmemError):
    """The endpoint did not answer, or not with yes or no."""


Ask = Callable[[str], str]
"""From a question to the judge's reply."""


def chat_endpoint(base_url: str, model: str, api_key: str | None = None) -> Ask:
    """A judge behind `<base_url>/chat/completions`; raises ValueError for an address that is not http."""
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"the judge's address must begin with http:// or https://, got {base_url!r}")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def ask(question: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 10}
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError) as error:
            raise JudgeError(f"{base_url}: {error}") from error

    return ask


def question_for(sample: Mapping[str, Any]) -> str:
    """What the judge is asked about a sample."""
    extra = sample["extra"]
    kind = extra.get("question_type")
    if extra.get("abstain"):
        rule, name = _ABSTAIN, "Reason"
    elif kind == "single-session-preference":
        rule, name = _PREFERENCE, "To be taken into account"
    else:
        rule, name = _RIGHT + _HINTS.get(str(kind), ""), "Correct answer"
    return (
        f"{rule}\n\nQuestion: {extra['question']}\n{name}: {sample['answers'][0]}\n"
        f"Given answer: {sample['prediction']}\n\nReply with yes or no."
    )


def judge_run(
    out: str | Path, ask: Ask, *, judge: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Ask about every answer that has no verdict of this judge yet; returns how many were asked and held right.

    Raises ValueError for samples without their question, JudgeError where the judge does not say yes or no.
    """
    out = Path(out)
    path = out / VERDICTS
    found = read_samples(path, mend=True)
    if others := sorted({row["judge"] for row in found} - {judge}):
        raise ValueError(f"{path} holds verdicts of {', '.join(others)}: two judges do not mix")
    known = {(row["id"], row["policy"], row["seed"]) for row in found}
    samples = [sample for file in sorted(out.glob("samples*.jsonl")) for sample in read_samples(file)]
    if not samples:
        raise ValueError(f"{out} holds no samples: run `flashmem eval run` first")
    open_ones = [s for s in samples if is_answer(s) and (s["id"], s["policy"], s["seed"]) not in known]
    if lacking := [sample["id"] for sample in open_ones if "question" not in sample["extra"]]:
        raise ValueError(f"{lacking[0]} has no question to show to a judge: only LongMemEval's items have")
    right = 0
    with path.open("a", encoding="utf-8") as file:
        for index, sample in enumerate(open_ones):
            verdict = _verdict(ask(question_for(sample)))
            right += verdict
            row = {
                "id": sample["id"],
                "policy": sample["policy"],
                "seed": sample["seed"],
                "right": verdict,
                "judge": judge,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            if progress is not None:
                progress(index + 1, len(open_ones))
    return {"asked": len(open_ones), "right": right}


def apply_verdicts(out: str | Path, samples: list[dict[str, Any]]) -> str | None:
    """Replace scores by verdicts in place; returns the judge's name, None where there are none."""
    verdicts = {(row["id"], row["policy"], row["seed"]): row for row in read_samples(Path(out) / VERDICTS)}
    judge = None
    for sample in samples:
        if (row := verdicts.get((sample["id"], sample["policy"], sample["seed"]))) is not None:
            sample["score"], sample["correct"], judge = float(row["right"]), row["right"], row["judge"]
    return judge


def _verdict(reply: str) -> bool:
    words = reply.lower().replace(".", " ").replace(",", " ").split()
    if not words or words[0] not in ("yes", "no"):
        raise JudgeError(f"the judge said {reply!r} instead of yes or no")
    return words[0] == "yes"


__all__ = ["VERDICTS", "JudgeError", "apply_verdicts", "chat_endpoint", "judge_run", "question_for"]
