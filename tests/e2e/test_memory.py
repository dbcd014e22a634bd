"""Saved memories of real sessions: going on after `open` is going on without; pages are read only when needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.engine import Session
from flashmem.store import MappedRecords
from flashmem.types import BudgetError, DamagedError

PAGE = 16  # tokens of the smallest page
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {"policy": "all"},
    "native": {"policy": "native", "keep": 0.4},
    "threshold": {"floor_pages": 1, "ceiling_pages": 5},
    "lsa-keep": {"keep": 0.3},
    "random": {"policy": "random", "keep": 0.4},
    "carry-over": {"policy": "carry-over", "keep": 0.5},
    "recency": {"policy": "recency", "keep": 0.3},
    "lead": {"keep": 0.4, "lead": 12},
    "rescue": {"keep": 0.3, "rescue": True, "rescue_recall": 0.9},
}


def make_engine(*, dtype: torch.dtype = torch.float32, layers: str = "CHC", seed: int = 1, **config: Any) -> Engine:
    values = {"page_chunks": 4, "tau": 24, "prefill_chunk": 100} | config
    return Engine(random_model(layers, seed=seed, dtype=dtype, eos_token_id=None), config=LSAConfig(**values))


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def observable(session: Session) -> dict[str, Any]:
    """What must be the same after save and open; where pages live and what was moved is not."""
    moved = ("pages_moved", "bytes_moved", "bytes_to_host", "bytes_to_disk", "tiers", "device_bytes_all_in")
    stats = {name: value for name, value in session.stats().items() if name not in (*moved, "state_bytes")}
    return stats | {
        "ids": session.ids,
        "resident": session.pages.resident,
        "prefetched": session.pages.prefetched,
        "selection": session.cycle.selection.pages,
        "steps": session.cycle.steps,
    }


def step_logits(session: Session, token: int) -> torch.Tensor:
    return session.engine.decode([session], [token])[0]


def assert_go_on_alike(one: Session, other: Session, *, steps: int = 8) -> None:
    """The same bits in every step, over a window boundary, an append and a turn of generation."""
    assert observable(one) == observable(other)
    one._flush()
    other._flush()
    for token in tokens(steps, seed=9):
        assert torch.equal(step_logits(one, token), step_logits(other, token))
    for session in (one, other):
        session.check()
    assert observable(one) == observable(other)
    more = tokens(21, seed=10)
    assert one.generate(more, max_new_tokens=3) == other.generate(more, max_new_tokens=3)
    assert torch.equal(one.next_logits, other.next_logits)
    assert observable(one) == observable(other)


# ---- going on


@pytest.mark.parametrize("name", SETTINGS)
def test_opening_changes_nothing(name: str, tmp_path: Path) -> None:
    """Every policy, saved at the start of a window and late in it.

    After 22 steps page 15 was born and completed in the window, page 16 is open, and a lead's copies are under way;
    8 more steps cross the boundary.
    """
    engine = make_engine(**SETTINGS[name])
    session = engine.session()
    session.append(tokens(238))
    for steps in (0, 22):
        for token in tokens(steps, seed=5):
            step_logits(session, token)
        session.save(tmp_path / "m")
        opened = engine.open(tmp_path / "m")
        engine.check()
        assert observable(session) == observable(opened)
        if steps:
            assert {15, 16} <= set(opened.pages.resident)
            assert (opened.pages.prefetched is not None) == (name == "lead")
            assert_go_on_alike(session, opened)
        opened.close()


FORMATS = [(torch.float32, "auto"), (torch.float32, "fp8"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp8")]


@pytest.mark.parametrize(("dtype", "kv_format"), FORMATS)
def test_a_new_engine_goes_on(dtype: torch.dtype, kv_format: str, tmp_path: Path) -> None:
    first = make_engine(dtype=dtype, kv_format=kv_format, keep=0.4, observation_window=3)
    second = make_engine(dtype=dtype, kv_format=kv_format, keep=0.4, observation_window=3)
    session = first.session()
    session.append(tokens(301))
    session.generate(max_new_tokens=18)  # the last of them has not run
    session.save(tmp_path / "m")
    opened = second.open(tmp_path / "m")
    assert_go_on_alike(session, opened)
    opened.save(tmp_path / "m")
    again = first.open(tmp_path / "m")
    assert_go_on_alike(opened, again, steps=3)


def test_a_model_directory_and_a_new_process_go_on(tmp_path: Path) -> None:
    random_model("WCHC", seed=3, eos_token_id=None).save_pretrained(tmp_path / "model")
    config = LSAConfig(page_chunks=4, tau=24, keep=0.4)
    engine = Engine.from_pretrained(tmp_path / "model", config=config, device="cpu")
    session = engine.session()
    session.generate(tokens(150), max_new_tokens=10)
    session.save(tmp_path / "m")
    code = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from flashmem import Engine, LSAConfig\n"
        "here = Path(sys.argv[1])\n"
        "config = LSAConfig(page_chunks=4, tau=24, keep=0.4)\n"
        "session = Engine.from_pretrained(here / 'model', config=config, device='cpu').open(here / 'm')\n"
        "print(json.dumps([session.generate(max_new_tokens=20), session.stats()]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ids, stats = json.loads(answer.stdout)
    assert ids == session.generate(max_new_tokens=20)
    for name in ("tokens", "pages", "resident_pages", "resident_bytes_paper", "cycles", "selected_pages"):
        assert stats[name] == session.stats()[name]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 15, 16, 17, 64, 128])
def test_lengths_around_every_boundary(count: int, tmp_path: Path) -> None:
    engine = make_engine(keep=0.5)
    session = engine.session()
    session.append(tokens(count))
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    engine.check()
    assert observable(session) == observable(opened)
    if count == 0:
        with pytest.raises(ValueError, match="nothing to continue from"):
            opened.generate()
    more = tokens(21, seed=2)
    assert session.generate(more, max_new_tokens=3) == opened.generate(more, max_new_tokens=3)


@pytest.mark.parametrize("lead", [0, 2])
def test_a_clock_that_runs_before_the_first_chunk_goes_on(lead: int, tmp_path: Path) -> None:
    engine = make_engine(keep=0.5, tau=3, lead=lead)
    session = engine.session()
    for token in (1, 2):
        step_logits(session, token)
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    assert_go_on_alike(session, opened)


def test_the_last_token_need_not_have_run(tmp_path: Path) -> None:
    engine = make_engine(keep=0.5)
    session = engine.session()
    new = session.generate(tokens(47), max_new_tokens=1)  # token 48 completes a chunk, a page, and has not run
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    assert opened.ids == tokens(47) + new and opened.state.position == 47
    opened.check()
    assert session.generate(max_new_tokens=9) == opened.generate(max_new_tokens=9)
    # appended, it runs first
    again = engine.open(tmp_path / "m")
    again.append([1, 2, 3])
    assert again.ids == [*tokens(47), *new, 1, 2, 3] and again.state.position == 51


def test_another_policy_selects_at_once(tmp_path: Path) -> None:
    first = make_engine(policy="all")
    session = first.session()
    session.append(tokens(400))
    session.save(tmp_path / "m")
    for settings in ({"keep": 0.2}, {"policy": "recency", "keep": 0.3}, {}):
        other = make_engine(**settings)
        opened = other.open(tmp_path / "m")
        other.check()
        fresh = other.session()
        fresh.append(tokens(400))
        assert opened.pages.resident == fresh.pages.resident
        assert opened.stats()["cycles"] == session.stats()["cycles"] + 1
        assert torch.equal(opened.next_logits, fresh.next_logits)
        assert opened.generate(max_new_tokens=26) == fresh.generate(max_new_tokens=26)
        opened.save(tmp_path / "n")
    assert first.open(tmp_path / "n").pages.resident == tuple(range(27))  # everything again


@pytest.mark.parametrize("change", [{"keep": 0.2}, {"tau": 16}, {"recency_pages": 5}, {"lead": 4}])
def test_other_settings_select_at_once(change: dict[str, Any], tmp_path: Path) -> None:
    session = make_engine(keep=0.6).session()
    session.append(tokens(400))
    for token in tokens(5, seed=5):
        step_logits(session, token)
    session.save(tmp_path / "m")
    engine = make_engine(**({"keep": 0.6} | change))
    opened = engine.open(tmp_path / "m")
    engine.check()
    assert opened.cycle.steps == 0 and opened.stats()["cycles"] == session.stats()["cycles"] + 1
    opened.generate(max_new_tokens=2)
    engine.check()


def test_a_smaller_device_budget_selects_what_fits(tmp_path: Path) -> None:
    session = make_engine(floor_pages=20).session()
    session.append(tokens(400))
    session.save(tmp_path / "m")
    record = session.engine.layout.record_bytes
    engine = make_engine(floor_pages=20, device_budget_bytes=14 * record)
    opened = engine.open(tmp_path / "m")
    assert len(opened.pages.resident) <= 14
    engine.check()
    opened.generate(max_new_tokens=26)
    engine.check()
    opened.close()

    everything = make_engine(policy="all", device_budget_bytes=14 * record)
    with pytest.raises(BudgetError, match="device pool"):
        everything.open(tmp_path / "m")
    assert not everything.sessions
    everything.check()


def test_a_session_of_a_callers_own_loop_can_be_saved(tmp_path: Path) -> None:
    """Its logits went to the caller: it must be appended to before it generates."""
    engine = make_engine(keep=0.5)
    session = engine.session()
    session.append(tokens(70))
    session.next_logits = None
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    with pytest.raises(ValueError, match="nothing to continue from"):
        opened.generate()
    assert opened.generate([1, 2], max_new_tokens=3) == session.generate([1, 2], max_new_tokens=3)


# ---- lazily


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Records of page files in the order in which they are first looked at."""
    seen: list[int] = []
    verify = MappedRecords._verify

    def noted(self: MappedRecords, record: int) -> None:
        if not self._verified[record]:
            seen.append(record)
        verify(self, record)

    monkeypatch.setattr(MappedRecords, "_verify", noted)
    yield seen


def test_only_what_is_needed_is_read(tmp_path: Path, reads: list[int]) -> None:
    engine = make_engine(keep=0.2)
    session = engine.session()
    session.append(tokens(1003))  # 62 pages and 11 tokens
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    size, resident = engine.layout.record_bytes, opened.pages.resident
    assert sorted(reads) == list(resident) and len(resident) == 13
    assert opened.pages.traffic.bytes_to_device == len(resident) * size
    tiers = opened.stats()["tiers"]
    assert tiers["saved"] == {"pages": 62, "bytes": 62 * size}
    assert tiers["host"]["bytes"] == tiers["disk"]["bytes"] == 0
    assert tiers["device"]["pages"] == 13

    reads.clear()
    opened.generate(max_new_tokens=20)  # no window boundary: nothing to read
    assert not reads
    opened.generate(max_new_tokens=10)
    assert set(reads) <= set(opened.pages.resident)
    opened.append([1])  # a prefill attends everything
    assert len(set(reads) | set(resident)) == 62 + 1


def test_opening_alone_reads_the_selection_and_nothing_more(tmp_path: Path, reads: list[int]) -> None:
    """Sink, recency and floor: whatever the length."""
    engine = make_engine(floor_pages=1, ceiling_pages=1)
    for count in (300, 1200):
        session = engine.session()
        session.append(tokens(count))
        session.save(tmp_path / "m")
        session.close()
        reads.clear()
        opened = engine.open(tmp_path / "m")
        assert len(reads) == len(opened.pages.resident) == 4
        opened.close()


# ---- saving over itself


def test_saving_over_an_open_memory(tmp_path: Path) -> None:
    engine = make_engine(keep=0.3)
    session = engine.session()
    session.append(tokens(300))
    session.save(tmp_path / "m")
    for turn in range(2):
        opened = engine.open(tmp_path / "m")
        twin = engine.open(tmp_path / "m")  # the same file, still unread for the most part
        more = tokens(29, seed=turn)
        session.append(more)
        opened.append(more)
        opened.save(tmp_path / "m")
        assert len(list((tmp_path / "m").iterdir())) == 3
        opened.save(tmp_path / "m")
        engine.check()
        assert twin.generate(more, max_new_tokens=5) == session.generate(max_new_tokens=5, prompt=None)[:5]
        opened.generate(max_new_tokens=5)  # as the session did
        assert_go_on_alike(opened, engine_reopen(engine, opened, tmp_path / "m"), steps=2)
        opened.close()
        twin.close()
        session.close()
        session = engine.open(tmp_path / "m")
    assert len(list((tmp_path / "m").iterdir())) == 3


def engine_reopen(engine: Engine, session: Session, path: Path) -> Session:
    session.save(path)
    return engine.open(path)


def test_saving_from_every_tier(tmp_path: Path) -> None:
    """Pages in a saved file, in host memory, on disk and on the device alone."""
    plain = make_engine(keep=0.3)
    session = plain.session()
    session.append(tokens(200))
    session.save(tmp_path / "m")
    record = plain.layout.record_bytes
    tiered = make_engine(keep=0.3, host_budget_bytes=5 * record, disk_path=str(tmp_path / "tier"))
    opened = tiered.open(tmp_path / "m")
    more = tokens(200, seed=1)
    for one in (session, opened):
        one.append(more)
    held = {name: tier["pages"] for name, tier in opened.stats()["tiers"].items()}
    assert held["saved"] == 12 and held["host"] == 5 and held["disk"] == 8
    opened.save(tmp_path / "n")
    assert_go_on_alike(session, plain.open(tmp_path / "n"))
    tiered.close()
    assert not list((tmp_path / "tier").iterdir())


def test_closed_sessions_and_foreign_paths(tmp_path: Path) -> None:
    engine = make_engine()
    session = engine.session()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        session.save(tmp_path / "file")
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    for name in ("file", "missing"):
        with pytest.raises(ValueError, match="is not a memory"):
            engine.open(tmp_path / name)
    assert not engine.sessions


# ---- whose memory it is


@dataclass
class Foreign:
    change: dict[str, Any]
    message: str


FOREIGN = {
    "model": Foreign({"seed": 2}, "model"),
    "geometry": Foreign({"layers": "WCHCC"}, "model"),
    "dtype": Foreign({"dtype": torch.bfloat16}, "dtype 'float32'; this engine has 'bfloat16'"),
    "page": Foreign({"page_chunks": 8}, "page_chunks 4; this engine has 8"),
    "format": Foreign({"kv_format": "fp8"}, "kv_format 'fp32'; this engine has 'fp8'"),
    "window": Foreign({"observation_window": 2}, "observation_window 1; this engine has 2"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_memories_are_refused(name: str, tmp_path: Path) -> None:
    session = make_engine().session()
    session.append(tokens(100))
    session.save(tmp_path / "m")
    engine = make_engine(**FOREIGN[name].change)
    with pytest.raises(DamagedError, match=FOREIGN[name].message):
        engine.open(tmp_path / "m")
    assert not engine.sessions
    engine.check()
