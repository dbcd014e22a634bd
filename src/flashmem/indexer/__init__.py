"""The Memory Indexer (level 1): hidden states in, one logit per chunk out.

One scorer for training, evaluation and serving (`scorer`), the ensemble over target layers (`memory`), rotary embedding
from positions (`rope`), files (`checkpoint`), and the backbone's own indexer as a start (`native`).
"""

from __future__ import annotations

from .config import FORMAT_VERSION, PUBLISHED_ROPE, Ensemble, IndexerConfig, QueryDtype
from .memory import MemoryIndexer
from .rope import MAX_POSITION, apply_rope, rope_cos_sin, rope_frequencies, rotate_interleaved
from .scorer import LayerScorer

__all__ = [
    "FORMAT_VERSION",
    "MAX_POSITION",
    "PUBLISHED_ROPE",
    "Ensemble",
    "IndexerConfig",
    "LayerScorer",
    "MemoryIndexer",
    "QueryDtype",
    "apply_rope",
    "rope_cos_sin",
    "rope_frequencies",
    "rotate_interleaved",
]
