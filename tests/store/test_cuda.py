"""Copies on the side stream under load: the host runs far ahead of the device, so every missing wait shows.

Nothing here waits for the device until the end: comparisons are summed up on the device.
Shape letters: N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from store_cases import CSA_LAYERS, Chunks, append, make_layout, make_store, random_chunks

from flashmem.store import PageStore, SessionPages, copies, device
from flashmem.store.device import _SideStream
from flashmem.store.host import _pin, _unpin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

PAGE = 64
CYCLES = 2_000_000  # about a millisecond
LONG = 100_000_000  # about 60 milliseconds


@pytest.fixture(autouse=True, params=["one by one", "batched"])
def kind_of_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(device, "best_copies", lambda devices: copies.LoopedCopies())
    elif copies._batching_runtime() is None:
        pytest.skip("CUDA has no batched copies here")
    return str(request.param)


def slow_side_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of copies starts late."""
    current = _SideStream.current

    def late(self: _SideStream) -> object:
        with current(self):
            torch.cuda._sleep(LONG // 10)
        return current(self)

    monkeypatch.setattr(_SideStream, "current", late)


def make_cuda_store(slots: int | None) -> PageStore:
    layout = make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    budget = None if slots is None else slots * layout.record_bytes
    return make_store(layout, device_budget_bytes=budget, poison=False)


def two_pages_at_home(store: PageStore) -> tuple[SessionPages, Chunks]:
    session, chunks = store.open_session(), Chunks(store.layout, torch.float32)
    for seed in (0, 1):
        append(session, chunks, PAGE, torch.Generator().manual_seed(seed))
        session.evict([])
    torch.cuda.synchronize()
    return session, chunks


def warm_up() -> None:
    """Do once what makes the host wait for the whole device the first time: it would hide a missing wait.

    That is loading kernels and allocating pinned memory for indices.
    """
    sizes = [2**power for power in range(9)]
    pinned = [torch.zeros(size, dtype=torch.int64).pin_memory() for size in sizes for _ in range(16)]
    del pinned
    store = make_cuda_store(2)
    session, _ = two_pages_at_home(store)
    session.prefetch([0, 1])
    session.flip()
    read_page(session, [0, 1], pause=True)
    session.evict([])
    session.prefetch([0])
    session.cancel_prefetch()
    store.close()
    torch.cuda.synchronize()


def read_page(session: SessionPages, pages: list[int], *, pause: bool = False) -> torch.Tensor:
    """KV entries of layer 1 of the live table, which must be `pages`; with a pause the device reads late."""
    batch = session.store.batch([session])
    batch.begin([session.num_chunks])
    picks = torch.arange(len(pages) * PAGE, device="cuda").unsqueeze(0)
    if pause:
        torch.cuda._sleep(LONG)
    return batch.kv(1, picks)[0]


def page_of(chunks: Chunks, page: int) -> torch.Tensor:
    return chunks.kv[1][page * PAGE : (page + 1) * PAGE]


def test_flip_makes_the_device_wait_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    session, chunks = two_pages_at_home(make_cuda_store(1))
    slow_side_streams(monkeypatch)
    session.prefetch([1])
    session.flip()
    assert torch.equal(read_page(session, [1]).cpu(), page_of(chunks, 1))


def test_a_copy_in_waits_for_the_last_reader_of_its_slot() -> None:
    warm_up()
    session, chunks = two_pages_at_home(make_cuda_store(1))
    session.prefetch([0])
    session.flip()
    torch.cuda.synchronize()
    kv = read_page(session, [0], pause=True)
    session.evict([])
    session.prefetch([1])  # into the slot that is still to be read
    assert torch.equal(kv.cpu(), page_of(chunks, 0))


def test_a_copy_out_waits_for_the_writer_of_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    store = make_cuda_store(1)
    session, chunks = store.open_session(), Chunks(store.layout, torch.float32)
    write = PageStore.write_entries

    def late(*arguments: object, **options: object) -> object:
        torch.cuda._sleep(LONG // 3)
        return write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PageStore, "write_entries", late)
    append(session, chunks, PAGE, torch.Generator().manual_seed(0))
    session.evict([])
    assert torch.equal(session.history(1, PAGE).kv(torch.arange(PAGE, device="cuda")).cpu(), page_of(chunks, 0))


def test_a_taken_slot_waits_for_the_copy_out_of_its_last_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    store = make_cuda_store(1)
    slow_side_streams(monkeypatch)
    session, chunks = store.open_session(), Chunks(store.layout, torch.float32)
    for seed in (0, 1):  # the second page takes the slot of the first
        append(session, chunks, PAGE, torch.Generator().manual_seed(seed))
        session.evict([])
    ids = torch.arange(2 * PAGE, device="cuda")
    assert torch.equal(session.history(1, 2 * PAGE).kv(ids).cpu(), chunks.kv[1])


def test_a_taken_slot_waits_for_a_cancelled_copy_in(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    session, chunks = two_pages_at_home(make_cuda_store(1))
    slow_side_streams(monkeypatch)
    session.prefetch([0])
    session.cancel_prefetch()
    append(session, chunks, PAGE - 1, torch.Generator().manual_seed(2))
    torch.cuda.synchronize()
    batch = session.store.batch([session])
    batch.begin([session.num_chunks])
    kv = batch.kv(1, torch.arange(PAGE - 1, device="cuda").unsqueeze(0))[0]
    assert torch.equal(kv.cpu(), chunks.kv[1][2 * PAGE :])


def test_an_opened_page_is_not_cleared_after_its_copy() -> None:
    """The device is behind: what clears the slot of the page being filled may not come after its bytes."""
    warm_up()
    store = make_cuda_store(8)
    session, chunks = store.open_session(), Chunks(store.layout, torch.float32)
    append(session, chunks, PAGE + 5, torch.Generator().manual_seed(2))
    torch.cuda.synchronize()
    saved = session.snapshot()
    rows = {layer: session.index_rows(layer).clone() for layer in store.layout.target_layers}
    opened = store.open_session()
    torch.cuda._sleep(LONG)
    opened.import_saved(saved, PAGE + 5, rows)
    torch.cuda.synchronize()
    assert torch.equal(store.pool.record_to_cpu(opened.slot_of(1)), saved.row(1))
    store.close()


def test_growth_waits_for_copies_into_the_old_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    session, chunks = two_pages_at_home(make_cuda_store(None))
    slow_side_streams(monkeypatch)
    session.prefetch([0, 1])
    session.reserve(20 * PAGE)
    session.flip()
    session.rollback()
    assert torch.equal(read_page(session, [0, 1]).cpu(), chunks.kv[1])


def test_the_kind_of_copies_is_told(kind_of_copies: str) -> None:
    store = make_cuda_store(1)
    assert store.pool.copies.name == kind_of_copies
    store.close()


@pytest.mark.parametrize("count", [1, 7, 60])
def test_both_kinds_of_copies_give_the_same_bytes(count: int) -> None:
    """Runs of every length between scattered slots and records, both ways, into memory that held other bytes."""
    draw, layout = random.Random(count), make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    store = make_store(layout, device_budget_bytes=100 * layout.record_bytes, poison=False)
    slots, homes = store.pool.take_for_copy(100, 0), store.host.take(100)
    taken = [sorted(draw.sample(range(100), count)) for _ in range(2)]
    runs = store.host.runs([slots[i] for i in taken[0]], [homes[i] for i in taken[1]])
    for home in homes:
        store.host.row(home).random_(generator=torch.Generator().manual_seed(home))
    before = [store.host.row(home).clone() for home in homes]
    store.pool.parts[0].fill_(7)
    store.pool.wait_host(store.pool._now())
    store.pool.wait(store.pool.copy_in(runs))
    torch.cuda.synchronize()
    source = dict(zip(taken[0], taken[1], strict=True))
    for slot in range(100):
        wanted = before[source[slot]] if slot in source else torch.full_like(before[0], 7)
        assert torch.equal(store.pool.record_to_cpu(slots[slot]), wanted)
    for home in homes:
        store.host.row(home).zero_()
    store.pool.wait_host(store.pool.copy_out(runs))
    for record in range(100):
        wanted = before[record] if record in taken[1] else torch.zeros_like(before[0])
        assert torch.equal(store.host.row(homes[record]), wanted)
    store.close()


def test_a_batch_does_not_make_the_host_wait() -> None:
    """Copies behind a pause are enqueued and not done; the same page copied out and in again is read in order."""
    warm_up()
    store = make_cuda_store(4)
    session, chunks = two_pages_at_home(store)
    with store.pool.side_stream(0):
        torch.cuda._sleep(LONG)
    session.prefetch([0, 1])
    assert session._pending is not None and not session._pending.ticket[0].query()
    session.flip()
    assert torch.equal(read_page(session, [0, 1]).cpu(), chunks.kv[1])


class Truth:
    """What a session holds, on the device, and how many entries ever differed from it."""

    def __init__(self, session: SessionPages, chunks: Chunks, capacity: int) -> None:
        self.session = session
        self.num_chunks = chunks.count
        self.kv = {layer: self._room(chunks.kv[layer], capacity) for layer in CSA_LAYERS}
        self.keys = {layer: self._room(chunks.keys[layer], capacity) for layer in CSA_LAYERS}
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.compared = 0

    @staticmethod
    def _room(rows: torch.Tensor, capacity: int) -> torch.Tensor:
        room = torch.zeros(capacity, rows.shape[1], dtype=rows.dtype, device="cuda")
        room[: rows.shape[0]] = rows.cuda()
        return room

    def append(self, count: int, generator: torch.Generator) -> None:
        """Reserve, write and commit; freed slots are taken again while older work may still run."""
        self.session.reserve(count)
        for layer in CSA_LAYERS:
            kv, keys = random_chunks(self.session.store.layout, count, torch.float32, generator)
            kv, keys = kv.pin_memory().cuda(non_blocking=True), keys.pin_memory().cuda(non_blocking=True)
            self.session.write(layer, kv, keys)
            self.kv[layer][self.num_chunks : self.num_chunks + count] = kv
            self.keys[layer][self.num_chunks : self.num_chunks + count] = keys
        self.session.commit(count)
        self.num_chunks += count

    def compare(self) -> None:
        """Read all resident entries behind a pause, so that the host frees and refills slots before the read runs."""
        batch = self.session.store.batch([self.session])
        batch.begin([self.num_chunks])
        torch.cuda._sleep(CYCLES)
        for layer in CSA_LAYERS:
            ids_N = batch.chunk_ids(layer)[0]
            there_N = ids_N >= 0
            picks = torch.arange(ids_N.shape[0], device="cuda").unsqueeze(0)
            expected = ids_N.clamp_min(0)
            for got, truth in (
                (batch.kv(layer, picks)[0], self.kv[layer]),
                (batch.keys(layer)[0].flatten(0, 1), self.keys[layer]),
            ):
                self.wrong += ((got != truth[expected]).any(-1) & there_N).sum()
                self.compared += ids_N.shape[0]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("with_disk", [False, True])
@pytest.mark.parametrize("device_pages", [40, None])
def test_windows_under_load(
    slow: bool, with_disk: bool, device_pages: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    layout = make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    size = layout.record_bytes
    store = make_store(
        layout,
        device_budget_bytes=None if device_pages is None else device_pages * size,
        host_budget_bytes=50 * size if with_disk else None,
        disk_path=str(tmp_path) if with_disk else None,
        poison=False,
    )
    session, chunks = store.open_session(), Chunks(layout, torch.float32)
    for _ in range(10):
        append(session, chunks, 6 * PAGE + 1, generator)
        session.evict(range(4))
    if slow:
        slow_side_streams(monkeypatch)
    truth = Truth(session, chunks, chunks.count + 40 * PAGE)
    for step in range(30):
        complete = truth.num_chunks // PAGE
        wanted = set(draw.sample(range(complete), 12)) | set(range(complete, session.num_pages))
        session.prefetch(sorted(wanted))
        truth.compare()
        if step % 3 == 0:
            truth.append(PAGE // 2 + step, generator)
        if step % 5 == 4:
            session.cancel_prefetch()
            truth.append(3, generator)  # may take a slot that the cancelled copy still writes
        else:
            session.flip()
        truth.compare()
        if step % 4 == 3:
            session.evict(range(0, complete, 2))
            truth.append(2 * PAGE, generator)
    torch.cuda.synchronize()
    assert truth.compared and truth.wrong.item() == 0
    store.check()
    ids = torch.randint(truth.num_chunks, (500,), device="cuda")
    for layer in CSA_LAYERS:
        history = session.history(layer, truth.num_chunks)
        assert torch.equal(history.kv(ids), truth.kv[layer][ids])
        assert torch.equal(history.keys(5, truth.num_chunks), truth.keys[layer][5 : truth.num_chunks])
    store.close()


def test_history_right_after_commit_waits_for_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_side_streams(monkeypatch)
    layout = make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    store = make_store(layout, poison=False)
    session, chunks = store.open_session(), Chunks(layout, torch.float32)
    for step in range(4):
        append(session, chunks, 5 * PAGE, torch.Generator().manual_seed(step))
        session.evict([])
        history = session.history(3, session.num_chunks)
        ids = torch.arange(session.num_chunks, device="cuda")
        assert torch.equal(history.kv(ids).cpu(), chunks.kv[3])
    pages = [record.clone() for _, record in session.export_pages()]
    assert len(pages) == 20
    store.close()


def test_the_mirror_is_pinned_at_its_exact_size() -> None:
    layout = make_layout(devices=(torch.device("cuda", 0),))
    store = make_store(layout)
    session, chunks = store.open_session(), Chunks(layout, torch.float32)
    append(session, chunks, 100, torch.Generator().manual_seed(0))
    assert all(slab.is_pinned() for slab in store.host.slabs)
    assert store.host.allocated_bytes == store.host.num_records * layout.record_bytes
    slabs = [slab.data_ptr() for slab in store.host.slabs]
    store.close()
    assert slabs and not store.host.slabs


def test_a_mirror_that_nobody_closed_is_unpinned() -> None:
    pinned = []
    for _ in range(20):  # addresses come again: pinning one that is still pinned would fail
        store = make_cuda_store(None)
        two_pages_at_home(store)
        pinned.append(store.host.slabs[0].data_ptr())
        del store
        gc.collect()
    assert len(set(pinned)) < len(pinned)


def test_memory_that_cannot_be_pinned_is_one_clear_error() -> None:
    slab = torch.zeros(1 << 16, dtype=torch.uint8)
    _pin(slab)
    with pytest.raises(MemoryError, match="pinning 65,536 bytes of host memory failed with CUDA error"):
        _pin(slab)
    torch.zeros(1, device="cuda")  # the error does not come up again
    _unpin([slab])


def test_device_bytes_are_the_slots() -> None:
    layout = make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    store = make_store(layout, device_budget_bytes=100 * layout.record_bytes)
    held = torch.cuda.memory_allocated() - before
    assert 0 <= held - 100 * layout.record_bytes < 4096
    store.close()
    assert torch.cuda.memory_allocated() == before
