"""The page store: a session's pages on the device, in host memory, on disk and in saved files.

The store moves bytes and counts them. What to keep comes from the policy, when to move from the cycle.

A page is *complete* when all its chunks are committed. A complete page always has a *home*: a record of the host
mirror, of the disk tier or of a saved file. The page being filled, and pages reserved beyond it, have only a slot.
Shape letters: N = chunks, D = head_dim, I = index_head_dim, R = bytes of an index row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from flashmem.kernels.kv_codec import put_planar
from flashmem.kernels.paged import places, to_device
from flashmem.types import BudgetError, TierBytes, Traffic, check_sorted_unique

from .batch import DecodeBatch
from .copies import Run
from .device import DevicePool, Ticket
from .disk import DiskTier
from .held import HeldRows
from .history import History
from .host import HostMirror
from .layout import EncodedRows, RecordLayout, encode_entries
from .records import Records, RecordStore, StackedRecords
from .resident import ResidentRows

HOST, DISK, SAVED = 0, 1, 2
STAGED_BYTES = 256 << 20
"""Of records on their way to `held_history`."""
MOST_SIZES = 64
"""Objects that `rows_in_place` keeps before it starts anew."""
_TIER_NAMES = ("host", "disk", "saved")


class Home(NamedTuple):
    """Where a complete page lives below the device."""

    tier: int
    record: int


class PageTables(NamedTuple):
    """A session's pages as int64 CPU tensors; -1 where a page has no slot, or no bytes below the device."""

    slots: torch.Tensor
    tiers: torch.Tensor
    records: torch.Tensor


@dataclass(slots=True)
class _Prefetch:
    wanted: tuple[int, ...]
    slots: dict[int, int]
    """Slots of the pages being copied."""
    ticket: Ticket
    first_open: int
    """First page that was not complete: pages from here on stay resident at the flip."""


class PageStore:
    """Everything that holds page bytes for one engine; `open_session` and `batch` hand out the parts that models use.

    Budgets are bytes; None is no limit. `dtype` is the model's compute dtype, in which entries are handed out.
    `disk_path` names the directory of the disk tier, used when the host budget is exhausted. `poison` fills unused
    slots with NaN (for tests). `shared_dir` and `writer`: see `HostMirror`. Methods must be called from one thread.
    """

    def __init__(
        self,
        layout: RecordLayout,
        *,
        device_budget_bytes: int | None,
        host_budget_bytes: int | None,
        disk_path: str | None,
        disk_budget_bytes: int | None,
        dtype: torch.dtype,
        poison: bool = False,
        shared_dir: str | None = None,
        writer: bool = True,
    ) -> None:
        if disk_budget_bytes is not None and disk_path is None:
            raise ValueError("disk_budget_bytes needs disk_path")
        self.layout = layout
        self.dtype = dtype
        self.pool = DevicePool(layout, device_budget_bytes, poison=poison)
        self.host = HostMirror(layout, host_budget_bytes, shared_dir=shared_dir, writer=writer)
        self.disk = None if disk_path is None else DiskTier(layout.record_bytes, disk_path, disk_budget_bytes)
        self.sessions: dict[int, SessionPages] = {}
        self._next_owner = 0
        self._rows: dict[tuple[int, int], ResidentRows] = {}
        self._rows_at: list[int] = []  # where the pool was when they were made

    def open_session(self) -> SessionPages:
        session = SessionPages(self, self._next_owner)
        self.sessions[self._next_owner] = session
        self._next_owner += 1
        return session

    def rows_in_place(
        self, sessions: Sequence[SessionPages], visible: Sequence[int], size: int | None = None
    ) -> ResidentRows:
        """The resident pages of these sessions for kernels, filled for a step (see `ResidentRows.fill`).

        There is one object for each `size`, and pages to powers of two (`places`): what it held for another batch is
        overwritten.
        """
        if (at := [part.data_ptr() for part in self.pool.parts]) != self._rows_at or len(self._rows) >= MOST_SIZES:
            self._rows, self._rows_at = {}, at
        longest = max(len(session.placed_pages()) for session in sessions)
        key = (size or len(sessions), places(longest, 4))
        if key not in self._rows:
            self._rows[key] = ResidentRows(self, *key)
        self._rows[key].fill(sessions, visible)
        return self._rows[key]

    def batch(self, sessions: Sequence[SessionPages]) -> DecodeBatch:
        """The resident pages of these sessions, row by row; sessions may not repeat."""
        if len({session.owner for session in sessions}) != len(sessions):
            raise ValueError("a session may be in a batch only once")
        if any(self.sessions.get(session.owner) is not session for session in sessions):
            raise ValueError("a session of the batch is closed or belongs to another store")
        return DecodeBatch(self, sessions)

    def tier_bytes(self) -> dict[str, TierBytes]:
        """Pages and bytes held by all sessions, per tier."""
        totals = {name: TierBytes() for name in ("device", *_TIER_NAMES)}
        for session in self.sessions.values():
            for name, held in session.tier_bytes().items():
                totals[name].pages += held.pages
                totals[name].bytes += held.bytes
        return totals

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes allocated per tier, used or not; index rows are beside the pool."""
        return {
            "device": self.pool.allocated_bytes,
            "index_rows": sum(session.index_row_bytes for session in self.sessions.values()),
            "host": self.host.allocated_bytes,
            "disk": 0 if self.disk is None else self.disk.allocated_bytes,
        }

    def close(self) -> None:
        """Close all sessions and give all memory and files back."""
        for session in list(self.sessions.values()):
            session.close()
        self.pool.close()
        self.host.close()
        if self.disk is not None:
            self.disk.close()

    def check(self) -> None:
        """Raise if any tier, session, or the match between them is inconsistent; blocks on all copies."""
        self.pool.check()
        for tier, store in ((HOST, self.host), (DISK, self.disk)):
            if store is not None:
                store.check()
                homes = [home for session in self.sessions.values() for home in session.homes() if home.tier == tier]
                if sorted(home.record for home in homes) != store.used_records():
                    raise RuntimeError(f"{store.tier}: records in use and the sessions' pages differ")
        if strangers := set(self.pool.owner_of.values()) - self.sessions.keys():
            raise RuntimeError(f"device: slots of closed sessions {sorted(strangers)}")
        for session in self.sessions.values():
            session.check()

    def write_entries(
        self, layer: int, slots_N: torch.Tensor, offsets_N: torch.Tensor, kv_ND: torch.Tensor, keys_NI: torch.Tensor,
        *, impl: Literal["fused"] | None = None,
    ) -> EncodedRows:  # fmt: skip
        """Write entries of one layer into the pool; returns their rows."""
        layout = self.layout
        rows = encode_entries(layout, layer, kv_ND, keys_NI, impl=impl)
        region, key_region = layout.kv_regions[layer], layout.key_regions.get(layer)
        pool = self.pool.parts[region.part]
        put_planar(region.form, region.of_part(pool), slots_N, offsets_N, rows.kv)
        if key_region is not None:
            assert rows.keys is not None
            put_planar(key_region.form, key_region.of_part(pool), slots_N, offsets_N, rows.keys)
        return rows

    def check_room(self, count: int) -> None:
        """Raise BudgetError unless host and disk together have room for `count` more records."""
        tiers: list[RecordStore] = [self.host] if self.disk is None else [self.host, self.disk]
        rooms = [tier.available for tier in tiers]
        available = sum(room for room in rooms if room is not None)
        if None not in rooms and count > available:
            name = " and ".join(tier.tier for tier in tiers)
            raise BudgetError(name, count * self.layout.record_bytes, available * self.layout.record_bytes)

    def take_homes(self, count: int) -> list[Home]:
        """Take records in the host mirror, then on disk; raises BudgetError and changes nothing if they do not fit."""
        self.check_room(count)
        room = self.host.available
        on_host = count if room is None else min(count, room)
        with ExitStack() as undo:
            homes = [Home(HOST, record) for record in self.host.take(on_host)]
            undo.callback(self.give_back_homes, homes)
            if count > on_host:
                assert self.disk is not None
                homes = [*homes, *(Home(DISK, record) for record in self.disk.take(count - on_host))]
            undo.pop_all()
        return homes

    def give_back_homes(self, homes: Iterable[Home]) -> None:
        for home in homes:
            if home.tier == HOST:
                self.host.give_back([home.record])
            elif home.tier == DISK:
                assert self.disk is not None
                self.disk.give_back([home.record])


class SessionPages:
    """One session's pages: implements `types.PrefillPages`, and decides nothing about which pages are resident."""

    def __init__(self, store: PageStore, owner: int) -> None:
        self.store = store
        self.owner = owner
        self.num_chunks = 0
        self.table_version = 0
        """Counts changes of the live table and its slots."""
        self.reserved_chunks = 0
        """Chunks that fit in the pages that are there: `num_chunks` and what `reserve` asked for."""
        self.traffic = Traffic()
        self._slots: dict[int, int] = {}  # by page: those on the device, reserved ones included
        self._homes: list[Home | None] = []  # by page; also of pages that the reserved chunks will complete
        self._saved: Records | None = None
        self._pending: _Prefetch | None = None
        self._held: HeldRows | None = None
        self._tables: PageTables | None = None
        self._placed: list[tuple[int, int]] | None = None
        self._resident: tuple[tuple[int, int], tuple[int, ...]] | None = None
        self._closed = False
        self._index_rows = {layer: self._new_rows(layer, store.layout.page_chunks) for layer in self._targets}

    # ---- what there is

    @property
    def num_pages(self) -> int:
        """Pages that exist, the one being filled included."""
        return self.store.layout.pages(self.num_chunks)

    @property
    def resident(self) -> tuple[int, ...]:
        """Pages of the live table."""
        state = _, there = self.table_version, self.num_pages
        if self._resident is None or self._resident[0] != state:
            self._resident = (state, tuple(sorted(page for page in self._slots if page < there)))
        return self._resident[1]

    @property
    def all_resident(self) -> bool:
        """Whether every page is on the device."""
        return len(self._slots) == len(self._homes)

    @property
    def prefetching(self) -> bool:
        return self._pending is not None

    @property
    def prefetched(self) -> tuple[int, ...] | None:
        """Pages that a flip now would leave resident; None without a running prefetch."""
        pending = self._pending
        if pending is None:
            return None
        return tuple(sorted({*pending.wanted, *range(pending.first_open, self.num_pages)}))

    @property
    def live_bytes(self) -> int:
        """Bytes of the slots of the live table, reserved pages included."""
        return len(self.placed_pages()) * self.store.layout.record_bytes

    @property
    def index_row_bytes(self) -> int:
        """Bytes allocated for index rows."""
        return sum(rows.nbytes for rows in self._index_rows.values())

    def index_rows(self, layer: int) -> torch.Tensor:
        """Index rows uint8 [num_chunks, I + 4] of a target layer: all committed chunks, on the layer's device."""
        return self._index_rows[layer][: self.num_chunks]

    def tier_bytes(self) -> dict[str, TierBytes]:
        """Pages and bytes held per tier: device (a running prefetch included), host, disk, saved."""
        prefetched = 0 if self._pending is None else len(self._pending.slots)
        pages = {"device": len(self.placed_pages()) + prefetched, **dict.fromkeys(_TIER_NAMES, 0)}
        for home in self.homes():
            pages[_TIER_NAMES[home.tier]] += 1
        size = self.store.layout.record_bytes
        return {name: TierBytes(pages=count, bytes=count * size) for name, count in pages.items()}

    # ---- writing

    def ensure_room(self, count: int) -> None:
        """Raise BudgetError unless host and disk have room for `count` more chunks; takes nothing."""
        pages = (self.num_chunks + count) // self.store.layout.page_chunks
        self.store.check_room(len(self._homeless(pages)))

    def reserve(self, count: int) -> None:
        """Make room for `count` chunks after `num_chunks`: slots, and homes for the pages that become complete.

        Room that was reserved before is kept. Raises BudgetError before anything changes.
        """
        self._check_usable()
        if count < 0:
            raise ValueError(f"cannot reserve {count} chunks")
        layout, store = self.store.layout, self.store
        end = max(self.reserved_chunks, self.num_chunks + count)
        homeless = self._homeless(end // layout.page_chunks)
        there = len(self._homes)
        new_pages = layout.pages(end) - there
        with ExitStack() as undo:
            homes = store.take_homes(len(homeless))
            undo.callback(store.give_back_homes, homes)
            slots = store.pool.take(new_pages, self.owner)
            undo.callback(store.pool.give_back, slots)
            self._grow_rows(end)
            undo.pop_all()
        self._slots.update(zip(range(there, there + new_pages), slots, strict=True))
        self._homes += [None] * new_pages
        for page, home in zip(homeless, homes, strict=True):
            self._homes[page] = home
        self.reserved_chunks = end
        if new_pages:
            self._changed()

    def rollback(self) -> None:
        """Give back all that `reserve` took and `commit` did not use; what was written there is forgotten."""
        self._check_usable()
        complete = self._complete
        surplus = [home for home in self._homes[complete:] if home is not None]
        slots = [self._slots.pop(page) for page in range(self.num_pages, len(self._homes))]
        self._homes[complete:] = [None] * (self.num_pages - complete)
        self.store.give_back_homes(surplus)
        self.reserved_chunks = self.num_chunks
        if slots:
            self.store.pool.give_back(slots)
            self._changed()

    def write(
        self, layer: int, kv_ND: torch.Tensor, keys_NI: torch.Tensor, *, impl: Literal["fused"] | None = None
    ) -> None:
        """Store one layer's entries of the N chunks that follow `num_chunks` (uncommitted)."""
        count = kv_ND.shape[0]
        if keys_NI.shape[0] != count:
            raise ValueError(f"{count} entries but {keys_NI.shape[0]} index keys")
        if self.num_chunks + count > self.reserved_chunks:
            room = self.reserved_chunks - self.num_chunks
            raise ValueError(f"{count} chunks written, room for {room} is reserved")
        if not count:
            return
        layout = self.store.layout
        first, last = self.num_chunks, self.num_chunks + count
        chunks_N, first_page = torch.arange(first, last), first // layout.page_chunks
        slots_P = torch.tensor([self._slots[page] for page in range(first_page, layout.pages(last))])
        slots_N = to_device(slots_P[chunks_N // layout.page_chunks - first_page], layout.device_of(layer))
        offsets_N = to_device(chunks_N % layout.page_chunks, layout.device_of(layer))
        rows = self.store.write_entries(layer, slots_N, offsets_N, kv_ND, keys_NI, impl=impl)
        if rows.index_rows is not None:
            self._index_rows[layer][first:last] = rows.index_rows
        if self._held is not None:
            self._held.put(layer, first, rows)

    @contextmanager
    def held_history(self, num_chunks: int, budget_bytes: int | None) -> Iterator[HeldRows]:
        """Hold the history on the layers' devices, up to that many chunks: prefill reads it from there.

        It takes at most the budget, beside the pool (None: what it needs). Chunks written meanwhile are held as well.
        Raises DamagedError or the device's out-of-memory error before anything changes.
        """
        self._check_usable()
        if self._held is not None:
            raise ValueError("the history is held already")
        held = HeldRows(self.store.layout, max(num_chunks, self.num_chunks), budget_bytes)
        self._load(held)
        self._held = held
        try:
            yield held
        finally:
            self._held = None

    def held_rows(self) -> HeldRows | None:
        """What `held_history` holds now."""
        return self._held

    def history(self, layer: int, num_chunks: int) -> History:
        """Readable view of the first `num_chunks` chunks, uncommitted ones of this layer included."""
        if not 0 <= num_chunks <= self.reserved_chunks:
            raise ValueError(f"{num_chunks} chunks asked for, {self.reserved_chunks} are there")
        return History(self, layer, num_chunks)

    def commit(self, count: int) -> None:
        """Make `count` written chunks permanent; pages that are complete now are copied home and stay resident.

        Room reserved beyond them is kept. Cannot fail on a budget.
        """
        self._check_usable()
        if not 0 <= count <= self.reserved_chunks - self.num_chunks:
            raise ValueError(f"cannot commit {count} chunks, {self.reserved_chunks - self.num_chunks} are reserved")
        first = self._complete
        self.num_chunks += count
        self._copy_home(range(first, self._complete))
        self._tables = None

    # ---- residency

    def evict(self, keep: Iterable[int]) -> None:
        """Drop complete pages that are not kept from the device at once."""
        self._check_usable()
        self._check_no_prefetch()
        kept = set(keep)
        self._drop([page for page in self.resident if page < self._complete and page not in kept])

    def prefetch(self, pages: Sequence[int]) -> None:
        """Start copying what the next live table lacks; `pages` is that whole table, the open page included.

        The live table stays as it is until `flip`. Raises BudgetError (the pool must hold both tables) or DamagedError
        before anything changes.
        """
        self._check_usable()
        self._check_no_prefetch()
        wanted = tuple(pages)
        check_sorted_unique(wanted, self.num_pages)
        if self._complete < self.num_pages and self._complete not in wanted:
            raise ValueError(f"the page being filled, {self._complete}, must stay resident")
        missing = [page for page in wanted if page not in self._slots]
        by_tier = self._by_tier(missing)
        for tier, pages in by_tier.items():
            self.tier(tier).verify(self._record_of(page) for page in pages)
        slots = dict(zip(missing, self.store.pool.take_for_copy(len(missing), self.owner), strict=True))
        runs = [run for tier, pages in by_tier.items() for run in self._runs(tier, pages, slots)]
        ticket = self.store.pool.copy_in(runs)
        self._pending = _Prefetch(wanted, slots, ticket, self._complete)
        self._count_to_device(len(missing))

    def flip(self) -> None:
        """Make the prefetched table live and drop the other pages; model code after this waits for the copies.

        Pages that were born or completed since `prefetch` stay resident.
        """
        self._check_usable()
        pending = self._pending
        if pending is None:
            raise ValueError("flip without a prefetch")
        self.store.pool.wait(pending.ticket)
        for page, slot in pending.slots.items():
            self._slots[page] = slot
        wanted = set(pending.wanted)
        self._pending = None
        self._changed()
        self._drop([page for page in self.resident if page < pending.first_open and page not in wanted])
        self.traffic.flips += 1

    def cancel_prefetch(self) -> None:
        """Forget a running prefetch, if there is one; the live table stays."""
        if self._pending is not None:
            self.store.pool.give_back(list(self._pending.slots.values()))
            self._pending = None

    # ---- saving and opening

    def export_pages(self, first: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """Pages from `first` on, the one being filled included, as (page, record uint8 [record_bytes] on the CPU).

        The record may be a view: read it before the next one is asked for.
        """
        self._check_usable()
        for page in range(first, self.num_pages):
            if page < self._complete:
                self.store.pool.wait_host(self.store.pool.copied_out)
                yield page, self._home_record(page)
            else:
                yield page, self.store.pool.record_to_cpu(self._slots[page])

    def snapshot(self) -> Records:
        """Every page as it is now. Pages of an opened memory are shared with it, all others are copied."""
        shared = 0
        while shared < self._complete and self._homes[shared] == Home(SAVED, shared):
            shared += 1
        rows = [record.clone() for _, record in self.export_pages(shared)]
        size = self.store.layout.record_bytes
        more = torch.stack(rows) if rows else torch.empty(0, size, dtype=torch.uint8)
        return StackedRecords(size, self._saved, shared, more)

    def import_saved(self, mapped: Records, num_chunks: int, index_rows: Mapping[int, torch.Tensor]) -> None:
        """Open a saved memory in this empty session: complete pages stay where they are and are read from there.

        `index_rows` has uint8 [num_chunks, I + 4] per target layer. The page being filled goes to a slot at once.
        Raises ValueError, BudgetError or DamagedError before anything changes.
        """
        self._check_usable()
        layout = self.store.layout
        if self.reserved_chunks:
            raise ValueError("a saved memory can only be opened in an empty session")
        num_pages, complete = layout.pages(num_chunks), num_chunks // layout.page_chunks
        if mapped.record_bytes != layout.record_bytes or mapped.num_records != num_pages:
            raise ValueError(
                f"{num_pages} records of {layout.record_bytes:,} bytes expected, "
                f"the memory has {mapped.num_records} of {mapped.record_bytes:,}"
            )
        for layer in layout.target_layers:
            expected = (num_chunks, layout.index_row_bytes)
            if layer not in index_rows or tuple(index_rows[layer].shape) != expected:
                raise ValueError(f"index rows of layer {layer} must be {list(expected)}")
        tail = range(complete, num_pages)
        mapped.verify(tail)
        slots = self.store.pool.take_for_copy(len(tail), self.owner)
        self.store.pool.wait(self.store.pool.copy_in(mapped.runs(slots, tail)))
        self._grow_rows(num_chunks)
        for layer in layout.target_layers:
            self._index_rows[layer][:num_chunks] = index_rows[layer]
        self._saved = mapped
        self._slots = dict(zip(tail, slots, strict=True))
        self._homes = [Home(SAVED, page) for page in range(complete)] + [None] * len(tail)
        self.num_chunks = self.reserved_chunks = num_chunks
        self._count_to_device(len(tail))
        self._changed()

    def close(self) -> None:
        """Give back everything in all tiers; closing twice is fine."""
        if self._closed:
            return
        self.cancel_prefetch()
        self.store.pool.give_back(list(self._slots.values()))
        self.store.give_back_homes(self.homes())
        self._slots, self._homes, self._index_rows, self._saved, self._held = {}, [], {}, None, None
        self.num_chunks = self.reserved_chunks = 0
        self._changed()
        self._closed = True
        del self.store.sessions[self.owner]

    # ---- for the store, its batches and its histories

    @property
    def _targets(self) -> tuple[int, ...]:
        return self.store.layout.target_layers

    @property
    def _complete(self) -> int:
        """Pages whose chunks are all committed; the page being filled has this number."""
        return self.num_chunks // self.store.layout.page_chunks

    def homes(self) -> list[Home]:
        """Records held below the device, those reserved for pages being filled included."""
        return [home for home in self._homes if home is not None]

    def placed_pages(self) -> list[tuple[int, int]]:
        """(page, slot) of the live table and of reserved pages, by page."""
        if self._placed is None:
            self._placed = sorted(self._slots.items())
        return self._placed

    def slot_of(self, page: int) -> int:
        assert page in self._slots, f"page {page} is not resident"
        return self._slots[page]

    def all_index_rows(self, layer: int) -> torch.Tensor:
        """Index rows [capacity, R], uncommitted ones included; capacity is a multiple of the page size."""
        return self._index_rows[layer]

    def tier(self, tier: int) -> Records:
        source = (self.store.host, self.store.disk, self._saved)[tier]
        assert source is not None, f"the session has no pages on tier {_TIER_NAMES[tier]}"
        return source

    def tables(self) -> PageTables:
        """Slots and homes of all pages; homes of complete pages only, since the others are empty yet."""
        if self._tables is None:
            homes = [home or Home(-1, -1) for home in self._homes[: self._complete]]
            homes += [Home(-1, -1)] * (len(self._homes) - len(homes))
            slots = torch.full((len(homes),), -1)
            slots[list(self._slots)] = torch.tensor(list(self._slots.values()), dtype=torch.int64)
            self._tables = PageTables(
                slots,
                torch.tensor([home.tier for home in homes], dtype=torch.int64),
                torch.tensor([home.record for home in homes], dtype=torch.int64),
            )
        return self._tables

    def check(self) -> None:
        """Raise if the tables are inconsistent or a resident complete page differs from its home."""
        if self._closed:
            return
        layout, pool = self.store.layout, self.store.pool
        held = list(self._slots.values())
        held += [] if self._pending is None else self._pending.slots.values()
        owned = sorted(slot for slot, owner in pool.owner_of.items() if owner == self.owner)
        self._require(sorted(held) == owned, f"slots held {sorted(held)}, owned {owned}")
        self._require(self.num_chunks <= self.reserved_chunks, "more chunks than room")
        self._require(
            len(self._homes) == layout.pages(self.reserved_chunks),
            f"{len(self._homes)} homes for {self.reserved_chunks} chunks",
        )
        incomplete = range(self._complete, len(self._homes))
        self._require(all(page in self._slots for page in incomplete), "an incomplete page has no slot")
        self._require(max(self._slots, default=-1) < len(self._homes), "a page that is not there has a slot")
        for page, home in enumerate(self._homes):
            due = page < self.reserved_chunks // layout.page_chunks
            self._require((home is not None) == due, f"page {page} has home {home}")
        for layer in self._targets:
            self._require(self._index_rows[layer].shape[0] >= self.reserved_chunks, "too few index rows")
        self._check_bytes()

    def _check_bytes(self) -> None:
        pool = self.store.pool
        pool.wait_host(pool.copied_out)
        places = [(page, slot) for page, slot in self.placed_pages() if page < self._complete]
        if self._pending is not None:
            pool.wait_host(self._pending.ticket)
            places += self._pending.slots.items()
            lost = [p for p in self._pending.wanted if p not in self._slots and p not in self._pending.slots]
            self._require(not lost, f"prefetched pages {lost} are nowhere")
        for page, slot in places:
            same = torch.equal(pool.record_to_cpu(slot), self._home_record(page))
            self._require(same, f"page {page} differs from its home")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(f"session {self.owner}: {message}")

    # ---- helpers

    def _homeless(self, complete: int) -> list[int]:
        """Pages that will be complete and have no home yet."""
        there = len(self._homes)
        return [page for page in range(self._complete, complete) if page >= there or self._homes[page] is None]

    def _home_record(self, page: int) -> torch.Tensor:
        home = self._homes[page]
        assert home is not None, f"page {page} has no home"
        return self.tier(home.tier).row(home.record)

    def _record_of(self, page: int) -> int:
        home = self._homes[page]
        assert home is not None, f"page {page} has no home"
        return home.record

    def _by_tier(self, pages: Iterable[int]) -> dict[int, list[int]]:
        """Complete pages by the tier of their homes."""
        by_tier: dict[int, list[int]] = {}
        for page in pages:
            home = self._homes[page]
            assert home is not None, f"page {page} has no home"
            by_tier.setdefault(home.tier, []).append(page)
        return by_tier

    def _runs(self, tier: int, pages: Sequence[int], slots: Mapping[int, int]) -> list[Run]:
        """What to copy between the homes of pages and their slots, given by page."""
        return self.tier(tier).runs([slots[page] for page in pages], [self._record_of(page) for page in pages])

    def _copy_home(self, pages: Iterable[int]) -> None:
        """Copy complete pages to their homes."""
        host, size = self.store.host, self.store.layout.record_bytes
        for tier, group in self._by_tier(pages).items():
            if tier == HOST and not host.writer:
                continue
            self.store.pool.copy_out(self._runs(tier, group, self._slots))
            if tier == HOST:
                self.traffic.pages_to_host += len(group)
                self.traffic.bytes_to_host += len(group) * size
            else:
                self.traffic.pages_to_disk += len(group)
                self.traffic.bytes_to_disk += len(group) * size

    def _load(self, held: HeldRows) -> None:
        """Bring what there is to the devices, a few records at a time; the page being filled comes from its slot."""
        layout, pool, complete = self.store.layout, self.store.pool, self._complete
        at_a_time = max(1, STAGED_BYTES // layout.record_bytes)
        for first in range(0, complete, at_a_time):
            pages = range(first, min(first + at_a_time, complete))
            staged = [
                torch.empty(len(pages), part.num_bytes, dtype=torch.uint8, device=part.device) for part in layout.parts
            ]
            runs = []
            for tier, group in self._by_tier(pages).items():
                self.tier(tier).verify(self._record_of(page) for page in group)
                runs += self._runs(tier, group, {page: page - first for page in group})
            pool.wait(pool.copy_to(staged, runs))
            held.put_pages(first, staged, len(pages), self.num_chunks)
        if complete < self.num_pages:
            slot = self._slots[complete]
            held.put_pages(complete, [part[slot : slot + 1] for part in pool.parts], 1, self.num_chunks)

    def _drop(self, pages: Sequence[int]) -> None:
        if pages:
            self.store.pool.give_back([self._slots.pop(page) for page in pages])
            self._changed()

    def _changed(self) -> None:
        self.table_version += 1
        self._tables = self._placed = None

    def _count_to_device(self, pages: int) -> None:
        self.traffic.pages_to_device += pages
        self.traffic.bytes_to_device += pages * self.store.layout.record_bytes

    def _grow_rows(self, num_chunks: int) -> None:
        for layer in self._targets:
            rows = self._index_rows[layer]
            if rows.shape[0] < num_chunks:
                grown = self._new_rows(layer, max(num_chunks, rows.shape[0] + rows.shape[0] // 2))
                grown[: rows.shape[0]] = rows
                self._index_rows[layer] = grown

    def _new_rows(self, layer: int, capacity: int) -> torch.Tensor:
        layout = self.store.layout
        chunks = layout.pages(capacity) * layout.page_chunks
        return torch.zeros(chunks, layout.index_row_bytes, dtype=torch.uint8, device=layout.device_of(layer))

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("the session is closed")

    def _check_no_prefetch(self) -> None:
        if self._pending is not None:
            raise ValueError("a prefetch is running; flip or cancel it first")


__all__ = ["DISK", "HOST", "SAVED", "Home", "PageStore", "PageTables", "SessionPages"]
