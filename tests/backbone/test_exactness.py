"""Contract 1 on the backbone alone: with everything resident, the stock model's logits."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashmem.backbone import Backbone, SessionState, StatePool, random_model
from flashmem.backbone.steps import DecodeStep, PrefillStep
from flashmem.kernels.kv_codec import KVFormatSpec
from support.plain_pages import PlainBatch, PlainPages

GEOMETRIES = {
    "four-csa": {"layers": "WCHCHCC", "seed": 1},
    "odd-heads": {"layers": "CHC", "seed": 2, "num_attention_heads": 6, "index_n_heads": 17, "o_groups": 3},
    "hash-moe": {"layers": "wcHC", "seed": 7, "hc_mult": 3},
    "yarn": {
        "layers": "HCWC",
        "seed": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
}


class Rig:
    """One model, stock and swapped by turns, and sessions over plain pages."""

    def __init__(self, name: str) -> None:
        arguments = dict(GEOMETRIES[name])
        self.model = random_model(arguments.pop("layers"), **arguments)
        self.backbone = Backbone(self.model)
        g = self.backbone.geometry
        self.pool = StatePool(
            g, dtype=torch.float32, device_of_layer=self.backbone.device_of_layer, target_layers=g.csa_layers[:1],
            observation_window=2, hca_format=KVFormatSpec("fp32", g.head_dim, g.compress_rope.dim),
        )  # fmt: skip

    def open(self) -> tuple[SessionState, PlainPages]:
        g = self.backbone.geometry
        return self.pool.open(), PlainPages(4, g.head_dim, g.index_head_dim)

    @torch.no_grad()
    def prefill(self, session: tuple[SessionState, PlainPages], ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
        state, pages = session
        sizes, logits = itertools.cycle(chunks), []
        while len(ids):
            now, ids = ids[: (size := next(sizes))], ids[size:]
            step = PrefillStep(state, pages, len(now))
            logits.append(self.backbone.prefill(step, now, all_logits=True))
            step.finish()
            pages.commit(state.position // 4 - pages.num_chunks)
        return torch.cat(logits)

    @torch.no_grad()
    def decode(self, sessions: list[tuple[SessionState, PlainPages]], ids: torch.Tensor) -> torch.Tensor:
        visible = [(state.position + 1) // 4 for state, _ in sessions]
        step = DecodeStep([s for s, _ in sessions], PlainBatch([p for _, p in sessions], visible))
        logits = self.backbone.decode(step, ids)
        step.finish()
        for (_, pages), count in zip(sessions, visible, strict=True):
            pages.commit(count - pages.num_chunks)
        return logits

    @torch.no_grad()
    def stock(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids[None], use_cache=False).logits[0]


@pytest.fixture(scope="module", params=GEOMETRIES)
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", [[300], [7], [64, 1, 3], [129, 5]])
def test_prefill_equals_stock(rig: Rig, chunks: list[int]) -> None:
    ids = tokens(287, 1)
    torch.testing.assert_close(rig.prefill(rig.open(), ids, chunks), rig.stock(ids), rtol=0, atol=1e-4)


def test_decode_equals_stock_from_every_length(rig: Rig) -> None:
    ids = tokens(300, 2)
    wanted, session = rig.stock(ids), rig.open()
    got = torch.cat([rig.decode([session], ids[i : i + 1]) for i in range(300)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_ragged_batches_join_and_leave(rig: Rig) -> None:
    texts = [tokens(n + 40, n) for n in (1, 3, 4, 31, 33, 126, 128, 255)]
    wanted = [rig.stock(t) for t in texts]
    sessions = [rig.open() for _ in texts]
    for session, text in zip(sessions, texts, strict=True):
        rig.prefill(session, text[:-40], [50])
    for turn in range(40):
        batch = {0: [3], 1: [0, 5, 7]}.get(turn % 3, list(range(8)))
        live = [i for i in batch if sessions[i][0].position < len(texts[i])]
        if not live:
            continue
        at = [sessions[i][0].position for i in live]
        got = rig.decode([sessions[i] for i in live], torch.stack([texts[i][p] for i, p in zip(live, at, strict=True)]))
        torch.testing.assert_close(
            got, torch.stack([wanted[i][p] for i, p in zip(live, at, strict=True)]), rtol=0, atol=1e-4
        )


def test_turns_alternate(rig: Rig) -> None:
    ids, session = tokens(200, 5), rig.open()
    wanted, got = rig.stock(ids), []
    for start, stop in itertools.pairwise([0, 45, 46, 50, 121, 122, 200]):
        if stop - start == 1:
            got.append(rig.decode([session], ids[start:stop]))
        else:
            got.append(rig.prefill(session, ids[start:stop], [33]))
    torch.testing.assert_close(torch.cat(got), wanted, rtol=0, atol=1e-4)


def test_detach_restores_the_stock_model(rig: Rig) -> None:
    names = set(rig.model.state_dict())
    rig.backbone.detach()
    assert type(rig.model.model.layers[0]).__name__ == "DeepseekV4DecoderLayer"
    assert type(rig.model.model.layers[0].self_attn).__name__ == "DeepseekV4Attention"
    ids = tokens(40, 6)
    before = rig.stock(ids)
    rig.backbone = Backbone(rig.model)
    assert set(rig.model.state_dict()) == names
    torch.testing.assert_close(rig.stock(ids), before, rtol=0, atol=0)
