"""One session at a time: what the random histories do not pin down."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from store_cases import (
    CPU,
    CPU_TWO,
    CSA_LAYERS,
    TARGETS,
    C,
    Chunks,
    append,
    make_layout,
    make_store,
    random_chunks,
    write,
)

from flashmem.store import PageStore, SessionPages
from flashmem.types import BudgetError, DecodePages, PrefillPages, TierBytes

LAYOUT = make_layout()
SIZE = LAYOUT.record_bytes


def filled(store: PageStore, count: int, *, seed: int = 0) -> tuple[SessionPages, Chunks]:
    session, chunks = store.open_session(), Chunks(store.layout, store.dtype)
    append(session, chunks, count, torch.Generator().manual_seed(seed))
    return session, chunks


def test_protocols_are_met() -> None:
    store = make_store(LAYOUT)
    session: PrefillPages = store.open_session()
    batch: DecodePages = store.batch([session])  # type: ignore[list-item]
    assert batch.keys_rotated(1) is False
    store.close()


@pytest.mark.parametrize("poison", [False, True])
def test_life_of_a_session(poison: bool) -> None:
    store = make_store(LAYOUT, poison=poison)
    session, _ = filled(store, 4 * C + 2)
    assert (session.num_pages, session.resident) == (5, (0, 1, 2, 3, 4))
    assert session.traffic.pages_to_host == 4 and session.traffic.bytes_to_host == 4 * SIZE
    session.evict([1])
    assert session.resident == (1, 4) and session.live_bytes == 2 * SIZE
    assert session.tier_bytes()["device"] == TierBytes(pages=2, bytes=2 * SIZE)
    assert session.tier_bytes()["host"] == TierBytes(pages=4, bytes=4 * SIZE)
    session.prefetch([0, 3, 4])
    assert session.resident == (1, 4)
    session.flip()
    assert session.resident == (0, 3, 4)
    assert session.traffic.pages_to_device == 2 and session.traffic.flips == 1
    store.check()
    session.close()
    assert store.tier_bytes()["host"] == store.tier_bytes()["device"] == TierBytes()
    store.check()
    with pytest.raises(ValueError, match="closed"):
        session.reserve(1)
    store.close()


def test_pages_born_after_the_prefetch_stay() -> None:
    store = make_store(LAYOUT)
    session, chunks = filled(store, 3 * C + 1)
    session.prefetch([0, 3])
    append(session, chunks, 2 * C, torch.Generator().manual_seed(1))  # completes 3 and 4, opens 5
    session.flip()
    assert session.resident == (0, 3, 4, 5)
    store.check()


def test_open_page_may_not_be_left_out() -> None:
    store = make_store(LAYOUT)
    session, _ = filled(store, 2 * C + 1)
    with pytest.raises(ValueError, match="page being filled, 2,"):
        session.prefetch([0])
    with pytest.raises(ValueError, match="sorted, unique"):
        session.prefetch([2, 0])
    with pytest.raises(ValueError, match="sorted, unique"):
        session.prefetch([2, 3])
    session.evict([])
    assert session.resident == (2,)


def test_room_that_was_reserved_is_kept_until_rollback() -> None:
    store = make_store(LAYOUT)
    session, chunks = filled(store, 1)
    session.reserve(3 * C)
    write(session, chunks, 2, torch.Generator().manual_seed(1))
    session.commit(2)
    assert (session.num_chunks, session.reserved_chunks) == (3, 3 * C + 1)
    assert session.tier_bytes()["device"].pages == 4 and session.resident == (0,)
    assert session.tier_bytes()["host"].pages == 3
    store.check()
    session.rollback()
    assert session.tier_bytes()["device"].pages == 1 and session.tier_bytes()["host"].pages == 0
    store.check()


def test_misuse_is_refused() -> None:
    store = make_store(LAYOUT)
    session = store.open_session()
    kv, keys = random_chunks(LAYOUT, 3, torch.float32, torch.Generator())
    session.reserve(2)
    with pytest.raises(ValueError, match="3 chunks written, room for 2"):
        session.write(1, kv, keys)
    with pytest.raises(ValueError, match="3 entries but 2 index keys"):
        session.write(1, kv, keys[:2])
    with pytest.raises(ValueError, match="cannot commit 3 chunks, 2 are reserved"):
        session.commit(3)
    with pytest.raises(ValueError, match="3 chunks asked for, 2 are there"):
        session.history(1, 3)
    with pytest.raises(ValueError, match="not within"):
        session.history(1, 2).keys(1, 3)
    batch = store.batch([session])
    with pytest.raises(ValueError, match="row 0: 3 visible chunks, 2 reserved"):
        batch.begin([3])
    with pytest.raises(ValueError, match="2 counts for 1 sessions"):
        batch.begin([0, 0])
    batch.begin([0])
    with pytest.raises(ValueError, match="only once"):
        store.batch([session, session])
    session.close()
    with pytest.raises(ValueError, match="closed"):
        store.batch([session])
    with pytest.raises(ValueError, match="needs disk_path"):
        make_store(LAYOUT, disk_budget_bytes=SIZE)


def test_committed_chunks_cannot_be_overwritten_in_a_step() -> None:
    store = make_store(LAYOUT)
    session, _ = filled(store, 3)
    batch = store.batch([session])
    batch.begin([3])
    kv, keys = random_chunks(LAYOUT, 1, torch.float32, torch.Generator())
    with pytest.raises(ValueError, match="chunk 2 is committed"):
        batch.write(1, torch.tensor([0]), kv, keys)


def test_an_empty_batch_and_empty_sessions() -> None:
    layout = make_layout("fp8")
    store = make_store(layout)
    for sessions in ([], [store.open_session(), store.open_session()]):
        batch = store.batch(sessions)
        batch.begin([0] * len(sessions))
        for layer in CSA_LAYERS:
            if sessions:
                assert batch.keys(layer).shape == (2, 0, C, layout.index_head_dim)
            assert batch.chunk_ids(layer).shape == (len(sessions), 0)
    ragged, _ = filled(store, 5)
    batch = store.batch([store.open_session(), ragged])
    batch.begin([0, 5])
    assert batch.chunk_ids(1).tolist() == [[-1] * 8, [0, 1, 2, 3, 4, -1, -1, -1]]
    assert batch.keys(3).shape == batch.keys(1).shape == (2, 2, C, layout.index_head_dim)
    assert batch.kv(1, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, layout.kv_spec.head_dim)


@pytest.mark.parametrize(("host_records", "disk_records", "tier"), [(2, None, "host"), (1, 1, "host and disk")])
def test_homes_that_do_not_fit_are_refused(
    tmp_path: Path, host_records: int, disk_records: int | None, tier: str
) -> None:
    store = make_store(
        LAYOUT,
        host_budget_bytes=host_records * SIZE,
        disk_path=None if disk_records is None else str(tmp_path),
        disk_budget_bytes=None if disk_records is None else disk_records * SIZE,
    )
    session, _ = filled(store, C + 1)
    session.ensure_room(C)
    for refuse in (session.ensure_room, session.reserve):
        with pytest.raises(BudgetError) as caught:
            refuse(2 * C)
        assert str(caught.value) == f"{tier}: {2 * SIZE:,} bytes needed, {SIZE:,} available"
    assert session.num_pages == 2 and session.reserved_chunks == C + 1
    store.check()


def test_pages_go_to_disk_when_the_mirror_is_full(tmp_path: Path) -> None:
    store = make_store(LAYOUT, host_budget_bytes=2 * SIZE, disk_path=str(tmp_path))
    session, chunks = filled(store, 5 * C)
    tiers = session.tier_bytes()
    assert (tiers["host"].pages, tiers["disk"].pages) == (2, 3)
    assert (session.traffic.pages_to_host, session.traffic.pages_to_disk) == (2, 3)
    session.evict([])
    assert torch.equal(session.history(4, 5 * C).kv(torch.arange(5 * C)), chunks.kv[4])
    store.check()


def test_device_budget_must_hold_both_tables_of_a_prefetch() -> None:
    store = make_store(LAYOUT, device_budget_bytes=4 * SIZE)
    session, _ = filled(store, 4 * C)
    session.evict([0, 1])
    with pytest.raises(BudgetError, match="device"):
        store.open_session().reserve(3 * C)
    session.prefetch([2, 3])
    with pytest.raises(BudgetError, match=f"device: {SIZE:,} bytes needed, 0 available"):
        store.open_session().reserve(1)
    session.flip()
    store.open_session().reserve(2 * C)
    with pytest.raises(BudgetError, match=f"device: {SIZE:,} bytes needed, 0 available"):
        session.prefetch([0])
    assert session.resident == (2, 3)
    store.check()


def test_a_failed_device_reservation_gives_its_homes_back() -> None:
    store = make_store(LAYOUT, device_budget_bytes=2 * SIZE, host_budget_bytes=9 * SIZE)
    session = store.open_session()
    with pytest.raises(BudgetError, match="device"):
        session.reserve(5 * C)
    assert store.host.used_bytes == 0 and session.reserved_chunks == 0
    store.check()


def test_history_of_uncommitted_chunks_is_not_read_from_their_empty_homes() -> None:
    store = make_store(LAYOUT)
    session, chunks = filled(store, C + 1)
    session.evict([])
    session.reserve(2 * C)
    write(session, chunks, 2 * C, torch.Generator().manual_seed(2))
    history = session.history(1, 3 * C + 1)
    assert torch.equal(history.kv(torch.arange(3 * C + 1)), chunks.kv[1])
    assert torch.equal(history.keys(1, 3 * C), chunks.keys[1][1 : 3 * C])


def test_wrong_saved_memories_are_refused(tmp_path: Path) -> None:
    from flashmem.store import MappedRecords

    store = make_store(LAYOUT)
    (tmp_path / "pages").write_bytes(bytes(2 * SIZE))
    mapped = MappedRecords(tmp_path / "pages", offset=0, count=2, record_bytes=SIZE, crcs=[0, 0])
    rows = {3: torch.zeros(2 * C, LAYOUT.index_row_bytes, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="3 records of"):
        store.open_session().import_saved(mapped, 2 * C + 1, rows)
    with pytest.raises(ValueError, match="index rows of layer 3 must be"):
        store.open_session().import_saved(mapped, 2 * C - 1, rows)
    session, _ = filled(store, 1)
    with pytest.raises(ValueError, match="empty session"):
        session.import_saved(mapped, 2 * C, rows)
    store.check()


def test_exported_pages_hold_no_foreign_bytes() -> None:
    """A slot that another session used before is clean when the open page is saved."""
    store = make_store(LAYOUT, device_budget_bytes=2 * SIZE, poison=False)
    other = store.open_session()
    other.reserve(2 * C)
    for part in store.pool.parts:
        part.fill_(0xAB)
    other.close()
    session, _ = filled(store, 1)
    [(page, record)] = session.export_pages()
    region = LAYOUT.kv_regions[1].of_records(record.view(1, -1))
    assert page == 0 and region[0, LAYOUT.kv_entry_bytes :].eq(0).all()


@pytest.mark.parametrize("devices", [(CPU,), (CPU, CPU_TWO)])
def test_index_rows_follow_the_chunks(devices: tuple[torch.device, ...]) -> None:
    store = make_store(make_layout("fp8", devices=devices))
    session, chunks = filled(store, 0)
    for step in range(9):
        append(session, chunks, step, torch.Generator().manual_seed(step))
        for layer in TARGETS:
            assert torch.equal(session.index_rows(layer), chunks.rows[layer])
    assert session.index_row_bytes >= 36 * store.layout.index_row_bytes


def test_shared_mirror_is_written_by_its_writer_alone(tmp_path: Path) -> None:
    stores = [make_store(LAYOUT, shared_dir=str(tmp_path), writer=writer) for writer in (True, False)]
    sessions = []
    for store in stores:
        session, chunks = filled(store, 3 * C + 1)
        session.evict([])
        sessions.append(session)
    for session in sessions:
        assert torch.equal(session.history(3, 3 * C + 1).kv(torch.arange(3 * C + 1)), chunks.kv[3])
        session.prefetch([1, 3])
        session.flip()
        session.check()
    assert sessions[1].traffic.pages_to_host == 0
    for store in reversed(stores):
        store.close()


def test_a_step_costs_the_same_at_any_history() -> None:
    """Decode work follows the resident pages, not the chunks."""
    seconds = []
    for count in (64 * C, 2048 * C):
        store = make_store(LAYOUT, poison=False)
        session, _ = filled(store, count)
        session.evict(range(8))
        batch = store.batch([session])
        kv, keys = random_chunks(LAYOUT, 1, torch.float32, torch.Generator())
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            session.reserve(1)
            batch.begin([session.num_chunks + 1])
            for layer in CSA_LAYERS:
                batch.write(layer, torch.tensor([0]), kv, keys)
                batch.keys(layer)
                batch.kv(layer, torch.zeros(1, 8, dtype=torch.int64))
            session.commit(1)
            times.append(time.perf_counter() - begin)
        seconds.append(sorted(times)[len(times) // 2])
        store.close()
    assert seconds[1] < 3 * seconds[0]
