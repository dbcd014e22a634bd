"""Tokens go into their rings, and windows that they complete are pooled where they lie."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from flashmem.backbone import random_model
from flashmem.backbone.compressor import first_token_rope, pool_newest, pool_plain, pool_rings
from flashmem.kernels.pool_in_place import pool_in_place
from support.paged_cases import draw

HCA, CSA = 1, 2


class Rings:
    """Sessions at given positions in a pool whose other rows are NaN, as is what a session has not written yet."""

    def __init__(
        self, windows: int, tokens: int, channels: int, positions: list[int], device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        batch, self.slots, width = len(positions), windows * tokens, windows * channels
        self.rings = [torch.full((2 * batch + 1, self.slots, width), float("nan"), device=device) for _ in range(2)]
        self.rows = 2 * torch.randperm(batch, generator=torch.Generator().manual_seed(0)).to(device) + 1
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        for which, ring in enumerate(self.rings):
            values = draw(batch, self.slots, width, seed=which).to(device) * (1 + 4 * which)
            for b, position in enumerate(positions):
                count = min(position, self.slots)
                written = torch.arange(position - count, position) % self.slots
                ring[self.rows[b], written] = values[b, written]
        self.new = [draw(batch, width, seed=7 + which).to(device) for which in range(2)]
        self.rings, self.new = ([x.to(dtype) for x in both] for both in (self.rings, self.new))
        self.bias = draw(tokens, width, seed=9).to(device)

    def pool(self, impl: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Entries, and the rings afterwards."""
        rings = [ring.clone() for ring in self.rings]
        return pool_in_place(*rings, *self.new, self.bias, self.rows, self.positions, impl=impl), rings


def written(rings: Rings) -> list[torch.Tensor]:
    """The rings that must be there afterwards."""
    out = [ring.clone() for ring in rings.rings]
    for ring, new in zip(out, rings.new, strict=True):
        ring[rings.rows, rings.positions % rings.slots] = new
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("windows", "tokens", "channels", "positions"),
    [
        (CSA, 4, 512, [7]),
        (CSA, 4, 128, [*range(10)]),
        (CSA, 4, 70, [126, 127, 128, 129, 130, 255, 256, 257]),
        (CSA, 3, 5, [2, 5, 7, 8]),
        (HCA, 128, 33, [0, 126, 127, 128, 129, 130, 255, 256, 257]),
        (HCA, 128, 512, [255]),
        (HCA, 5, 1, [4, 8, 9]),
    ],
)
def test_it_pools_as_defined(
    windows: int, tokens: int, channels: int, positions: list[int], dtype: torch.dtype, triton_device: torch.device
) -> None:
    rings = Rings(windows, tokens, channels, positions, triton_device, dtype)
    wanted, _ = rings.pool("reference")
    found, after = rings.pool("fused")
    complete = [(position + 1) % tokens == 0 for position in positions]
    assert found.shape == (len(positions), channels)
    assert [bool(row.any()) for row in found] == complete
    rtol = 1e-5 if dtype is torch.float32 else 2**-7  # a step of bfloat16, which the interpreter cuts off
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)
    for ring, expected in zip(after, written(rings), strict=True):
        torch.testing.assert_close(ring, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", ["C", "H", "index"])
@torch.no_grad()
def test_entries_are_those_of_the_reference_step(kind: str, batch: int, triton_device: torch.device) -> None:
    """Norm and rotary embedding included, against what steps on the definition call."""
    model = random_model("H" if kind == "H" else "C", head_dim=48, index_head_dim=16).to(triton_device)
    module = model.model.layers[0].self_attn.compressor
    module = module.indexer if kind == "index" else module
    module.kv_norm.weight.data.copy_(draw(module.head_dim, seed=4))
    ratio, windows = module.compress_rate, HCA if kind == "H" else CSA
    positions = [ratio * (1 + 3 * b) - 1 for b in range(batch)]
    rings = Rings(windows, ratio, module.head_dim, positions, triton_device)
    module.position_bias.data.copy_(rings.bias)
    kv, gate = (ring[rings.rows].nan_to_num() for ring in written(rings))
    if kind == "H":
        wanted = pool_plain(module, kv, gate, rings.positions + 1 - ratio)
    else:
        wanted = pool_rings(module, kv, gate, rings.positions)
    rope = first_token_rope(module, rings.positions, torch.float32)
    found = pool_newest(module, tuple(rings.rings), tuple(rings.new), rings.rows, rings.positions, rope)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_token_at_a_time_gives_what_the_compressor_gives(triton_device: torch.device) -> None:
    model = random_model("C").to(triton_device)
    module = model.model.layers[0].self_attn.compressor.indexer
    hidden = draw(21, model.config.hidden_size, seed=2).to(triton_device)
    everything: list[torch.Tensor] = []
    cache = SimpleNamespace(
        layers=[
            SimpleNamespace(
                store_compression_weights=lambda _, kv, gate: (kv[:, :20], gate[:, :20], 0),
                update_overlap_state=lambda _, *new: (None, None),
                update_compressor_states=lambda _, entries: everything.append(entries) or entries,
            )
        ]
    )
    residual = hidden.new_zeros(1, 21, model.config.q_lora_rank)
    module(hidden[None], residual, torch.arange(21, device=triton_device)[None], cache, 0)
    rings = [torch.full((2, 8, 2 * module.head_dim), float("nan"), device=triton_device) for _ in range(2)]
    row, found = torch.tensor([1], device=triton_device), []
    for position in range(21):
        newest = torch.tensor([position], device=triton_device)
        token = module.kv_proj(hidden[position : position + 1]), module.gate_proj(hidden[position : position + 1])
        rope = first_token_rope(module, newest, torch.float32)
        entry = pool_newest(module, tuple(rings), token, row, newest, rope)
        found += [entry] if position % 4 == 3 else []
    assert isinstance(module, stock.DeepseekV4Indexer)
    torch.testing.assert_close(torch.cat(found), everything[0][0], rtol=1e-4, atol=1e-5)


def test_no_session_is_no_work(triton_device: torch.device) -> None:
    rings = Rings(CSA, 4, 6, [], triton_device)
    for impl in ("reference", "fused"):
        assert rings.pool(impl)[0].shape == (0, 6)


def test_what_does_not_fit_is_refused(triton_device: torch.device) -> None:
    rings = Rings(CSA, 4, 6, [3, 4], triton_device)
    kv, gate = rings.rings
    new, bias, rows, positions = rings.new, rings.bias, rings.rows, rings.positions
    for message, call in (
        ("does not fit rings", lambda: pool_in_place(kv, gate, *new, bias[:3], rows, positions)),
        ("does not fit rings", lambda: pool_in_place(kv, gate, *new, bias[:2], rows, positions)),
        ("does not fit rings", lambda: pool_in_place(kv, gate, *new, bias[:, :6], rows, positions)),
        ("differ", lambda: pool_in_place(kv, gate.double(), *new, bias, rows, positions)),
        (
            r"must be torch.float32 \[2, 12\]",
            lambda: pool_in_place(kv, gate, new[0], new[1][:1], bias, rows, positions),
        ),
        (r"must be int64 \[2\]", lambda: pool_in_place(kv, gate, *new, bias, rows, positions.int())),
        ("unknown impl 'fast'", lambda: pool_in_place(kv, gate, *new, bias, rows, positions, impl="fast")),
        (
            "must be contiguous",
            lambda: pool_in_place(kv.mT.contiguous().mT, gate, *new, bias, rows, positions, impl="fused"),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    long = Rings(HCA, 300, 2, [3], triton_device)
    with pytest.raises(ValueError, match="300 slots"):
        long.pool("fused")
