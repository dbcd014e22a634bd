"""Train the small backbone.

    python -m flashmem.training.backbone.train --corpus corpus/ --recipe recipe.json --out run/ --seconds 480

A run is a recipe (model, curriculum, optimiser, seed) and a corpus folder. It writes `log.jsonl`, a full checkpoint
that a later call resumes exactly (`--resume`), and an export with stock names. `--seconds` bounds the training of one
call: then the run writes its checkpoint and ends. With a bound, the learning rate falls with time where time runs out
first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .batches import GROUPS, Batch, BatchPool
from .export import export, load_export
from .forward import Backbone, answer_loss, buffers, initial_parameters
from .optimizer import Optimizer
from .recipe import Recipe, Stage

STATE, TENSORS = "state.json", "checkpoint.safetensors"


def rate_factor(recipe: Recipe, step: int, progress: float) -> float:
    """Warm-up, constant, then linear decay; `step` counts from 0, `progress` is the share of the run that is over."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    if progress < recipe.decay_from:
        return warm
    return warm * max(recipe.final_rate, (1 - progress) / (1 - recipe.decay_from))


class Stepper:
    """One training step of a stage: eager on a CPU, one CUDA graph on a GPU."""

    def __init__(self, trainer: Trainer, stage: Stage, batch: Batch) -> None:
        self.trainer, self.stage = trainer, stage
        self.inputs = {name: value.to(trainer.device) for name, value in _tensors(batch).items()}
        self.counts = torch.zeros(len(GROUPS) + 1, 5, device=trainer.device)
        self.sums = torch.zeros(3, device=trainer.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if trainer.device.type == "cuda":
            self._capture()

    def _run(self) -> None:
        trainer, given = self.trainer, self.inputs
        loss, kl, (losses, right) = trainer.losses(self.stage, given)
        (loss + kl).backward()
        norm = trainer.optimizer.step()
        for value in trainer.params.values():
            assert value.grad is not None
            value.grad.zero_()
        group = torch.where(given["groups_R"] < 0, len(GROUPS), given["groups_R"])
        first = given["first_R"].float()
        stats = torch.stack((torch.ones_like(losses), losses, right.float(), first, first * right), dim=1)
        self.counts.index_add_(0, group, stats)
        self.sums += torch.stack((loss.detach(), kl.detach(), norm.detach()))

    def _capture(self) -> None:
        """Warm up (compilation happens here) on a side stream, put all states back, then capture."""
        kept = [(value, value.detach().clone()) for value in self.trainer.state_tensors()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        with torch.no_grad():
            for value, old in kept:
                value.copy_(old)
        self.counts.zero_()
        self.sums.zero_()

    def step(self, batch: Batch) -> None:
        for name, value in _tensors(batch).items():
            self.inputs[name].copy_(value, non_blocking=True)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def report(self, steps: int) -> dict[str, Any]:
        """Means since the last report."""
        loss, kl, norm = (self.sums / steps).tolist()
        counts = list(zip(GROUPS, self.counts.tolist(), strict=False))
        self.sums.zero_()
        self.counts.zero_()
        return {
            "loss": round(loss, 4),
            "kl": round(kl, 4),
            "norm": round(norm, 3),
            "right": {name: round(row[2] / row[0], 4) for name, row in counts if row[0]},
            "first": {name: round(row[4] / row[3], 4) for name, row in counts if row[3]},
            "losses": {name: round(row[1] / row[0], 4) for name, row in counts if row[0]},
        }


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {item.name: torch.from_numpy(np.asarray(getattr(batch, item.name))) for item in dataclasses.fields(batch)}


class Trainer:
    """A run: parameters, optimiser, position in the curriculum."""

    def __init__(
        self, recipe: Recipe, device: torch.device, *, compiled: bool, start: str | Path | None = None
    ) -> None:
        self.recipe, self.device = recipe, device
        values = load_export(start)[1] if start else initial_parameters(recipe.sizes, recipe.seed)
        names = initial_parameters(recipe.sizes, 0).keys()
        self.params = {name: values[name].float().to(device).requires_grad_() for name in names}
        for value in self.params.values():
            value.grad = torch.zeros_like(value)
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        fixed = {name: value.to(device) for name, value in buffers(recipe.sizes).items()}
        self.net = Backbone(recipe.sizes, self.params | fixed, compute=compute, compiled=compiled)
        self.optimizer = Optimizer(self.params, recipe, compute)
        self.stage = self.stage_step = self.step = 0
        self.tokens = 0
        self.seconds = 0.0

    def state_tensors(self) -> Iterator[Tensor]:
        yield from self.params.values()
        for _, value in self.optimizer.tensors():
            yield value

    def losses(self, stage: Stage, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(answer and language loss, indexer loss, per position: unweighted loss and whether it is right)."""
        logits, kl = self.net.forward(
            given["ids_BS"], given["rows_R"], positions_BS=given["positions_BS"], kl_rows_BK=given["kl_rows_BK"],
            visible_BL=given["visible_BL"] if stage.hide else None, topk=stage.topk,
        )  # fmt: skip
        losses, right = answer_loss(logits, given["targets_RC"], torch.ones_like(given["weights_R"]))
        return (losses * given["weights_R"]).sum(), kl, (losses.detach(), right)

    def train(self, pool: BatchPool, out: Path, *, seconds: float | None = None, log_every: int = 50) -> None:
        """Run the curriculum from where it stands; ends early, in good order, when `seconds` are over."""
        began = time.monotonic()
        with open(out / "log.jsonl", "a") as log:
            _write(
                log, {"event": "start", "step": self.step, "parameters": sum(p.numel() for p in self.params.values())}
            )
            while self.stage < len(self.recipe.stages):
                if not self._run_stage(pool, log, began, seconds, log_every):
                    break
                self.stage, self.stage_step = self.stage + 1, 0
            self.seconds += time.monotonic() - began
            _write(log, {"event": "end", "step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)})

    def _run_stage(self, pool: BatchPool, log: IO[str], began: float, seconds: float | None, log_every: int) -> bool:
        """Run one stage; False when the call's time is over."""
        stage, setup = self.recipe.stages[self.stage], time.monotonic()
        stepper, since, mark, running = None, 0, 0.0, 0.0
        for batch in pool.stage(self.stage, self.stage_step):
            if stepper is None:
                stepper = Stepper(self, stage, batch)
                mark = running = time.monotonic()
                _write(log, {"event": "stage", "stage": self.stage, "length": stage.length, "setup_s": mark - setup})
            elapsed = time.monotonic() - began
            done = self.step / self.recipe.total_steps
            factor = rate_factor(self.recipe, self.step, max(done, elapsed / seconds if seconds else 0.0))
            self.optimizer.factor.fill_(factor * stage.learning_rate)
            stepper.step(batch)
            self.step, self.stage_step, since = self.step + 1, self.stage_step + 1, since + 1
            self.tokens += stage.rows * stage.length
            if since == log_every or self.stage_step == stage.steps:
                row = stepper.report(since)
                now = time.monotonic()
                rate = since * stage.rows * stage.length / (now - mark)
                row = {"step": self.step, "stage": self.stage, "length": stage.length, **row, "rate": round(factor, 4)}
                _write(log, row | {"tokens_per_s": round(rate), "seconds": round(now - began, 1)})
                if not np.isfinite(row["loss"]):
                    raise FloatingPointError(f"the loss is {row['loss']} at step {self.step}")
                mark, since = now, 0
                if seconds is not None and now - began > seconds:
                    return False
                if stage.seconds is not None and now - running > stage.seconds:
                    break
                if stage.until and min(row["first"].get(f, 0.0) for f in stage.until_families) >= stage.until:
                    break
        del stepper
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def save(self, folder: Path) -> None:
        """Write a full checkpoint: each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"params.{name}": value for name, value in self.params.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.tensors()}
        save_file({name: v.detach().cpu().contiguous() for name, v in tensors.items()}, folder / (TENSORS + ".part"))
        names = ("stage", "stage_step", "step", "tokens", "seconds")
        state = {name: getattr(self, name) for name in names} | {"recipe": self.recipe.to_mapping()}
        (folder / (STATE + ".part")).write_text(json.dumps(state, indent=1))
        for name in (TENSORS, STATE):
            (folder / (name + ".part")).replace(folder / name)

    def restore(self, folder: Path) -> None:
        """Continue a checkpoint of the same recipe."""
        state = json.loads((folder / STATE).read_text())
        if state["recipe"] != json.loads(json.dumps(self.recipe.to_mapping())):
            raise ValueError(f"{folder} was made by another recipe")
        tensors = load_file(folder / TENSORS)
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(tensors[f"params.{name}"])
            for name, value in self.optimizer.tensors():
                value.copy_(tensors[f"optimizer.{name}"])
        for name in ("stage", "stage_step", "step", "tokens", "seconds"):
            setattr(self, name, state[name])


def _write(log: IO[str], row: dict[str, Any]) -> None:
    line = json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
    log.write(line + "\n")
    log.flush()
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by flashmem.training.backbone.corpus")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the checkpoint in --out")
    parser.add_argument("--start", type=Path, help="begin with the weights of an export instead of random ones")
    parser.add_argument("--seconds", type=float, help="end in good order after so long")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.load(args.recipe)
    pool = BatchPool(args.corpus, "train", recipe, workers=args.workers)
    compiled = args.device == "cuda" and not args.no_compile
    if compiled:
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 256
        torch._dynamo.config.automatic_dynamic_shapes = False
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(recipe, torch.device(args.device), compiled=compiled, start=args.start)
    if args.resume:
        trainer.restore(args.out)
    trainer.train(pool, args.out, seconds=args.seconds)
    pool.close()
    trainer.save(args.out)
    export(trainer.params, recipe, args.out / "export", args.corpus)


if __name__ == "__main__":
    main()
