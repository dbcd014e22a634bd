"""Copies of neighbours in one piece, and all pieces in one call of CUDA; a stand-in plays the call on the CPU."""

from __future__ import annotations

import ctypes
import random
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from store_cases import CPU, CPU_TWO, C, Chunks, append, make_layout, make_store

from flashmem.store import HostMirror, Run, copies
from flashmem.store.copies import BatchedCopies, LoopedCopies, best_copies, pieces
from flashmem.store.device import _SideStream


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1


class Runtime:
    """What `BatchedCopies` uses of `cuda.bindings.runtime`, with its checks; copies at once, in any order."""

    cudaMemcpySrcAccessOrder = SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)

    def __init__(self, driver: int = 13_000, built_for: int = 13_000) -> None:
        self.driver, self.built_for = driver, built_for
        self.calls: list[list[int]] = []
        self.fails = False

    def cudaMemcpyAttributes(self) -> Any:
        return SimpleNamespace(srcAccessOrder=0)

    def cudaMemcpyBatchAsync(
        self, dsts: list[int], srcs: list[int], sizes: list[int], count: int, attrs: list[Any], indices: list[int],
        num_attrs: int, stream: int,
    ) -> tuple[Error]:  # fmt: skip
        assert 0 < count == len(dsts) == len(srcs) == len(sizes) and len(attrs) == num_attrs == 1 and indices == [0]
        assert attrs[0].srcAccessOrder == 1 and all(type(value) is int for value in (*dsts, *srcs, *sizes, stream))
        if self.fails:
            return (Error.cudaErrorInvalidValue,)
        self.calls.append(sizes)
        for index in random.Random(0).sample(range(count), count):
            ctypes.memmove(dsts[index], srcs[index], sizes[index])
        return (Error.cudaSuccess,)

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self.built_for


def mirror_of(records: int, *, budget: int | None = None) -> HostMirror:
    layout = make_layout()
    host = HostMirror(layout, None if budget is None else budget * layout.record_bytes)
    host.take(records)
    return host


def shape(runs: list[Run]) -> list[tuple[int, int, int]]:
    return [(run.slot, run.row, run.length) for run in runs]


@pytest.mark.parametrize(
    ("slots", "records", "runs"),
    [
        ([], [], []),
        ([3], [5], [(3, 5, 1)]),
        ([0, 1, 2, 3], [4, 5, 6, 7], [(0, 4, 4)]),
        ([0, 1, 3, 4], [4, 5, 6, 7], [(0, 4, 2), (3, 6, 2)]),  # a gap among the slots
        ([0, 1, 2, 3], [4, 5, 7, 8], [(0, 4, 2), (2, 7, 2)]),  # a gap among the records
        ([1, 0], [4, 5], [(1, 4, 1), (0, 5, 1)]),  # neighbours, but not in the same order
        ([0, 1, 2], [6, 5, 4], [(0, 6, 1), (1, 5, 1), (2, 4, 1)]),
    ],
)
def test_neighbours_become_one_run(slots: list[int], records: list[int], runs: list[tuple[int, int, int]]) -> None:
    host = mirror_of(12)
    assert shape(host.runs(slots, records)) == runs
    host.close()


def test_a_run_ends_with_its_slab() -> None:
    host = mirror_of(16)
    host.take(8)
    first = host.slabs[0].shape[0]
    assert len(host.slabs) == 2 and first == 16
    runs = host.runs(list(range(20)), list(range(2, 22)))
    assert shape(runs) == [(0, 2, 14), (14, 0, 6)]
    assert [run.slab.data_ptr() for run in runs] == [slab.data_ptr() for slab in host.slabs]
    back = host.runs([7, 8], [17, 3])
    assert shape(back) == [(7, 1, 1), (8, 3, 1)] and back[1].slab.data_ptr() == host.slabs[0].data_ptr()
    host.close()


def test_runs_cover_what_was_asked() -> None:
    host, draw = mirror_of(40), random.Random(2)
    for _ in range(100):
        count = draw.randrange(30)
        slots, records = sorted(draw.sample(range(40), count)), sorted(draw.sample(range(40), count))
        pairs = []
        for run in host.runs(slots, records):
            start = next(i for i, slab in enumerate(host.slabs) if slab is run.slab)
            pairs += [(run.slot + i, host._starts[start] + run.row + i) for i in range(run.length)]
        assert pairs == list(zip(slots, records, strict=True))
    host.close()


def test_records_of_several_parts_go_one_by_one() -> None:
    layout = make_layout(devices=(CPU, CPU_TWO))
    slab = torch.zeros(8, layout.record_bytes, dtype=torch.uint8)
    assert shape(list(pieces(layout.parts[0], [Run(2, slab, 1, 3, True)]))) == [(2, 1, 1), (3, 2, 1), (4, 3, 1)]
    whole = make_layout().parts[0]
    assert shape(list(pieces(whole, [Run(2, slab, 1, 3, True)]))) == [(2, 1, 3)]


@pytest.mark.parametrize("devices", [(CPU,), (CPU, CPU_TWO)])
@pytest.mark.parametrize(("host_pinned", "stream"), [(True, 7), (False, 7), (True, 0)])
def test_batched_copies_give_the_same_bytes(
    devices: tuple[torch.device, ...], host_pinned: bool, stream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random windows in several calls each: `check` compares every resident page with its home. Only pinned memory and
    parts with a stream, as those on CUDA devices have, go in batches."""
    monkeypatch.setattr(copies, "BATCH_PIECES", 2)
    monkeypatch.setattr(_SideStream, "handle", stream)
    layout, runtime, draw = make_layout(devices=devices), Runtime(), random.Random(4)
    store = make_store(layout, device_budget_bytes=30 * layout.record_bytes)
    store.host.pinned = host_pinned
    store.host._pinned_slabs.clear()
    store.pool.copies = BatchedCopies(runtime)
    slabs = store.host._grow

    def grow_without_pinning(missing: int) -> None:
        store.host.pinned = False  # there is no device to pin for
        slabs(missing)
        store.host.pinned = host_pinned

    store.host._grow = grow_without_pinning  # type: ignore[method-assign]
    session, chunks = store.open_session(), Chunks(layout, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        append(session, chunks, 3 * C + 1, generator)
        complete = session.num_chunks // C
        wanted = {*draw.sample(range(complete), min(complete, 5)), *range(complete, session.num_pages)}
        session.prefetch(sorted(wanted))
        store.check()
        session.flip()
        store.check()
        session.evict(range(0, complete, 2))
    batch = store.batch([session])
    batch.begin([session.num_chunks])
    for layer in layout.csa_layers:
        ids = batch.chunk_ids(layer)[0]
        picks = (ids >= 0).nonzero().T
        assert torch.equal(batch.kv(layer, picks)[0], chunks.kv[layer][ids[ids >= 0]])
    assert bool(runtime.calls) == (host_pinned and stream > 0)
    store.close()


def test_a_batch_that_cuda_refuses_is_an_error() -> None:
    layout, runtime = make_layout(), Runtime()
    pool, slab = (torch.zeros(4, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    batched = BatchedCopies(runtime)
    batched.to_device(layout.parts[0], pool, [], 7)  # no attributes without a copy
    runtime.fails = True
    with pytest.raises(RuntimeError, match=r"cudaMemcpyBatchAsync of 1 pieces.*cudaErrorInvalidValue"):
        batched.to_host(layout.parts[0], pool, [Run(0, slab, 0, 2, True)], 7)


def test_the_capability_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_copies([CPU]).name == "one by one"
    cuda = [torch.device("cuda", 0)]
    monkeypatch.setattr(copies, "_batching_runtime", lambda: None)
    assert isinstance(best_copies(cuda), LoopedCopies)
    monkeypatch.setattr(copies, "_batching_runtime", Runtime)
    assert best_copies(cuda).name == "batched" and best_copies([CPU]).name == "one by one"


@pytest.mark.parametrize(
    ("driver", "built_for", "usable"),
    [(13_000, 13_000, True), (13_020, 13_000, True), (13_000, 13_020, True), (12_090, 13_000, False),
     (12_080, 12_090, True), (12_040, 12_090, False), (0, 13_000, False)],
)  # fmt: skip
def test_an_old_driver_cannot(driver: int, built_for: int, usable: bool) -> None:
    assert (copies._usable(Runtime(driver, built_for)) is not None) == usable
    assert copies._usable(SimpleNamespace()) is None


def test_slots_are_handed_out_lowest_first() -> None:
    pool = make_store(make_layout(), device_budget_bytes=8 * make_layout().record_bytes).pool
    assert pool.take(6, 0) == [0, 1, 2, 3, 4, 5]
    pool.give_back([4, 1, 2])
    assert pool.take_for_copy(4, 1) == [1, 2, 4, 6]
    pool.check()
