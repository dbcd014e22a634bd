"""What a Memory Indexer is, beside its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..config import RopeConfig

Ensemble = Literal["max", "mean"]
QueryDtype = Literal["bf16", "fp32"]

FORMAT_VERSION = 1

PUBLISHED_ROPE = RopeConfig(theta=160_000.0, dim=64, factor=16.0, original_positions=65_536)
"""Rotary embedding of the published joint checkpoints (DeepSeek-V4-Flash)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerConfig:
    """Sizes and rules of a Memory Indexer; stored beside the weights."""

    hidden_size: int
    q_rank: int
    num_heads: int
    head_dim: int
    """Channels of an index key of the backbone."""
    layers: tuple[int, ...]
    """Target layers as CSA indices, ascending."""
    rope: RopeConfig = PUBLISHED_ROPE
    query_dtype: QueryDtype = "bf16"
    """Queries are rounded to this before and after the rotary embedding, as in the backbone they were trained on."""
    rms_norm_eps: float = 1e-6
    ensemble: Ensemble = "max"
    """How logits of target layers and observed tokens combine."""
    observation_window: int = 1
    """Hidden states of the last m tokens that the indexer was trained or calibrated to read."""
    logit_offset: float = 0.0
    """Calibration: added to the combined logit, so that probability 0.5 is the right threshold."""
    length_offsets: tuple[tuple[int, float], ...] = ()
    """Calibration by length: (chunks, offset) pairs, ascending; histories of up to so many chunks get the offset beside
    `logit_offset`, longer ones the last."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {self.format_version!r}")
        for name in ("hidden_size", "q_rank", "num_heads", "head_dim", "observation_window"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not self.layers or any(type(csa) is not int or csa < 0 for csa in self.layers):
            raise ValueError(f"layers must name at least one CSA index, got {self.layers!r}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be ascending and distinct, got {self.layers}")
        if self.rope.dim > self.head_dim:
            raise ValueError(f"rope dim {self.rope.dim} exceeds head_dim {self.head_dim}")
        if self.query_dtype not in ("bf16", "fp32"):
            raise ValueError(f"query_dtype must be 'bf16' or 'fp32', got {self.query_dtype!r}")
        if self.ensemble not in ("max", "mean"):
            raise ValueError(f"ensemble must be 'max' or 'mean', got {self.ensemble!r}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if not math.isfinite(self.logit_offset):
            raise ValueError(f"logit_offset must be finite, got {self.logit_offset}")
        bounds = [chunks for chunks, _ in self.length_offsets]
        if bounds != sorted(set(bounds)) or not all(math.isfinite(offset) for _, offset in self.length_offsets):
            raise ValueError(f"length_offsets must ascend and be finite, got {self.length_offsets}")

    def length_offset(self, num_chunks: int) -> float:
        """The offset that a history of so many chunks gets beside `logit_offset`."""
        fitting = (offset for chunks, offset in self.length_offsets if num_chunks <= chunks)
        return next(fitting, self.length_offsets[-1][1] if self.length_offsets else 0.0)

    def to_mapping(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_mapping` reads it back."""
        return {**asdict(self), "layers": list(self.layers), "length_offsets": [list(p) for p in self.length_offsets]}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> IndexerConfig:
        """Read `to_mapping`'s output. Raises ValueError naming unknown, missing or wrong entries."""
        values = {"length_offsets": (), **values}  # absent in the first files of this version
        _check_names("indexer config", values, cls)
        rope = values["rope"]
        if not isinstance(rope, Mapping) or not isinstance(values["layers"], list | tuple):
            raise ValueError("rope must be an object and layers a list")
        _check_names("rope", rope, RopeConfig)
        for name in ("rms_norm_eps", "logit_offset"):
            _check_number(name, values[name])
        for name, value in rope.items():
            _check_number(f"rope.{name}", value)
        pairs = values["length_offsets"]
        if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise ValueError(f"length_offsets must be a list of pairs, got {pairs!r}")
        for pair in pairs:
            _check_number("length_offsets", pair[0])
            _check_number("length_offsets", pair[1])
        made = {"layers": tuple(values["layers"]), "rope": RopeConfig(**rope)}
        return cls(**{**values, **made, "length_offsets": tuple((chunks, offset) for chunks, offset in pairs)})


def _check_names(what: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    names = {item.name for item in fields(cls)}
    if unknown := sorted(str(name) for name in values.keys() - names):
        raise ValueError(f"unknown {what} entries: {', '.join(unknown)}")
    if missing := sorted(names - values.keys()):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")


__all__ = ["FORMAT_VERSION", "PUBLISHED_ROPE", "Ensemble", "IndexerConfig", "QueryDtype"]
