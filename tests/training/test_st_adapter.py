"""Training through sentence-transformers gives the same Memory Indexer as flashmem's own loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler

from flashmem.capture.format import ShardReader
from flashmem.indexer import MemoryIndexer
from flashmem.training.config import TrainConfig
from flashmem.training.loop import Trainer
from flashmem.training.st import IndexerModule, indexer_trainer
from support.learnable_shards import start_indexer, write_shards

CONFIG = TrainConfig(
    losses={"page-kl": 1.0, "chunk-kl": 0.3, "focal": 0.5}, layer_weights={1: 1.0}, page_chunks=4, epochs=2,
    documents_per_step=2, learning_rate=0.02, clip=0.5,
)  # fmt: skip
QUIET: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return write_shards(tmp_path_factory.mktemp("shards"))


def in_order_of(trainer: Trainer) -> Any:
    """A batch sampler that hands out the documents of flashmem's own run, epoch by epoch."""

    class Sampler(DefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            first = self.epoch * trainer.steps_per_epoch
            for step in range(first, first + trainer.steps_per_epoch):
                yield [index for index, _ in trainer.documents(step)]

    return lambda dataset, **given: Sampler(torch.utils.data.SequentialSampler(dataset), given["batch_size"], False)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_same_documents_give_the_same_weights(epochs: int, shards: ShardReader, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=epochs)
    own = Trainer(shards, start_indexer(), config, tmp_path / "own", cpu=True)
    other = indexer_trainer(
        shards, start_indexer(), config, tmp_path / "st", batch_sampler=in_order_of(own), **QUIET
    )  # fmt: skip
    own.train()
    other.train()
    assert other.state.global_step == own.step == 3 * epochs
    begin = start_indexer().state_dict()
    for name, tensor in own.indexer.state_dict().items():
        torch.testing.assert_close(other.model[0].indexer.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
        assert name == "offset" or not torch.equal(tensor, begin[name])


def test_what_it_saves_is_a_memory_indexer_and_a_sentence_transformer(shards: ShardReader, tmp_path: Path) -> None:
    trainer = indexer_trainer(shards, start_indexer(), replace(CONFIG, epochs=1), tmp_path / "run", **QUIET)
    trainer.train()
    trained = trainer.model[0].indexer
    trainer.model.save_pretrained(str(tmp_path / "indexer"), create_model_card=False)
    assert MemoryIndexer.from_pretrained(tmp_path / "indexer").fingerprint() == trained.fingerprint()
    loaded = SentenceTransformer(str(tmp_path / "indexer"), device="cpu", trust_remote_code=True)
    assert isinstance(loaded[0], IndexerModule) and loaded[0].indexer.fingerprint() == trained.fingerprint()
    assert trained.config.observation_window == 2


def test_it_resumes_from_the_framework_s_checkpoint(shards: ShardReader, tmp_path: Path) -> None:
    config = replace(CONFIG, queries_per_document=5, losses={"page-kl": 1.0, "budget": 0.5})
    saving = QUIET | {"save_strategy": "epoch"}
    whole = indexer_trainer(shards, start_indexer(), config, tmp_path / "run", **saving)
    whole.train()
    again = indexer_trainer(shards, start_indexer(), config, tmp_path / "run", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.model[0].indexer.fingerprint() == whole.model[0].indexer.fingerprint()
