"""Where the time of a decode step goes: a mark between every two components of it, and what each lasted.

A step is measured twice. First whole: its wall time, the device's time from the first to the last kernel, and what the
first step of a window adds. Then with a mark at each boundary between components; on a CUDA device a mark is an event
in the stream, and in the graph if steps are captured. Marks cost time themselves, as much each: this is taken off, so
that the components of a step add up to the device's time, and with the host's gap to the step.

What no component claims is the component `OTHER`. A negative time is a component that is shorter than its marks.
`limits_ms` says how long the bytes that a component must read take at the rate of a copy on the device, measured in the
same run: weights once, index keys of resident chunks, windows and the entries that attention reads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import mean
from typing import Any

import torch

from ..backbone import fused as fused_step
from ..backbone import steps
from ..backbone.fused import FusedStep
from ..backbone.graphs import DecodeGraphs
from ..backbone.steps import DecodeStep
from ..engine import Engine, Session
from ..kernels.select_chunks import fused as select
from ..lookahead import Cycle, level_1
from ..store import SessionPages, resident
from ..store.batch import DecodeBatch
from . import report
from .decode import TOKEN, fill_sessions, run_on_engine, split_batches, warm_steps
from .kernel_timing import copy_bytes_per_second
from .skeleton import Mode, Skeleton

OTHER = "embedding, rotary tables, final norm"
STREAMS = "mHC and norms of layers"
MODULES = {
    "self_attn": "attention: norms, rotary embedding", "self_attn.q_a_proj": "attention projections",
    "self_attn.q_b_proj": "attention projections", "self_attn.kv_proj": "attention projections",
    "self_attn.o_a_proj": "attention projections", "self_attn.o_b_proj": "attention projections",
    "input_layernorm": STREAMS, "post_attention_layernorm": STREAMS, "attn_hc": STREAMS, "ffn_hc": STREAMS,
    "mlp": "MoE: rest", "mlp.gate": "MoE: router", "mlp.experts": "MoE: experts",
    "mlp.shared_experts": "MoE: shared expert",
}  # fmt: skip
"""Components of a layer's modules; the layer's own time mixes the streams of mHC, and in fused steps collapses and
normalises them too: one component, so that steps on both kernels can be compared."""
BOOKKEEPING = "step: indices and rings"
_OF_BOTH = (("project", "compressor: projections"), ("encode_rows", "compressor: encode"))
FUNCTIONS = (
    (steps, "index_query", "level 2: query"), (fused_step, "project_query", "level 2: query"),
    (fused_step, "select_resident", "level 2: top-k"), (select, "prepare_queries", "level 2: query"),
    (select, "score_ranks", "level 2: scores"), (select, "topk_ranks", "level 2: top-k"),
    (steps, "lightning_scores", "level 2: scores"), (steps, "topk_chunks", "level 2: top-k"),
    (DecodeBatch, "keys", "gather of pages"), (DecodeBatch, "kv", "gather of pages"),
    (DecodeBatch, "chunk_ids", "gather of pages"), (DecodeBatch, "write", "put rows"),
    (steps, "decode_rows", "gather of pages"), (resident, "encode_entries", "compressor: encode"),
    (resident, "put_rows", "put rows"), (fused_step, "put_rows", "put rows"),
    (steps, "pool_rings", "compressor: pooling"), (steps, "pool_plain", "compressor: pooling"),
    (fused_step, "pool_newest", "compressor: pooling"), (fused_step, "first_token_rope", "compressor: pooling"),
    *((owner, name, component) for owner in (fused_step, steps) for name, component in _OF_BOTH),
)  # fmt: skip
BOUNDARY = (
    (Cycle, "_logits", "level 1: scores"), (level_1, "score_group", "level 1: scores"),
    (level_1, "select_group", "level 1: selection"), (SessionPages, "evict", "swaps"),
    (SessionPages, "prefetch", "swaps"), (SessionPages, "flip", "swaps"),
)  # fmt: skip


class Marks:
    """The components of the latest step, by the marks between them; the innermost component owns the time."""

    def __init__(self, device: torch.device, fine: bool) -> None:
        self.device, self.fine = device, fine
        self._marks: list[tuple[Any, str]] = []
        """Marks, and the component that begins there."""
        self._open: list[str] = []

    def start(self) -> None:
        self._marks, self._open = [], []
        self.enter(OTHER)

    def stop(self) -> None:
        assert self._open == [OTHER], f"components left open: {self._open}"
        self._marks.append((self._now(), ""))
        self._open = []

    def enter(self, component: str) -> None:
        self._open.append(component)
        self._marks.append((self._now(), component))

    def leave(self) -> None:
        self._open.pop()
        self._marks.append((self._now(), self._open[-1]))

    @property
    def running(self) -> bool:
        return bool(self._open)

    def seconds(self) -> tuple[dict[str, float], Counter[str]]:
        """Seconds and marks of every component; waits for the device."""
        report.synchronizer(self.device)()
        took: dict[str, float] = {}
        marks: Counter[str] = Counter()
        for (mark, component), (after, _) in zip(self._marks, self._marks[1:], strict=False):
            took[component] = took.get(component, 0.0) + _between(mark, after)
            marks[component] += 1
        return took, marks

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event


def _between(mark: Any, after: Any) -> float:
    return float(after - mark) if isinstance(mark, float) else 1e-3 * float(mark.elapsed_time(after))


# ---- putting the marks


@contextmanager
def marked(engine: Engine, marks: Marks) -> Iterator[None]:
    """Mark what this engine decodes; graphs are captured anew, with the marks and afterwards without."""
    backbone, layers = engine.backbone, engine.backbone.model.model.layers
    with ExitStack() as undo:
        undo.enter_context(_replaced(type(backbone), "decode", _whole(marks)))
        if marks.fine:
            for owner, name, component in FUNCTIONS:
                undo.enter_context(_replaced(owner, name, _part(marks, lambda *_, c=component: c)))
            for owner in (FusedStep, DecodeStep):
                undo.enter_context(_replaced(owner, "attend", _part(marks, lambda *_: BOOKKEEPING, first=_Kind())))
                undo.enter_context(_replaced(owner, "_put", _part(marks, lambda *_: BOOKKEEPING)))
            for owner, name in ((fused_step, "attend_rows"), (steps, "attend")):
                undo.enter_context(_replaced(owner, name, _part(marks, lambda *_: _Kind.now)))
            for layer in layers:
                undo.enter_context(_hooked(layer, marks, STREAMS))
                for name, component in MODULES.items():
                    undo.enter_context(_hooked(layer.get_submodule(name), marks, component))
            undo.enter_context(_hooked(backbone.model.model.hc_head, marks, STREAMS))
            undo.enter_context(_hooked(backbone.model.lm_head, marks, "lm head"))
        _forget_graphs(engine)
        yield
    _forget_graphs(engine)


class _Kind:
    """The kind of the layer whose attention runs."""

    now = ""

    def __call__(self, step: Any, attention: Any, *_: Any) -> None:
        _Kind.now = _attention(step.pool.geometry.layer_kinds[attention.layer_idx])


def _attention(kind: str) -> str:
    return "attention: window only" if kind == "window" else f"attention: {kind.upper()} and window"


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _whole(marks: Marks) -> Wrap:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            marks.start()
            result = function(*args, **kwargs)
            marks.stop()
            return result

        return run

    return wrap


def _part(marks: Marks, component: Callable[..., str], first: Callable[..., None] = lambda *_: None) -> Wrap:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not marks.running:  # level 1 and a prefill use some of the functions of a step
                return function(*args, **kwargs)
            first(*args)
            marks.enter(component())
            result = function(*args, **kwargs)
            marks.leave()
            return result

        return run

    return wrap


@contextmanager
def _replaced(owner: Any, name: str, wrap: Wrap) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _hooked(module: torch.nn.Module, marks: Marks, component: str) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: marks.enter(component) if marks.running else None)
    after = module.register_forward_hook(lambda *_: marks.leave() if marks.running else None)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _forget_graphs(engine: Engine) -> None:
    if engine.graphs is not None:
        engine.graphs = DecodeGraphs(engine.backbone)


@contextmanager
def _boundary_times(engine: Engine, seconds: dict[str, float]) -> Iterator[None]:
    """Add up what level 1, the selection and the swaps take, each waited for."""
    synchronize = report.synchronizer(engine.backbone.input_device)

    def timed(component: str) -> Wrap:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                results: list[Any] = []
                took = report.timed(lambda: results.append(function(*args, **kwargs)), synchronize)
                seconds[component] = seconds.get(component, 0.0) + took
                return results[0]

            return run

        return wrap

    with ExitStack() as undo:
        for owner, name, component in (*BOUNDARY, (type(engine.policy), "select", "level 1: selection")):
            undo.enter_context(_replaced(owner, name, timed(component)))
        yield


# ---- measuring


def run_profile(
    skeleton: Skeleton,
    *,
    context: int,
    modes: Sequence[Mode],
    batches: Sequence[int],
    windows: int,
    device_budget_bytes: int,
    host_budget_bytes: int,
    on_row: report.OnRow = report.unheard,
) -> list[dict[str, Any]]:
    """One row per mode and batch; a batch that the budgets do not hold is a row that says so."""
    model, rows = skeleton.model(), list[dict[str, Any]]()
    for mode in modes:
        memory = skeleton.session_memory(mode, context, steps_of_all(skeleton, batches, windows))
        fit = memory.sessions(device_budget_bytes, host_budget_bytes)
        wanted, too_many = split_batches(mode, context, batches, fit)
        rows += too_many
        if wanted:
            run = partial(_profile_batches, rows, mode, wanted, context, windows, on_row)
            run_on_engine(skeleton, model, mode, context, wanted[-1], memory, run)
    return rows


def _profile_batches(
    rows: list[dict[str, Any]], mode: Mode, batches: Sequence[int], context: int, windows: int, on_row: report.OnRow,
    engine: Engine,
) -> None:  # fmt: skip
    for batch in batches:
        fill_sessions(engine, mode, batch, context)
        row = {"context": context, "mode": mode, "batch": batch, **profile(engine, engine.sessions, windows)}
        report.log(f"{mode}: batch {batch}, {row['step_ms']:.2f} ms a step")
        rows.append(row)
        on_row(row)


def steps_of_all(skeleton: Skeleton, batches: Sequence[int], windows: int) -> int:
    """Steps that the first session decodes: per batch those for warmth, the windows, and two windows for the marks."""
    return len(batches) * (warm_steps(skeleton.tau) + (windows + 2) * skeleton.tau)


def parts(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row as lines: part, ms, share of a step inside a window, and limit_ms; the parts of a step add up to it."""
    if "failed" in row:
        yield {"part": row["failed"], "ms": None, "share": None, "limit_ms": None}
        return
    step, limits = row["step_ms"], row["limits_ms"]
    lines = {**row["components_ms"], "host, not hidden by the device": row["host_gap_ms"], "a step": step}
    lines |= {f"first step of a window, beside that: {name}": ms for name, ms in row["boundary_ms"].items()}
    lines[f"mean step over windows of {row['tau']}"] = row["mean_step_ms"]
    for part, ms in lines.items():
        yield {"part": part, "ms": ms, "share": ms / step, "limit_ms": limits.get(part)}


def profile(engine: Engine, sessions: Sequence[Session], windows: int) -> dict[str, Any]:
    """Milliseconds of a step inside a window by component, and of what its first step adds. Means, not medians: they
    add up."""
    device, tau = engine.backbone.input_device, engine.config.tau
    for session in sessions:
        session.cycle.settle()  # all clocks alike
    whole, boundary_seconds = Marks(device, fine=False), dict[str, float]()
    with marked(engine, whole):
        list(_steps(engine, sessions, warm_steps(tau)))
        with _boundary_times(engine, boundary_seconds):
            steps_taken = list(_steps(engine, sessions, windows * tau, whole))
    inside = [(wall, took) for wall, first, took in steps_taken if not first]
    firsts = [wall for wall, first, _ in steps_taken if first]
    fine = Marks(device, fine=True)
    with marked(engine, fine):
        list(_steps(engine, sessions, tau - 1))  # to the end of a window: components are those of the last step
        parts = [took for _, first, took in _steps(engine, sessions, tau, fine) if not first]
    step, device_time = mean(wall for wall, _ in inside), mean(sum(took.values()) for _, took in inside)
    counts = fine.seconds()[1]
    raw = {name: mean(took.get(name, 0.0) for took in parts) for name in counts}
    mark = (sum(raw.values()) - device_time) / (counts.total() - 1)
    components = {name: seconds - mark * counts[name] for name, seconds in raw.items()}
    components[OTHER] += mark  # the measurement without marks has one interval of its own
    rate = copy_bytes_per_second(device) if device.type == "cuda" else None
    sizes = component_bytes(engine, sessions)
    return {
        "windows": windows,
        "kernels": engine.config.kernels,
        "cuda_graphs": engine.config.cuda_graphs,
        "step_ms": _ms(step),
        "device_ms": _ms(device_time),
        "host_gap_ms": _ms(step - device_time),
        "mark_us": round(1e6 * mark, 3),
        "marks": counts.total(),
        "components_ms": {name: _ms(components[name]) for name in sorted(components, key=lambda at: -components[at])},
        "bytes": sizes,
        "copy_gb_per_s": None if rate is None else round(rate / 1e9, 1),
        "limits_ms": {} if rate is None else {name: _ms(size / rate) for name, size in sizes.items()},
        "first_step_of_window_ms": _ms(mean(firsts)),
        "boundary_ms": _boundary(boundary_seconds, mean(firsts) - step, windows),
        "tau": tau,
        "mean_step_ms": _ms(mean(wall for wall, _, _ in steps_taken)),
    }


def component_bytes(engine: Engine, sessions: Sequence[Session]) -> dict[str, int]:
    """Bytes that a step must read or write, by component, for those where it can be said."""
    g, layout, model = engine.geometry, engine.layout, engine.backbone.model
    found: Counter[str] = Counter({"lm head": _weights(model.lm_head)})
    for layer in model.model.layers:
        for name, component in MODULES.items():
            if name not in ("self_attn", "mlp"):  # their own weights are norms
                found[component] += _weights(layer.get_submodule(name))
        if (compressor := layer.self_attn.compressor) is not None:
            pools = [compressor, *([compressor.indexer] if hasattr(compressor, "indexer") else [])]
            found["compressor: projections"] += sum(_weights(x.kv_proj) + _weights(x.gate_proj) for x in pools)
            for indexer in pools[1:]:
                found["level 2: query"] += _weights(indexer.q_b_proj) + _weights(indexer.scorer.weights_proj)
    picks = min(model.config.num_experts_per_tok * len(sessions), model.config.n_routed_experts)
    found["MoE: experts"] = found["MoE: experts"] * picks // model.config.n_routed_experts
    itemsize = model.lm_head.weight.element_size()
    token = (g.sliding_window + 2 * g.num_heads) * g.head_dim * itemsize  # window, queries and results
    for session in sessions:
        chunks = min(session.pages.num_chunks, len(session.pages.resident) * layout.page_chunks)
        found["level 2: scores"] += len(g.csa_layers) * chunks * (layout.key_form.row_bytes + 4)  # and a score of each
        entries = {"csa": min(g.index_topk, chunks), "hca": session.state.num_hca_entries(), "window": 0}
        for kind in g.layer_kinds:
            found[_attention(kind)] += token + entries[kind] * layout.kv_spec.entry_bytes
    return dict(found)


def _weights(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _boundary(seconds: Mapping[str, float], extra: float, windows: int) -> dict[str, float]:
    """What the first step of a window takes more than another, by component."""
    per_window = {name: total / windows for name, total in seconds.items()}
    return {name: _ms(value) for name, value in {**per_window, "other": extra - sum(per_window.values())}.items()}


def _steps(
    engine: Engine, sessions: Sequence[Session], count: int, marks: Marks | None = None
) -> Iterator[tuple[float, bool, dict[str, float]]]:
    """Decode; yields a step's wall time, whether it was the first of its window, and the components."""
    synchronize = report.synchronizer(engine.backbone.input_device)
    for _ in range(count):
        first = sessions[0].cycle.steps >= engine.config.tau or sessions[0].cycle.due
        wall = report.timed(lambda: engine.decode(sessions, [TOKEN] * len(sessions)), synchronize)
        yield wall, first, {} if marks is None else marks.seconds()[0]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 5)


__all__ = [
    "FUNCTIONS",
    "MODULES",
    "OTHER",
    "STREAMS",
    "Marks",
    "component_bytes",
    "marked",
    "parts",
    "profile",
    "run_profile",
    "steps_of_all",
]
