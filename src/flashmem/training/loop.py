"""A training run: documents in a seeded order, several per step, with exact resume.

The unit is a document: its keys are read once and all its queries are scored against all its chunks. Processes share a
step's documents (accelerate: devices, gradients averaged over processes).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
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
        self, documents: Sequence[tuple[Queries, torch.Generator]]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, parts = [], []
        rounds = self.config.mixed_precision == "bf16"
        for queries, generator in documents:
            with torch.autocast(queries.need.device.type, torch.bfloat16, enabled=rounds):
                logits_QN = queries.logits(self.indexer)
            loss, named = total_loss(logits_QN, queries, self.config, generator)
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
        indexer = starting_indexer(start, shards, config)
        if config.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("tensorboard=true needs tensorboard: pip install 'flashmem[train]'")
        # precision is the objective's: accelerate's holds for the whole process and cannot change from run to run
        self.accelerator = Accelerator(
            cpu=cpu, mixed_precision="no", log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(self.out),
        )  # fmt: skip
        # without a GPU, accelerate takes the processes of a launcher for as many single ones unless it is told cpu=True
        if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != self.accelerator.num_processes:
            raise ValueError(
                f"launched as {launched} processes, but {self.accelerator.num_processes} would train together; "
                "without GPUs, pass --cpu"
            )
        if config.documents_per_step % self.accelerator.num_processes:
            raise ValueError(
                f"documents_per_step={config.documents_per_step} must be a multiple of the "
                f"{self.accelerator.num_processes} processes"
            )
        self.optimizer = make_optimizer(indexer, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_share(step, self.total_steps, config.warmup)
        )
        self.objective, self.optimizer = self.accelerator.prepare(_Objective(indexer, config), self.optimizer)
        self.step = 0

    @property
    def indexer(self) -> MemoryIndexer:
        return self.accelerator.unwrap_model(self.objective).indexer

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.shards), self.config)

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def documents(self, step: int) -> list[tuple[int, torch.Generator]]:
        """This process's documents of a step: a seeded permutation per epoch, filled up from its beginning.

        Each comes with the stream of its random draws, which is the same whichever process has it, resumed or not.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.shards), generator=_stream(self.config.seed * 1_000_003 + epoch)).tolist()
        size = self.config.documents_per_step
        places = range(self.accelerator.process_index, size, self.accelerator.num_processes)
        seed = (self.config.seed * 1_000_003 + step) * 1009
        return [(order[(index * size + place) % len(order)], _stream(seed + place)) for place in places]

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
        layers, device = self.indexer.target_layers, self.accelerator.device
        documents = [
            (read_queries(self.shards, index, layers, self.config, stream).to(device), stream)
            for index, stream in self.documents(self.step)
        ]
        loss, parts = self.objective(documents)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip)
        named = {"loss": loss.detach(), **parts, "norm": torch.as_tensor(norm).to(loss)}
        means = self.accelerator.reduce(torch.stack(list(named.values())), reduction="mean").tolist()
        values = dict(zip(named, means, strict=True))
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
        self.accelerator.wait_for_everyone()  # every process writes its own random state
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


def starting_indexer(start: MemoryIndexer, shards: ShardReader, config: TrainConfig) -> MemoryIndexer:
    """The indexer that a run trains. Raises ValueError where shards, start and config do not fit together."""
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
    indexer.offset.requires_grad_(False)  # calibration's, not training's
    return indexer.train()


def make_optimizer(indexer: MemoryIndexer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; norm weights do not decay."""
    trained = [p for p in indexer.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def learning_rate_share(step: int, total_steps: int, warmup: float) -> float:
    """Linear to 1 over the warm-up, then a cosine to 0."""
    warm = max(1, round(warmup * total_steps)) if warmup else 0
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total_steps - warm))))


def steps_per_epoch(documents: int, config: TrainConfig) -> int:
    return math.ceil(documents / config.documents_per_step)


def read_queries(
    shards: ShardReader, key: int | str, layers: tuple[int, ...], config: TrainConfig, generator: torch.Generator
) -> Queries:
    """One document as a run reads it, on the CPU; `generator` draws its queries."""
    made = queries_of(
        shards[key], shards.meta, page_rules(config), target=dict(config.target),
        layer_weights=config.layer_weights, layers=layers,
    )  # fmt: skip
    if config.queries_per_document is not None and config.queries_per_document < len(made):
        made = made.pick(torch.randperm(len(made), generator=generator)[: config.queries_per_document])
    return made


def _stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


__all__ = [
    "CHECKPOINT",
    "INDEXER",
    "LOG",
    "Trainer",
    "learning_rate_share",
    "make_optimizer",
    "page_rules",
    "read_queries",
    "starting_indexer",
    "steps_per_epoch",
]
