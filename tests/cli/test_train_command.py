"""train and calibrate over synthetic shards: results, resume, several processes, bad input in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from flashmem.indexer import MemoryIndexer
from flashmem.training.config import TrainConfig
from flashmem.training.loop import Trainer
from support.learnable_shards import write_shards

SMALL = ("--cpu", "--set", "page_chunks=4", "--set", "epochs=2", "--set", "documents_per_step=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards")).directory


@pytest.fixture(scope="module")
def indexer(shards: Path) -> Path:
    return shards / "native"


def test_train_writes_an_indexer_and_a_log(run: Run, shards: Path, tmp_path: Path) -> None:
    result = run("train", shards, "-o", tmp_path / "run", *SMALL, "--set", "layer_weights={1: 1.0}", "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values) == {"indexer", "steps", "loss", "fingerprint"} and values["steps"] == 6
    trained = MemoryIndexer.from_pretrained(values["indexer"])
    assert trained.fingerprint() == values["fingerprint"] and trained.config.observation_window == 2
    assert "step 6 of 6: loss" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == values["loss"]
    assert set(rows[-1]) == {"step", "loss", *TrainConfig().losses, "norm", "rate", "seconds_per_step"}


def test_settings_come_from_file_recipe_and_command(run: Run, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: 7\nseed: 3\n")
    args = ("--recipe", "published", "--config", tmp_path / "run.yaml", "--start", shards / "native")
    assert run("train", shards, "-o", tmp_path / "run", *args, *SMALL).exit_code == 0
    config = json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())["config"]
    assert (config["losses"], config["seed"], config["epochs"], config["observe"]) == ({"focal": 1.0}, 3, 2, 1)


def test_an_interrupted_run_goes_on_where_its_checkpoint_is(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("train", shards, *SMALL, "--set", "save_every=2", "--json")
    whole = json.loads(run(*args, "-o", tmp_path / "whole").stdout)
    step = Trainer._step

    def until_three(self: Trainer) -> dict[str, float]:
        if self.step == 3:
            raise SystemExit(9)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", until_three)
        assert run(*args, "-o", tmp_path / "part").exit_code == 9
    again = run(*args, "-o", tmp_path / "part", "--resume")
    assert "resumed at step 2 of 6" in again.stderr
    assert json.loads(again.stdout)["fingerprint"] == whole["fingerprint"]


def test_tensorboard_gets_the_losses(run: Run, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run("train", shards, "-o", tmp_path / "run", *SMALL, "--set", "tensorboard=true").exit_code == 0
    events = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert events and any(b"page-kl" in path.read_bytes() for path in events)


def test_processes_that_would_not_work_together_are_refused(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", shards, "-o", tmp_path / "run")
    assert result.exit_code == 2 and "launched as 2 processes" in result.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_bad_settings_are_one_line(run: Run, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert run("train", shards, "-o", tmp_path / "there", *SMALL).exit_code == 0
    output = ("-o", tmp_path / "run")
    cases = [
        ((shards, *output, "--set", "epochs"), "name=value"),
        ((shards, *output, "--set", "losses={bce"), "losses={bce is not YAML"),
        ((shards, *output, "--set", "epochs=many"), "epochs must be int, got 'many'"),
        ((shards, *output, "--set", "epoch=3"), "unknown training settings: epoch"),
        ((shards, *output, "--set", "epochs=0"), "epochs must be at least 1"),
        ((shards, *output, "--set", "losses={mse: 1.0}"), "unknown losses: mse"),
        ((shards, *output, "--set", "observe=9"), "observe=9, but the shards hold 2"),
        ((shards, *output, "--config", tmp_path / "list.yaml"), "must hold a mapping"),
        ((shards, *output, "--config", tmp_path / "none.yaml"), "none.yaml"),
        ((shards, *output, "--recipe", "best"), "'ours' or 'published'"),
        ((shards, *output, "--start", tmp_path / "none"), "no indexer checkpoint"),
        ((shards, *output, "--resume"), "no checkpoint to resume"),
        ((shards, "-o", tmp_path / "there"), "holds a run already"),
        ((tmp_path / "empty", *output), "empty"),
    ]
    for args, message in cases:
        result = run("train", *args, "--cpu")
        assert result.exit_code == 2 and not result.stdout, args
        assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("wish", [("--miss", 0.4), ("--keep", 0.6)])
def test_calibrate_puts_the_cut_at_probability_one_half(
    wish: tuple[str, float], run: Run, indexer: Path, shards: Path, tmp_path: Path
) -> None:
    args = ("calibrate", indexer, shards, "-o", tmp_path / "cut", *wish, "--page-chunks", 4)
    result = run(*args, "--layer-weights", "1=1.0", "--json")
    assert result.exit_code == 0, result.stderr
    (bucket,) = json.loads(result.stdout)["buckets"]
    assert set(bucket) == {"chunks", "cut", "documents", "recall", "share"} and bucket["documents"] == 6
    assert bucket["recall"] >= 0.6 if wish[0] == "--miss" else bucket["share"] <= 0.6
    made = MemoryIndexer.from_pretrained(tmp_path / "cut")
    assert made.config.length_offsets == ((bucket["chunks"], -bucket["cut"]),)
    text = run(*args, "--recall", "evidence", "--buckets", "42,60")
    assert text.exit_code == 0 and text.stdout.count("(2 documents)") + text.stdout.count("(4 documents)") == 2


def test_what_cannot_be_calibrated_is_one_line(run: Run, indexer: Path, shards: Path, tmp_path: Path) -> None:
    cases = [
        ((), "either a miss to allow"),
        (("--miss", 0.1, "--keep", 0.1), "not both"),
        (("--miss", 0.1), "6 documents cannot promise a miss of at most 0.1: at least 9"),
        (("--keep", 0.01), "always-kept pages alone"),
        (("--miss", 0.3, "--buckets", "5,500"), "no calibration document has 1..5 chunks"),
        (("--miss", 0.3, "--layer-weights", "7=1"), "CSA indices [7]"),
    ]
    for args, message in cases:
        result = run("calibrate", indexer, shards, "-o", tmp_path / "cut", "--page-chunks", 4, *args)
        assert result.exit_code == 2 and not result.stdout, args
        assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "cut").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_give_the_indexer_of_one(run: Run, shards: Path, tmp_path: Path) -> None:
    """With random draws in it: which process reads a document changes nothing but the order of sums."""
    args = ["train", str(shards), *SMALL, "--json", "--set", "queries_per_document=5", "--set", "learning_rate=0.02"]
    args += ["--set", "losses={page-kl: 1.0, chunk-kl: 0.3, budget: 0.3}"]
    one = json.loads(run(*args, "-o", tmp_path / "one").stdout)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*launcher, "-m", "flashmem", *args, "-o", str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    values = json.loads(two.stdout)  # one process answers
    assert values["steps"] == one["steps"] == 6 and abs(values["loss"] - one["loss"]) < 1e-4
    begin = MemoryIndexer.from_pretrained(shards / "native").state_dict()
    first, second = (MemoryIndexer.from_pretrained(made["indexer"]).state_dict() for made in (one, values))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
        assert name == "offset" or not torch.equal(tensor, begin[name])
    assert len(list((tmp_path / "two" / "checkpoint").glob("random_states_*"))) == 2
