"""Training by sentence-transformers: the scorer, losses, labels and optimiser of `loop` in its Trainer's hands.

    shards, start = ShardReader("shards"), MemoryIndexer.from_pretrained("shards/native")
    trainer = indexer_trainer(shards, start, TrainConfig(), "run")
    trainer.train()
    trainer.model.save_pretrained("indexer", create_model_card=False)  # MemoryIndexer.from_pretrained reads it

To the framework a document's id is a text, and a batch of documents a batch of texts. The order of documents, random
streams, checkpoints and logs are the framework's. Needs the extra `st`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Module
from sentence_transformers.util import load_dir_path
from torch import nn

from ..capture.format import ShardReader
from ..indexer import MemoryIndexer
from .config import TrainConfig
from .loop import learning_rate_share, make_optimizer, read_queries, starting_indexer, steps_per_epoch
from .losses import total_loss


class IndexerModule(Module):  # type: ignore[misc]
    """A Memory Indexer as the only module of a SentenceTransformer: `queries` of documents in, `logits` out."""

    save_in_root = True  # so that the model's directory is an indexer's directory

    def __init__(self, indexer: MemoryIndexer) -> None:
        super().__init__()
        self.indexer = indexer

    def preprocess(self, inputs: Sequence[str], **_: Any) -> dict[str, list[str]]:
        """Ids stay ids: the loss has the shards. `input_ids` is the name by which the Trainer knows an input."""
        return {"input_ids": list(inputs)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**features, "logits": [queries.logits(self.indexer) for queries in features["queries"]]}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        self.indexer.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **found: Any) -> IndexerModule:
        where = {name: found.get(name) for name in ("token", "cache_folder", "revision")}
        where["local_files_only"] = found.get("local_files_only", False)
        return cls(MemoryIndexer.from_pretrained(load_dir_path(model_name_or_path, subfolder, **where)))


class DocumentLoss(nn.Module):
    """The losses of a TrainConfig over the documents of a batch."""

    def __init__(self, model: SentenceTransformer, shards: ShardReader, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.shards, self.config = model, shards, config
        self.layers = model[0].indexer.target_layers

    def forward(self, features: Sequence[Mapping[str, Any]], labels: torch.Tensor | None = None) -> torch.Tensor:
        # drawn from torch's own stream, which the framework's checkpoints restore
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        device = next(self.model.parameters()).device
        documents = [
            read_queries(self.shards, rid, self.layers, self.config, generator).to(device)
            for feature in features
            for rid in feature["input_ids"]
        ]
        scored = self.model({"queries": documents})["logits"]
        losses = [
            total_loss(logits_QN, queries, self.config, generator)[0]
            for logits_QN, queries in zip(scored, documents, strict=True)
        ]
        return torch.stack(losses).mean()


def indexer_trainer(
    shards: ShardReader, start: MemoryIndexer, config: TrainConfig, out: str | Path, **arguments: Any
) -> SentenceTransformerTrainer:
    """The Trainer of a run with these settings; `arguments` go over what SentenceTransformerTrainingArguments get.

    The learning rate and its schedule are those of `config` and of its number of steps. Raises ValueError where shards,
    start and config do not fit together.
    """
    indexer = starting_indexer(start, shards, config)
    processes = PartialState(cpu=arguments.get("use_cpu", False)).num_processes
    if config.documents_per_step % processes:
        raise ValueError(
            f"documents_per_step={config.documents_per_step} must be a multiple of the {processes} processes"
        )
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": config.documents_per_step // processes,
        "num_train_epochs": config.epochs,
        "max_grad_norm": config.clip,
        "bf16": config.mixed_precision == "bf16",
        "seed": config.seed,
        "logging_steps": 10,
        "save_strategy": "steps" if config.save_every else "epoch",
        "save_steps": config.save_every or 1,
        "report_to": "tensorboard" if config.tensorboard else "none",
    }
    args = SentenceTransformerTrainingArguments(**settings | arguments)
    model = SentenceTransformer(modules=[IndexerModule(indexer)], device=str(args.device))
    optimizer = make_optimizer(indexer, config)
    steps = config.epochs * steps_per_epoch(len(shards), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps, config.warmup)
    )
    return SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"document": list(shards.rids)}),
        loss=DocumentLoss(model, shards, config),
        optimizers=(optimizer, schedule),
    )


__all__ = ["DocumentLoss", "IndexerModule", "indexer_trainer"]
