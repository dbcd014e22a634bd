"""Layers on several devices: records split by device, one page table; the same bits as on one.

The second device is the CPU under another name, which every part of flashmem takes for another one. Real devices:
`tests/e2e/test_contracts_cuda.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flashmem.engine
from flashmem import Engine, LSAConfig, Session
from flashmem.backbone import Backbone
from support.stock import make_model, tokens

CPU, CPU_TWO = torch.device("cpu"), torch.device("cpu", 1)
TEXT = tokens(330, seed=4)


class Spread(Backbone):
    """The second half of the layers lives elsewhere."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        count = len(self.device_of_layer)
        self.device_of_layer = {layer: CPU if layer < count // 2 else CPU_TWO for layer in range(count)}


def decode(session: Session, ids: list[int]) -> torch.Tensor:
    return torch.cat([session.engine.decode([session], [token]) for token in ids])


@pytest.mark.parametrize("kv_format", ["fp32", "fp8"])
@pytest.mark.parametrize("policy", [{"policy": "all"}, {"policy": "native", "keep": 0.3, "lead": 3, "rescue": True}])
def test_two_devices_say_what_one_says(
    policy: dict[str, Any], kv_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for backbone in (Backbone, Spread):
        monkeypatch.setattr(flashmem.engine, "Backbone", backbone)
        config = LSAConfig(**policy, kv_format=kv_format, page_chunks=4, tau=6, prefill_chunk=50)
        engine = Engine(make_model("four-csa"), config=config)
        session, other = engine.session(), engine.session()
        session.append(TEXT[:200])
        other.append(TEXT[:70])
        logits = [decode(session, TEXT[200:215]), engine.decode([other, session], [7, TEXT[215]])]
        session.save(tmp_path / "m")
        opened = engine.open(tmp_path / "m")
        logits.append(decode(opened, TEXT[216:240]))
        assert opened.pages.resident and engine.layout.record_bytes == sum(p.num_bytes for p in engine.layout.parts)
        results.append((torch.cat(logits), opened.pages.resident, session.stats()))
        devices = {str(part.device) for part in engine.layout.parts}
        assert devices == ({"cpu"} if backbone is Backbone else {"cpu", "cpu:1"})
        engine.check()
        engine.close()
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]
