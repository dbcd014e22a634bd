"""gen, run, report and compare as commands, over a random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Run
from flashmem.evaluation import Document, Item, ItemSet, write_items

SETTINGS = ("--page-chunks", 4, "--tau", 8, "--keep", 0.3, "--device", "cpu", "--policies", "full,lsa,recency@match")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("frozen") / "items"
    documents = tuple(Document(id=name, content=f"{name}. It was the best of times. " * 12) for name in ("one", "two"))
    asked = tuple(
        Item(
            id=f"{document.id}-{index}", task="times", length=512, document=document.id, question=f"Which? {index}",
            answers=("",), scorer="all", max_new_tokens=4, evidence=((10, 40),),
        )
        for document in documents
        for index in range(2)
    )  # fmt: skip
    write_items(directory, ItemSet(suite="test", documents=documents, items=asked))
    return directory


def test_run_report_and_compare(run: Run, text_model: Path, items: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for shard in ("0/2", "1/2"):
        result = run("eval", "run", items, "-o", first, "--model", text_model, *SETTINGS, "--shard", shard, "--json")
        assert result.exit_code == 0, result.stderr
        assert Path(json.loads(result.stdout)["samples"]).is_file()
    result = run("eval", "report", first, "--floor", 0, "--no-pictures")
    assert result.exit_code == 0, result.stderr
    assert "| times 512 |" in result.stdout and "written" in result.stderr
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["complete"] and metrics["run"]["lsa"]["keep"] == 0.3
    assert [cell["n"] for cell in metrics["cells"]] == [4, 4, 4]
    assert all(cell["evidence_recall"] is not None for cell in metrics["cells"])

    again = run("eval", "run", items, "-o", first, "--model", text_model, *SETTINGS, "--tau", 4)
    assert again.exit_code == 2
    assert "holds samples of another run: lsa differ" in again.stderr.replace("\n", " ")

    result = run("eval", "run", items, "-o", second, "--model", text_model, *SETTINGS, "--tau", 4, "--limit", 3)
    assert result.exit_code == 0, result.stderr
    compared = run("eval", "compare", first, second, "-o", tmp_path / "table.md")
    assert compared.exit_code == 0, compared.stderr
    assert "| second | tau 4 | 3 | 100.0 |" in compared.stdout == (tmp_path / "table.md").read_text()
    assert json.loads(run("eval", "compare", first, second, "--json").stdout)["runs"][1]["paired"]["pairs"] == 3
    also = json.loads(run("eval", "compare", first, "--also", "full,recency@match", "--json").stdout)["runs"]
    assert [row["policy"] for row in also] == ["lsa", "full", "recency@match"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gen", "chess", "-o", "x"), "unknown suite 'chess'"),
        (("gen", "mrcr", "-o", "x"), "name their folder with --data"),
        (("gen", "mini-table1", "-o", "x", "--lengths", "64"), "the row has"),
        (("gen", "mini-table1", "-o", "x", "--tasks", "chess"), "unknown tasks chess"),
        (("gen", "mini-table1", "-o", "x", "--lengths", "16k tokens"), "is not a size"),
        (("run", "missing", "-o", "x"), "flashmem eval gen"),
        (("run", "missing", "-o", "x", "--shard", "3"), "is neither i/n nor auto"),
        (("run", "missing", "-o", "x", "--shard", "3/3"), "must lie in 0..2"),
        (("run", "missing", "-o", "x", "--policies", "best"), "unknown policy 'best'"),
        (("report", "missing"), "holds no samples"),
        (("compare", "missing"), "at least two runs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("eval", *args)
    assert result.exit_code == 2, result.stdout
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_gen_freezes_items(run: Run, tmp_path: Path) -> None:
    args = ("eval", "gen", "mini-table1", "--lengths", "2K", "--n", 2, "--tasks", "single,talk")
    made = [run(*args, "-o", tmp_path / name, "--json") for name in ("a", "b")]
    values = [json.loads(result.stdout) for result in made]
    assert values[0] == values[1]
    assert (values[0]["items"], values[0]["documents"]) == (4, 1)
    refused = run(*args, "-o", tmp_path / "a")
    assert refused.exit_code == 2 and "is not empty" in refused.stderr
