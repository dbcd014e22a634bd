"""`Engine`: a loaded model with its page store. `Session`: one timeline of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import accounting
from .backbone import Backbone, StatePool, load_model
from .backbone.fused import FusedStep, FusedSteps, check_fused
from .backbone.fused_prefill import FusedPrefillStep
from .backbone.graphs import DecodeGraphs
from .backbone.steps import DecodeStep, PickObserver, PrefillStep
from .config import LSAConfig, ModelDefaults, ModelGeometry, check_sampling
from .indexer import MemoryIndexer
from .kernels.kv_codec import KVFormatSpec
from .lookahead import Cycle, SlotShare, choose
from .memory import SavedMemory, open_memory, save_memory
from .policy import make_policy
from .store import PageStore, RecordLayout
from .types import DamagedError, FlashmemError, Policy

_FORMAT_OF_DTYPE: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SELECTING = (
    "keep", "threshold", "floor_pages", "ceiling_pages", "sink_pages", "recency_pages", "ensemble", "seed", "tau",
    "lead",
)  # fmt: skip
"""Settings that a memory must share with an engine to go on with its window; else level 1 runs when it is opened."""
_SAMPLES_PER_TENSOR = 64  # elements of every weight that enter a model's fingerprint


class Engine:
    """A loaded DeepSeek-V4, swapped to read pages, and everything that its sessions share."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        indexer: MemoryIndexer | None = None,
        config: LSAConfig | None = None,
    ) -> None:
        """Take over a loaded `DeepseekV4ForCausalLM` (until `close`).

        Without an indexer, the backbone's own Lightning Indexer at the default target layers stands in for it.
        Raises ValueError for what does not fit together, BudgetError for budgets too small to work in.
        """
        self.config = config or LSAConfig()
        self.tokenizer = tokenizer
        self.policy = make_policy(self.config)
        self.backbone = Backbone(model)
        try:
            self._build(model, indexer)
        except BaseException:
            self.backbone.detach()
            raise

    def _build(self, model: Any, indexer: MemoryIndexer | None) -> None:
        config, backbone, g = self.config, self.backbone, self.backbone.geometry
        self.geometry = g
        _check_fits(config, g)
        kv_format = _resolve_format(config, backbone.dtype)
        targets = indexer.target_layers if indexer is not None else g.default_targets()
        if targets[-1] >= len(g.csa_layers):
            raise ValueError(f"the indexer reads CSA index {targets[-1]}, the model has {len(g.csa_layers)} CSA layers")
        self.scorers: dict[str, MemoryIndexer] = {}
        if indexer is None or self.policy.scorer == "native" or config.rescue:
            self.scorers["native"] = self._placed(MemoryIndexer.native(model, layers=targets))
        self.indexer = self.scorers["native"] if indexer is None else self._placed(indexer)
        self.scorers["memory"] = self.indexer
        target_layers = tuple(g.csa_layers[csa] for csa in targets)
        self.layout = RecordLayout(
            g, page_chunks=config.page_chunks, kv_format=kv_format, target_layers=target_layers,
            device_of_layer=backbone.device_of_layer,
        )  # fmt: skip
        budget_slots = (config.device_budget_bytes or 0) // self.layout.record_bytes
        self.share = SlotShare.of(config, g, budget_slots, self.layout.record_bytes)
        self.states = StatePool(
            g, dtype=backbone.dtype, device_of_layer=backbone.device_of_layer, target_layers=target_layers,
            observation_window=config.observation_window or self.indexer.config.observation_window,
            hca_format=KVFormatSpec(kv_format, g.head_dim, g.compress_rope.dim),
        )  # fmt: skip
        self.store = PageStore(
            self.layout, dtype=backbone.dtype, device_budget_bytes=config.device_budget_bytes,
            host_budget_bytes=config.host_budget_bytes, disk_path=config.disk_path,
            disk_budget_bytes=config.disk_budget_bytes,
        )  # fmt: skip
        self.fused = FusedSteps(self.states) if config.kernels == "fused" else None
        if config.prefill_kernels == "fused":
            check_fused(self.states, "prefill_kernels")
        self.graphs = DecodeGraphs(backbone) if config.cuda_graphs else None
        self.sessions: list[Session] = []
        self._batch: tuple[tuple[Session, ...], Any] | None = None
        self._fingerprint: str | None = None

    def _placed(self, scorer: MemoryIndexer) -> MemoryIndexer:
        """The scorer, each part beside its layer."""
        _check_indexer(scorer, self.backbone)
        scorer.eval()
        for csa, part in scorer.layers.items():
            part.to(self.backbone.device_of_layer[self.geometry.csa_layers[csa]])
        return scorer

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        *,
        indexer: MemoryIndexer | str | Path | None = None,
        config: LSAConfig | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        **model_arguments: Any,
    ) -> Engine:
        """Load a local directory or a hub name with transformers, and its tokenizer if it has one.

        `device` is where the whole model goes (CUDA if there is one); `device_map` spreads layers instead.
        `model_arguments` go to transformers' `from_pretrained` (quantization_config, revision, max_memory, ...).
        An `indexer/` folder in a local model directory is used where no indexer is given, and its `flashmem.json`
        (`ModelDefaults`) where no config is, or where dtype is "auto".
        """
        defaults = ModelDefaults.of(model_dir)
        config = config or defaults.config()
        dtype = defaults.dtype if dtype == "auto" else dtype
        make_policy(config)  # before a big model is loaded for nothing
        bundled = Path(model_dir) / "indexer"
        if indexer is None and bundled.is_dir():
            indexer = bundled
        if isinstance(indexer, str | Path):
            indexer = MemoryIndexer.from_pretrained(indexer)
        model, tokenizer = load_model(
            model_dir, device=device, dtype=dtype, device_map=device_map, **model_arguments
        )  # fmt: skip
        return cls(model, tokenizer, indexer=indexer, config=config)

    @classmethod
    def demo(cls, *, config: LSAConfig | None = None, device: str | torch.device | None = None) -> Engine:
        """Load the small model that flashmem ships (docs/models/demo.md), on the CPU by default."""
        directory = accounting.shipped_model()
        assert directory is not None, "the package lacks its model"
        return cls.from_pretrained(directory, config=config, device=device or "cpu")

    def session(self) -> Session:
        """Open an empty session; raises BudgetError's base where `max_sessions` are open under a device budget."""
        if self.config.device_budget_bytes is not None and len(self.sessions) >= self.config.max_sessions:
            raise FlashmemError(f"max_sessions={self.config.max_sessions} sessions are open under the device budget")
        session = Session(self)
        self.sessions.append(session)
        return session

    def open(self, path: str | Path) -> Session:
        """Open a saved memory as a session; raises DamagedError or ValueError where it is damaged or does not fit."""
        memory = open_memory(path)
        for name, wanted in self.identity().items():
            if (found := memory.session.get(name)) != wanted:
                raise DamagedError(f"{path} was made with {name} {found!r}; this engine has {wanted!r}")
        session = self.session()
        try:
            session._load(memory)
        except BaseException:
            session.close()
            raise
        return session

    def resume(self, snapshot: SavedMemory, *, policy: Policy | None = None, rescue: bool | None = None) -> Session:
        """A new session that goes on from a snapshot of one of this engine's sessions.

        A policy, or a choice about rescue, is this session's own from now on; level 1 then selects at once.
        """
        session, own = self.session(), policy is not None or rescue is not None
        try:
            if own:
                session.select_by(policy, rescue=rescue)
            session._load(snapshot, select=own)
        except BaseException:
            session.close()
            raise
        return session

    @torch.no_grad()
    def decode(self, sessions: Sequence[Session], tokens: Sequence[int]) -> torch.Tensor:
        """Run one token of each session, of whatever lengths, in one batch; returns float32 logits [B, V].

        Raises ValueError for sessions that are closed, foreign, repeated or too long; nothing is changed then.
        """
        if not sessions or len(sessions) != len(tokens) or len(set(map(id, sessions))) != len(sessions):
            raise ValueError(
                f"{len(tokens)} tokens for {len(sessions)} sessions, which must be distinct and at least one"
            )
        for session, token in zip(sessions, tokens, strict=True):
            session._check_ready(self)
            self._check_tokens([token], session.state.position)
        try:
            logits, step = self._decode(sessions, torch.tensor(tokens))
        except BaseException:
            self._roll_back(sessions)
            raise
        self._end_decode(sessions, step)
        for session, token, row in zip(sessions, tokens, logits, strict=True):
            session.ids[session.state.position - 1 :] = [token]  # in place: no cost that grows with the context
            session.next_logits = row
        return logits

    def generate(self, sessions: Sequence[Session], *, max_new_tokens: int = 64, **sampling: Any) -> list[list[int]]:
        """Continue several sessions in ragged batches; returns the new token ids of each, greedy by default."""
        check_sampling(max_new_tokens=max_new_tokens, **sampling)
        streams = [session._sampler(**sampling) for session in sessions]
        new: list[list[int]] = [[] for _ in sessions]
        live = list(range(len(sessions)))
        for session in sessions:
            session._flush()
        for _ in range(max_new_tokens):
            chosen = {i: streams[i](sessions[i].next_logits) for i in live}
            for i, token in chosen.items():
                new[i].append(token)
                sessions[i].ids.append(token)
            live = [i for i in live if chosen[i] not in self.stop_ids and len(new[i]) < max_new_tokens]
            if not live:
                break
            self.decode([sessions[i] for i in live], [chosen[i] for i in live])
        return new

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = self.backbone.model.generation_config.eos_token_id
        return frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)

    def fingerprint(self) -> str:
        """Short hash of the model's config and of samples of all its weights."""
        if self._fingerprint is None:
            config = self.backbone.model.config.to_dict()
            for volatile in (
                "transformers_version",
                "_name_or_path",
                "dtype",
                "torch_dtype",
                "architectures",
                "use_cache",
            ):
                config.pop(volatile, None)
            digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
            for name, tensor in sorted(self.backbone.model.state_dict().items()):
                flat = tensor.detach().flatten()
                stride = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
                sample = flat[::stride][:_SAMPLES_PER_TENSOR].float().cpu()
                digest.update(f"{name} {tuple(tensor.shape)} {sample.tolist()}".encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def close(self) -> None:
        """Close all sessions, free all tiers and give the model back as it was."""
        for session in list(self.sessions):
            session.close()
        self.store.close()
        self.backbone.detach()

    def check(self) -> None:
        """Raise AssertionError if any invariant of the engine or of its sessions is broken."""
        self.store.check()
        for session in self.sessions:
            session.check()

    def identity(self) -> dict[str, Any]:
        """What a memory and an engine must have in common."""
        return {
            "dtype": str(self.backbone.dtype).removeprefix("torch."),  # first: it changes the fingerprint too
            "model": self.fingerprint(),
            "kv_format": self.layout.kv_format,
            "page_chunks": self.layout.page_chunks,
            "target_layers": list(self.layout.target_layers),
            "record_bytes": self.layout.record_bytes,
            "observation_window": self.states.observation_window,
        }

    def _check_tokens(self, ids: Sequence[int], position: int) -> None:
        vocab, longest = self.geometry.vocab_size, self.geometry.max_positions
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise ValueError(f"token ids must lie in 0..{vocab - 1}, got {bad[0]}")
        if position + len(ids) > longest:
            raise ValueError(f"{position + len(ids)} tokens exceed the model's {longest} positions")

    def _begin_prefill(self, session: Session, count: int) -> PrefillStep:
        chunks = (session.state.position + count) // self.geometry.csa_ratio - session.pages.num_chunks
        session.cycle.before_prefill_chunk()
        session.pages.reserve(chunks)
        if self.config.prefill_kernels == "fused" and self.on_prefill_picks is None:
            return FusedPrefillStep(session.state, session.pages, count)
        return PrefillStep(session.state, session.pages, count, self.on_prefill_picks)

    def _end_prefill(self, session: Session, step: PrefillStep) -> None:
        step.finish()
        session.pages.commit(step.end // self.geometry.csa_ratio - session.pages.num_chunks)

    def _decode(self, sessions: Sequence[Session], ids: torch.Tensor) -> tuple[torch.Tensor, DecodeStep | FusedStep]:
        """Logits [B, V] of one step, which `_end_decode` makes permanent."""
        size = None if self.graphs is None else self.graphs.size(len(sessions))
        step = self._begin_decode(sessions, size=size)
        if self.graphs is not None and isinstance(step, FusedStep):
            return self.graphs.run(step, ids), step
        return self.backbone.decode(step, ids), step

    def _begin_decode(
        self, sessions: Sequence[Session], on_picks: PickObserver | None = None, *, size: int | None = None
    ) -> DecodeStep | FusedStep:
        """A step of these sessions; on the fused kernels with pads up to `size`."""
        visible = [(session.state.position + 1) // self.geometry.csa_ratio for session in sessions]
        selecting = [session.cycle for session in sessions if session.cycle.selects_next]
        choices = dict(zip(map(id, selecting), choose(selecting), strict=True))
        for session, count in zip(sessions, visible, strict=True):
            session.cycle.before_step(choices.get(id(session.cycle)))
            session.pages.reserve(count - session.pages.num_chunks)
        states, observer = [session.state for session in sessions], on_picks or self.on_picks
        if self.fused is not None and observer is None:  # the fused kernels have no scores and weights to show
            rows = self.store.rows_in_place([session.pages for session in sessions], visible, size)
            return self.fused.step(states, rows, size)
        if self._batch is None or self._batch[0] != tuple(sessions):
            self._batch = tuple(sessions), self.store.batch([session.pages for session in sessions])
        pages = self._batch[1]
        pages.begin(visible)
        return DecodeStep(states, pages, observer)

    on_picks: PickObserver | None = None
    """Sees the chunks that level 2 picks in every decode step (evaluation, oracle)."""
    on_prefill_picks: PickObserver | None = None
    """Likewise in prefill, where each token has its own picks (capture); it costs time and memory."""

    def _end_decode(self, sessions: Sequence[Session], step: DecodeStep | FusedStep) -> None:
        step.finish()
        for session in sessions:
            session.pages.commit(session.state.position // self.geometry.csa_ratio - session.pages.num_chunks)
            session.cycle.after_step()

    def _roll_back(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            session.pages.rollback()


class Session:
    """One timeline: the tokens appended and generated so far, and what the model keeps of them.

    Make one with `Engine.session` or `Engine.open`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = engine.states.open()
        self.pages = engine.store.open_session()
        self.cycle = Cycle(engine.config, engine.policy, engine.scorers, self.state, self.pages, engine.share)
        self.ids: list[int] = []
        """All tokens; the last one may not have been run yet (`state.position` were)."""
        self.next_logits: torch.Tensor | None = None
        """Float32 logits [V] of the token after `ids`, once all of them have run."""
        self.closed = False

    def append(self, content: str | Sequence[int], *, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Read text or token ids: prefill over the whole history, then level 1.

        `on_progress(done, total)` is called after every prefill chunk, in tokens. Raises BudgetError before any work
        if the tokens cannot be held, ValueError for bad tokens. If a forward fails, the tokens that ran stay.
        """
        new = self._encode(content)
        self._check_open()
        if not new:
            return
        self._run([*self.ids[self.state.position :], *new], on_progress)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Append a prompt if given, then decode until a stop token; returns text, or ids without a tokenizer."""
        ids = list(
            self.stream(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        )  # fmt: skip
        tokenizer = self.engine.tokenizer
        return ids if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)

    def stream(
        self, prompt: str | Sequence[int] | None = None, *, max_new_tokens: int = 64, **sampling: Any
    ) -> Iterator[int]:
        """As `generate`, yielding token ids as they are decided."""
        check_sampling(max_new_tokens=max_new_tokens, **sampling)
        choose = self._sampler(**sampling)
        if prompt is not None:
            self.append(prompt)
        self._flush()
        for index in range(max_new_tokens):
            token = choose(self.next_logits)
            self.ids.append(token)
            yield token
            if token in self.engine.stop_ids or index + 1 == max_new_tokens:
                return
            self.engine.decode([self], [token])

    def stats(self) -> dict[str, Any]:
        """Bytes per tier and in the paper's accounting, cycles, pages and bytes moved, misses and fallbacks."""
        layout, cycle, traffic = self.engine.layout, self.cycle.stats, self.pages.traffic
        report, tiers = self.report(), self.pages.tier_bytes()
        return {
            "tokens": self.state.position,
            "pages": report.num_pages,
            "resident_pages": report.resident_pages,
            "resident_bytes_paper": report.paper.resident_bytes,
            "full_bytes_paper": report.paper.full_bytes,
            "device_bytes_all_in": report.all_in.device_bytes,
            "full_bytes_all_in": report.all_in.full_bytes,
            "tiers": {name: {"pages": tier.pages, "bytes": tier.bytes} for name, tier in tiers.items()},
            "state_bytes": self.state.nbytes(),
            "index_row_bytes": sum(self.pages.index_rows(layer).nbytes for layer in layout.target_layers),
            "cycles": cycle.cycles,
            "selected_pages": cycle.selected_pages,
            "truncated": cycle.truncated,
            "pages_moved": traffic.pages_to_device,
            "bytes_moved": traffic.bytes_to_device,
            "bytes_to_host": traffic.bytes_to_host,
            "bytes_to_disk": traffic.bytes_to_disk,
            "page_copies": self.pages.store.pool.copies.name,
            "misses": cycle.misses,
            "looks": cycle.looks,
            "fallbacks": cycle.fallbacks,
            "widened": cycle.widened,
            "early": cycle.early,
        }

    def report(self) -> accounting.KVReport:
        """The accounting formulas at this session's measured page counts and capacities."""
        engine, tiers = self.engine, self.pages.tier_bytes()
        capacities = [len(rows.data) for rows in self.state.entries.values()]
        return accounting.kv_report(
            engine.geometry,
            self.state.position,
            kv_format=engine.layout.kv_format,
            state_format=_FORMAT_OF_DTYPE[engine.backbone.dtype],
            page_chunks=engine.layout.page_chunks,
            num_targets=len(engine.layout.target_layers),
            observation_window=engine.states.observation_window,
            resident_pages=len(self.pages.resident),
            host_pages=tiers["host"].pages,
            disk_pages=tiers["disk"].pages + tiers["saved"].pages,
            slack_pages=tiers["device"].pages - len(self.pages.resident),
            hca_capacity=capacities[0] if capacities else None,
            row_capacity=self.pages.index_row_bytes
            // (len(engine.layout.target_layers) * (engine.geometry.index_head_dim + 4)),
        )

    def save(self, path: str | Path) -> None:
        """Write a memory directory, atomically replacing an older one; `Engine.open` continues from it."""
        self._check_open()
        session, state = self._export()
        records = (record for _, record in self.pages.export_pages())
        save_memory(path, session, state, records, self.pages.num_pages, self.engine.layout.record_bytes)

    def snapshot(self) -> SavedMemory:
        """This session as it is now, in memory, for `Engine.resume`; pages of an opened memory are shared with it."""
        self._check_open()
        session, state = self._export()
        state = {name: tensor.clone() for name, tensor in state.items()}  # index rows are views where all is on a CPU
        return SavedMemory(session, state, self.pages.snapshot())

    def select_by(self, policy: Policy | None = None, *, rescue: bool | None = None) -> None:
        """Use another policy, or another choice about rescue, from the next level 1 on; the engine's stays as it is."""
        engine, cycle = self.engine, self.cycle
        cycle.policy = policy or cycle.policy
        if rescue is not None:
            cycle.config = replace(cycle.config, rescue=rescue)
        if (cycle.policy.scorer == "native" or cycle.config.rescue) and "native" not in engine.scorers:
            native = MemoryIndexer.native(engine.backbone.model, layers=engine.indexer.target_layers)
            engine.scorers["native"] = engine._placed(native)

    def close(self) -> None:
        """Free this session's bytes in every tier."""
        if not self.closed:
            self.closed = True
            self.engine.sessions.remove(self)
            self.engine._batch = None
            self.pages.close()
            self.state.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.state.check()
        self.pages.check()
        self.cycle.check()
        assert self.pages.num_chunks == self.state.position // self.engine.geometry.csa_ratio
        assert self.state.position in (len(self.ids), max(0, len(self.ids) - 1))

    @torch.no_grad()
    def _run(self, ids: list[int], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Prefill ids that follow the position; they replace what of `self.ids` has not run."""
        engine, first = self.engine, self.state.position
        engine._check_tokens(ids, first)
        chunks = (first + len(ids)) // engine.geometry.csa_ratio
        self.cycle.admit(chunks)
        self.pages.ensure_room(chunks - self.pages.num_chunks)
        with self._held_history(chunks, len(ids)):
            for start in range(0, len(ids), engine.config.prefill_chunk):
                self._run_chunk(ids[start : start + engine.config.prefill_chunk])
                if on_progress is not None:
                    on_progress(min(start + engine.config.prefill_chunk, len(ids)), len(ids))
        self.cycle.settle()

    def _run_chunk(self, ids: list[int]) -> None:
        """One forward of a prefill."""
        engine = self.engine
        try:
            step = engine._begin_prefill(self, len(ids))
            logits = engine.backbone.prefill(step, torch.tensor(ids))
        except BaseException:
            engine._roll_back([self])
            raise
        engine._end_prefill(self, step)
        self.ids[self.state.position - len(ids) :] = ids
        self.next_logits = logits[0]

    def _held_history(self, num_chunks: int, tokens: int) -> AbstractContextManager[object]:
        """Hold the history on the devices while so many tokens are read, if that spares anything.

        It does not for a single forward, nor where all pages stay on the device anyway.
        """
        engine, budget = self.engine, self.engine.config.history_budget_bytes
        if tokens <= engine.config.prefill_chunk or self.cycle.keeps_all:
            return nullcontext()
        if budget is None:
            on_cpu = all(device.type == "cpu" for device in engine.layout.devices)
            budget = 0 if on_cpu else engine.store.pool.spare_bytes() // 2
        return self.pages.held_history(num_chunks, budget) if budget else nullcontext()

    def _flush(self) -> None:
        """Run a token that was generated but not run; make sure that there is something to continue from."""
        self._check_open()
        if self.state.position < len(self.ids):
            self.engine.decode([self], self.ids[self.state.position :])
        if self.next_logits is None:
            raise ValueError("the session has nothing to continue from: append something, or give a prompt")

    def _encode(self, content: str | Sequence[int]) -> list[int]:
        if not isinstance(content, str):
            return [int(i) for i in content]
        if self.engine.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids")
        return list(self.engine.tokenizer(content, add_special_tokens=not self.ids)["input_ids"])

    def _sampler(
        self, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Callable[[torch.Tensor | None], int]:
        generator = torch.Generator().manual_seed(seed)

        def choose(logits: torch.Tensor | None) -> int:
            assert logits is not None
            if temperature == 0:
                return int(logits.argmax())
            scaled = (logits - logits.max()).cpu().double() / temperature  # at most 0: no temperature overflows it
            probabilities, order = scaled.softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
            return int(order[torch.multinomial(probabilities, 1, generator=generator)])

        return choose

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the session is closed")

    def _check_ready(self, engine: Engine) -> None:
        self._check_open()
        if self.engine is not engine:
            raise ValueError("the session belongs to another engine")

    def _export(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a memory holds beside its pages: JSON values and CPU tensors."""
        layers = self.engine.layout.target_layers
        state = self.state.export() | {f"index_rows.{layer}": self.pages.index_rows(layer).cpu() for layer in layers}
        state["ids"] = torch.tensor(self.ids, dtype=torch.int64)
        if self.next_logits is not None:
            state["next_logits"] = self.next_logits.cpu()
        return self.engine.identity() | {
            "position": self.state.position,
            "num_chunks": self.pages.num_chunks,
            "policy": self.cycle.policy.name,
            "settings": self._settings(),
            "cycle": self.cycle.export(),
        }, state

    @torch.no_grad()
    def _load(self, memory: SavedMemory, *, select: bool = False) -> None:
        values, state = memory.session, memory.state
        self._check_saved(values, state)
        rows = {layer: state[f"index_rows.{layer}"] for layer in self.engine.layout.target_layers}
        self.state.load(state, values["position"])
        self.pages.import_saved(memory.records, values["num_chunks"], rows)
        self.ids = state["ids"].tolist()
        if "next_logits" in state:
            self.next_logits = state["next_logits"].to(self.engine.backbone.input_device)
        self.cycle.load(values["cycle"], same_settings=not select and values["settings"] == self._settings())

    def _check_saved(self, values: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        """Raise DamagedError where a memory's parts do not belong together."""
        g, ids, position = self.engine.geometry, state.get("ids"), values["position"]
        if ids is None or ids.dtype is not torch.int64 or ids.dim() != 1:
            raise DamagedError("the memory's state file lacks its token ids")
        if len(ids) not in (position, position + bool(position)) or values["num_chunks"] != position // g.csa_ratio:
            raise DamagedError(
                f"the memory is damaged: {len(ids)} token ids, position {position} and {values['num_chunks']} chunks"
            )
        if bool(((ids < 0) | (ids >= g.vocab_size)).any()) or len(ids) > g.max_positions:
            raise DamagedError("the memory is damaged: its token ids are not this model's")
        for layer in self.engine.layout.target_layers:
            rows = state.get(f"index_rows.{layer}")
            if rows is None or rows.dtype is not torch.uint8:
                raise DamagedError(f"the memory's state file lacks the index rows of layer {layer}")
        logits = state.get("next_logits")  # none in a session that a caller's own code ran
        if logits is not None and (logits.dtype is not torch.float32 or tuple(logits.shape) != (g.vocab_size,)):
            raise DamagedError(f"the memory is damaged: next_logits are {logits.dtype} {tuple(logits.shape)}")

    def _settings(self) -> dict[str, Any]:
        """What decides about a session's next selection, as JSON values."""
        config = self.engine.config
        return {"policy": self.cycle.policy.name} | {name: getattr(config, name) for name in _SELECTING}


def _resolve_format(config: LSAConfig, dtype: torch.dtype) -> Any:
    exact = _FORMAT_OF_DTYPE.get(dtype)
    if exact is None:
        raise ValueError(f"flashmem runs float32 and bfloat16 models, got {dtype}")
    if config.kv_format in ("auto", exact):
        return exact
    if config.kv_format != "fp8":
        raise ValueError(f"kv_format {config.kv_format!r} does not fit a {dtype} model; choose 'auto' or 'fp8'")
    return "fp8"


def _check_fits(config: LSAConfig, geometry: ModelGeometry) -> None:
    """A page or a window beyond the model's longest text is a slip, and would be allocated."""
    longest = geometry.max_positions
    for name, tokens in (
        ("page_chunks", config.page_chunks * geometry.csa_ratio),
        ("observation_window", config.observation_window or 1),
    ):
        if tokens > longest:
            raise ValueError(f"{name} {getattr(config, name)}: {tokens} tokens exceed the model's {longest} positions")


def _check_indexer(indexer: MemoryIndexer, backbone: Backbone) -> None:
    g, config = backbone.geometry, indexer.config
    for name, found, wanted in (
        ("hidden_size", config.hidden_size, g.hidden_size),
        ("head_dim", config.head_dim, g.index_head_dim),
    ):
        if found != wanted:
            raise ValueError(f"the indexer's {name} is {found}, the model's is {wanted}")
