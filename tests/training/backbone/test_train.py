"""A tiny run on the CPU: it learns, it resumes exactly, and its export is what stock transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashmem.training.backbone.batches import BatchPool
from flashmem.training.backbone.corpus import encode_books
from flashmem.training.backbone.export import export, load_export
from flashmem.training.backbone.forward import Backbone
from flashmem.training.backbone.recipe import Recipe, Sizes, Stage
from flashmem.training.backbone.tokenizer import train_tokenizer
from flashmem.training.backbone.train import Stepper, Trainer, rate_factor

SIZES = Sizes(
    layers="SC", hash_layers=1, vocab=1536, hidden=32, heads=2, head_dim=16, rope_dim=8, q_rank=16, o_rank=8,
    window=64, expert_width=16, experts=2, experts_per_token=1, index_heads=16, index_dim=8, index_topk=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose made of invented words."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [a + b for a in ("bar", "dol", "fen", "gim", "hus", "kal", "lor", "min") for b in ("ta", "ren", "sil", "vos", "dum", "kip", "zan")]  # fmt: skip # noqa: E501
    text = " ".join(f"The {a} of {b} is {c}." for a in words for b in words[:9] for c in words[:5])
    tokenizer = train_tokenizer([text] * 20, vocab_size=SIZES.vocab, number_repeats=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    single = [w for w in words if len(tokenizer.encode(" " + w).ids) == 1]
    (folder / "words.txt").write_text("\n".join(single))
    (folder / "book.txt").write_text(text)
    for split in ("train", "test"):
        encode_books([folder / "book.txt"], tokenizer).save(folder / f"{split}.npz")
    return folder


def recipe(steps: int = 3) -> Recipe:
    kinds = {"kv": 0.5, "pairs": 0.25, "lm": 0.25}
    first = Stage(length=128, rows=4, steps=steps, kinds=kinds, hide=0.5, skip=0.5)
    return Recipe(sizes=SIZES, stages=(first, Stage(length=256, rows=2, steps=2, kinds={"any": 1.0}, topk=16)),
                  logit_rows=256, kl_rows=64, warmup=2)  # fmt: skip


def run(corpus: Path, out: Path, plan: Recipe, *, resume: bool = False) -> Trainer:
    out.mkdir(exist_ok=True)
    trainer = Trainer(plan, torch.device("cpu"), compiled=False)
    if resume:
        trainer.restore(out)
    trainer.train(BatchPool(corpus, "train", plan, workers=0), out)
    trainer.save(out)
    return trainer


def test_resumed_run_is_the_same_run(corpus: Path, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole", recipe())
    stopped = recipe()
    trainer = Trainer(stopped, torch.device("cpu"), compiled=False)
    pool = BatchPool(corpus, "train", stopped, workers=0)
    out = tmp_path / "parts"
    out.mkdir()
    _train_steps(trainer, pool, out, 2)
    trainer.save(out)
    resumed = run(corpus, out, stopped, resume=True)
    assert (resumed.step, resumed.stage) == (whole.step, whole.stage) == (5, 2)
    for name, value in whole.params.items():
        assert torch.equal(value, resumed.params[name]), name


def _train_steps(trainer: Trainer, pool: BatchPool, out: Path, steps: int) -> None:
    """Stop inside the first stage, as a full disk or a lost machine would, but with a checkpoint of that moment."""
    stage = trainer.recipe.stages[0]
    for batch in pool.stage(0):
        trainer.optimizer.factor.fill_(
            rate_factor(trainer.recipe, trainer.step, trainer.step / trainer.recipe.total_steps)
        )
        Stepper(trainer, stage, batch).step(batch)
        trainer.step, trainer.stage_step = trainer.step + 1, trainer.stage_step + 1
        trainer.tokens += stage.rows * stage.length
        if trainer.step == steps:
            return


def test_loss_falls(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", recipe(30))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["losses"]["lm"] for row in rows if row.get("length") == 128 and "losses" in row]
    assert losses[-1] < 7.3  # ln 1536 = 7.34


def test_another_recipe_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", recipe())
    with pytest.raises(ValueError, match="another recipe"):
        Trainer(recipe(9), torch.device("cpu"), compiled=False).restore(tmp_path / "run")


def test_stock_reads_the_export(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plan = recipe()
    trainer = Trainer(plan, torch.device("cpu"), compiled=False)
    export(trainer.params, plan, tmp_path, corpus)
    sizes, state = load_export(tmp_path)
    assert sizes == plan.sizes
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("The barta is 482913.")["input_ids"]) == "The barta is 482913."
    ids = torch.randint(3, 1500, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0]
        actual, _ = Backbone(sizes, state, compute=torch.float32).forward(ids, topk=sizes.index_topk)
    assert (actual - expected).norm() / expected.norm() < 1e-4
