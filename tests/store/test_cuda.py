"""Copies on the side stream under load: the host runs far ahead of the device, so every missing wait shows.

Nothing here waits for the device until the end: comparisons are summed up on the device.
Shape letters: N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from store_cases import CSA_LAYERS, Chunks, append, make_layout, make_store, random_chunks

from flashmem.store import SessionPages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

PAGE = 64
CYCLES = 2_000_000  # about a millisecond


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
                self.compared += int(ids_N.shape[0])


def slow_side_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy in or out starts a millisecond late."""
    from flashmem.store.device import _SideStream

    current = _SideStream.current

    def late(self: _SideStream) -> object:
        with current(self):
            torch.cuda._sleep(CYCLES)
        return current(self)

    monkeypatch.setattr(_SideStream, "current", late)


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


def test_device_bytes_are_the_slots() -> None:
    layout = make_layout(devices=(torch.device("cuda", 0),), page_chunks=PAGE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    store = make_store(layout, device_budget_bytes=100 * layout.record_bytes)
    held = torch.cuda.memory_allocated() - before
    assert 0 <= held - 100 * layout.record_bytes < 4096
    store.close()
    assert torch.cuda.memory_allocated() == before
