"""The formulas against the bytes of the tensors that an engine holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flashmem import Engine, LSAConfig
from flashmem.accounting import kv_report, record_bytes, resolve_geometry
from flashmem.backbone import random_model
from flashmem.store import RecordLayout

LAYERS = "WCHCHCC"
CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("page_chunks", [4, 64])
@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_records_are_as_long_as_the_stores(name: str, page_chunks: int, kv_format: str) -> None:
    geometry = resolve_geometry(name)
    targets = tuple(geometry.csa_layers[csa] for csa in geometry.default_targets())
    layout = RecordLayout(
        geometry,
        page_chunks=page_chunks,
        kv_format=kv_format,
        target_layers=targets,
        device_of_layer=dict.fromkeys(geometry.csa_layers, CPU),
    )
    assert layout.record_bytes == record_bytes(geometry, kv_format, page_chunks=page_chunks, num_targets=3)


@pytest.fixture(params=[(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp8")])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    dtype, kv_format = request.param
    config = LSAConfig(
        policy="native", keep=0.3, page_chunks=4, tau=8, kv_format=kv_format, observation_window=3, prefill_chunk=100
    )
    engine = Engine(random_model(LAYERS, dtype=dtype, head_dim=40), config=config)
    yield engine
    engine.close()


@pytest.mark.parametrize("tokens", [3, 517])
def test_components_are_the_tensors_held(engine: Engine, tokens: int) -> None:
    with engine.session() as session:
        session.append(torch.randint(256, (tokens,)).tolist())
        session.generate(max_new_tokens=11)
        components = session.report().all_in.device
        state, pages = session.state, session.pages

        held = {
            name: sum(state.tensor(layer, part).nbytes for layer, part in state.pool.tensors if part in parts)
            for name, parts in {
                "window": ("window",),
                "compressor": ("kv", "gate", "index_kv", "index_gate"),
                "hidden": ("hidden",),
            }.items()
        }
        assert {name: components[name] for name in held} == held
        assert components["pages"] == engine.store.pool.used_bytes == pages.live_bytes
        assert components["index_rows"] == sum(pages.index_rows(x).nbytes for x in engine.layout.target_layers)
        assert components["hca"] == state.num_hca_entries() * sum(rows.data.shape[1] for rows in state.entries.values())
        all_but_table = session.report().all_in.device_bytes - components["page_table"]
        assert all_but_table == pages.live_bytes + pages.index_row_bytes + state.nbytes()
        assert session.report().all_in.host_bytes == engine.store.host.used_bytes


def test_a_fixed_budget_holds_what_was_predicted(engine: Engine) -> None:
    with engine.session() as session:
        session.append(torch.randint(256, (500,)).tolist())
        measured, config = session.report(), engine.config
        predicted = kv_report(
            engine.geometry,
            500,
            keep=config.keep,
            kv_format=engine.layout.kv_format,
            state_format="fp32" if engine.backbone.dtype is torch.float32 else "bf16",
            page_chunks=config.page_chunks,
            observation_window=3,
        )
        assert measured.paper == predicted.paper
        assert measured.all_in.host == predicted.all_in.host
        assert measured.all_in.full_bytes == predicted.all_in.full_bytes
        slack = measured.all_in.device["slack"]
        assert measured.all_in.device_bytes - slack == predicted.all_in.device_bytes
