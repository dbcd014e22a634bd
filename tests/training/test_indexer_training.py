"""The training loop: it learns, resumes exactly, loads no backbone; settings and losses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem.capture.format import ShardReader
from flashmem.indexer import MemoryIndexer
from flashmem.policy import page_scores
from flashmem.training import metrics
from flashmem.training.config import TrainConfig
from flashmem.training.data import PageRules, Queries, queries_of
from flashmem.training.loop import INDEXER, LOG, Trainer
from flashmem.training.losses import page_logits, total_loss
from support.learnable_shards import start_indexer, write_shards

CONFIG = TrainConfig(
    page_chunks=4, layer_weights={1: 1.0}, epochs=3, documents_per_step=2, learning_rate=0.02, weight_decay=0.0
)
RULES = PageRules(page_chunks=4, sink_pages=1, recency_pages=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return write_shards(tmp_path_factory.mktemp("shards"))


def read(shards: ShardReader, index: int = 0, **changes: Any) -> Queries:
    given: dict[str, Any] = {"target": {"mass": 1.0}, "layer_weights": {1: 1.0}}
    return queries_of(shards[index], shards.meta, RULES, **(given | changes))


def recall(shards: ShardReader, indexer: MemoryIndexer) -> float:
    found = []
    for index in range(len(shards)):
        queries = read(shards, index)
        found.append(metrics.recalls(metrics.by_indexer(indexer)(queries), queries, (0.4,)).need_QG)
    return float(metrics.document_means(found).mean())


@pytest.mark.parametrize("losses", [{"page-kl": 1.0, "chunk-kl": 0.3, "budget": 0.3}, {"pairwise": 1.0}])
def test_it_learns_what_windows_need(losses: dict[str, float], shards: ShardReader, tmp_path: Path) -> None:
    config = replace(CONFIG, losses=losses, epochs=30)
    trainer = Trainer(shards, start_indexer(), config, tmp_path / "run", cpu=True)
    before = recall(shards, trainer.indexer)
    trainer.train(log_every=5)
    trained = MemoryIndexer.from_pretrained(tmp_path / "run" / INDEXER)
    assert before < 0.6 < 0.8 < recall(shards, trained)
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["step"] == trainer.total_steps == 90
    assert trained.config.observation_window == 2 and trained.config.ensemble == "max"


def test_the_published_recipe_runs(shards: ShardReader, tmp_path: Path) -> None:
    config = TrainConfig.published(page_chunks=4, epochs=2, learning_rate=0.02)
    trainer = Trainer(shards, start_indexer(), config, tmp_path, cpu=True)
    trainer.train()
    assert trainer.indexer.config.observation_window == 1 and trainer.step == 4


def test_bfloat16_products_train_as_well(shards: ShardReader, tmp_path: Path) -> None:
    losses, weights = [], []
    for precision in ("no", "bf16"):
        config = replace(CONFIG, mixed_precision=precision, epochs=8)
        trainer = Trainer(shards, start_indexer(), config, tmp_path / precision, cpu=True)
        trainer.train(log_every=4)
        rows = [json.loads(line)["loss"] for line in (tmp_path / precision / LOG).read_text().splitlines()]
        losses.append((rows[0], rows[-1]))
        weights.append(trainer.indexer.layers[0].wq_a.weight.detach())
    assert all(last < 0.9 * first for first, last in losses)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=0.05)
    assert weights[1].dtype is torch.float32 and not torch.equal(*weights)


def test_a_resumed_run_is_the_uninterrupted_one(shards: ShardReader, tmp_path: Path) -> None:
    config = replace(CONFIG, queries_per_document=5, losses={"focal": 1.0, "budget": 1.0}, negatives=2.0)
    whole = Trainer(shards, start_indexer(), config, tmp_path / "whole", cpu=True)
    whole.train()
    part = Trainer(shards, start_indexer(), config, tmp_path / "part", cpu=True)
    part.train(until=4)
    again = Trainer(shards, start_indexer(), config, tmp_path / "part", cpu=True)
    again.resume()
    assert again.step == 4
    again.train()
    for name, tensor in whole.indexer.state_dict().items():
        assert torch.equal(tensor, again.indexer.state_dict()[name]), name


def test_resuming_another_run_is_refused(shards: ShardReader, tmp_path: Path) -> None:
    trainer = Trainer(shards, start_indexer(), CONFIG, tmp_path / "run", cpu=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.resume()
    trainer.train(until=1)
    other = Trainer(shards, start_indexer(), replace(CONFIG, seed=1), tmp_path / "run", cpu=True)
    with pytest.raises(ValueError, match="another seed: 0"):
        other.resume()
    fewer = Trainer(write_shards(tmp_path / "few", 2), start_indexer(), CONFIG, tmp_path / "run", cpu=True)
    with pytest.raises(ValueError, match="other documents"):
        fewer.resume()


def test_what_does_not_fit_is_refused(shards: ShardReader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="observe=3, but the shards hold 2"):
        Trainer(shards, start_indexer(), replace(CONFIG, observe=3), tmp_path, cpu=True)
    with pytest.raises(ValueError, match=r"target layers are \[0, 2\], not \[1\]"):
        Trainer(shards, start_indexer(), replace(CONFIG, target_layers=(1,)), tmp_path, cpu=True)
    with pytest.raises(ValueError, match=r"names CSA indices \[9\]"):
        read(shards, layer_weights={9: 1.0})


def test_training_loads_no_backbone(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 2)
    program = (
        "import sys; from flashmem.cli import app; "
        f"app(['train', {str(tmp_path / 'shards')!r}, '-o', {str(tmp_path / 'run')!r}, '--cpu', "
        "'--set', 'epochs=1', '--set', 'page_chunks=4', '--json'], standalone_mode=False); "
        "loaded = [m for m in sys.modules if m.startswith(('transformers.models', 'flashmem.backbone', "
        "'flashmem.engine'))]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1 and (tmp_path / "run" / INDEXER / "config.json").exists()


def test_page_logits_are_the_policy_s_page_scores(shards: ShardReader) -> None:
    queries, indexer = read(shards), start_indexer()
    logits = queries.logits(indexer)
    pages = page_logits(logits, queries)
    for query, count in enumerate(queries.num_chunks.tolist()):
        expected = page_scores(logits[query, :count].detach(), 4, queries.num_pages)
        eligible = queries.eligible_pages()[query]
        torch.testing.assert_close(pages[query][eligible].detach(), expected[eligible])
        assert not eligible[0] and not eligible[RULES.num_pages(count) - 2 :].any()  # sink and recency
        assert bool((pages[query][~eligible] == -torch.inf).all())


def test_needs_are_shares_of_eligible_chunks(shards: ShardReader) -> None:
    queries = read(shards)
    torch.testing.assert_close(queries.need.sum(1), (queries.need > 0).any(1).float())
    assert not (queries.need * ~queries.eligible).any()
    mixed = read(shards, target={"mass": 0.5, "evidence": 0.5}, layer_weights={0: 1.0})
    assert bool((mixed.need > 0).sum() > (queries.need > 0).sum())  # layer 0 looks elsewhere than the evidence


@pytest.mark.parametrize("name", ["bce", "focal", "pairwise", "chunk-kl", "page-kl", "budget"])
def test_losses_are_finite_and_least_where_scores_equal_needs(name: str, shards: ShardReader) -> None:
    queries, config = read(shards), replace(CONFIG, losses={name: 1.0})
    good = (queries.need * 40 - 10).requires_grad_()
    bad = (-queries.need * 40).requires_grad_()
    values = []
    for logits in (good, bad):
        loss, _ = total_loss(logits, queries, config, torch.Generator().manual_seed(0))
        loss.backward()
        assert logits.grad is not None and bool(logits.grad.isfinite().all())
        values.append(float(loss.detach()))
    assert 0 <= values[0] < 0.1 < values[1]


def test_queries_that_need_nothing_teach_nothing(shards: ShardReader) -> None:
    queries = read(shards)
    nothing = replace(queries, need=torch.zeros_like(queries.need))
    for name in ("bce", "focal", "pairwise", "chunk-kl", "page-kl", "budget"):
        logits = torch.randn(queries.need.shape, requires_grad=True)
        config = replace(CONFIG, losses={name: 1.0}, negatives=3.0)
        loss, _ = total_loss(logits, nothing, config, torch.Generator().manual_seed(0))
        loss.backward()
        assert float(loss) == 0 and not logits.grad.any(), name  # type: ignore[union-attr]


def test_settings_come_from_yaml_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 3\ntarget_layers: [1, 2]\nlayer_weights: {1: 0.25, 2: 0.75}\n")
    config = TrainConfig.from_mapping(TrainConfig.read(path) | {"seed": 4})
    assert (config.epochs, config.target_layers, config.layer_weights[2], config.seed) == (3, (1, 2), 0.75, 4)
    assert TrainConfig.from_mapping(config.to_mapping()) == config
    for text, message in (("epoch: 3", "unknown training settings: epoch"), ("[1]", "mapping"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_mapping(TrainConfig.read(path))
    for change, message in (
        ({"losses": {"mse": 1.0}}, "unknown losses: mse"), ({"epochs": 0}, "epochs"), ({"observe": 0}, "observe"),
        ({"budgets": (0.2, 0.1)}, "budgets"), ({"target": {"clicks": 1.0}}, "clicks"),
        ({"negatives": 0.0}, "negatives"), ({"ensemble": "sum"}, "ensemble must be one of max, mean"),
        ({"save_every": -1}, "save_every"), ({"budgets": (0.1,)}, "two numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TrainConfig(**change)  # type: ignore[arg-type]


def test_values_of_settings_have_the_type_of_their_field() -> None:
    made = TrainConfig.from_mapping(
        {"learning_rate": "1e-4", "mixed_precision": False, "layer_weights": {"1": 1}, "budgets": [0.1, 1], "clip": 2}
    )
    assert (made.learning_rate, made.mixed_precision, made.layer_weights, made.budgets, made.clip) == (
        1e-4, "no", {1: 1.0}, (0.1, 1.0), 2.0,
    )  # fmt: skip
    for change, message in (
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"warmup": float("nan")}, "warmup must be a number"),
        ({"clip": True}, "clip must be a number, got True"),
        ({"epochs": 2.5}, "epochs must be int, got 2.5"),
        ({"epochs": None}, "epochs must be int, got None"),
        ({"tensorboard": 1}, "tensorboard must be bool"),
        ({"losses": ["bce"]}, "losses must be Mapping"),
        ({"target_layers": ["a"]}, "target_layers must be int, got 'a'"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be one of no, bf16"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TrainConfig.from_mapping(change)
