"""Everything that determines a training run of a Memory Indexer, beside the shards. No tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

LOSSES = ("bce", "focal", "pairwise", "chunk-kl", "page-kl", "budget")
TARGETS = ("mass", "vote", "evidence")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A run: what is learnt, from which labels, how long. `published` gives the recipe of the published code."""

    losses: Mapping[str, float] = field(default_factory=lambda: {"page-kl": 1.0, "chunk-kl": 0.3})
    """Loss -> weight. `bce`, `focal` and `pairwise` are the published ones; see `losses`."""
    target: Mapping[str, float] = field(default_factory=lambda: {"mass": 1.0})
    """Label -> weight in the soft target. The published losses take every chunk with any weight as positive."""
    layer_weights: Mapping[int, float] = field(default_factory=dict)
    """CSA index -> weight of its mass; empty means all alike. Labels of layers that do not retrieve are noise: measure
    what a layer is worth (zero its entries) and say so here."""
    target_layers: tuple[int, ...] | None = None
    """CSA indices to read; None means those of the indexer that training starts from."""
    observe: int | None = None
    """Hidden states of the last m tokens to read; None means all that the shards hold."""
    ensemble: Literal["max", "mean"] = "max"
    num_heads: int | None = None
    """Widen the native start to so many heads, without changing what it computes; None keeps it."""
    q_rank: int | None = None
    negatives: float | None = None
    """Published losses: negatives drawn per positive; None takes all eligible chunks."""
    focal_gamma: float = 2.0
    page_chunks: int = 64
    """Page size of the page losses; the one that is served."""
    sink_pages: int = 1
    recency_pages: int = 2
    budgets: tuple[float, float] = (0.02, 0.15)
    """Range of the share of pages that the budget loss draws from."""
    budget_width: float = 0.5
    """Logits over which the budget loss counts a page as partly in."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps."""
    clip: float = 1.0
    epochs: int = 10
    documents_per_step: int = 4
    """Over all processes."""
    queries_per_document: int | None = None
    """Drawn anew in every epoch; None takes all."""
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    save_every: int = 0
    """Steps between full checkpoints; 0 means at the end of every epoch."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not self.losses or any(weight <= 0 for weight in self.losses.values()):
            raise ValueError(f"losses must have positive weights, got {dict(self.losses)}")
        if unknown := sorted(set(self.losses) - set(LOSSES)):
            raise ValueError(f"unknown losses: {', '.join(unknown)}; known are {', '.join(LOSSES)}")
        if not self.target or set(self.target) - set(TARGETS):
            raise ValueError(f"target names {', '.join(TARGETS)}, got {dict(self.target)}")
        if any(weight < 0 for weight in (*self.target.values(), *self.layer_weights.values())):
            raise ValueError("target and layer weights must not be negative")
        for name in ("epochs", "documents_per_step", "page_chunks", "recency_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("observe", "queries_per_document", "num_heads", "q_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("sink_pages", "save_every", "focal_gamma", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, choices in (("ensemble", ("max", "mean")), ("mixed_precision", ("no", "bf16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.negatives is not None and self.negatives <= 0:
            raise ValueError(f"negatives must be positive, got {self.negatives}")
        if len(self.budgets) != 2 or not 0 < self.budgets[0] <= self.budgets[1] <= 1:
            raise ValueError(f"budgets must be two numbers in (0, 1], ascending, got {self.budgets}")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.clip <= 0 or self.budget_width <= 0:
            raise ValueError("learning_rate, clip and budget_width must be positive and warmup lie in [0, 1)")

    @classmethod
    def published(cls, **changes: Any) -> TrainConfig:
        """Focal BCE on three negatives per voted chunk, newest hidden state only (public code, train.py and README)."""
        values: dict[str, Any] = {
            "losses": {"focal": 1.0}, "target": {"vote": 1.0}, "negatives": 3.0, "observe": 1, "learning_rate": 1e-4,
            "warmup": 0.0,
        }  # fmt: skip
        return cls(**(values | changes))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The settings in a YAML (or JSON) file, for `from_mapping`."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of settings")
        return values

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """What YAML or JSON gave. Raises ValueError for unknown keys and values of another type."""
        names = {item.name for item in fields(cls)}
        if unknown := sorted(map(str, values.keys() - names)):
            raise ValueError(f"unknown training settings: {', '.join(unknown)}; known are {', '.join(sorted(names))}")
        kinds = {item.name: str(item.type) for item in fields(cls)}
        return cls(**{name: _read(name, kinds[name], value) for name, value in values.items()})

    def to_mapping(self) -> dict[str, Any]:
        """What JSON can hold; `from_mapping` reads it back."""
        return json.loads(json.dumps(asdict(self)))


def _read(name: str, kind: str, value: Any) -> Any:
    """A value of a field annotated `kind`."""
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    if kind == "float":
        return _number(name, value)
    if (kind, type(value)) in (("int", int), ("bool", bool)):
        return value
    if kind.startswith("Literal"):
        return "no" if value is False else value  # YAML reads a bare no as false
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(_read(name, "int" if "int" in kind else "float", item) for item in value)
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        key = int if "int" in kind else str
        return {key(item): _number(name, weight) for item, weight in value.items()}
    raise ValueError(f"{name} must be {kind}, got {value!r}")


def _number(name: str, value: Any) -> float:
    """A finite number; YAML 1.1 reads 1e-4 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return number


__all__ = ["LOSSES", "TrainConfig"]
