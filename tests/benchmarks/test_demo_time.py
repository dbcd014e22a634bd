"""The demo, timed."""

from __future__ import annotations

import pytest

from benchmarks import demo_time


@pytest.mark.slow
def test_a_short_demo_is_timed_and_told() -> None:
    told = demo_time.measure(1, "2K")
    assert told["questions"] == told["right"]["full attention"] == 7
    assert 0 < told["seconds_from_reading"] <= told["seconds_of_the_command"]
    assert told["within_limit"] == (told["seconds_from_reading"] <= demo_time.LIMIT_SECONDS)
