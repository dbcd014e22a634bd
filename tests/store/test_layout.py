from itertools import pairwise

import pytest
import torch
from store_cases import CPU, CPU_TWO, CSA_LAYERS, geometry, make_layout

from flashmem.config import RopeConfig
from flashmem.store import RecordLayout


def v4_flash(kv_format: str) -> RecordLayout:
    model = geometry(
        layer_kinds=tuple("window" if i < 2 else "hca" if i % 2 else "csa" for i in range(43)),
        head_dim=512,
        index_head_dim=128,
        compress_rope=RopeConfig(theta=1.6e5, dim=64),
    )
    devices = dict.fromkeys(model.csa_layers, CPU)
    return RecordLayout(
        model,
        page_chunks=64,
        kv_format=kv_format,
        target_layers=(22, 26, 42),
        device_of_layer=devices,
    )


def test_bytes_of_v4_flash() -> None:
    layout = v4_flash("fp8")
    assert (layout.kv_entry_bytes, layout.key_entry_bytes, layout.index_row_bytes) == (584, 132, 132)
    assert layout.record_bytes == 21 * 37_440 + 18 * 8_448 == 938_304
    assert v4_flash("bf16").record_bytes == 21 * 64 * (1024 + 256)
    assert v4_flash("fp32").record_bytes == 21 * 64 * (2048 + 512)


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("devices", [(CPU,), (CPU, CPU_TWO)])
@pytest.mark.parametrize("page_chunks", [1, 4, 64])
def test_regions_tile_the_record(kv_format: str, devices: tuple[torch.device, ...], page_chunks: int) -> None:
    layout = make_layout(kv_format, devices=devices, page_chunks=page_chunks)
    regions = [*layout.kv_regions.values(), *layout.key_regions.values()]
    spans = sorted((region.record_offset, region.record_offset + region.form.page_bytes) for region in regions)
    assert spans[0][0] == 0 and spans[-1][1] == layout.record_bytes
    assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
    assert all(region.offset % 16 == region.record_offset % 16 == 0 for region in regions)
    assert [part.end for part in layout.parts][-1] == layout.record_bytes
    for region in regions:
        part = layout.parts[region.part]
        assert region.record_offset == part.begin + region.offset < part.end
    assert len(layout.key_regions) == (2 if kv_format == "fp8" else 3)
    assert layout.devices == devices


def test_layers_of_one_device_lie_together() -> None:
    layout = make_layout(devices=(CPU, CPU_TWO))
    assert layout.layer_order == (1, 4, 3)
    assert layout.device_of(3) == CPU_TWO
    in_a_row = RecordLayout(
        geometry(),
        page_chunks=4,
        kv_format="fp32",
        target_layers=(3,),
        device_of_layer={1: CPU, 3: CPU_TWO, 4: CPU_TWO},
    )
    alone = make_layout()
    for layer in CSA_LAYERS:  # a model cut into runs of layers has the records of the uncut model
        assert in_a_row.kv_regions[layer].record_offset == alone.kv_regions[layer].record_offset


def test_bad_layers_are_refused() -> None:
    devices = dict.fromkeys(CSA_LAYERS, CPU)
    with pytest.raises(ValueError, match=r"\[2\] are not CSA layers"):
        RecordLayout(geometry(), page_chunks=4, kv_format="fp8", target_layers=(2, 3), device_of_layer=devices)
    del devices[4]
    with pytest.raises(ValueError, match=r"no device given for CSA layers \[4\]"):
        RecordLayout(geometry(), page_chunks=4, kv_format="fp8", target_layers=(3,), device_of_layer=devices)
