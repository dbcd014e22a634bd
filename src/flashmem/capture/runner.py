"""Runs a backbone over prompts, once, and writes what the Memory Indexer is trained from.

Every document is read by chunked prefill, then its answer is watched with every page resident: read too where it is
given, decoded where the model answers. Watched tokens show, in each CSA layer, which chunks level 2 picked, their
scores and what attention gave them.
Shape letters: B = documents decoded together, T = watched tokens of a document, L = CSA layers, K = picks,
m = observed tokens, E = hidden size.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backbone import load_model
from ..backbone.steps import Picks
from ..config import LSAConfig, ModelGeometry
from ..engine import Engine, Session
from ..indexer import MemoryIndexer
from .format import Document, ShardMeta, ShardWriter
from .labels import evidence_rows, sample_queries, sum_windows, vote_windows, votes, windows
from .prompts import Prompt

NATIVE = "native"
"""Folder beside the shards: the backbone's own Lightning Indexer at the captured layers, where training starts."""

Progress = Callable[[str, str], None]
"""Called with a document's id and what became of it: 'written', 'there', 'empty' or 'damaged' (and captured again)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureConfig:
    """What a user chooses about capture."""

    layers: tuple[int, ...] | None = None
    """CSA indices to keep hidden states and index rows of; None means all. Labels are of all CSA layers anyway."""
    tau: int = 64
    observe: int = 1
    """Hidden states per query (m)."""
    queries: int = 32
    """Queries per document, at most."""
    max_new_tokens: int = 256
    """Tokens of a greedy answer, at most."""
    tail: int = 0
    """Last prompt tokens that are watched too, unless a prompt says otherwise."""
    batch: int = 1
    """Documents decoded together; answers that prompts give are read."""
    vote_p: float = 0.6
    vote_layers: int = 3
    prefill_chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "observe", "queries", "max_new_tokens", "batch", "vote_layers", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tail < 0:
            raise ValueError(f"tail must not be negative, got {self.tail}")

    def engine_config(self) -> LSAConfig:
        """Every page resident, and the hidden states of a forward's tokens at hand, or the last m."""
        return LSAConfig(
            policy="all", tau=self.tau, observation_window=max(self.observe, self.prefill_chunk),
            prefill_chunk=self.prefill_chunk,
        )  # fmt: skip


@dataclass(slots=True)
class CaptureSummary:
    """What a run did."""

    written: int = 0
    there: int = 0
    """Documents found whole from an earlier run."""
    empty: int = 0
    """Documents whose greedy answer was a stop token: nothing to learn from, nothing written."""
    queries: int = 0
    tokens: int = 0
    decoded: int = 0
    bytes: int = 0
    seconds: float = 0.0


def open_engine(
    model: str | Path,
    config: CaptureConfig,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
) -> Engine:
    """Load a model for capture; arguments as for `Engine.from_pretrained`."""
    loaded, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map)
    return engine_for(loaded, config, tokenizer)


def engine_for(model: Any, config: CaptureConfig, tokenizer: Any = None) -> Engine:
    """Take over a loaded model for capture, until the engine is closed."""
    layers = config.layers
    if layers is None:
        layers = tuple(range(len(ModelGeometry.from_mapping(model.config.to_dict()).csa_layers)))
    return Engine(model, tokenizer, indexer=MemoryIndexer.native(model, layers), config=config.engine_config())


def open_shards(directory: str | Path, engine: Engine, config: CaptureConfig) -> ShardWriter:
    """Start shards of this engine, or go on with them; puts the native indexer beside them."""
    native = engine.indexer
    meta = ShardMeta(
        model=engine.fingerprint(),
        geometry=engine.geometry,
        layers=native.target_layers,
        labels=tuple(range(len(engine.geometry.csa_layers))),
        dtype=str(engine.backbone.dtype).removeprefix("torch."),
        tokenizer=None if engine.tokenizer is None else tokenizer_hash(engine.tokenizer),
        tau=config.tau,
        observe=config.observe,
        vote_p=config.vote_p,
        vote_layers=config.vote_layers,
        settings={name: getattr(config, name) for name in ("queries", "max_new_tokens", "tail", "seed")},
    )
    writer = ShardWriter(directory, meta)
    if not (writer.directory / NATIVE).exists():
        native.save_pretrained(writer.directory / NATIVE)
    return writer


@torch.no_grad()
def capture(
    engine: Engine,
    prompts: Iterable[Prompt],
    writer: ShardWriter,
    config: CaptureConfig,
    on_progress: Progress | None = None,
) -> CaptureSummary:
    """Capture the prompts that the shards do not hold yet.

    `engine` comes from `open_engine` or `engine_for`, `writer` from `open_shards`, with the same config. Raises
    ValueError for a prompt that does not fit the model, or that the shards hold in another form; what was written
    before stays, and a later run goes on from there.
    """
    tell = on_progress or (lambda rid, what: None)
    summary, started = CaptureSummary(), time.monotonic()
    waiting = _missing(prompts, writer, summary, tell)
    observer = _Observer(engine)
    live: list[Recording] = []
    try:
        while True:
            while len(live) < config.batch and (prompt := next(waiting, None)) is not None:
                live.append(Recording(engine, prompt, config))
                observer.read(live[-1])
            for recording in [item for item in live if item.finished]:
                _finish(recording, writer, summary, tell)
                live.remove(recording)
            if live:
                observer.step(live)
            elif prompt is None:
                break
    finally:
        for recording in live:
            recording.session.close()
        summary.seconds = round(time.monotonic() - started, 2)
    return summary


def _missing(
    prompts: Iterable[Prompt], writer: ShardWriter, summary: CaptureSummary, tell: Progress
) -> Iterator[Prompt]:
    for prompt in prompts:
        known = prompt.rid in writer.entries
        if writer.holds(prompt.rid, prompt.source()):
            summary.there += 1
            tell(prompt.rid, "there")
            continue
        if known:
            tell(prompt.rid, "damaged")
        yield prompt


def _finish(recording: Recording, writer: ShardWriter, summary: CaptureSummary, tell: Progress) -> None:
    rid = recording.prompt.rid
    document = recording.document() if recording.steps else None
    recording.session.close()
    if document is None:
        summary.empty += 1
        tell(rid, "empty")
        return
    entry = writer.write(document)
    summary.written += 1
    summary.queries += entry.queries
    summary.tokens += entry.tokens
    summary.decoded += entry.tokens - entry.prompt_tokens
    summary.bytes += entry.bytes
    tell(rid, "written")


class Recording:
    """One document while it is captured."""

    def __init__(self, engine: Engine, prompt: Prompt, config: CaptureConfig) -> None:
        self.engine, self.prompt, self.config = engine, prompt, config
        tail = config.tail if prompt.tail is None else prompt.tail
        if tail >= len(prompt.tokens):
            raise ValueError(f"document {prompt.rid!r}: a tail of {tail} tokens leaves nothing of the prompt to read")
        read = prompt.tokens[: len(prompt.tokens) - tail]
        self.forced = [*prompt.tokens[len(read) :], *(prompt.response or ())]
        self.longest = len(self.forced) + (config.max_new_tokens if prompt.response is None else 0)
        longest, total = engine.geometry.max_positions, len(read) + self.longest
        if total > longest:
            raise ValueError(f"document {prompt.rid!r}: {total} tokens exceed the model's {longest} positions")
        self.first = len(read) - 1
        """Position of the last token that prefill reads."""
        for start, end in prompt.turns or ():
            if not len(read) <= start < end <= len(read) + len(self.forced):
                raise ValueError(
                    f"document {prompt.rid!r}: the turn [{start}, {end}] is not within the watched tokens "
                    f"{len(read)}..{len(read) + len(self.forced)}"
                )
        self.steps: list[Step] = []
        self.session: Session = engine.session()
        try:
            self.session.append(read)
        except BaseException:
            self.session.close()
            raise
        self.start_LmE = hidden_of(engine, [self.session], config.observe)[:, 0]
        self.next_token: int | None = None
        """The answer's next token, None at its end; known once the given tokens have been read."""

    @property
    def finished(self) -> bool:
        return self.next_token is None

    def add(self, steps: Sequence[Step]) -> None:
        self.steps += steps
        self.next_token = self._choose()

    def _choose(self) -> int | None:
        if len(self.steps) >= self.longest:
            return None
        assert self.session.next_logits is not None
        token = int(self.session.next_logits.argmax())
        return None if token in self.engine.stop_ids else token

    def document(self) -> Document:
        """What training reads of this document."""
        config, g, steps = self.config, self.engine.geometry, len(self.steps)
        turns = self.prompt.turns or ((self.first + 1, self.first + 1 + steps),)
        queries = sample_queries(turns, config.tau, config.queries, config.seed, self.prompt.rid)
        positions = [query.position for query in queries]
        spans = windows(queries, self.first, config.tau)
        num_chunks = [(position + 1) // g.csa_ratio for position in positions]
        picked = [_padded([getattr(step, name) for step in self.steps], fill) for name, fill in _STEP_FILL.items()]
        ids_LTK, lightning_LTK, attention_LTK = (tensor.transpose(0, 1) for tensor in picked)
        token_votes = [votes(step.ids, step.lightning, config.vote_p, config.vote_layers) for step in self.steps]
        hidden, observed = self._hidden(positions)
        evidence = self.prompt.evidence
        return Document(
            rid=self.prompt.rid,
            tokens=self.session.state.position,
            prompt_tokens=self.first + 1,
            source=self.prompt.source(),
            meta=self.prompt.meta,
            positions=torch.tensor(positions),
            num_chunks=torch.tensor(num_chunks),
            observed=observed,
            turns=torch.tensor([[query.start, query.end] for query in queries]),
            hidden=hidden,
            rows={
                csa: self.session.pages.index_rows(g.csa_layers[csa]).cpu() for csa in self.engine.indexer.target_layers
            },
            mass={
                csa: sum_windows(ids_LTK[csa], attention_LTK[csa], spans, num_chunks)
                for csa in range(len(g.csa_layers))
            },
            lightning={
                csa: sum_windows(ids_LTK[csa], lightning_LTK[csa], spans, num_chunks)
                for csa in range(len(g.csa_layers))
            },
            vote=vote_windows(token_votes, spans, num_chunks),
            evidence=None
            if evidence is None
            else evidence_rows(evidence, queries, config.tau, g.csa_ratio, num_chunks),
        )

    def _hidden(self, positions: Sequence[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Hidden states [Q, m, E] per captured layer, and how many of the m there are."""
        m, before = self.config.observe, self.start_LmE.shape[1]
        timeline_LTE = torch.cat((self.start_LmE, torch.stack([step.hidden for step in self.steps], dim=1)), dim=1)
        out = timeline_LTE.new_zeros(len(timeline_LTE), len(positions), m, timeline_LTE.shape[2])
        observed = []
        for query, position in enumerate(positions):
            end = position - self.first + before
            count = min(m, end)
            out[:, query, m - count :] = timeline_LTE[:, end - count : end]
            observed.append(count)
        layers = self.engine.indexer.target_layers
        return dict(zip(layers, out.unbind(0), strict=True)), torch.tensor(observed)


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What one watched token showed, on the CPU."""

    ids: torch.Tensor
    """Int32 [L, K], best first, -1 where there is no pick."""
    lightning: torch.Tensor
    """Float32 [L, K]: softmax of the picks' scores."""
    attention: torch.Tensor
    """Float32 [L, K]: attention probability, head mean."""
    hidden: torch.Tensor
    """[captured layers, E]."""


_STEP_FILL = {"ids": -1, "lightning": 0, "attention": 0}


class _Observer:
    """Runs tokens of documents and hands each document what its tokens showed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.picks: dict[int, Picks] = {}

    def __call__(self, layer: int, picks: Picks) -> None:
        self.picks[layer] = picks

    def read(self, item: Recording) -> None:
        """Run all tokens that the document gives, several in a forward."""
        engine, size, steps = self.engine, item.config.prefill_chunk, list[Step]()
        for first in range(0, len(item.forced), size):
            tokens = item.forced[first : first + size]
            self.picks.clear()
            engine.on_prefill_picks = self
            try:
                item.session.append(tokens)
            finally:
                engine.on_prefill_picks = None
            steps += self._steps(hidden_of(engine, [item.session], len(tokens))[:, 0])
        item.add(steps)

    def step(self, recordings: Sequence[Recording]) -> None:
        """Decode the next token of every recording."""
        engine = self.engine
        self.picks.clear()
        engine.on_picks = self
        try:
            engine.decode(
                [item.session for item in recordings],
                [item.next_token for item in recordings if item.next_token is not None],
            )
        finally:
            engine.on_picks = None
        hidden_LBE = hidden_of(engine, [item.session for item in recordings], 1)[:, :, 0]
        for item, step in zip(recordings, self._steps(hidden_LBE), strict=True):
            item.add([step])

    def _steps(self, hidden_LBE: torch.Tensor) -> list[Step]:
        ids_LBK, lightning_LBK, attention_LBK = self._picked(hidden_LBE.shape[1])
        return [
            Step(ids_LBK[:, row], lightning_LBK[:, row], attention_LBK[:, row], hidden_LBE[:, row])
            for row in range(hidden_LBE.shape[1])
        ]

    def _picked(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layers = self.engine.geometry.csa_layers
        if not self.picks:  # no chunk yet
            empty = torch.empty(len(layers), batch, 0)
            return empty.int(), empty, empty
        ids, lightning, attention = [], [], []
        for layer in layers:
            picks = self.picks[layer]
            ids.append(picks.chunk_ids.int().cpu())
            lightning.append(lightning_probabilities(picks).cpu())
            attention.append(picks.weights.mean(1).cpu())
        return torch.stack(ids), torch.stack(lightning), torch.stack(attention)


def hidden_of(engine: Engine, sessions: Sequence[Session], count: int) -> torch.Tensor:
    """Hidden states [captured layers, B, at most `count`, E] of the newest tokens, on the CPU: one copy per layer."""
    layers = [engine.geometry.csa_layers[csa] for csa in engine.indexer.target_layers]
    return torch.stack(
        [torch.stack([session.state.observed(layer)[-count:] for session in sessions]).cpu() for layer in layers]
    )


def lightning_probabilities(picks: Picks) -> torch.Tensor:
    """Softmax of the picks' scores, float32 [B, K]; zero where there is no pick."""
    valid = picks.chunk_ids >= 0
    scores = picks.scores.masked_fill(~valid, float("-inf"))
    return scores.softmax(-1).masked_fill(~valid, 0)  # a row without picks would be NaN


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of what the tokenizer does."""
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _padded(tensors_LK: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """[T, L, K] of tensors [L, K] with different K."""
    widest = max(tensor.shape[1] for tensor in tensors_LK)
    out = tensors_LK[0].new_full((len(tensors_LK), tensors_LK[0].shape[0], widest), fill)
    for row, tensor in zip(out, tensors_LK, strict=True):
        row[:, : tensor.shape[1]] = tensor
    return out


__all__ = [
    "NATIVE",
    "CaptureConfig",
    "CaptureSummary",
    "Progress",
    "Recording",
    "capture",
    "engine_for",
    "open_engine",
    "open_shards",
    "tokenizer_hash",
]
