"""A training run: documents in a seeded order, several per step, with exact resume.

The unit is a document: its keys are read once and all its queries are scored against all its chunks. Processes share a
step's documents (accelerate: devices, mixed precision, gradients averaged over processes).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..capture.format import ShardReader
from ..indexer import IndexerConfig, MemoryIndexer
from .config import TrainConfig
from .data import PageRules, Queries, queries_of
from .losses import total_loss

CHECKPOINT, INDEXER, LOG = "checkpoint", "indexer", "log.jsonl"
Report = Callable[[Mapping[str, Any]], None]
"""Called with every row of the log."""


def page_rules(config: TrainConfig) -> PageRules:
    return PageRules(
        page_chunks=config.page_chunks, sink_pages=config.sink_pages, recency_pages=config.recency_pages
    )  # fmt: skip


class _Objective(nn.Module):
    """The loss as a module's forward, so that data-parallel wrappers see it."""

    def __init__(self, indexer: MemoryIndexer, config: TrainConfig) -> None:
        super().__init__()
        self.indexer, self.config = indexer, config

    def forward(
        self, documents: Sequence[Queries], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, parts = [], []
        for queries in documents:
            loss, named = total_loss(queries.logits(self.indexer), queries, self.config, generator)
            losses.append(loss)
            parts.append(named)
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in self.config.losses}
        return torch.stack(losses).mean(), means


class Trainer:
    """A run in a directory: `log.jsonl`, a full checkpoint that a later call resumes exactly, and the indexer."""

    def __init__(
        self, shards: ShardReader, start: MemoryIndexer, config: TrainConfig, out: str | Path, *, cpu: bool = False
    ) -> None:
        """Raises ValueError where shards, start and config do not fit together."""
        self.shards, self.config, self.out = shards, config, Path(out)
        if not len(shards):
            raise ValueError(f"{shards.directory} holds no documents")
        observe = config.observe or shards.meta.observe
        if observe > shards.meta.observe:
            raise ValueError(f"observe={observe}, but the shards hold {shards.meta.observe} hidden states per query")
        indexer = start.derive(
            layers=config.target_layers, num_heads=config.num_heads, q_rank=config.q_rank, ensemble=config.ensemble,
            observation_window=observe, seed=config.seed,
        )  # fmt: skip
        _check_fits(indexer.config, shards)
        self.accelerator = Accelerator(
            cpu=cpu, mixed_precision=config.mixed_precision, log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(self.out),
        )  # fmt: skip
        if config.documents_per_step % self.accelerator.num_processes:
            raise ValueError(
                f"documents_per_step={config.documents_per_step} must be a multiple of the "
                f"{self.accelerator.num_processes} processes"
            )
        indexer.offset.requires_grad_(False)  # calibration's, not training's
        indexer.train()
        self.optimizer = torch.optim.AdamW(
            _decay_groups(indexer, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.objective, self.optimizer = self.accelerator.prepare(_Objective(indexer, config), self.optimizer)
        self.step = 0

    @property
    def indexer(self) -> MemoryIndexer:
        return self.accelerator.unwrap_model(self.objective).indexer

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.shards) / self.config.documents_per_step)

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def _rate(self, step: int) -> float:
        warm = max(1, round(self.config.warmup * self.total_steps))
        if step < warm and self.config.warmup:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.total_steps - warm))))

    def documents(self, step: int) -> list[int]:
        """This process's documents of a step: a seeded permutation per epoch, filled up from its beginning."""
        epoch, index = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        size, share = self.config.documents_per_step, self.accelerator.num_processes
        mine = range(index * size + self.accelerator.process_index, (index + 1) * size, share)
        return [order[i % len(order)] for i in mine]

    def queries(self, index: int, generator: torch.Generator) -> Queries:
        """One document, as this run reads it."""
        config = self.config
        made = queries_of(
            self.shards[index], self.shards.meta, page_rules(config), target=dict(config.target),
            layer_weights=config.layer_weights, layers=self.indexer.target_layers,
        )  # fmt: skip
        if config.queries_per_document is not None and config.queries_per_document < len(made):
            made = made.pick(torch.randperm(len(made), generator=generator)[: config.queries_per_document])
        return made.to(self.accelerator.device)

    def train(self, *, until: int | None = None, log_every: int = 10, on_row: Report | None = None) -> None:
        """Run to the end, or to a step; writes the checkpoint and the indexer at the end of what it ran."""
        last = self.total_steps if until is None else min(until, self.total_steps)
        every = self.config.save_every or self.steps_per_epoch
        self.out.mkdir(parents=True, exist_ok=True)
        if self.config.tensorboard:
            self.accelerator.init_trackers("flashmem")
        kept: list[dict[str, float]] = []
        since = time.monotonic()
        while self.step < last:
            kept.append(self._step())
            self.step += 1
            if self.step % log_every == 0 or self.step == last:
                now = time.monotonic()
                self._log(kept, (now - since) / len(kept), on_row)
                kept, since = [], now
            if self.step % every == 0 and self.step < last:
                self.save()
        if self.config.tensorboard:
            self.accelerator.end_training()
        self.save()

    def _step(self) -> dict[str, float]:
        # one stream per step and process: a resumed run draws what the uninterrupted one would
        seed = (self.config.seed * 1_000_003 + self.step) * 1009 + self.accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        documents = [self.queries(index, generator) for index in self.documents(self.step)]
        loss, parts = self.objective(documents, generator)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip)
        values = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}, "norm": float(norm)}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {self.step}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return values

    def _log(self, kept: Sequence[Mapping[str, float]], seconds: float, on_row: Report | None) -> None:
        means = {name: sum(row[name] for row in kept) / len(kept) for name in kept[0]}
        row = {"step": self.step, **{name: round(value, 5) for name, value in means.items()}}
        row |= {"rate": float(self.schedule.get_last_lr()[0]), "seconds_per_step": round(seconds, 4)}
        if self.accelerator.is_main_process:
            with (self.out / LOG).open("a") as log:
                log.write(json.dumps(row) + "\n")
            if on_row is not None:
                on_row(row)
        if self.config.tensorboard:
            self.accelerator.log(means, step=self.step)

    def save(self) -> None:
        """Write the full checkpoint and the indexer; the old checkpoint stays until the new one is whole."""
        final, fresh = self.out / CHECKPOINT, self.out / f"{CHECKPOINT}.part"
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh), safe_serialization=True)
        if self.accelerator.is_main_process:
            state = {"step": self.step, "config": self.config.to_mapping(), "documents": list(self.shards.rids)}
            state["schedule"] = self.schedule.state_dict()
            (fresh / "run.json").write_text(json.dumps(state))
            old = self.out / f"{CHECKPOINT}.old"
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            fresh.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            self.indexer.save_pretrained(self.out / INDEXER)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on with the checkpoint in the directory. Raises ValueError for none, or one of another run."""
        folder = self.out / CHECKPOINT
        if not folder.is_dir() and (self.out / f"{CHECKPOINT}.old").is_dir():  # the process died between two renames
            folder = self.out / f"{CHECKPOINT}.old"
        if not (folder / "run.json").is_file():
            raise ValueError(f"{self.out} holds no checkpoint to resume")
        state = json.loads((folder / "run.json").read_text())
        mine = self.config.to_mapping()
        if changed := sorted(name for name in mine if mine[name] != state["config"].get(name)):
            raise ValueError(f"{folder} was made with another {changed[0]}: {state['config'].get(changed[0])!r}")
        if state["documents"] != list(self.shards.rids):
            raise ValueError(f"{folder} was made from other documents than {self.shards.directory} holds")
        self.accelerator.load_state(str(folder))
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def _decay_groups(indexer: MemoryIndexer, decay: float) -> list[dict[str, Any]]:
    trained = [p for p in indexer.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _check_fits(config: IndexerConfig, shards: ShardReader) -> None:
    g = shards.meta.geometry
    for name, found, wanted in (
        ("hidden_size", config.hidden_size, g.hidden_size),
        ("head_dim", config.head_dim, g.index_head_dim),
    ):
        if found != wanted:
            raise ValueError(f"the indexer's {name} is {found}, the shards' is {wanted}")
    if absent := sorted(set(config.layers) - set(shards.meta.layers)):
        raise ValueError(f"the shards hold CSA indices {list(shards.meta.layers)}, not {absent}")


__all__ = ["CHECKPOINT", "INDEXER", "LOG", "Trainer", "page_rules"]
