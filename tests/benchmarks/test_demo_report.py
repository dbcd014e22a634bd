"""The small model's page shows what the result files say."""

from __future__ import annotations

from benchmarks import demo_report


def test_the_page_holds_the_tables_of_its_files() -> None:
    assert demo_report.PAGE.read_text() == demo_report.page(demo_report.training_log())
    assert demo_report.CURVES.is_file()
