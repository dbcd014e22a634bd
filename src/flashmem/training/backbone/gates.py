"""Measure a trained backbone on test documents: the recall tasks by length, what each CSA layer does, and top-k.

    python -m flashmem.training.backbone.gates --model export/ --corpus corpus/ --out gates.json --lengths 16384 65536

One document per prompt, as RULER has it; answers are scored under teacher forcing at the exported weights: a question
is right when every token of its values is the model's best one (any of the values still missing, where their order is
free). `exact` counts questions, `values` counts values, RULER's `string_match_all`. Intervals are 95 %: Wilson's where
every document has one question, else a bootstrap over documents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .batches import Source
from .export import load_export
from .forward import Backbone
from .long import LongForward
from .tasks import FAMILIES, FIRST, REST, Answer, Draw, Row, compose, frequent_words_row, number, several, song, vt

RESAMPLES = 2000
PROSE_TOKENS = 400_000
"""Longer documents go round: their text repeats, their facts do not."""


def _single(draw: Draw) -> None:
    number(draw, 1, style="ruler")


def _multikey(draw: Draw) -> None:
    for _ in range(4):
        number(draw, 1, style="ruler")
    draw.questions[:] = draw.questions[:1]


def _multivalue(draw: Draw) -> None:
    number(draw, 4)
    for _ in range(3):
        number(draw, 1)
    draw.questions[:] = draw.questions[:1]


def _multiquery(draw: Draw) -> None:
    for _ in range(8):
        number(draw, 1)
    draw.questions.clear()
    draw.listable.sort(key=lambda item: item[0])
    several(draw, 4)


def _variables(draw: Draw) -> None:
    vt(draw, 4, style="ruler")


def _mixed(draw: Draw) -> None:
    """Ten facts of every family; every one asked."""
    for family in FAMILIES:
        for _ in range(10):
            FAMILIES[family](draw)


def _many(draw: Draw) -> None:
    """RULER's questions by the dozen in one document: 24 keys, 8 keys of four values, 8 chains, 8 times four keys."""
    for _ in range(24):
        number(draw, 1, style="ruler")
    for _ in range(8):
        several(draw, 4)
        number(draw, 4)
        vt(draw, 4, style="ruler")


def _ahead(draw: Draw) -> None:
    """Answers longer than a window: sixteen facts asked at once, and a song of eighty words."""
    for _ in range(24):
        FAMILIES["kv"](draw)
    draw.questions.clear()
    several(draw, 16)
    for _ in range(3):
        song(draw, 80)
    draw.questions[:] = draw.questions[:2]


DOCUMENTS: dict[str, Callable[[Draw], None]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "vt": _variables,
    "ahead": _ahead,
    "mixed": _mixed,
    "many": _many,
}
GATES = ("single", "multikey", "multivalue", "multiquery", "vt", "ahead", "mixed")


def document(kind: str, source: Source, length: int, seed: str) -> Row:
    """One test document of a kind with its questions at the end."""
    rng = random.Random(f"{seed}/{kind}/{length}")
    if kind == "fwe":
        return frequent_words_row(rng, source.lexicon, source.split, length)
    draw = Draw(rng, source.lexicon, source.split)
    DOCUMENTS[kind](draw)
    return compose(draw, source.corpus, length, rng.sample(draw.questions, len(draw.questions)))


def values_of(answer: Answer) -> list[list[int]]:
    """Token offsets of each value of an answer; where keys are answered too, a value runs on over the next key."""
    values: list[list[int]] = []
    for offset, weight in enumerate(answer.weights):
        if weight == FIRST:
            values.append([offset])
        elif weight == REST and values and values[-1][-1] == offset - 1:
            values[-1].append(offset)
    return values


def score(net: LongForward, row: Row, device: torch.device, **how: Any) -> list[dict[str, Any]]:
    """Every question of a document: family, exact, share of values right."""
    ids = torch.from_numpy(row.ids.astype(np.int64)).to(device)
    rows = [p for answer in row.answers for p in range(answer.start - 1, answer.stop - 1)]
    best = net.logits(ids, torch.tensor(rows, device=device), **how).argmax(-1).tolist()
    at, out = 0, []
    for answer in row.answers:
        wanted = row.ids[answer.start : answer.stop].tolist()
        right = [
            got == want or got in answer.also.get(offset, ())
            for offset, (got, want) in enumerate(zip(best[at : at + len(wanted)], wanted, strict=True))
        ]
        at += len(wanted)
        values = [all(right[offset] for offset in value) for value in values_of(answer)]
        counted = [ok for ok, weight in zip(right, answer.weights, strict=True) if weight >= REST]
        out.append({"family": answer.family, "exact": all(counted), "values": sum(values) / len(values)})
    return out


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    middle = (right + z * z / 2) / (count + z * z)
    half = z * math.sqrt(right * (count - right) / count + z * z / 4) / (count + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def _cell(documents: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means over questions and their intervals over documents."""
    made: dict[str, Any] = {"documents": len(documents), "questions": sum(map(len, documents))}
    counts = np.array([len(questions) for questions in documents])
    picks = np.random.default_rng(0).integers(0, len(documents), size=(RESAMPLES, len(documents)))
    for key in ("exact", "values"):
        sums = np.array([sum(float(question[key]) for question in questions) for questions in documents])
        if set(counts) == {1} and key == "exact":
            low, high = wilson(float(sums.sum()), len(sums))
        else:
            low, high = np.percentile(sums[picks].sum(1) / counts[picks].sum(1), [2.5, 97.5])
        made[key] = round(float(sums.sum() / counts.sum()), 4)
        made[f"{key}_interval"] = [round(float(low), 4), round(float(high), 4)]
    return made


def summary(documents: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """All questions of one cell, and by family where there are several."""
    whole = _cell(documents)
    families = sorted({question["family"] for questions in documents for question in questions})
    if len(families) > 1:
        whole["families"] = {}
        for family in families:
            kept = [[q for q in questions if q["family"] == family] for questions in documents]
            whole["families"][family] = _cell([questions for questions in kept if questions])
    return whole


def conditions_of(net: LongForward, kind: str, topks: Sequence[int], ablate: bool) -> dict[str, dict[str, Any]]:
    """How a document is read: all entries; top-k (mixed documents, and all kinds at the ablated length); CSA layers
    hidden one by one and all but one (mixed documents at the ablated length)."""
    made: dict[str, dict[str, Any]] = {"full": {}}
    if ablate or kind == "mixed":
        made |= {f"top{k}": {"topk": k} for k in topks}
    count = len(net.net.sizes.csa_layers)
    if ablate and kind == "mixed":
        made["none"] = {"visible": []}
        made |= {f"only{i}": {"visible": [i]} for i in range(count)}
        made |= {f"without{i}": {"visible": [j for j in range(count) if j != i]} for i in range(count)}
    return made


def measure(
    net: LongForward, source: Source, device: torch.device, out: Path, report: dict[str, Any], *, kinds: Sequence[str],
    lengths: Sequence[int], count: Sequence[int], topks: Sequence[int], ablate_at: int | None, seconds: float,
    seed: int,
) -> None:  # fmt: skip
    """Fill `report["cells"]`, shortest length first, writing the file after every cell; ends when time is over."""
    began = time.monotonic()
    for length, documents in zip(lengths, count, strict=True):
        for kind in kinds:
            conditions = conditions_of(net, kind, topks, length == ablate_at)
            scores: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in conditions}
            start = time.monotonic()
            number_of_documents = max(2, documents // 6) if kind == "mixed" else documents
            for index in range(number_of_documents):
                if time.monotonic() - began > seconds:
                    break
                row = document(kind, source, length, f"{seed}/{index}")
                for name, how in conditions.items():
                    scores[name].append(score(net, row, device, **how))
            for name, done in scores.items():
                if done:
                    cell = {"length": length, "kind": kind, "condition": name, **summary(done)}
                    report["cells"].append(cell | {"seconds": round(time.monotonic() - start, 1)})
                    print(json.dumps({k: v for k, v in cell.items() if k != "families"}), flush=True)
                    if "families" in cell:
                        print({f: c["exact"] for f, c in cell["families"].items()}, flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    report["complete"] = time.monotonic() - began <= seconds
    out.write_text(json.dumps(report, indent=1) + "\n")


def describe(model: Path, device: torch.device) -> dict[str, Any]:
    """What was measured, and on what."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    hardware = torch.cuda.get_device_name().replace("NVIDIA ", "") if device.type == "cuda" else "CPU"
    return {"hardware": hardware, "torch": torch.__version__, "weights_sha256": digest.hexdigest()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    filler = parser.add_mutually_exclusive_group(required=True)
    filler.add_argument("--corpus", type=Path, help="folder with the books that facts are scattered in")
    filler.add_argument("--prose", action="store_true", help="scatter them in text of our own (flashmem.prose) instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384])
    parser.add_argument("--documents", type=int, nargs="+", default=[48], help="per length and kind (mixed: a sixth)")
    parser.add_argument("--kinds", nargs="+", default=list(GATES), choices=[*DOCUMENTS, "fwe"])
    parser.add_argument("--topk", type=int, nargs="*", default=[])
    parser.add_argument("--ablate-at", type=int, help="length at which CSA layers are hidden one by one")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument(
        "--attention", choices=("flex", "tiles"), default="flex" if torch.cuda.is_available() else "tiles"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if len(args.documents) == 1:
        args.documents *= len(args.lengths)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # FlexAttention is compiled anew for every length
    sizes, state = load_export(args.model)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = Backbone(sizes, {name: value.to(device) for name, value in state.items()}, compute=compute)
    report = {"bench": "backbone-gates", **describe(args.model, device), "seed": args.seed, "cells": []}
    source = Source.prose(args.model, PROSE_TOKENS) if args.prose else Source.load(args.corpus, "test")
    report |= {"filler": "prose" if args.prose else "books"}
    report |= {"attention": args.attention, "compute": str(compute).removeprefix("torch.")}
    measure(
        LongForward(net, attention=args.attention), source, device, args.out, report,
        kinds=args.kinds, lengths=args.lengths, count=args.documents, topks=args.topk, ablate_at=args.ablate_at,
        seconds=args.seconds, seed=args.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
