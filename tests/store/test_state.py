"""Random histories of a store against a plain model of what every session wrote.

`python tests/store/test_state.py cpu 2000 100` (or `cuda`) runs longer than the tests do: 2000 histories of 100 steps.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_cases import CPU, CPU_TWO, CSA_LAYERS, TARGETS, C, Chunks, make_layout, make_store, random_chunks, write

from flashmem.store import DecodeBatch, MappedRecords, PageStore, SessionPages
from flashmem.types import BudgetError


@dataclass
class Open:
    pages: SessionPages
    chunks: Chunks
    prefetched: tuple[int, ...] | None = None
    first_open: int = 0
    live: set[int] = field(default_factory=set)
    """The live table as the model sees it."""


class StoreMachine(RuleBasedStateMachine):
    """Two or three sessions over one store; every step ends with all invariants."""

    devices: tuple[torch.device, ...] = (CPU,)

    @initialize(
        kv_format=st.sampled_from(("fp32", "bf16", "fp8")),
        device_records=st.sampled_from((None, 10, 24)),
        host_records=st.sampled_from((None, 5, 20)),
        disk_records=st.sampled_from((None, 0, 15)),
        split=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def start(
        self,
        kv_format: str,
        device_records: int | None,
        host_records: int | None,
        disk_records: int | None,
        split: bool,
        seed: int,
    ) -> None:
        self.directory = TemporaryDirectory()
        self.generator = torch.Generator().manual_seed(seed)
        self.slabs = pytest.MonkeyPatch()
        self.slabs.setattr("flashmem.store.host.FIRST_SLAB_RECORDS", 2)  # many slabs, so that reads span them
        self.layout = make_layout(kv_format, devices=self.devices[: 2 if split else 1])
        size = self.layout.record_bytes

        def budget(records: int | None) -> int | None:
            return None if records is None else records * size + size // 2

        disk = disk_records != 0
        self.store: PageStore = make_store(
            self.layout,
            device_budget_bytes=budget(device_records),
            host_budget_bytes=budget(host_records),
            disk_path=self.directory.name if disk else None,
            disk_budget_bytes=budget(disk_records) if disk else None,
        )
        self.open: list[Open] = []
        self.batches: dict[tuple[int, ...], DecodeBatch] = {}
        self.add_session()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()
            self.slabs.undo()

    # ---- helpers

    def pick(self, index: int) -> Open:
        return self.open[index % len(self.open)]

    def pick_filled(self, index: int) -> Open:
        """A session with pages, if there is one: the empty case is in `pick` often enough."""
        filled = [one for one in self.open if one.pages.num_pages > 1] or self.open
        return filled[index % len(filled)]

    def add_session(self) -> Open:
        session = self.store.open_session()
        self.open.append(Open(session, Chunks(self.layout, self.store.dtype)))
        return self.open[-1]

    def random_pages(self, one: Open, share: float) -> tuple[int, ...]:
        keep = torch.rand(one.pages.num_pages, generator=self.generator) < share
        pages = set(keep.nonzero().squeeze(1).tolist())
        if one.pages.num_chunks % C:
            pages.add(one.pages.num_chunks // C)
        return tuple(sorted(pages))

    def refused(self, error: BudgetError) -> None:
        """A refusal names both numbers, and they say that it does not fit."""
        assert error.needed > error.available >= 0
        assert f"{error.needed:,}" in str(error) and f"{error.available:,}" in str(error)

    def state(self, one: Open) -> object:
        pages = one.pages
        return (pages.num_chunks, pages.reserved_chunks, pages.resident, pages.table_version, pages.tier_bytes())

    def try_reserve(self, one: Open, count: int) -> bool:
        before = self.state(one)
        try:
            one.pages.reserve(count)
        except BudgetError as error:
            self.refused(error)
            assert self.state(one) == before
            return False
        return True

    def born(self, one: Open, before: int) -> None:
        one.live |= set(range(before // C, -(-one.pages.num_chunks // C)))

    def current_batch(self) -> DecodeBatch:
        """The batch of the open sessions, kept as long as they are the same: its tables must notice every change."""
        owners = tuple(one.pages.owner for one in self.open)
        if owners not in self.batches:
            self.batches = {owners: self.store.batch([one.pages for one in self.open])}
        return self.batches[owners]

    # ---- what callers do

    @precondition(lambda self: len(self.open) < 3)
    @rule()
    def open_another(self) -> None:
        self.add_session()

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 2), count=st.sampled_from((0, 1, 3, 4, 7, 13, 24)), extra=st.integers(0, 5))
    def append(self, index: int, count: int, extra: int) -> None:
        """A prefill forward that reads the history it is writing."""
        one = self.pick(index)
        before = one.pages.num_chunks
        if not self.try_reserve(one, count + extra):
            return
        write(one.pages, one.chunks, count, self.generator)
        for layer in CSA_LAYERS:
            self.compare_history(one, layer, before + count)
        one.pages.commit(count)
        self.born(one, before)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 2), count=st.integers(1, 9), layers=st.integers(0, 3), roll_back=st.booleans())
    def failing_forward(self, index: int, count: int, layers: int, roll_back: bool) -> None:
        one = self.pick(index)
        if not self.try_reserve(one, count):
            return
        for layer in CSA_LAYERS[:layers]:
            kv, keys = random_chunks(self.layout, count, self.store.dtype, self.generator)
            device = self.layout.device_of(layer)
            one.pages.write(layer, kv.to(device), keys.to(device))
        if roll_back:
            one.pages.rollback()
            assert one.pages.reserved_chunks == one.pages.num_chunks

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def decode_step(self, data: st.DataObject) -> None:
        """Some sessions of the batch complete a chunk, and attend it at once."""
        born = []
        for row, one in enumerate(self.open):
            if data.draw(st.booleans()) and self.try_reserve(one, 1):
                born.append(row)
        visible = [one.pages.num_chunks + (row in born) for row, one in enumerate(self.open)]
        batch = self.current_batch()
        batch.begin(visible)
        rows = torch.tensor(born, dtype=torch.int64)
        for layer in CSA_LAYERS:
            device = self.layout.device_of(layer)
            kv, keys = random_chunks(self.layout, len(born), self.store.dtype, self.generator)
            batch.write(layer, rows, kv.to(device), keys.to(device))
            for place, row in enumerate(born):
                self.open[row].chunks.append(layer, kv[place : place + 1], keys[place : place + 1])
            self.compare_batch(batch, layer, visible, committed=False)
        for row in born:
            before = self.open[row].pages.num_chunks
            self.open[row].pages.commit(1)
            self.born(self.open[row], before)
        batch.begin(visible)
        for layer in CSA_LAYERS:
            self.compare_batch(batch, layer, visible, committed=True)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 2), share=st.sampled_from((0.0, 0.3, 0.7)))
    def evict(self, index: int, share: float) -> None:
        one = self.pick_filled(index)
        keep = self.random_pages(one, share)
        if one.prefetched is not None:
            with pytest.raises(ValueError, match="prefetch is running"):
                one.pages.evict(keep)
            return
        one.pages.evict(keep)
        one.live &= set(keep)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 2), share=st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    def window_boundary(self, index: int, share: float) -> None:
        """Flip what was prefetched, then prefetch for the next window; other steps come in between."""
        one = self.pick_filled(index)
        if one.prefetched is not None:
            self.flip(one)
        self.prefetch(one, share)

    def prefetch(self, one: Open, share: float) -> None:
        wanted = self.random_pages(one, share)
        before = self.state(one)
        moved = one.pages.traffic.pages_to_device
        try:
            one.pages.prefetch(wanted)
        except BudgetError as error:
            self.refused(error)
            assert self.state(one) == before
            return
        assert one.pages.traffic.pages_to_device - moved == len(set(wanted) - one.live)
        assert one.pages.resident == before[2] and one.pages.table_version == before[3]
        with pytest.raises(ValueError, match="prefetch is running"):
            one.pages.prefetch(wanted)
        one.prefetched = wanted
        one.first_open = one.pages.num_chunks // C

    def flip(self, one: Open) -> None:
        version = one.pages.table_version
        one.pages.flip()
        assert one.pages.table_version > version
        one.live = set(one.prefetched) | {page for page in one.live if page >= one.first_open}
        one.prefetched = None
        with pytest.raises(ValueError, match="without a prefetch"):
            one.pages.flip()

    @precondition(lambda self: any(one.prefetched is not None for one in self.open))
    @rule()
    def flip_one(self) -> None:
        self.flip(next(one for one in self.open if one.prefetched is not None))

    @precondition(lambda self: any(one.prefetched is not None for one in self.open))
    @rule(index=st.integers(0, 2))
    def cancel(self, index: int) -> None:
        one = self.pick_filled(index)
        one.pages.cancel_prefetch()
        one.prefetched = None

    @precondition(lambda self: len(self.open) > 1)
    @rule(index=st.integers(0, 2))
    def close(self, index: int) -> None:
        one = self.pick(index)
        one.pages.close()
        one.pages.close()
        self.open.remove(one)

    @precondition(lambda self: any(one.pages.num_chunks for one in self.open))
    @rule(index=st.integers(0, 2), first=st.integers(0, 100))
    def save_and_open(self, index: int, first: int) -> None:
        """The copy replaces the original, so that runs go on with pages in a saved file."""
        one = self.pick_filled(index)
        path = Path(self.directory.name) / f"{one.pages.owner}.pages"
        pages, crcs = [], []
        with path.open("wb") as file:
            file.write(b"x" * first)
            for page, record in one.pages.export_pages():
                pages.append(page)
                crcs.append(zlib.crc32(record.numpy()))
                file.write(record.numpy().tobytes())
        assert pages == list(range(one.pages.num_pages))
        size = self.layout.record_bytes
        mapped = MappedRecords(path, offset=first, count=len(crcs), record_bytes=size, crcs=crcs)
        rows = {layer: one.pages.index_rows(layer).clone() for layer in TARGETS}
        copy = Open(self.store.open_session(), one.chunks.copy())
        try:
            copy.pages.import_saved(mapped, one.pages.num_chunks, rows)
        except BudgetError as error:
            self.refused(error)
            assert copy.pages.num_chunks == copy.pages.reserved_chunks == 0
            copy.pages.close()
            return
        count = one.pages.num_chunks
        assert copy.pages.tier_bytes()["saved"].pages == count // C
        if count % C:
            copy.live = {count // C}
        one.pages.close()
        self.open[self.open.index(one)] = copy

    # ---- what must hold after each step

    @invariant()
    def all_is_consistent(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        for one in self.open:
            assert one.pages.num_chunks == one.chunks.count
            assert one.pages.resident == tuple(sorted(one.live))
            assert one.pages.live_bytes % self.layout.record_bytes == 0
            for layer in TARGETS:
                assert torch.equal(one.pages.index_rows(layer).cpu(), one.chunks.rows[layer])

    @invariant()
    def resident_pages_hold_what_was_written(self) -> None:
        """Against the model too: a damaged home would agree with a slot that was copied from it."""
        if not getattr(self, "open", None):
            return
        batch = self.current_batch()
        visible = [one.pages.num_chunks for one in self.open]
        batch.begin(visible)
        for layer in CSA_LAYERS:
            self.compare_batch(batch, layer, visible, committed=True)

    @invariant()
    def history_holds_what_was_written(self) -> None:
        for one in getattr(self, "open", []):
            layer = CSA_LAYERS[int(torch.randint(3, (), generator=self.generator))]
            self.compare_history(one, layer, one.pages.num_chunks)

    def compare_batch(self, batch: DecodeBatch, layer: int, visible: list[int], *, committed: bool) -> None:
        ids = batch.chunk_ids(layer)
        keys = batch.keys(layer)
        assert keys.shape == (len(self.open), ids.shape[1] // C, C, self.layout.index_head_dim)
        for row, one in enumerate(self.open):
            there = ids[row] >= 0
            expected = [c for page in sorted(one.live) for c in range(page * C, page * C + C) if c < visible[row]]
            if not committed and visible[row] > one.pages.num_chunks:
                expected = sorted({*expected, visible[row] - 1})
            assert ids[row][there].tolist() == expected
            chosen = ids[row][there].cpu()
            assert torch.equal(keys[row].flatten(0, 1)[there].cpu(), one.chunks.keys[layer][chosen])
            picks = there.nonzero().squeeze(1).expand(len(self.open), -1)
            if picks.numel():
                kv = batch.kv(layer, picks.clone())[row]
                assert torch.equal(kv.cpu(), one.chunks.kv[layer][chosen])

    def compare_history(self, one: Open, layer: int, num_chunks: int) -> None:
        history = one.pages.history(layer, num_chunks)
        draw = torch.randint(num_chunks + 1, (2,), generator=self.generator).sort().values.tolist()
        for first, last in ((0, num_chunks), tuple(draw)):
            keys = history.keys(first, last).cpu()
            assert torch.equal(keys, one.chunks.keys[layer][first:last])
        if num_chunks:
            ids = torch.randint(num_chunks, (3, 5), generator=self.generator)
            kv = history.kv(ids.to(self.layout.device_of(layer))).cpu()
            assert torch.equal(kv, one.chunks.kv[layer][ids])


class OnCPU(StoreMachine):
    devices = (CPU, CPU_TWO)


class OnCuda(StoreMachine):
    devices = (torch.device("cuda", 0), CPU)


def run(machine: type[StoreMachine], histories: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories() -> None:
    run(OnCPU, 30, 50)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_histories_on_cuda() -> None:
    run(OnCuda, 40, 40)


if __name__ == "__main__":
    run({"cpu": OnCPU, "cuda": OnCuda}[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]))
