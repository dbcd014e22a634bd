"""What the documents point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/log.md", "docs/models/demo.md", "docs/concepts/kernels.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_result_files_are_there(name: str) -> None:
    named = re.findall(r"`(results/[\w./-]+)`", (ROOT / name).read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_documents_name_result_files() -> None:
    """Else the test above tests nothing."""
    assert "`results/mini-table1/16k/table.md`" in (ROOT / "docs/models/demo.md").read_text()
