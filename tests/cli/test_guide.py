"""The session of the guide docs/guides/read-and-ask.md, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/guides/read-and-ask.md"
BLOCK = re.compile(r"```(bash|text)\n(.*?)```", re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_guide_prints_what_stands_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = GUIDE.read_text(encoding="utf-8").split("## With a model of yours")[0]
    blocks = BLOCK.findall(session)
    asked = 0
    for (kind, commands), (next_kind, shown) in zip(blocks, [*blocks[1:], ("bash", "")], strict=True):
        if kind == "text":
            continue
        expected = shown if next_kind == "text" else None
        if not commands.startswith("flashmem "):
            in_a_shell(commands)
            continue
        (line,) = commands.splitlines()
        typed = "".join(f"{line[2:]}\n" for line in (expected or "").splitlines() if line.startswith("> "))
        result = run(*shlex.split(line)[1:], stdin=typed)
        assert result.exit_code == 0, result.stderr
        if expected is not None:
            asked += 1
            assert result.stdout == re.sub(r"^> .*\n", "", expected, flags=re.MULTILINE)
    assert asked == 4


def in_a_shell(commands: str) -> None:
    """Run a block in bash, with this Python first in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], check=True, env=environment)
