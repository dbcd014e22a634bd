"""For people who keep their own transformers code: `attach` a model, then `generate` with an `LSACache`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .backbone.fused import FusedStep
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
        self.step: BatchPrefillStep | DecodeStep | FusedStep | None = None
        self.unfinished = False
        """True from `begin` to `end`: still true at the next `begin` if a forward failed."""

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
        if self.unfinished:  # the last forward failed
            engine._roll_back(self.sessions)
            self.step = None
        if not self.sessions:
            self._open(rows)
        if rows != len(self.sessions):
            raise ValueError(f"a batch of {rows} rows for a cache of {len(self.sessions)}")
        self.unfinished = True
        position = self.get_seq_length()
        for ids in ids_BS.tolist():
            engine._check_tokens(ids, position)
        if count == 1 and position:
            self.step = engine._begin_decode(self.sessions)
        else:
            for session in self.sessions:
                session.cycle.admit((position + count) // engine.geometry.csa_ratio)
            self.step = BatchPrefillStep([engine._begin_prefill(session, count) for session in self.sessions])

    def _open(self, rows: int) -> None:
        """Open one session per row, or none."""
        try:
            for _ in range(rows):
                self.sessions.append(self.engine.session())
        except BaseException:
            self.close()
            raise

    def end(self, ids_BS: torch.Tensor) -> None:
        """Make a finished forward permanent."""
        if isinstance(self.step, BatchPrefillStep):
            for session, step in zip(self.sessions, self.step.steps, strict=True):
                self.engine._end_prefill(session, step)
        elif self.step is not None:
            self.engine._end_decode(self.sessions, self.step)
        for session, ids in zip(self.sessions, ids_BS.tolist(), strict=True):
            session.ids += ids
        self.step, self.unfinished = None, False


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


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    cache = _cache_of(named)
    if cache is None:
        return None
    if cache.engine is not getattr(model, "_flashmem", None):
        raise ValueError("this LSACache was made for another model, or before flashmem was detached")
    ids = named.get("input_ids")
    if ids is None:
        raise ValueError("flashmem needs input_ids; inputs_embeds alone is not supported")
    if not ids.shape[1]:
        raise ValueError("flashmem needs at least one token per row")
    if torch.is_grad_enabled():
        raise ValueError("an LSACache is for inference: call the model under torch.no_grad()")
    asked = named.get("output_attentions")
    if asked or (asked is None and getattr(model.config, "output_attentions", False)):
        raise ValueError("flashmem has no attention weights to return: leave output_attentions off")
    _check_mask(named.get("attention_mask"))
    start = cache.get_seq_length()
    wanted = torch.arange(start, start + ids.shape[1], device=ids.device)
    positions = named.get("position_ids")
    if positions is not None and not bool((positions.to(ids.device) == wanted).all()):
        raise ValueError(f"position_ids must continue the cache at {start}, got {positions.flatten()[:4].tolist()}...")
    cache.begin(ids)
    return (), named | {"attention_mask": {"none": None}, "position_ids": wanted[None].expand(len(ids), -1)}


def _after_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_of(kwargs)  # as the hook before the forward left them: all by name
    if cache is not None:
        cache.end(kwargs["input_ids"])


def _cache_of(named: dict[str, Any]) -> LSACache | None:
    """The LSACache among a forward's arguments, under its name in older or newer transformers."""
    found = (named.get(name) for name in ("past_key_values", "cache"))
    return next((cache for cache in found if isinstance(cache, LSACache)), None)


def _check_mask(mask: Any) -> None:
    """Only a mask that masks nothing can be honoured."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError("flashmem makes its own masks: give a 2-dimensional attention_mask of ones, or none")
    if not bool(mask.bool().all()):
        raise ValueError("flashmem does not run padded batches: pad tokens would be compressed into the memory")
