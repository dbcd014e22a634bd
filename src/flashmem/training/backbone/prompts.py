"""Documents with questions, as prompts for `flashmem capture`: what the small backbone's Memory Indexer learns from.

    python -m flashmem.training.backbone.prompts --corpus corpus/ --split train --lengths 4096 --documents 64 \\
        --out prompts.jsonl

Every document is a passage of a novel with facts scattered in it, followed by questions with their answers. Most
questions look ahead: they ask for several things at once, or for something longer than a window of 64 tokens, so that
what an answer will need is known before its first token while the backbone's own indexer sees one token at a time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .batches import Source
from .tasks import FAMILIES, FIRST, REST, Answer, Draw, Question, Row, compose, hop, kv, number, several, song, talk, vt

SONG_PIECE = 16
"""Tokens of a song that count as one piece of evidence: a window needs the part that it recites, not the whole."""
FACTS_SHARE = (0.08, 0.25)
"""Share of a document's tokens that are facts, beside those asked for."""
Span = tuple[int, int]


def lookahead_questions(draw: Draw) -> list[Question]:
    """Twelve questions in random order.

    Lists of 16 and of 2 to 8 keys, of 4 and of 2 to 8 of RULER's keys, four values, two chains, two hops, a song, a
    conversation, and one fact alone.
    """
    some = draw.random.randint
    for _ in range(20):
        kv(draw)
    for _ in range(12):
        number(draw, 1)
    single = draw.random.choice(draw.questions)
    draw.questions.clear()
    several(draw, 16, "kv")
    several(draw, some(2, 8), "kv")
    several(draw, 4, "number")
    several(draw, some(2, 8), "number")
    number(draw, 4)
    vt(draw, 4, style="ruler")
    vt(draw, some(1, 4))
    hop(draw)
    hop(draw)
    song(draw, some(40, 80))
    talk(draw)
    asked = [*draw.questions, single]
    return draw.random.sample(asked, len(asked))


def make_document(source: Source, length: int, seed: str) -> Row:
    """A document of exactly `length` tokens with its questions at the end; the same for the same seed."""
    draw = Draw(random.Random(f"prompts/{seed}/{length}"), source.lexicon, source.split)
    asked = lookahead_questions(draw)
    room = length - 1 - sum(map(len, draw.statements)) - sum(question.size for question in asked)
    wanted = draw.random.uniform(*FACTS_SHARE) * room
    added = 0
    while added < wanted:
        before = len(draw.statements)
        FAMILIES[draw.random.choice(tuple(FAMILIES))](draw)
        added += sum(map(len, draw.statements[before:]))
    return compose(draw, source.corpus, length, asked)


def evidence_parts(ids: np.ndarray, answer: Answer) -> list[tuple[Span, Span]]:
    """(evidence, part of the answer that needs it), both in tokens of the document.

    A value belongs to the statement that holds most of it, and needs that from the token after the value before it on.
    What no value points to (older statements of a chain) is needed by the whole answer.
    """
    first = [offset for offset, weight in enumerate(answer.weights) if weight == FIRST]
    parts: list[tuple[Span, Span]] = []
    pointed: set[Span] = set()
    begin = answer.start
    for offset, following in zip(first, [*first[1:], len(answer.weights)], strict=True):
        run = 1
        while offset + run < following and answer.weights[offset + run] == REST:
            run += 1
        value = ids[answer.start + offset : answer.start + offset + run].tolist()
        held = [_longest_prefix(value, ids[lo:hi].tolist()) for lo, hi in answer.evidence]
        best = max(range(len(held)), key=lambda i: (held[i][0], -i))
        size, at = held[best]
        lo, hi = answer.evidence[best]
        pointed.add((lo, hi))
        end = answer.start + offset + size
        if size > 2 * SONG_PIECE:
            for piece in range(0, size, SONG_PIECE):
                stop = min(piece + SONG_PIECE, size)
                part = (answer.start + offset + piece, answer.start + offset + stop)
                parts.append(((lo if not piece else lo + at + piece, lo + at + stop), part))
        else:
            parts.append(((lo, hi), (begin, end)))
        begin = end
    whole = (answer.start, answer.stop)
    return parts + [(span, whole) for span in answer.evidence if span not in pointed]


def _longest_prefix(value: Sequence[int], text: Sequence[int]) -> tuple[int, int]:
    """Length and place of the longest beginning of `value` in `text`."""
    best = (0, 0)
    for at in range(len(text)):
        size = 0
        while size < len(value) and at + size < len(text) and text[at + size] == value[size]:
            size += 1
        best = max(best, (size, -at))
    return best[0], -best[1]


def record(row: Row, rid: str, **meta: Any) -> dict[str, Any]:
    """One line of a prompt file: everything before the first answer is read, the rest is decoded."""
    ids, first = row.ids.tolist(), row.answers[0].start
    evidence = [part for answer in row.answers for part in evidence_parts(row.ids, answer)]
    return {
        "id": rid,
        "tokens": ids[:first],
        "response_tokens": ids[first:],
        "turns": [[answer.start, answer.stop] for answer in row.answers],
        "evidence": [{"span": list(span), "answer": list(part)} for span, part in evidence],
        "meta": {"families": [answer.family for answer in row.answers], **meta},
    }


def records(source: Source, lengths: Sequence[int], documents: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """So many documents of each length."""
    for length, count in zip(lengths, documents, strict=True):
        for index in range(count):
            row = make_document(source, length, f"{seed}/{index}")
            yield record(row, f"{source.split}-{seed}-{length}-{index}", split=source.split, length=length)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by flashmem.training.backbone.corpus")
    parser.add_argument("--split", choices=["train", "test"], required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens per document")
    parser.add_argument("--documents", type=int, nargs="+", required=True, help="how many of each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if len(args.lengths) != len(args.documents):
        parser.error(f"{len(args.lengths)} lengths need as many counts, got {len(args.documents)}")
    source = Source.load(args.corpus, args.split)
    with args.out.open("w") as file:
        for line in records(source, args.lengths, args.documents, args.seed):
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
