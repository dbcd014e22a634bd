"""For people who keep their own transformers code: `attach` a model, then `generate` with an `LSACache`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .backbone.steps import BatchPrefillStep, DecodeStep
from .config import LSAConfig
from .engine import Engine, Session
from .indexer import MemoryIndexer


def attach(model: Any, indexer: MemoryIndexer | None = None, config: LSAConfig | None = None) -> Engine:
    """Make a loaded model accept `LSACache`; with any other cache it stays the stock model.

    `detach(model)` undoes it. Raises ValueError if the model is attached already.
    """
    engine = Engine(model, indexer=indexer, config=config)
    model._flashmem = engine
    engine.hooks = [  # type: ignore[attr-defined]
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True),
    ]
    return engine


def detach(model: Any) -> None:
    """Close the attached engine and its sessions; the model is stock again."""
    engine = _engine_of(model)
    for hook in engine.hooks:  # type: ignore[attr-defined]
        hook.remove()
    engine.close()
    del model._flashmem


class LSACache(Cache):
    """A cache for `model.generate`: one flashmem session per row of the batch, made at the first forward.

    Refused with a clear error: beams (reorder), crop, left padding, padding inside a batch.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(engine.geometry.num_layers)])
        self.engine = engine
        self.sessions: list[Session] = []
        self.step: BatchPrefillStep | DecodeStep | None = None
        self.unsettled = False

    @classmethod
    def for_model(cls, model: Any) -> LSACache:
        """An empty cache for an attached model."""
        return cls(_engine_of(model))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.sessions[0].state.position if self.sessions else 0

    def stats(self) -> list[dict[str, Any]]:
        """`Session.stats` of every row."""
        return [session.stats() for session in self.sessions]

    def close(self) -> None:
        """Free every row's session."""
        for session in self.sessions:
            session.close()
        self.sessions = []

    def reset(self) -> None:
        self.close()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise ValueError("flashmem does not run beam search: sessions cannot be reordered")

    def crop(self, max_length: int) -> None:
        raise ValueError("flashmem cannot crop: compressed entries hold several tokens each")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("flashmem cannot repeat rows of a cache; repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ValueError("flashmem cannot select rows of a cache")

    def begin(self, ids_BS: torch.Tensor) -> None:
        """Prepare a forward of ids [B, S]."""
        engine, (rows, count) = self.engine, ids_BS.shape
        if self.step is not None:  # the last forward failed
            engine._roll_back(self.sessions)
            self.step = None
        if not self.sessions:
            self.sessions = [engine.session() for _ in range(rows)]
        if rows != len(self.sessions):
            raise ValueError(f"a batch of {rows} rows for a cache of {len(self.sessions)}")
        position = self.get_seq_length()
        for ids in ids_BS.tolist():
            engine._check_tokens(ids, position)
        if count == 1 and position:
            self.settle()
            self.step = engine._begin_decode(self.sessions)
        else:
            for session in self.sessions:
                session.cycle.admit((position + count) // engine.geometry.csa_ratio)
            self.step = BatchPrefillStep([engine._begin_prefill(session, count) for session in self.sessions])

    def settle(self) -> None:
        """Level 1 after a prefill, before the first decode step."""
        if self.unsettled:
            for session in self.sessions:
                session.cycle.settle()
            self.unsettled = False

    def end(self, ids_BS: torch.Tensor) -> None:
        """Make a finished forward permanent."""
        if isinstance(self.step, DecodeStep):
            self.engine._end_decode(self.sessions, self.step)
        elif self.step is not None:
            for session, step in zip(self.sessions, self.step.steps, strict=True):
                self.engine._end_prefill(session, step)
            self.unsettled = True
        for session, ids in zip(self.sessions, ids_BS.tolist(), strict=True):
            session.ids += ids
        self.step = None


class _Layer(CacheLayerMixin):
    """What generate asks of a layer; the state is the sessions'."""

    is_sliding = True
    is_compileable = False
    is_croppable = False
    _layer_type = None  # never registered for other caches

    def __init__(self, cache: LSACache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, *_: Any, **__: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("an LSACache serves the model that flashmem is attached to, and no other")

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.cache.get_seq_length() + length, 0

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def _engine_of(model: Any) -> Engine:
    engine = getattr(model, "_flashmem", None)
    if not isinstance(engine, Engine):
        raise ValueError("flashmem is not attached to this model: call flashmem.attach(model) first")
    return engine


def _cache_and_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LSACache | None, Any]:
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    ids = kwargs.get("input_ids", args[0] if args else None)
    return (cache if isinstance(cache, LSACache) else None), ids


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    cache, ids = _cache_and_ids(args, kwargs)
    if cache is None:
        return None
    if ids is None:
        raise ValueError("flashmem needs input_ids; inputs_embeds alone is not supported")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.bool().all()):
        raise ValueError("flashmem does not run padded batches: pad tokens would be compressed into the memory")
    start = cache.get_seq_length()
    wanted = torch.arange(start, start + ids.shape[1], device=ids.device)
    positions = kwargs.get("position_ids")
    if positions is not None and not bool((positions.to(ids.device) == wanted).all()):
        raise ValueError(f"position_ids must continue the cache at {start}, got {positions.flatten()[:4].tolist()}...")
    cache.begin(ids)
    return args, kwargs | {"attention_mask": {"none": None}, "position_ids": wanted[None].expand(len(ids), -1)}


def _after_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache, ids = _cache_and_ids(args, kwargs)
    if cache is not None:
        cache.end(ids)
