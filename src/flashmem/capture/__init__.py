"""Capture: runs a backbone over prompts and writes the shards that the Memory Indexer is trained from.

`format` stands alone (no model, no transformers), so that training can read shards without a backbone.
"""

from .format import Csr, Document, ShardMeta, ShardReader, ShardWriter

__all__ = ["Csr", "Document", "ShardMeta", "ShardReader", "ShardWriter"]
