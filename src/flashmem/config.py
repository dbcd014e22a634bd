"""Every setting, frozen and validated on construction. Imports nothing from the package.

`ModelGeometry` is what flashmem needs to know of a DeepSeek-V4 model; `LSAConfig` is what a user may choose, and
`ModelDefaults` what a model directory chooses where the user does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

LayerKind = Literal["window", "csa", "hca"]
KVFormat = Literal["fp32", "bf16", "fp8"]

_KIND_OF_LAYER_TYPE: Mapping[str, LayerKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_KIND_OF_RATIO: Mapping[int, LayerKind] = {0: "window", 4: "csa", 128: "hca"}

_NUMBERS: Mapping[str, type[Any]] = {"int": Integral, "float": Real}

PUBLISHED_TARGETS = (10, 12, 20)
"""CSA indices that the published Memory Indexer reads (transformer layers 22, 26 and 42 of V4-Flash)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Interleaved rotary embedding of the trailing `dim` channels, with optional YaRN frequencies."""

    theta: float
    dim: int
    factor: float = 1.0
    """YaRN factor; 1 means plain frequencies."""
    original_positions: int = 65_536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"rope dim must be a positive even number, got {self.dim}")
        if self.theta <= 1 or self.factor < 1:
            raise ValueError(f"rope theta must exceed 1 and factor be at least 1, got {self.theta} and {self.factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGeometry:
    """The sizes of a DeepSeek-V4 model, from its `config.json`; no tensors, no transformers."""

    layer_kinds: tuple[LayerKind, ...]
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    csa_ratio: int
    hca_ratio: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    compress_rope: RopeConfig
    """Rotary embedding of CSA and HCA layers, of their entries and of the index keys; dim counts channels of a head."""
    rms_norm_eps: float
    hc_mult: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    max_positions: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name == "num_shared_experts" else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{item.name} must be at least {least}, got {value}")
        if "csa" not in self.layer_kinds:
            raise ValueError("the model has no CSA layer: there is nothing for flashmem to page")
        if self.compress_rope.dim > min(self.head_dim, self.index_head_dim):
            raise ValueError(
                f"rope dim {self.compress_rope.dim} exceeds head_dim {self.head_dim} or "
                f"index_head_dim {self.index_head_dim}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def csa_layers(self) -> tuple[int, ...]:
        """Transformer layer of each CSA index."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "csa")

    @property
    def hca_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "hca")

    def default_targets(self) -> tuple[int, ...]:
        """CSA indices read by the Memory Indexer: the published ones if the model has them, else at most three."""
        count = len(self.csa_layers)
        if count > PUBLISHED_TARGETS[-1]:
            return PUBLISHED_TARGETS
        if count <= 3:
            return tuple(range(count))
        return tuple(sorted({count // 2, (3 * count) // 4, count - 1}))

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> ModelGeometry:
        """Read a `config.json` mapping, in the published (V4-Flash) or in the transformers spelling.

        Raises ValueError naming what is missing or unsupported.
        """
        if config.get("model_type") != "deepseek_v4":
            raise ValueError(f"model_type must be 'deepseek_v4', got {config.get('model_type')!r}")

        head_dim = _int(config, "head_dim")
        rates = _mapping(config, "compress_rates")
        return cls(
            layer_kinds=_layer_kinds(config, _int(config, "num_hidden_layers")),
            hidden_size=_int(config, "hidden_size"),
            vocab_size=_int(config, "vocab_size"),
            num_heads=_int(config, "num_attention_heads"),
            head_dim=head_dim,
            q_lora_rank=_int(config, "q_lora_rank"),
            o_groups=_int(config, "o_groups"),
            o_lora_rank=_int(config, "o_lora_rank"),
            sliding_window=_int(config, "sliding_window"),
            csa_ratio=_int(rates, "compressed_sparse_attention", _int(config, "compress_rate_csa", 4)),
            hca_ratio=_int(rates, "heavily_compressed_attention", _int(config, "compress_rate_hca", 128)),
            index_heads=_int(config, "index_n_heads"),
            index_head_dim=_int(config, "index_head_dim"),
            index_topk=_int(config, "index_topk"),
            compress_rope=_compress_rope(config, head_dim),
            rms_norm_eps=_float(config, "rms_norm_eps", 1e-6),
            hc_mult=_int(config, "hc_mult", 4),
            moe_intermediate_size=_int(config, "moe_intermediate_size"),
            num_experts=_int(config, "n_routed_experts"),
            num_experts_per_token=_int(config, "num_experts_per_tok"),
            num_shared_experts=_int(config, "n_shared_experts", 1),
            max_positions=_int(config, "max_position_embeddings", 1_048_576),
        )

    @classmethod
    def from_json(cls, path: str | Path) -> ModelGeometry:
        """Read a model directory or its `config.json`."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no model config at {path}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no model config: it holds no JSON object")
        return cls.from_mapping(values)


def _layer_kinds(config: Mapping[str, Any], num_layers: int) -> tuple[LayerKind, ...]:
    tables: dict[str, Mapping[Any, LayerKind]] = {"layer_types": _KIND_OF_LAYER_TYPE, "compress_ratios": _KIND_OF_RATIO}
    key = next((key for key in tables if config.get(key) is not None), None)
    if key is None:
        raise ValueError("the model config has neither 'layer_types' nor 'compress_ratios'")
    names, table = config[key], tables[key]
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) < num_layers:
        raise ValueError(f"{key} must be a list of {num_layers} layers, got {names!r}")
    if unknown := sorted({repr(name) for name in names[:num_layers] if not isinstance(name, str | int)
                          or name not in table}):  # fmt: skip
        raise ValueError(f"unknown {key}: {', '.join(unknown)}")
    return tuple(table[name] for name in names[:num_layers])  # a trailing entry belongs to the MTP layer


def _compress_rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    given = _mapping(config, "rope_parameters")
    nested = _mapping(given, "compress")
    flat = nested or _mapping(config, "rope_scaling") or given
    theta = _float(nested, "rope_theta", _float(config, "compress_rope_theta", 160_000.0))
    partial = _float(config, "partial_rotary_factor", _float(flat, "partial_rotary_factor", 64 / 512))
    dim = _int(config, "qk_rope_head_dim", int(head_dim * partial))
    kind = flat.get("rope_type", flat.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim)
    if kind != "yarn":
        raise ValueError(f"rope type {kind!r} is not supported; 'default' and 'yarn' are")
    return RopeConfig(
        theta=theta,
        dim=dim,
        factor=_float(flat, "factor"),
        original_positions=_int(flat, "original_max_position_embeddings"),
        beta_fast=_float(flat, "beta_fast", 32),
        beta_slow=_float(flat, "beta_slow", 1),
    )


def _int(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a config file; raises ValueError that names its key."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"the model config lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    return value


def _float(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"the model config lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return float(value)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object of a config file, empty where there is none."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class LSAConfig:
    """What a user chooses about Lookahead Sparse Attention."""

    policy: Any = "lsa"
    """'lsa', 'all', 'recency', 'random', 'carry-over', 'native', or an object with the protocol `types.Policy`."""
    page_chunks: int = 64
    """Chunks per page, a power of two from 4; 64 chunks are 256 tokens."""
    tau: int = 64
    """Decode steps per cycle: level 1 runs once per cycle."""
    lead: int = 0
    """Level 1 starts this many steps before the window boundary so that copies overlap with decoding."""
    threshold: float = 0.5
    """A chunk is wanted when its probability exceeds this."""
    keep: float | None = None
    """Fixed budget: share of all pages to keep resident, sink and recency included; None means the threshold rule."""
    floor_pages: int = 4
    """The threshold rule selects at least this many pages beside the always-kept ones (if there are as many)."""
    ceiling_pages: int | None = None
    """The threshold rule selects at most this many pages beside the always-kept ones; None means no ceiling."""
    sink_pages: int = 1
    """First pages, always kept."""
    recency_pages: int = 2
    """Last pages, always kept; the page being filled counts."""
    observation_window: int | None = None
    """Hidden states of the last m tokens that level 1 reads; None means the indexer's own setting (1 as published)."""
    ensemble: Literal["max", "mean"] | None = None
    """How logits of target layers and observed tokens combine; None means the indexer's own setting."""
    rescue: bool = False
    """Widen the budget or re-run level 1 early when the selection is seen to be too small (see `lookahead.cycle`)."""
    rescue_interval: int = 8
    """Decode steps between two looks at the target layers' own lightning scores."""
    rescue_recall: float = 0.5
    """Least share of the lightning top-k that must be resident; below it level 1 runs early."""
    kv_format: Literal["auto"] | KVFormat = "auto"
    """Format of the records; 'auto' is the model's own dtype, hence exact."""
    device_budget_bytes: int | None = None
    """Bytes of the device pool, over all devices; None lets it grow with what sessions need."""
    max_sessions: int = 1
    """With a device budget: sessions that may be open at a time; each is promised an equal share of the pool."""
    host_budget_bytes: int | None = None
    disk_budget_bytes: int | None = None
    disk_path: str | None = None
    """Directory of the disk tier; None means no disk tier."""
    history_budget_bytes: int | None = None
    """Bytes of the devices, beside the pool, that an append of several prefill forwards may hold the history in; 0: it
    reads keys and entries from where they are for every forward. None: half of what is free, on a CPU nothing."""
    prefill_chunk: int = 512
    """Tokens per prefill forward."""
    kernels: Literal["reference", "fused"] = "reference"
    """What decode steps and level 1 run on: PyTorch over gathered entries, or Triton where they lie (CUDA only)."""
    prefill_kernels: Literal["reference", "fused"] = "reference"
    """The same for prefill; on the reference where `Engine.on_prefill_picks` is set."""
    cuda_graphs: bool = False
    """Decode by replaying captured CUDA graphs: fused kernels, all layers on one device, and best a device budget."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if self.page_chunks < 4 or self.page_chunks & (self.page_chunks - 1):
            raise ValueError(f"page_chunks must be a power of two from 4, got {self.page_chunks}")
        for name in ("tau", "rescue_interval", "prefill_chunk", "recency_pages", "max_sessions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.observation_window is not None and self.observation_window < 1:
            raise ValueError(f"observation_window must be at least 1, got {self.observation_window}")
        for name in ("floor_pages", "sink_pages", "lead"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lead >= self.tau:
            raise ValueError(f"lead must be below tau={self.tau}, got {self.lead}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")
        if self.ceiling_pages is not None and self.ceiling_pages < self.floor_pages:
            raise ValueError(f"ceiling_pages must be at least floor_pages={self.floor_pages}, got {self.ceiling_pages}")
        if not 0 <= self.rescue_recall <= 1:
            raise ValueError(f"rescue_recall must lie in [0, 1], got {self.rescue_recall}")
        if self.ensemble not in (None, "max", "mean"):
            raise ValueError(f"ensemble must be 'max' or 'mean', got {self.ensemble!r}")
        if self.kv_format not in ("auto", "fp32", "bf16", "fp8"):
            raise ValueError(f"kv_format must be 'auto', 'fp32', 'bf16' or 'fp8', got {self.kv_format!r}")
        for name in ("kernels", "prefill_kernels"):
            if getattr(self, name) not in ("reference", "fused"):
                raise ValueError(f"{name} must be 'reference' or 'fused', got {getattr(self, name)!r}")
        if self.cuda_graphs and self.kernels != "fused":
            raise ValueError("cuda_graphs needs kernels='fused'")
        for name in ("device_budget_bytes", "host_budget_bytes", "disk_budget_bytes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.history_budget_bytes is not None and self.history_budget_bytes < 0:
            raise ValueError(f"history_budget_bytes must not be negative, got {self.history_budget_bytes}")
        if self.disk_budget_bytes is not None and self.disk_path is None:
            raise ValueError("disk_budget_bytes needs disk_path")

    def _check_types(self) -> None:
        """Settings also come from files: raise ValueError where a number is none."""
        for item in fields(self):
            kind = str(item.type).removesuffix(" | None")
            value = getattr(self, item.name)
            if value is None and "None" in str(item.type):
                continue
            if kind in ("int", "float") and (isinstance(value, bool) or not isinstance(value, _NUMBERS[kind])):
                raise ValueError(f"{item.name} must be {'an integer' if kind == 'int' else 'a number'}, got {value!r}")
            if kind == "bool" and not isinstance(value, bool):
                raise ValueError(f"{item.name} must be true or false, got {value!r}")
            if kind == "str" and not isinstance(value, str):
                raise ValueError(f"{item.name} must be a text, got {value!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LSAConfig:
        names = {item.name for item in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"unknown options: {', '.join(unknown)}; known are {', '.join(sorted(names))}")
        return cls(**values)


def check_sampling(*, max_new_tokens: int = 1, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
    """Raise ValueError for decoding options that mean nothing."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number from 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")


MODEL_DEFAULTS = "flashmem.json"
_NOT_OF_A_MODEL = (
    "device_budget_bytes", "max_sessions", "host_budget_bytes", "disk_budget_bytes", "disk_path",
    "history_budget_bytes", "seed", "kernels", "prefill_kernels", "cuda_graphs",
)  # fmt: skip
"""What belongs to a machine or a run: a directory from elsewhere must not choose where we write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefaults:
    """What a model directory says about its use: an optional `flashmem.json` beside `config.json`."""

    lsa: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `LSAConfig`, by name, for whoever gives no others."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type to load the weights in where none is given; 'auto' is the checkpoint's own."""
    question: str = "{question}"
    """The form in which `flashmem ask` and `flashmem chat` put a question to this model."""

    def __post_init__(self) -> None:
        if not isinstance(self.lsa, Mapping) or not isinstance(self.question, str):
            raise ValueError("lsa must be an object and question a text")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype must be 'auto', 'bfloat16' or 'float32', got {self.dtype!r}")
        if wrong := sorted(self.lsa.keys() & set(_NOT_OF_A_MODEL)):
            raise ValueError(f"a model must not set {', '.join(wrong)}")
        if self.question.count("{question}") != 1:
            raise ValueError(f"question must hold {{question}} once, got {self.question!r}")
        self.config()

    def config(self, **given: Any) -> LSAConfig:
        """The given settings and, for what is not given, the model's. Raises ValueError for unknown or bad ones.

        A given threshold asks for the threshold rule: the model's `keep` is no part of it.
        """
        dropped = {"keep"} if "threshold" in given and "keep" not in given else set()
        own = {name: value for name, value in self.lsa.items() if name not in dropped}
        return LSAConfig.from_mapping(own | given)

    def ask(self, question: str) -> str:
        """A question in the model's form."""
        return self.question.replace("{question}", question)

    @classmethod
    def of(cls, model: str | Path) -> ModelDefaults:
        """Read a local model directory's file; defaults of our own where there is none, or the model is a hub name."""
        path = Path(model) / MODEL_DEFAULTS
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object")
            if unknown := sorted(values.keys() - {item.name for item in fields(cls)}):
                raise ValueError(f"unknown entries {', '.join(unknown)}")
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


__all__ = [
    "MODEL_DEFAULTS",
    "PUBLISHED_TARGETS",
    "KVFormat",
    "LSAConfig",
    "LayerKind",
    "ModelDefaults",
    "ModelGeometry",
    "RopeConfig",
    "check_sampling",
]
