"""`flashmem demo`: the mechanism on a random model, in about a minute on a CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

import flashmem

from ..config import LSAConfig
from .options import Json
from .output import answer, answer_json, log
from .sizes import format_bytes, parse_tokens

_LAYERS = "WCHCHC"
_NEW_TOKENS = 32
_PAGE_CHUNKS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo measured."""

    context_tokens: int
    new_tokens: int
    tokens_equal_to_transformers: int
    pages: int
    resident_pages: int
    paper_resident_bytes: int
    paper_full_bytes: int
    cycles: int
    pages_moved: int
    restored_tokens_equal: int
    seconds: float


def add_command(app: typer.Typer) -> None:
    app.command("demo")(run)


def run(
    context: Annotated[str, typer.Option(help="Tokens to read, e.g. 2K.")] = "2K",
    keep: Annotated[float, typer.Option(help="Share of pages on the device.")] = 0.15,
    json: Json = False,
) -> None:
    """Show the mechanism on a small DeepSeek-V4 with random weights, on the CPU.

    With every page on the device the tokens are those of unmodified transformers; with few pages, the rest waits in
    host memory. Random weights write nothing that could be read: this shows mechanism, not quality.

    Example: `flashmem demo --context 2K --keep 0.15`
    """
    result = show(parse_tokens(context), keep)
    if json:
        answer_json(asdict(result))
        return
    equal = f"{result.tokens_equal_to_transformers} of {result.new_tokens}"
    answer(
        f"every page on the device: {equal} tokens equal to transformers\n"
        f"keep {keep:g}: {result.resident_pages} of {result.pages} pages on the device, "
        f"{format_bytes(result.paper_resident_bytes)} of {format_bytes(result.paper_full_bytes)} (paper accounting), "
        f"{result.cycles} cycles, {result.pages_moved} pages brought back\n"
        f"saved, opened, continued: {result.restored_tokens_equal} of {result.new_tokens} tokens equal"
    )


def show(context_tokens: int, keep: float) -> DemoResult:
    """Run the demo. Raises ValueError for an empty context or a bad share."""
    import torch  # takes seconds: after the arguments are known to be right

    from ..backbone import random_model

    if context_tokens < 1:
        raise ValueError(f"the context must have at least one token, got {context_tokens}")
    few_pages = LSAConfig(policy="native", keep=keep, page_chunks=_PAGE_CHUNKS, tau=8)
    started = time.monotonic()
    model = random_model(_LAYERS)
    model.generation_config.eos_token_id = None  # random weights stop anywhere
    ids = torch.randint(256, (context_tokens,), generator=torch.Generator().manual_seed(0)).tolist()

    log(f"transformers reads {context_tokens:,} random tokens and decodes {_NEW_TOKENS}")
    expected = model.generate(torch.tensor([ids]), max_new_tokens=_NEW_TOKENS, do_sample=False)[0, context_tokens:]

    log("flashmem does the same with every page on the device")
    with _engine(model, LSAConfig(policy="all", page_chunks=_PAGE_CHUNKS)) as engine:
        session = engine.session()
        session.append(ids)
        exact = session.generate(max_new_tokens=_NEW_TOKENS)

    log(f"and with {keep:.0%} of them; then saves, opens and continues twice")
    with _engine(model, few_pages) as engine, tempfile.TemporaryDirectory() as directory:
        session = engine.session()
        session.append(ids)
        session.generate(max_new_tokens=_NEW_TOKENS)
        session.save(f"{directory}/demo.mem")
        stats = session.stats()
        opened = engine.open(f"{directory}/demo.mem").generate(max_new_tokens=_NEW_TOKENS)
        continued = session.generate(max_new_tokens=_NEW_TOKENS)
    return DemoResult(
        context_tokens=context_tokens,
        new_tokens=_NEW_TOKENS,
        tokens_equal_to_transformers=_equal(exact, expected.tolist()),
        pages=stats["pages"],
        resident_pages=stats["resident_pages"],
        paper_resident_bytes=stats["resident_bytes_paper"],
        paper_full_bytes=stats["full_bytes_paper"],
        cycles=stats["cycles"],
        pages_moved=stats["pages_moved"],
        restored_tokens_equal=_equal(opened, continued),
        seconds=round(time.monotonic() - started, 1),
    )


@contextmanager
def _engine(model: Any, config: LSAConfig) -> Iterator[flashmem.Engine]:
    engine = flashmem.Engine(model, config=config)
    try:
        yield engine
    finally:
        engine.close()  # gives the model back as it was


def _equal(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


__all__ = ["DemoResult", "add_command", "show"]
