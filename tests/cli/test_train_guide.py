"""docs/guides/train.md: its commands run, on small shards and with small settings, and its table has every setting."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from cli.conftest import Run
from flashmem.indexer import MemoryIndexer
from flashmem.training import compare
from flashmem.training.config import LOSSES, TrainConfig
from support.learnable_shards import write_shards

GUIDE = (Path(__file__).parents[2] / "docs/guides/train.md").read_text()
SMALLER = {
    "train": ["--cpu", "--set", "page_chunks=4", "--set", "epochs=1", "--set", "num_heads=4", "--set", "q_rank=8"],
    "calibrate": ["--page-chunks", "4"],
    "compare": ["--page-chunks", "4"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def commands() -> list[list[str]]:
    """Words of every command line; what launches several processes is taken off."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    made = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words[words.index("-m") + 1 :] if words[0] in ("accelerate", "torchrun") else words for words in made]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the guide's reader stands after the capture."""
    for index, (name, documents) in enumerate((("shards", 4), ("held-out", 19), ("test", 3))):
        write_shards(tmp_path / name, documents, chunks=160, first=100 * index)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(directory: Path, run: Run) -> None:
    ran = set()
    for words in commands():
        if words[:2] == ["flashmem", "train"] and (directory / words[words.index("-o") + 1]).exists():
            words = words if "--resume" in words else [*words, "-o", "another"]  # the same run, told twice
        if words[0] == "flashmem" and words[1] in ("train", "calibrate"):
            result = run(*words[1:], *SMALLER[words[1]])
            if "tensorboard=true" in words and find_spec("tensorboard") is None:  # an extra, as the guide says
                assert result.exit_code == 2 and "flashmem[train]" in result.stderr
            else:
                assert result.exit_code == 0, (words, result.stderr)
        elif words[1:3] == ["-m", "flashmem.training.compare"]:
            compare.main([*words[3:], *SMALLER["compare"]])
        else:  # needs a model, or is not ours
            assert words[:2] in (["flashmem", "capture"], ["flashmem", "read"], ["tensorboard", "--logdir"]), words
        ran.add(" ".join(words[:2]))
    assert ran == {"flashmem train", "flashmem calibrate", "flashmem capture", "flashmem read", "python -m",
                   "tensorboard --logdir"}  # fmt: skip
    assert "published" in (directory / "table.md").read_text()


def test_the_adapter_s_lines_run(directory: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (lines,) = blocks("python")
    names: dict[str, object] = {}
    exec(lines, names)
    assert isinstance(names["indexer"], MemoryIndexer)
    assert (directory / "indexer-st" / "modules.json").is_file()


def test_the_table_has_every_setting_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", GUIDE, re.MULTILINE))
    assert {name: yaml.safe_load(text) for name, text in rows.items()} == TrainConfig().to_mapping() | {
        "mixed_precision": False  # YAML reads a bare no as false
    }
    assert list(rows) == list(TrainConfig().to_mapping())


def test_losses_and_yaml_of_the_guide_are_ours() -> None:
    told = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \| ", GUIDE.split("## Losses")[1], re.MULTILINE)
    assert sorted(name.strip("`") for cell in told for name in cell.split(", ")) == sorted(LOSSES)
    (text,) = blocks("yaml")
    assert TrainConfig.from_mapping(yaml.safe_load(text)).queries_per_document == 32
