"""The formulas of `accounting` against the bytes of the tensors that a session really holds, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig
from flashmem.accounting import kv_report, record_bytes, resolve_geometry
from flashmem.backbone import random_model
from flashmem.config import KVFormat, ModelGeometry
from flashmem.engine import Session
from flashmem.store import RecordLayout

CPU = torch.device("cpu")


def tokens(count: int) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def held(session: Session) -> dict[str, int]:
    """Bytes on the device, counted on the tensors themselves."""
    engine, pages = session.engine, session.pages
    row = [tensor[session.state.row].nbytes for tensor in engine.states.tensors.values()]
    slots = [slot for slot, owner in engine.store.pool.owner_of.items() if owner == pages.owner]
    table = engine.store.batch([pages])
    table.update()
    return {
        "slots": sum(part[slot].nbytes for part in engine.store.pool.parts for slot in slots),
        "index_rows": sum(pages.all_index_rows(layer).nbytes for layer in engine.layout.target_layers),
        "hca": sum(rows.data.nbytes for rows in session.state.entries.values()),
        "row": sum(row),
        "page_table": table._pages_BP[0].nbytes + table._slots_BP[0].nbytes,
    }


def records_below(session: Session) -> dict[str, int]:
    """Bytes of the records in host memory and in files."""
    pages, size = session.pages, {"host": 0, "disk": 0, "saved": 0}
    for home in pages.homes():
        size[("host", "disk", "saved")[home.tier]] += pages.tier(home.tier).row(home.record).nbytes
    return size


def assert_measured(session: Session) -> None:
    report, stats, found, below = session.report(), session.stats(), held(session), records_below(session)
    all_in, layout = report.all_in, session.engine.layout
    assert all_in.device_bytes == sum(found.values())
    assert all_in.host_bytes == below["host"]
    assert all_in.disk_bytes == below["disk"] + below["saved"]
    device = all_in.device
    assert device["window"] + device["compressor"] + device["hidden"] == found["row"]
    assert device["page_table"] == found["page_table"]
    assert device["pages"] + device["index_rows"] + device["hca"] + device["slack"] == (
        found["slots"] + found["index_rows"] + found["hca"]
    )
    assert report.record_bytes == layout.record_bytes
    assert stats["device_bytes_all_in"] == all_in.device_bytes
    assert stats["full_bytes_all_in"] == all_in.full_bytes
    assert stats["state_bytes"] == found["row"] + found["hca"]
    assert stats["tiers"]["device"]["bytes"] == found["slots"]
    assert {name: stats["tiers"][name]["bytes"] for name in below} == below
    assert_paper(session)


def assert_paper(session: Session) -> None:
    """Entries one by one: those of resident pages, and those of a cache without pages."""
    layout, pages, stats = session.engine.layout, session.pages, session.stats()
    # a key costs what a row of the format costs, though in fp8 those of target layers lie beside the records
    entry = len(layout.csa_layers) * (layout.kv_entry_bytes + layout.key_entry_bytes)
    chunks = [min(layout.page_chunks, pages.num_chunks - page * layout.page_chunks) for page in pages.resident]
    hca = sum(rows.get(session.state.num_hca_entries()).nbytes for rows in session.state.entries.values())
    assert stats["resident_bytes_paper"] == sum(chunks) * entry + hca
    assert stats["full_bytes_paper"] == pages.num_chunks * entry + hca


MODELS: dict[str, dict[str, Any]] = {
    "four CSA": {"layers": "WCHCHCC"},
    "odd": {"layers": "HCW", "num_attention_heads": 3, "o_groups": 3, "index_n_heads": 17, "head_dim": 24,
            "partial_rotary_factor": 0.5, "sliding_window": 17},
    "no HCA": {"layers": "CW", "hidden_size": 48},
}  # fmt: skip
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("four CSA", torch.float32, {"policy": "all"}),
    ("four CSA", torch.float32, {"keep": 0.3, "kv_format": "fp8", "page_chunks": 16}),
    ("four CSA", torch.bfloat16, {"policy": "native", "keep": 0.4, "observation_window": 3}),
    ("four CSA", torch.bfloat16, {"kv_format": "fp8", "floor_pages": 2, "ceiling_pages": 3}),
    ("odd", torch.float32, {"policy": "recency", "keep": 0.3, "page_chunks": 8}),
    ("odd", torch.float32, {"policy": "all", "kv_format": "fp8"}),
    ("odd", torch.bfloat16, {"keep": 0.5, "lead": 6}),
    ("no HCA", torch.float32, {"policy": "random", "keep": 0.2}),
    ("no HCA", torch.bfloat16, {"kv_format": "fp8", "page_chunks": 64}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_measured_is_predicted(case: int, tmp_path: Path) -> None:
    name, dtype, settings = CASES[case]
    model = random_model(**MODELS[name], dtype=dtype, eos_token_id=None)
    config = LSAConfig(**({"page_chunks": 4, "tau": 12, "prefill_chunk": 77} | settings))
    engine = Engine(model, config=config)
    session = engine.session()
    assert_measured(session)
    for count in (1, 2, 130, 300):
        session.append(tokens(count))
        assert_measured(session)
    assert_predicted(session)
    for _ in range(17):  # over a boundary, and with copies under way in a lead
        session.generate(max_new_tokens=1)
        assert_measured(session)
    session.save(tmp_path / "m")
    opened = engine.open(tmp_path / "m")
    assert_measured(opened)
    opened.append(tokens(41))
    assert_measured(opened)
    assert_measured(session)
    session.close()
    opened.close()
    assert all(not tier.bytes for tier in engine.store.tier_bytes().values())


def assert_predicted(session: Session) -> None:
    """Without any measured count, the formulas give what is measured, but for what is allocated ahead of need."""
    engine, config, measured = session.engine, session.engine.config, session.report()
    known: dict[str, Any] = {"keep": config.keep} if config.keep else {"resident_pages": measured.resident_pages}
    predicted = kv_report(
        engine.geometry,
        session.state.position,
        kv_format=engine.layout.kv_format,
        state_format="bf16" if engine.backbone.dtype is torch.bfloat16 else "fp32",
        page_chunks=config.page_chunks,
        observation_window=config.observation_window or 1,
        **known,
    )
    assert predicted.resident_pages == measured.resident_pages
    assert predicted.paper == measured.paper
    assert predicted.all_in.full_bytes == measured.all_in.full_bytes
    assert predicted.all_in.host == measured.all_in.host
    for part in predicted.all_in.device.keys() - {"slack"}:
        assert predicted.all_in.device[part] == measured.all_in.device[part], part


def test_pages_on_disk_and_engine_totals(tmp_path: Path) -> None:
    model = random_model("CHC", eos_token_id=None)
    size = Engine(model, config=LSAConfig(page_chunks=4))
    record = size.layout.record_bytes
    size.close()
    config = LSAConfig(page_chunks=4, keep=0.3, host_budget_bytes=3 * record, disk_path=str(tmp_path))
    engine = Engine(model, config=config)
    sessions = [engine.session() for _ in range(3)]
    for count, session in zip((100, 33, 65), sessions, strict=True):
        session.append(tokens(count))
        assert_measured(session)
    assert [session.report().all_in.host_bytes // record for session in sessions] == [3, 0, 0]
    assert [session.report().all_in.disk_bytes // record for session in sessions] == [3, 2, 4]
    reports = [session.report().all_in for session in sessions]
    allocated = engine.store.allocated_bytes()
    assert allocated["host"] == 3 * record == sum(report.host_bytes for report in reports)
    assert allocated["disk"] >= sum(report.disk_bytes for report in reports)
    assert engine.store.pool.used_bytes == sum(held(session)["slots"] for session in sessions)
    assert allocated["device"] == sum(part.nbytes for part in engine.store.pool.parts)


def test_all_resident_costs_what_it_says() -> None:
    """`all`: every entry is on the device, so the paper's ratio is 1 and all-in is full plus named overheads."""
    engine = Engine(random_model("WCHC", eos_token_id=None), config=LSAConfig(page_chunks=4, policy="all"))
    session = engine.session()
    session.append(tokens(256))  # whole pages, whole HCA windows
    report = session.report()
    assert report.paper.ratio == 1.0 and report.resident_pages == report.num_pages == 16
    device = report.all_in.device
    overhead = device["index_rows"] + device["hidden"] + device["page_table"] + device["slack"]
    assert report.all_in.device_bytes == report.all_in.full_bytes + overhead


# ---- record bytes: the formula and the layout that the store uses


def layout_bytes(geometry: ModelGeometry, kv_format: KVFormat, page_chunks: int, targets: tuple[int, ...]) -> int:
    layout = RecordLayout(
        geometry,
        page_chunks=page_chunks,
        kv_format=kv_format,
        target_layers=tuple(geometry.csa_layers[csa] for csa in targets),
        device_of_layer=dict.fromkeys(range(geometry.num_layers), CPU),
    )
    regions = [*layout.kv_regions.values(), *layout.key_regions.values()]
    assert layout.record_bytes == sum(region.form.page_bytes for region in regions)
    return layout.record_bytes


GEOMETRIES = {
    "flash": resolve_geometry("deepseek-v4-flash"),
    "pro": resolve_geometry("deepseek-v4-pro"),
    **{name: ModelGeometry.from_mapping(random_model(**sizes).config.to_dict()) for name, sizes in MODELS.items()},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_record_bytes_are_the_layouts(name: str) -> None:
    geometry = GEOMETRIES[name]
    for kv_format in ("fp32", "bf16", "fp8"):
        for page_chunks in (4, 16, 64, 256):
            for targets in ((), geometry.default_targets(), tuple(range(len(geometry.csa_layers)))):
                formula = record_bytes(geometry, kv_format, page_chunks=page_chunks, num_targets=len(targets))
                assert formula == layout_bytes(geometry, kv_format, page_chunks, targets)


def test_record_bytes_of_the_published_models() -> None:
    flash, pro = GEOMETRIES["flash"], GEOMETRIES["pro"]
    assert layout_bytes(flash, "fp8", 64, flash.default_targets()) == 938_304
    assert len(flash.default_targets()) == 3 and len(flash.csa_layers) == 21
    # 64 entries of 584 bytes are 37,440 with padding; 64 keys of 132 are 8,448
    layers, targets = len(pro.csa_layers), len(pro.default_targets())
    assert layout_bytes(pro, "fp8", 64, pro.default_targets()) == layers * 37_440 + (layers - targets) * 8_448
    assert record_bytes(pro, "fp8", num_targets=targets) == 30 * 37_440 + 27 * 8_448
