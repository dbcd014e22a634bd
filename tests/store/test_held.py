"""A held history reads as the tiers do, whatever of it a budget leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from store_cases import CPU, CPU_TWO, CSA_LAYERS, C, Chunks, append, make_layout, make_store, random_entries, write

from flashmem.kernels.kv_codec import decode_rows
from flashmem.store import MappedRecords, PageStore, SessionPages, tiered

FORMATS = ("fp32", "bf16", "fp8")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reads_as(session: SessionPages, chunks: Chunks) -> None:
    """Keys, entries and entries in place are those of `chunks`."""
    ids = torch.randint(chunks.count, (3, 5), generator=generator(chunks.count))
    for layer in CSA_LAYERS:
        history = session.history(layer, chunks.count)
        assert torch.equal(history.keys(0, chunks.count).cpu(), chunks.keys[layer])
        assert torch.equal(history.keys(1, chunks.count - 1).cpu(), chunks.keys[layer][1:-1])
        here = ids.to(session.store.layout.device_of(layer))
        assert torch.equal(history.kv(here).cpu(), chunks.kv[layer][ids])
        source = history.entries(here.index_fill(1, torch.tensor([2], device=here.device), -1))
        picks = source.picks_BK
        assert picks is not None and picks[:, 2].eq(-1).all()
        rows = torch.stack([rows[row] for rows, row in zip(source.rows.read(), picks.clamp_min(0), strict=True)])
        found = decode_rows(session.store.layout.kv_spec, rows, session.store.dtype).cpu()
        assert torch.equal(found[:, [0, 1, 3, 4]], chunks.kv[layer][ids][:, [0, 1, 3, 4]])


def filled(store: PageStore, count: int) -> tuple[SessionPages, Chunks]:
    session, chunks = store.open_session(), Chunks(store.layout, store.dtype)
    append(session, chunks, count, generator(7))
    return session, chunks


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("before", [0, 1, 5 * C, 5 * C + 3])
def test_it_reads_as_it_was_written(before: int, kv_format: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks from before, brought in three records at a time, and chunks that are written while it is held."""
    layout = make_layout(kv_format, devices=(torch.device(device, 0),))
    monkeypatch.setattr(tiered, "STAGED_BYTES", 3 * layout.record_bytes)
    session, chunks = filled(make_store(layout), before)
    session.evict([])
    with session.held_history(before + 3 * C + 2, None) as held:
        assert set(held.kv) == set(CSA_LAYERS)
        for count in (C + 1, 0, 2 * C + 1):
            append(session, chunks, count, generator(count))
            session.evict([])
            if chunks.count > 2:
                reads_as(session, chunks)
                assert session.history(1, chunks.count).on_device
    assert session.history(1, chunks.count).on_device == (chunks.count < C)
    reads_as(session, chunks)
    session.store.check()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99, 1.0])
def test_a_budget_leaves_out_what_does_not_fit(share: float, kv_format: str) -> None:
    """On two devices; keys come before entries."""
    session, chunks = filled(make_store(make_layout(kv_format, devices=(CPU, CPU_TWO))), 4 * C + 1)
    session.evict([])
    with session.held_history(chunks.count, None) as held:
        everything = held.nbytes
    with session.held_history(chunks.count, int(share * everything)) as held:
        assert held.nbytes <= share * everything and (share < 1 or held.nbytes == everything)
        tensors = (*held.keys.values(), *held.kv.values())
        assert held.nbytes == sum(rows.nbytes for rows in tensors)
        assert (held.nbytes == 0) == (share == 0)
        assert len(held.keys) == len(session.store.layout.key_regions) or not held.kv
        reads_as(session, chunks)


def test_pages_come_from_every_tier(tmp_path: Path) -> None:
    """A saved file below, then host records, then the disk."""
    layout = make_layout("fp8")
    first, chunks = filled(make_store(layout), 3 * C + 2)
    records = [record.clone() for _, record in first.export_pages()]
    (tmp_path / "pages").write_bytes(b"".join(bytes(record.numpy()) for record in records))
    from zlib import crc32

    mapped = MappedRecords(
        tmp_path / "pages", offset=0, count=4, record_bytes=layout.record_bytes,
        crcs=[crc32(record.numpy()) for record in records],
    )  # fmt: skip
    size = layout.record_bytes
    store = make_store(layout, host_budget_bytes=2 * size, disk_path=str(tmp_path), disk_budget_bytes=4 * size)
    session = store.open_session()
    session.import_saved(mapped, 3 * C + 2, {layer: first.index_rows(layer) for layer in layout.target_layers})
    append(session, chunks, 4 * C, generator())
    session.evict([])
    assert {name for name, held in session.tier_bytes().items() if held.pages} == {"device", "host", "disk", "saved"}
    with session.held_history(chunks.count, None):
        reads_as(session, chunks)


def test_what_a_failed_forward_wrote_is_overwritten() -> None:
    session, chunks = filled(make_store(make_layout()), C + 1)
    with session.held_history(4 * C, None):
        session.reserve(C)
        write(session, random_entries(session.store.layout, C, torch.float32, generator(3)))
        session.rollback()
        append(session, chunks, C + 2, generator(4))
        session.evict([])
        reads_as(session, chunks)


def test_it_is_held_once() -> None:
    session, _ = filled(make_store(make_layout()), C)
    with (
        session.held_history(C, None),
        pytest.raises(ValueError, match="held already"),
        session.held_history(C, None),
    ):
        pass
    assert session.held_rows() is None
    session.close()
    with pytest.raises(ValueError, match="closed"), session.held_history(C, None):
        pass


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_spare_bytes_are_within_the_machine(device: str) -> None:
    pool = make_store(make_layout(devices=(torch.device(device, 0),))).pool
    if device == "cuda":
        assert 0 < pool.spare_bytes() <= torch.cuda.mem_get_info()[1]
    else:
        assert pool.spare_bytes() > 0
