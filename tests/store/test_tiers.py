"""The tiers by themselves: budgets, growth, files."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_cases import make_layout

from flashmem.store import DevicePool, DiskTier, HostMirror, MappedRecords, host
from flashmem.store.records import RecordStore
from flashmem.types import BudgetError, DamagedError

LAYOUT = make_layout()
SIZE = LAYOUT.record_bytes
MakeTier = Callable[[int | None], RecordStore]


@pytest.fixture(params=["host", "pinned", "disk", "shared"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTier:
    """A pinned mirror has memory of another kind; to pin it takes a device."""
    for name in ("_pin", "_unpin"):
        monkeypatch.setattr(host, name, lambda memory: None)

    def make(budget: int | None) -> RecordStore:
        if request.param == "disk":
            return DiskTier(SIZE, str(tmp_path / "tier"), budget)
        mirror = HostMirror(LAYOUT, budget, shared_dir=str(tmp_path) if request.param == "shared" else None)
        mirror.pinned = request.param == "pinned"
        return mirror

    return make


def test_budget_is_checked_before_anything_is_taken(make_tier: MakeTier) -> None:
    tier = make_tier(5 * SIZE + SIZE - 1)
    assert tier.take(3) == [0, 1, 2] and tier.available == 2
    with pytest.raises(BudgetError, match=f"{3 * SIZE:,} bytes needed, {2 * SIZE:,} available"):
        tier.take(3)
    assert tier.available == 2
    assert tier.take(2) == [3, 4]
    assert tier.allocated_bytes == 5 * SIZE
    tier.give_back([1, 3])
    assert tier.take(2) == [1, 3]
    tier.check()
    tier.close()


def test_bytes_survive_growth(make_tier: MakeTier) -> None:
    tier = make_tier(None)
    written = {}
    for step in range(8):
        for record in tier.take(1 + 5 * step):
            tier.row(record).fill_(record % 251)
            written[record] = record % 251
        tier.check()
    assert sorted(written) == list(range(sum(1 + 5 * step for step in range(8))))
    assert all(tier.row(record).eq(value).all() for record, value in written.items())
    with pytest.raises(KeyError):
        tier.give_back([10_000])
    tier.close()
    assert tier.allocated_bytes == 0


def test_fresh_mirror_does_not_exceed_a_small_budget() -> None:
    mirror = HostMirror(LAYOUT, 2 * SIZE)
    mirror.take(1)
    assert mirror.allocated_bytes <= 2 * SIZE


def test_processes_share_one_mirror(tmp_path: Path) -> None:
    writer = HostMirror(LAYOUT, None, shared_dir=str(tmp_path))
    reader = HostMirror(LAYOUT, None, shared_dir=str(tmp_path), writer=False)
    for count in (3, 40):  # both take in the same order
        assert writer.take(count) == reader.take(count)
    for record in range(43):
        writer.row(record).fill_(record)
    assert all(reader.row(record).eq(record).all() for record in range(43))
    reader.close()
    assert len(list(tmp_path.iterdir())) == 2
    writer.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="does not exist"):
        HostMirror(LAYOUT, None, shared_dir=str(tmp_path / "nowhere"))


def test_disk_file_has_no_name_and_goes_away(tmp_path: Path) -> None:
    tier = DiskTier(SIZE, str(tmp_path), None)
    tier.take(4)
    assert not list(tmp_path.iterdir())
    tier.close()


def test_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(SIZE, str(tmp_path), None)
    kept = tier.take(4)
    for record in kept:
        tier.row(record).fill_(record + 1)
    fallocate, sizes = os.posix_fallocate, []

    def full(handle: int, offset: int, count: int) -> None:
        sizes.append(count)
        fallocate(handle, offset, SIZE)  # what a full file system may leave behind
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(BudgetError, match=r"no space left in .*bytes needed") as caught:
            tier.take(1)
    assert caught.value.needed == SIZE and sizes == [2 * SIZE, SIZE]  # first in a larger step
    tier.check()
    assert tier.available is None and tier.allocated_bytes == 4 * SIZE
    assert os.fstat(tier._file.fileno()).st_size == 4 * SIZE
    assert all(tier.row(record).eq(record + 1).all() for record in kept)
    assert tier.take(1) == [4]
    tier.close()


def _mapped(tmp_path: Path, *, flip: int | None = None, cut: int = 0) -> MappedRecords:
    records = torch.randint(0, 256, (3, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crcs = [zlib.crc32(record.numpy()) for record in records]
    content = bytearray(b"head" * 4 + records.numpy().tobytes())
    if flip is not None:
        content[flip] ^= 1
    path = tmp_path / "pages.bin"
    path.write_bytes(content[: len(content) - cut])
    return MappedRecords(path, offset=16, count=3, record_bytes=SIZE, crcs=crcs)


def test_saved_records_are_verified_on_first_read(tmp_path: Path) -> None:
    mapped = _mapped(tmp_path, flip=16 + SIZE + 7)
    mapped.row(0)
    mapped.row(2)
    region = LAYOUT.kv_regions[1]
    mapped.read(region, torch.tensor([2, 0]))
    for read in (lambda: mapped.row(1), lambda: mapped.read(region, torch.tensor([0, 1]), torch.tensor([0, 0]))):
        with pytest.raises(DamagedError, match=r"pages\.bin: page record 1 does not match its checksum"):
            read()


def test_truncated_page_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=f"truncated, {16 + 3 * SIZE:,} bytes expected, {15 + 3 * SIZE:,} there"):
        _mapped(tmp_path, cut=1)
    with pytest.raises(DamagedError, match="2 checksums for 3 records"):
        MappedRecords(tmp_path / "pages.bin", offset=0, count=3, record_bytes=SIZE, crcs=[1, 2])


def test_writing_to_a_mapped_record_leaves_the_file(tmp_path: Path) -> None:
    mapped = _mapped(tmp_path)
    before = (tmp_path / "pages.bin").read_bytes()
    mapped.row(0).fill_(0)
    assert (tmp_path / "pages.bin").read_bytes() == before


def test_pool_has_exactly_the_slots_of_its_budget() -> None:
    pool = DevicePool(LAYOUT, 3 * SIZE + SIZE // 2)
    assert pool.num_slots == 3 and pool.allocated_bytes == 3 * SIZE
    slots = pool.take(2, owner=1)
    with pytest.raises(BudgetError, match=f"{2 * SIZE:,} bytes needed, {SIZE:,} available"):
        pool.take(2, owner=2)
    pool.check()
    assert pool.available == 1
    pool.give_back(slots)
    assert sorted(pool.take(3, owner=2)) == [0, 1, 2]
    with pytest.raises(BudgetError, match=f"{SIZE:,} bytes needed, {SIZE - 1:,} available"):
        DevicePool(LAYOUT, SIZE - 1)


def test_pool_without_budget_grows_and_keeps_its_bytes() -> None:
    pool = DevicePool(LAYOUT, None)
    first = pool.take(4, owner=1)
    for slot in first:
        pool.parts[0][slot].fill_(slot + 1)
    pool.take(1, owner=1)
    assert pool.num_slots == 6
    pool.take(50, owner=2)
    assert all(pool.parts[0][slot].eq(slot + 1).all() for slot in first)
    pool.check()


@pytest.mark.parametrize("poison", [False, True])
def test_taken_slots_hold_no_old_bytes(poison: bool) -> None:
    pool = DevicePool(LAYOUT, SIZE, poison=poison)
    slots = pool.take(1, owner=1)
    pool.parts[0][slots[0]].fill_(77)
    pool.give_back(slots)
    assert pool.parts[0].eq(0xFF).all() == poison
    pool.take(1, owner=2)
    assert pool.parts[0].eq(0xFF if poison else 0).all()
