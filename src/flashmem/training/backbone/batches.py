"""Batches of rows as arrays of fixed shape, each a pure function of seed, stage and step; made by worker processes.

Shape letters: B = rows, S = tokens per row, R = positions with logits, K = positions per row for distillation,
L = CSA layers, C = right tokens per position.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .corpus import Corpus, Split, encode_prose
from .recipe import Recipe, Stage
from .tasks import (
    FAMILIES,
    FIRST,
    MAX_CHOICES,
    REST,
    Lexicon,
    Row,
    frequent_words_row,
    pairs_row,
    prose_row,
    recall_row,
)

GROUPS = ("number", "multivalue", "several", "kv", "vt", "talk", "hop", "song", "fwe", "pairs", "lm")
"""Families that are logged apart."""
LM = GROUPS.index("lm")
SKIP_STEP = 128
"""Position skips are multiples of this, so that chunks and HCA windows keep their phase."""


@dataclass(slots=True)
class Batch:
    ids_BS: np.ndarray
    positions_BS: np.ndarray
    visible_BL: np.ndarray
    """False where a row must not see a CSA layer's entries."""
    rows_R: np.ndarray
    """Flat positions whose next token is predicted."""
    targets_RC: np.ndarray
    """Right next tokens; the first is the row's own, unused ones are -1."""
    weights_R: np.ndarray
    groups_R: np.ndarray
    """Index into GROUPS of tokens that count as right or wrong; -1 for commas, ends and padding."""
    first_R: np.ndarray
    """True at the first token of a value."""
    kl_rows_BK: np.ndarray


@dataclass(slots=True)
class Source:
    """What rows are made of."""

    lexicon: Lexicon
    corpus: Corpus
    split: Split

    @classmethod
    def load(cls, folder: str | Path, split: Split) -> Source:
        return cls(Lexicon.load(folder), Corpus.load(Path(folder) / f"{split}.npz"), split)

    @classmethod
    def prose(cls, model: str | Path, num_tokens: int, seed: int | str = 0) -> Source:
        """Text of our own instead of books, for test rows; of a model's folder only tokenizer and words are read."""
        lexicon = Lexicon.load(model)
        return cls(lexicon, encode_prose(num_tokens, lexicon.tokenizer, seed), "test")


def make_row(rng: random.Random, source: Source, kind: str, stage: Stage) -> Row:
    """One row of a kind (see `Stage.kinds`)."""
    if kind == "lm":
        return prose_row(rng, source.corpus, stage.length)
    if kind == "pairs":
        return pairs_row(rng, source.lexicon, source.split, stage.length, min(128, stage.length // 8))
    if kind == "fwe":
        return frequent_words_row(rng, source.lexicon, source.split, stage.length)
    families = tuple(FAMILIES) if kind == "any" else tuple(kind.split("+"))
    return recall_row(
        rng, source.lexicon, source.corpus, source.split, stage.length, families,
        facts_share=rng.uniform(*stage.facts), questions_share=rng.uniform(*stage.questions),
    )  # fmt: skip


def make_batch(source: Source, recipe: Recipe, stage_index: int, step: int) -> Batch:
    """The batch of one step."""
    stage = recipe.stages[stage_index]
    rng = random.Random(f"{recipe.seed}/{source.split}/{stage_index}/{step}")
    rows = [make_row(rng, source, kind, stage) for kind in _kinds(rng, stage)]
    return collate(rng, rows, recipe, stage)


def _kinds(rng: random.Random, stage: Stage) -> list[str]:
    """Row kinds of one batch: whole numbers of rows by share, the rest drawn."""
    kinds = [kind for kind, share in stage.kinds.items() for _ in range(int(share * stage.rows + 1e-9))]
    names, shares = list(stage.kinds), list(stage.kinds.values())
    rest = [share * stage.rows - int(share * stage.rows + 1e-9) for share in shares]
    missing = stage.rows - len(kinds)
    return kinds + (rng.choices(names, rest if sum(rest) > 0 else shares, k=missing) if missing else [])


def collate(rng: random.Random, rows: list[Row], recipe: Recipe, stage: Stage) -> Batch:
    """Stack rows; a question's loss grows with the root of its length, so that long answers do not drown short ones."""
    B, S, R = len(rows), stage.length, recipe.logit_rows
    generator = np.random.default_rng(rng.getrandbits(64))
    where: list[int] = []
    choices: dict[int, list[int]] = {}
    weights: list[float] = []
    groups: list[int] = []
    first: list[bool] = []
    for index, row in enumerate(rows):
        for answer in row.answers:
            scale = recipe.family_weight.get(answer.family, 1.0) / sum(answer.weights) ** 0.5
            for offset, extra in answer.also.items():
                choices[len(where) + offset] = extra
            base = index * S + answer.start - 1
            where += range(base, base + len(answer.weights))
            weights += [weight * scale for weight in answer.weights]
            first += [weight == FIRST for weight in answer.weights]
            group = GROUPS.index(answer.family)
            groups += [group if weight >= REST else -1 for weight in answer.weights]
    ids_BS = np.stack([row.ids for row in rows]).astype(np.int32)
    flat = ids_BS.reshape(-1)
    count = min(len(where), R)  # dense batches may hold more answers than fit; the last rows lose some
    rows_R, targets_RC = np.zeros(R, np.int64), np.full((R, MAX_CHOICES), -1, np.int64)
    weights_R, groups_R = np.zeros(R, np.float32), np.full(R, -1, np.int64)
    first_R = np.zeros(R, dtype=bool)
    if count:
        first_R[:count] = first[:count]
        rows_R[:count] = where[:count]
        targets_RC[:count, 0] = flat[rows_R[:count] + 1]
        weights_R[:count] = weights[:count]
        weights_R[:count] /= weights_R[:count].sum()
        groups_R[:count] = groups[:count]
    for at, extra in choices.items():
        if at < count:
            targets_RC[at, 1 : 1 + len(extra)] = extra
    prose = np.concatenate([row.prose for row in rows])
    candidates = np.flatnonzero(prose[1:])
    candidates = candidates[candidates % S != S - 1]
    picked = generator.permutation(candidates)[: R - count]
    if len(picked):
        span = slice(count, count + len(picked))
        rows_R[span], groups_R[span] = picked, LM
        targets_RC[span, 0] = flat[picked + 1]
        weights_R[span] = stage.lm_weight / len(picked)
    return Batch(
        ids_BS, _positions(generator, stage, B), _visible(generator, stage, B, len(recipe.sizes.csa_layers)),
        rows_R, targets_RC, weights_R, groups_R, first_R, _kl_rows(generator, rows, recipe.kl_rows // B, S),
    )  # fmt: skip


def _positions(generator: np.random.Generator, stage: Stage, B: int) -> np.ndarray:
    """Positions with one jump in some rows, log-uniform up to the model's last position."""
    S = stage.length
    positions_BS = np.tile(np.arange(S), (B, 1))
    most = (1_048_576 - S) // SKIP_STEP
    for row in np.flatnonzero(generator.random(B) < stage.skip):
        cut = int(generator.integers(1, S // SKIP_STEP)) * SKIP_STEP if S > SKIP_STEP else 0
        positions_BS[row, cut:] += int(np.exp(generator.uniform(0, np.log(most)))) * SKIP_STEP
    return positions_BS.astype(np.int32)


def _visible(generator: np.random.Generator, stage: Stage, B: int, L: int) -> np.ndarray:
    """In hidden rows one CSA layer alone sees its entries, or (one in four) all but one do."""
    visible_BL = np.ones((B, L), dtype=bool)
    for row in np.flatnonzero(generator.random(B) < stage.hide):
        layer = int(generator.integers(L))
        alone = generator.random() < 0.75
        visible_BL[row] = not alone
        visible_BL[row, layer] = alone
    return visible_BL


def _kl_rows(generator: np.random.Generator, rows: list[Row], K: int, S: int) -> np.ndarray:
    """Half at answers, half anywhere after the first eighth."""
    out = generator.integers(S // 8, S, size=(len(rows), K))
    for index, row in enumerate(rows):
        spots = [p for answer in row.answers for p in range(answer.start - 1, answer.stop - 1)]
        if spots:
            out[index, : K // 2] = generator.choice(np.array(spots), size=K // 2)
    return out.astype(np.int64)


_worker: tuple[Source, Recipe] | None = None


def _start_worker(folder: str, split: Split, recipe: Recipe) -> None:
    global _worker
    _worker = (Source.load(folder, split), recipe)


def _work(stage_index: int, step: int) -> Batch:
    assert _worker is not None
    return make_batch(*_worker, stage_index, step)


class BatchPool:
    """Batches of consecutive steps, made ahead by worker processes; with no workers, made on demand."""

    def __init__(self, folder: str | Path, split: Split, recipe: Recipe, *, workers: int) -> None:
        self.recipe, self.workers = recipe, workers
        self._source = Source.load(folder, split) if not workers else None
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _start_worker, (str(folder), split, recipe)
            )

    def stage(self, stage_index: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of a stage from a step on."""
        steps = range(first_step, self.recipe.stages[stage_index].steps)
        if self._pool is None:
            assert self._source is not None
            for step in steps:
                yield make_batch(self._source, self.recipe, stage_index, step)
            return
        waiting: deque[Future[Batch]] = deque()
        ahead = iter(steps)
        try:
            for _ in steps:
                while len(waiting) < 4 * self.workers and (following := next(ahead, None)) is not None:
                    waiting.append(self._pool.submit(_work, stage_index, following))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


__all__ = ["GROUPS", "LM", "Batch", "BatchPool", "Source", "collate", "make_batch", "make_row"]
