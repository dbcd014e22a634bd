"""One forward of the backbone: what every attention layer does to a session's state, pages and queries.

A `PrefillStep` runs S tokens of one session over its whole history; it changes the session only in `finish`, so that a
failed forward loses nothing. A `DecodeStep` runs one token of each of B sessions over their resident pages.
Shape letters: B = sessions, S = tokens, H = heads, D = head_dim, I = index_head_dim, E = hidden size, W = window,
P = pages, C = chunks per page, K = picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kernels.kv_codec import decode_rows, encode_rows
from ..kernels.score_chunks import QueryFinish, finish_queries
from ..kernels.select_chunks import lightning_scores, topk_chunks, topk_history
from ..kernels.sparse_attention import KeySet, attend, attend_prefill, attention_weights
from ..types import DecodePages, LayerHistory, PrefillPages
from .compressor import pool_overlapping, pool_plain, pool_rings, project
from .state import SessionState, StatePool

KEY_TILE = 4096
"""Chunks whose index keys a prefill holds at a time."""
OBSERVED_TILE = 32
"""Queries of a prefill whose picks are shown at a time."""


@dataclass(frozen=True, eq=False, slots=True)
class Picks:
    """What level 2 picked in one CSA layer of a step, best first. B = sessions in decode, tokens in prefill."""

    chunk_ids: torch.Tensor
    """Int64 [B, K], -1 where there are fewer picks."""
    scores: torch.Tensor
    """Float32 [B, K], undefined where there is no pick."""
    weights: torch.Tensor
    """Float32 [B, H, K]: attention probabilities, the sink in the denominator."""


Entries = Callable[[int, int], Any]
"""Gives the compressed entries of queries lo..hi-1: a `KeySet`, or an `EntrySource` in a fused step."""

PickObserver = Callable[[int, Picks], None]
"""Called with (layer, picks); not for a layer in which no session of the step has a chunk."""


class Step(Protocol):
    @property
    def fused(self) -> bool:
        """Whether layers run norms, rotary embeddings and residual streams on the fused kernels."""
        ...

    def attend(
        self, attention: Any, hidden: torch.Tensor, q_residual: torch.Tensor, q: torch.Tensor, kv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """hidden [B, S, E], q [B, S, H, D], kv [B, S, D] -> [B, S, H, D]."""
        ...


def project_query(
    indexer: Any, hidden: torch.Tensor, q_residual: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], rotated: bool
) -> tuple[torch.Tensor, torch.Tensor, QueryFinish]:
    """Projections [B, S, H, I] and [B, S, H] of the Lightning Indexer, and what makes queries and weights of them."""
    q = indexer.q_b_proj(q_residual).unflatten(-1, (-1, indexer.head_dim))
    scorer = indexer.scorer
    finish = QueryFinish(rope, rotated, scorer.weights_scaling * scorer.softmax_scale)
    return q, scorer.weights_proj(hidden), finish


def index_query(
    indexer: Any, hidden: torch.Tensor, q_residual: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], rotated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Lightning Indexer's queries [B, S, H, I] and head weights [B, S, H] with every scale factor folded in."""
    return finish_queries(*project_query(indexer, hidden, q_residual, rope, rotated))


class PrefillStep:
    """`count` tokens of one session, over its whole history."""

    fused = False
    attend_queries: Callable[..., torch.Tensor] = staticmethod(attend_prefill)
    """The prefill form of attention."""

    def __init__(
        self, state: SessionState, pages: PrefillPages, count: int, on_picks: PickObserver | None = None
    ) -> None:
        self.state, self.pages, self.pool, self.on_picks = state, pages, state.pool, on_picks
        self.first, self.count, self.end = state.position, count, state.position + count
        self.updates: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []
        self.new_entries: list[tuple[int, int, torch.Tensor]] = []
        self._picked: tuple[torch.Tensor, torch.Tensor]  # of the layer that runs; only while somebody observes

    def attend(
        self,
        attention: Any,
        hidden: torch.Tensor,
        q_residual: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        layer = attention.layer_idx
        g = self.pool.geometry
        if layer in self.pool.target_layers:
            self._remember(layer, "hidden", hidden[0])
        window_kv, _ = self._with_past(layer, "window", kv[0], min(self.first, g.sliding_window - 1))
        kind, entries, per_query = g.layer_kinds[layer], None, 0
        if kind == "csa" and (total := self._write_chunks(attention.compressor, layer, hidden[0])):
            entries, per_query = self._csa_entries(attention.compressor, layer, total, hidden, q_residual, rope)
            if self.on_picks is not None:
                self.on_picks(layer, self._observe(attention, q[0], window_kv, entries))
        elif kind == "hca" and len(rows := self._hca_rows(attention.compressor, layer, hidden[0])):
            entries, per_query = self._hca_entries(rows)
        self._remember(layer, "window", kv[0])
        return self.attend_queries(
            q[0], window_kv, self.first, g.sliding_window, attention.sinks, attention.scaling, entries, per_query
        )[None]  # fmt: skip

    def finish(self) -> None:
        """Apply what the layers left: rings, HCA entries, position. Pages are committed by their owner."""
        for layer, name, index, values in self.updates:
            self.state.tensor(layer, name)[index] = values
        for layer, first, rows in self.new_entries:
            self.state.entries[layer].put(first, rows)
        self.state.position = self.end

    def _remember(self, layer: int, name: str, values: torch.Tensor) -> None:
        """Put the newest tokens' values into the ring when the step finishes."""
        size = self.pool.tensors[layer, name].shape[1]
        newest = values[-size:]
        index = torch.arange(self.end - len(newest), self.end, device=values.device) % size
        self.updates.append((layer, name, index, newest))

    def _with_past(self, layer: int, name: str, new: torch.Tensor, past: int) -> tuple[torch.Tensor, int]:
        """The last `past` tokens of the ring followed by the new ones, and the position of the first."""
        ring = self.state.tensor(layer, name)
        index = torch.arange(self.first - past, self.first, device=ring.device) % len(ring)
        return torch.cat((ring[index], new)), self.first - past

    def _visible(self, ratio: int, device: torch.device) -> torch.Tensor:
        """Entries that each query may see, int64 [S]."""
        return (torch.arange(self.first, self.end, device=device) + 1) // ratio

    def _csa_windows(
        self, module: Any, layer: int, prefix: str, hidden_SE: torch.Tensor, first_chunk: int, chunks: int
    ) -> torch.Tensor:
        """Entries of the chunks that these tokens complete."""
        ratio, (kv, gate) = module.compress_rate, project(module, hidden_SE)
        past = self.first - max(0, (first_chunk - 1) * ratio)  # back to the previous window's first token
        positions = torch.arange(first_chunk, first_chunk + chunks, device=kv.device) * ratio
        windows = []
        for name, new in ((f"{prefix}kv", kv), (f"{prefix}gate", gate)):
            tokens, _ = self._with_past(layer, name, new, past)
            if first_chunk == 0:  # no previous window: any tokens do, their gates are masked
                tokens = torch.cat((tokens.new_zeros(ratio, tokens.shape[1]), tokens))
            split = (
                tokens[: (chunks + 1) * ratio].unflatten(0, (-1, ratio)) if chunks else tokens.new_empty(0, ratio, 1)
            )
            windows.append(torch.cat((split[:-1], split[1:]), dim=1))
            self._remember(layer, name, new)
        if not chunks:
            return kv.new_empty(0, module.head_dim)
        return pool_overlapping(module, windows[0], windows[1], positions)

    def _write_chunks(self, compressor: Any, layer: int, hidden_SE: torch.Tensor) -> int:
        """Write the chunks that these tokens complete; returns how many there are now."""
        ratio = self.pool.geometry.csa_ratio
        first_chunk, total = self.first // ratio, self.end // ratio
        kv = self._csa_windows(compressor, layer, "", hidden_SE, first_chunk, total - first_chunk)
        keys = self._csa_windows(compressor.indexer, layer, "index_", hidden_SE, first_chunk, total - first_chunk)
        if total > first_chunk:
            self.pages.write(layer, kv, keys, impl="fused" if self.fused else None)
        return total

    def _csa_entries(
        self, compressor: Any, layer: int, total: int, hidden: torch.Tensor, q_residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[Entries, int]:  # fmt: skip
        history = self.pages.history(layer, total)
        q, weights = index_query(compressor.indexer, hidden, q_residual, rope, history.keys_rotated)
        k = min(self.pool.geometry.index_topk, total)
        visible_S = self._visible(self.pool.geometry.csa_ratio, q.device)
        picks = topk_history(q[0], weights[0], visible_S, _key_tiles(history), k)
        if self.on_picks is not None:
            self._picked = _best_first(q[0], weights[0], history, picks)
            picks = self._picked[0]

        def entries(lo: int, hi: int) -> KeySet:
            ids = picks[lo:hi]
            return history.kv(ids.clamp_min(0)), ids >= 0

        return entries, k

    def _observe(self, attention: Any, q_SHD: torch.Tensor, window_kv: torch.Tensor, entries: Entries) -> Picks:
        """The picks of all queries with their attention probabilities, a few queries at a time."""
        window, (ids_SK, scores_SK) = self.pool.geometry.sliding_window, self._picked
        back = torch.arange(window - 1, -1, -1, device=window_kv.device)
        last_S = torch.arange(len(window_kv) - self.count, len(window_kv), device=window_kv.device)
        weights = []
        for lo in range(0, self.count, OBSERVED_TILE):
            hi = min(lo + OBSERVED_TILE, self.count)
            at = last_S[lo:hi, None] - back  # a query's own token is the last of its window
            sets: list[KeySet] = [(window_kv[at.clamp_min(0)], at >= 0), entries(lo, hi)]
            found = attention_weights(q_SHD[lo:hi], sets, attention.sinks, attention.scaling)
            weights.append(found[..., window:])
        return Picks(ids_SK, scores_SK, torch.cat(weights))

    def _hca_rows(self, compressor: Any, layer: int, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Stored entries [N, bytes] up to the last of these tokens."""
        ratio, spec = self.pool.geometry.hca_ratio, self.pool.hca_format
        first_entry, total = self.first // ratio, self.end // ratio
        past = self.first - first_entry * ratio
        windows = []
        for name, new in zip(("kv", "gate"), project(compressor, hidden_SE), strict=True):
            tokens, _ = self._with_past(layer, name, new, past)
            windows.append(tokens[: (total - first_entry) * ratio])
            self._remember(layer, name, new)
        old = self.state.entries[layer].get(first_entry)
        if total > first_entry:
            kv, gate = (tokens.unflatten(0, (-1, ratio)) for tokens in windows)
            positions = torch.arange(first_entry, total, device=hidden_SE.device) * ratio
            new_rows = encode_rows(spec, pool_plain(compressor, kv, gate, positions))
            self.new_entries.append((layer, first_entry, new_rows))
            old = torch.cat((old, new_rows))
        return old

    def _hca_entries(self, rows_NE: torch.Tensor) -> tuple[Entries, int]:
        entries_ND = decode_rows(self.pool.hca_format, rows_NE, self.pool.dtype)
        index_N = torch.arange(len(rows_NE), device=rows_NE.device)
        visible_S = self._visible(self.pool.geometry.hca_ratio, rows_NE.device)
        return (lambda lo, hi: (entries_ND, index_N < visible_S[lo:hi, None])), len(rows_NE)


class BatchPrefillStep:
    """The same number of tokens of each of several sessions, one session after the other in every layer."""

    fused = False

    def __init__(self, steps: Sequence[PrefillStep]) -> None:
        self.steps = list(steps)

    def attend(
        self,
        attention: Any,
        hidden: torch.Tensor,
        q_residual: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        cos, sin = (x.expand(len(self.steps), -1, -1) for x in rope)
        rows = [slice(i, i + 1) for i in range(len(self.steps))]
        return torch.cat(
            [
                step.attend(attention, hidden[i], q_residual[i], q[i], kv[i], (cos[i], sin[i]))
                for step, i in zip(self.steps, rows, strict=True)
            ]
        )


def _best_first(
    q_SHI: torch.Tensor, w_SH: torch.Tensor, history: LayerHistory, ids_SK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks with their scores, by falling score, equal ones by rising id; -1 last."""
    keys_NI = torch.cat([keys for _, keys in _key_tiles(history)])
    ids_SK = ids_SK.sort(dim=1).values
    tiles = [slice(lo, lo + OBSERVED_TILE) for lo in range(0, len(ids_SK), OBSERVED_TILE)]
    scores_SK = torch.cat([lightning_scores(q_SHI[at], w_SH[at], keys_NI[ids_SK[at].clamp_min(0)]) for at in tiles])
    order_SK = scores_SK.masked_fill(ids_SK < 0, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    return ids_SK.gather(1, order_SK), scores_SK.gather(1, order_SK)


def _key_tiles(history: LayerHistory) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, history.num_chunks, KEY_TILE):
        yield first, history.keys(first, min(first + KEY_TILE, history.num_chunks))


class TokenStep:
    """One token of each of some sessions: how such steps end.

    State is written in place, by position: what a failed step wrote is overwritten before it is read.
    """

    def __init__(self, states: Sequence[SessionState]) -> None:
        self.states = list(states)
        self._observed: list[tuple[int, torch.Tensor]] = []
        """Layers and hidden states [B, E] for level 1."""

    def observe(self) -> None:
        """Put the hidden states of this step's tokens into the rings that level 1 reads."""
        for layer, hidden_BE in self._observed:
            self._put(layer, "hidden", hidden_BE)

    def finish(self) -> None:
        """Advance positions and, only now, the observed tokens: level 1 may look before a failed step is repeated."""
        self.observe()
        for state in self.states:
            state.position += 1

    def _put(self, layer: int, name: str, values: torch.Tensor) -> torch.Tensor:
        """Write one token's values into every session's ring; return rings."""
        raise NotImplementedError


class DecodeStep(TokenStep):
    """One token of each of B sessions, over their resident pages."""

    fused = False

    def __init__(
        self, states: Sequence[SessionState], pages: DecodePages, on_picks: PickObserver | None = None
    ) -> None:
        super().__init__(states)
        self.pages, self.on_picks = pages, on_picks
        self.pool: StatePool = states[0].pool
        self.rows = torch.tensor([state.row for state in states])
        self.positions = torch.tensor([state.position for state in states])
        self._by_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._picked: tuple[torch.Tensor, torch.Tensor]  # of the layer that runs; only while somebody observes

    def attend(
        self,
        attention: Any,
        hidden: torch.Tensor,
        q_residual: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        layer, g = attention.layer_idx, self.pool.geometry
        hidden, kv = hidden[:, 0], kv[:, 0]
        if layer in self.pool.target_layers:
            self._observed.append((layer, hidden))
        window_BWD = self._put(layer, "window", kv)
        _, positions = self._index(kv.device)
        seen = torch.arange(g.sliding_window, device=kv.device) <= positions[:, None]
        sets: list[KeySet] = [(window_BWD, seen)]
        if g.layer_kinds[layer] == "csa":
            sets += self._csa_set(attention.compressor, layer, hidden, q_residual, rope)
            if self.on_picks is not None and len(sets) > 1:
                weights = attention_weights(q[:, 0], sets, attention.sinks, attention.scaling)
                self.on_picks(layer, Picks(*self._picked, weights[..., g.sliding_window :]))
        elif g.layer_kinds[layer] == "hca":
            sets += self._hca_set(attention.compressor, layer, hidden)
        return attend(q[:, 0], sets, attention.sinks, attention.scaling)[:, None]

    def _index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._by_device:
            self._by_device[device] = (self.rows.to(device), self.positions.to(device))
        return self._by_device[device]

    def _put(self, layer: int, name: str, values: torch.Tensor) -> torch.Tensor:
        """Write one token's values into every session's ring; return the rings [B, size, ...]."""
        ring = self.pool.tensors[layer, name]
        rows, positions = self._index(ring.device)
        ring[rows, positions % ring.shape[1]] = values
        return ring[rows]

    def _completing(self, ratio: int, device: torch.device) -> torch.Tensor:
        """Batch rows whose token completes a window."""
        return self._completing_rows(ratio).to(device)

    def _completing_rows(self, ratio: int) -> torch.Tensor:
        return (((self.positions + 1) % ratio) == 0).nonzero()[:, 0]  # on the CPU: no sync with a GPU

    def _csa_set(
        self, compressor: Any, layer: int, hidden_BE: torch.Tensor, q_residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> list[KeySet]:  # fmt: skip
        g = self.pool.geometry
        rows = self._completing(g.csa_ratio, hidden_BE.device)
        kv = self._csa_window(compressor, layer, "", hidden_BE, rows)
        keys = self._csa_window(compressor.indexer, layer, "index_", hidden_BE, rows)
        if len(rows):
            self.pages.write(layer, self._completing_rows(g.csa_ratio), kv, keys)
        ids = self.pages.chunk_ids(layer)
        if not ids.shape[1]:
            return []
        q, weights = index_query(
            compressor.indexer, hidden_BE[:, None], q_residual, rope, self.pages.keys_rotated(layer)
        )  # fmt: skip
        scores = lightning_scores(q[:, 0], weights[:, 0], self.pages.keys(layer).flatten(1, 2))
        picks, valid = topk_chunks(scores, ids, g.index_topk)
        if self.on_picks is not None:
            self._picked = torch.where(valid, ids.gather(1, picks), -1), scores.gather(1, picks)
        return [(self.pages.kv(layer, picks), valid)]

    def _csa_window(
        self, module: Any, layer: int, prefix: str, hidden_BE: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        kv, gate = project(module, hidden_BE)
        kv, gate = self._put(layer, f"{prefix}kv", kv)[rows], self._put(layer, f"{prefix}gate", gate)[rows]
        return pool_rings(module, kv, gate, self._index(kv.device)[1][rows])

    def _hca_set(self, compressor: Any, layer: int, hidden_BE: torch.Tensor) -> list[KeySet]:
        ratio, spec = self.pool.geometry.hca_ratio, self.pool.hca_format
        kv, gate = project(compressor, hidden_BE)
        kv, gate = self._put(layer, "kv", kv), self._put(layer, "gate", gate)
        rows = self._completing(ratio, kv.device)
        if len(rows):
            starts = self._index(kv.device)[1][rows] + 1 - ratio  # a multiple of the ring's size: in order
            new = encode_rows(spec, pool_plain(compressor, kv[rows], gate[rows], starts))
            for row, encoded in zip(self._completing_rows(ratio).tolist(), new, strict=True):
                state = self.states[row]
                state.entries[layer].put(state.position // ratio, encoded[None])
        counts = ((self.positions + 1) // ratio).tolist()
        if not max(counts):
            return []
        stored = [state.entries[layer].get(count) for state, count in zip(self.states, counts, strict=True)]
        packed = stored[0][None] if len(stored) == 1 else torch.nn.utils.rnn.pad_sequence(stored, batch_first=True)
        seen = torch.arange(max(counts), device=kv.device) < torch.tensor(counts, device=kv.device)[:, None]
        return [(decode_rows(spec, packed, self.pool.dtype), seen)]
