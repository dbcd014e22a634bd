"""What is trained and how: sizes of the model, stages of the curriculum, and the optimiser's settings. No tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .tokenizer import BOS_ID, EOS_ID, PAD_ID

LAYER_TYPES = {"S": "sliding_attention", "C": "compressed_sparse_attention", "H": "heavily_compressed_attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a DeepSeek-V4 model; `config` gives the stock `config.json`."""

    layers: str = "SSCHCHC"
    """S window only, C CSA, H HCA."""
    hash_layers: int = 1
    """The first so many layers route experts by token id."""
    vocab: int = 4096
    hidden: int = 256
    heads: int = 8
    head_dim: int = 128
    rope_dim: int = 32
    q_rank: int = 192
    o_groups: int = 2
    o_rank: int = 128
    window: int = 64
    experts: int = 4
    experts_per_token: int = 2
    expert_width: int = 192
    routed_scaling: float = 1.5
    swiglu_limit: float = 10.0
    streams: int = 2
    sinkhorn: int = 4
    index_heads: int = 16
    index_dim: int = 64
    index_topk: int = 64
    csa_ratio: int = 4
    hca_ratio: int = 128
    rope_theta: float = 10_000.0
    compress_theta: float = 160_000.0
    yarn_factor: float = 16.0
    yarn_original: int = 65_536
    max_positions: int = 1_048_576
    norm_eps: float = 1e-6
    hc_eps: float = 1e-6

    def __post_init__(self) -> None:
        if unknown := set(self.layers) - set(LAYER_TYPES):
            raise ValueError(f"layers must consist of S, C and H, got {''.join(sorted(unknown))!r}")
        if self.rope_dim % 2 or self.rope_dim > min(self.head_dim, self.index_dim):
            raise ValueError(f"rope_dim must be even and at most head_dim and index_dim, got {self.rope_dim}")
        if self.heads * self.head_dim % self.o_groups:
            raise ValueError(f"o_groups={self.o_groups} must divide {self.heads * self.head_dim} channels")

    @property
    def csa_layers(self) -> tuple[int, ...]:
        return tuple(index for index, kind in enumerate(self.layers) if kind == "C")

    def config(self) -> dict[str, Any]:
        """The `config.json` that transformers and `ModelGeometry` read."""
        share = self.rope_dim / self.head_dim
        compress: dict[str, Any] = {
            "rope_type": "yarn",
            "rope_theta": self.compress_theta,
            "partial_rotary_factor": share,
            "factor": self.yarn_factor,
            "original_max_position_embeddings": self.yarn_original,
            "beta_fast": 32,
            "beta_slow": 1,
            "attention_factor": 1.0,
        }
        count = len(self.layers)
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.expert_width,
            "num_hidden_layers": count,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 1,
            "head_dim": self.head_dim,
            "q_lora_rank": self.q_rank,
            "num_experts_per_tok": self.experts_per_token,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "routed_scaling_factor": self.routed_scaling,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "compress_rope_theta": self.compress_theta,
            "partial_rotary_factor": share,
            "rope_parameters": {
                "main": {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": share},
                "compress": compress,
            },
            "layer_types": [LAYER_TYPES[kind] for kind in self.layers],
            "mlp_layer_types": ["hash_moe" if i < self.hash_layers else "moe" for i in range(count)],
            "compress_rates": {LAYER_TYPES["C"]: self.csa_ratio, LAYER_TYPES["H"]: self.hca_ratio},
            "hc_mult": self.streams,
            "hc_sinkhorn_iters": self.sinkhorn,
            "hc_eps": self.hc_eps,
            "swiglu_limit": self.swiglu_limit,
            "sliding_window": self.window,
            "o_groups": self.o_groups,
            "o_lora_rank": self.o_rank,
            "index_n_heads": self.index_heads,
            "index_head_dim": self.index_dim,
            "index_topk": self.index_topk,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "hidden_act": "silu",
            "use_cache": True,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of the curriculum: rows of one length."""

    length: int
    rows: int
    steps: int
    seconds: float | None = None
    """The stage ends after so long at the latest, its set-up not counted."""
    until: float | None = None
    """The stage ends once the first tokens of values are right this often, over the families of `until_families`."""
    until_families: tuple[str, ...] = ("kv", "number")
    kinds: Mapping[str, float] = field(default_factory=dict)
    """Row kind -> share of the batch. A kind is a family, 'a+b' for families mixed in one row, 'any' for all recall
    families mixed, 'pairs', 'fwe' or 'lm'."""
    facts: tuple[float, float] = (0.1, 0.45)
    """Range of the share of fact tokens in a recall row."""
    questions: tuple[float, float] = (0.3, 0.5)
    skip: float = 0.0
    """Share of rows with a position skip."""
    hide: float = 0.0
    """Share of rows in which only some CSA layers see their entries."""
    topk: int | None = None
    """Entries that CSA layers attend to, picked by the Lightning Indexer; None means all."""
    lm_weight: float = 0.1
    learning_rate: float = 1.0
    """Factor on the run's rate."""

    def __post_init__(self) -> None:
        if self.length % 128 or self.rows < 1 or self.steps < 1:
            raise ValueError(f"a stage needs a length that is a multiple of 128, rows and steps, got {self}")
        if self.kinds and abs(sum(self.kinds.values()) - 1) > 1e-6:
            raise ValueError(f"shares of row kinds must sum to 1, got {sum(self.kinds.values())}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that determines a run, beside the corpus."""

    sizes: Sizes = field(default_factory=Sizes)
    stages: tuple[Stage, ...] = ()
    seed: int = 0
    logit_rows: int = 12_288
    """Positions per batch with logits: all answers, then prose."""
    kl_rows: int = 4_096
    """Positions per batch at which the Lightning Indexer is distilled."""
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    decay_from: float = 0.6
    """Share of the run after which the rate falls linearly."""
    final_rate: float = 0.02
    family_weight: Mapping[str, float] = field(default_factory=lambda: {"pairs": 0.15})
    """Loss share of a question of a family; 1 where not named."""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a JSON recipe; unknown keys are errors."""
        return cls.from_mapping(json.loads(Path(path).read_text()))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        known = {item.name for item in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown recipe keys: {', '.join(unknown)}")
        made = dict(values)
        made["sizes"] = Sizes(**made.get("sizes", {}))
        made["stages"] = tuple(Stage(**_tuples(stage)) for stage in made.get("stages", []))
        return cls(**made)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


__all__ = ["LAYER_TYPES", "Recipe", "Sizes", "Stage"]
