"""Forward of one very long row without gradients: logits at chosen positions, all or only the picked entries attended.

Window and sink come from `forward.attend`; entries are a second branch, merged by their log-sum-exp. The branch over
all entries runs through FlexAttention ("flex", for GPUs) or tile by tile ("tiles"); the Lightning Indexer's picks are
gathered tile by tile. Shape letters as in `forward`; T = queries of a tile.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .forward import Backbone, Params, Projected, attend, finish_layer, project_layer, read_out, rotations

BLOCK = 128
TILE_ELEMENTS = 2**29
"""Logits per tile; a tile's float32 logits take four bytes times this."""


def entries_mask(S: int, E: int, ratio: int, device: torch.device) -> BlockMask:
    """Entry e is seen by position p when e < (p + 1) // ratio; built block by block, never densely."""
    rows, columns = -(-S // BLOCK), -(-E // BLOCK)
    start = torch.arange(rows, device=device) * BLOCK
    whole = ((start + 1) // ratio // BLOCK).clamp(max=columns)
    touched = (-(-((start + BLOCK) // ratio) // BLOCK)).clamp(max=columns)
    order = torch.arange(columns, device=device).expand(rows, columns)
    partly = (order + whole.unsqueeze(1)).clamp(max=columns - 1)

    def shape(x: Tensor) -> Tensor:
        return x.to(torch.int32).contiguous()[None, None]

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv < (q + 1) // ratio

    return BlockMask.from_kv_blocks(
        shape(touched - whole), shape(partly), shape(whole), shape(order), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen,
        seq_lengths=(S, E),
    )  # fmt: skip


class LongForward:
    """Long rows through one set of weights."""

    def __init__(self, net: Backbone, *, attention: Literal["flex", "tiles"]) -> None:
        if attention not in ("flex", "tiles"):
            raise ValueError(f"attention must be 'flex' or 'tiles', got {attention!r}")
        self.net, self.attention = net, attention
        self.flex: Any = torch.compile(flex_attention, dynamic=False) if attention == "flex" else None
        self.masks: dict[tuple[int, int, int], BlockMask] = {}

    @torch.no_grad()
    def logits(
        self, ids_S: Tensor, rows_R: Tensor, *, topk: int | None = None, visible: Collection[int] | None = None
    ) -> Tensor:
        """Float32 logits [R, vocab] of positions `rows_R`; `visible` names the CSA indices whose entries are seen."""
        net, s, dtype = self.net, self.net.sizes, self.net.compute
        device, length = ids_S.device, len(ids_S)
        S = -(-length // BLOCK) * BLOCK  # tokens after the end are seen by nobody before them
        ids = torch.nn.functional.pad(ids_S, (0, S - length))
        positions = torch.arange(S, device=device)
        turn = {"S": rotations(positions, net.main)}
        turn["C"] = turn["H"] = rotations(positions, net.yarn)
        x = net.embed(ids)
        csa = 0
        for kind, p in zip(s.layers, net.layers, strict=True):
            cos, sin = turn[kind]
            part = Projected(*project_layer(x, p, kind, s, cos, sin, net.first_entries(kind, 1, S, device), dtype))
            o, total = attend(
                part.q_NHC.unsqueeze(0), part.kv_NC.unsqueeze(0), None, None, p["self_attn.sinks"], 1, None, s
            )
            o, total = o[0], total[0]
            hidden = kind == "C" and visible is not None and csa not in visible
            if part.entries_EC is not None and not hidden:
                if kind == "C" and topk is not None and topk < len(part.entries_EC):
                    far, far_total = self._picked(part, p, cos, sin, topk)
                else:
                    far, far_total = self._all(part, s.csa_ratio if kind == "C" else s.hca_ratio)
                both = torch.logaddexp(total, far_total)
                o = o * (total - both).exp().unsqueeze(-1) + far * (far_total - both).exp().unsqueeze(-1)
            csa += kind == "C"
            hashed = p.get("mlp.gate.tid2eid")
            for t in range(0, S, 65_536):
                span = slice(t, t + 65_536)
                experts_of = None if hashed is None else hashed[ids[span]]
                x[span] = finish_layer(
                    x[span], o[span].to(dtype), part.write[span], part.mix[span], p, experts_of, s, cos[span],
                    sin[span], dtype,
                )  # fmt: skip
        return read_out(x[rows_R], net.params, s, dtype)

    def _all(self, part: Projected, ratio: int) -> tuple[Tensor, Tensor]:
        entries = part.entries_EC
        assert entries is not None
        S, E = len(part.q_NHC), len(entries)
        if self.attention == "flex" and E >= BLOCK:
            key = (S, E, ratio)
            if key not in self.masks:
                self.masks = {k: v for k, v in self.masks.items() if k[0] == S}
                self.masks[key] = entries_mask(S, E, ratio, entries.device)
            kv = entries[None, None]
            out, total = self.flex(
                part.q_NHC.transpose(0, 1)[None].contiguous(), kv, kv, block_mask=self.masks[key], enable_gqa=True,
                return_lse=True,
            )  # fmt: skip
            out, total = out[0].transpose(0, 1), total[0].transpose(0, 1).float()
            return out.masked_fill(total.isneginf().unsqueeze(-1), 0), total
        return self._tiles(part, ratio)

    def _tiles(self, part: Projected, ratio: int) -> tuple[Tensor, Tensor]:
        q_NHC, entries = part.q_NHC, part.entries_EC
        assert entries is not None
        S, H, C = q_NHC.shape
        outs, totals = [], []
        step = max(BLOCK, TILE_ELEMENTS // (H * len(entries)) // BLOCK * BLOCK)
        for t in range(0, S, step):
            q = q_NHC[t : t + step]
            seen = entries[: (t + len(q)) // ratio]
            born = (torch.arange(t, t + len(q), device=q.device) + 1) // ratio
            logits = (q.flatten(0, 1) @ seen.T).view(len(q), H, -1).float() * C**-0.5
            logits = logits.masked_fill(torch.arange(len(seen), device=q.device) >= born.view(-1, 1, 1), float("-inf"))
            out, total = _softmax_read(logits, seen.unsqueeze(0).expand(len(q), -1, -1), q.dtype)
            outs.append(out)
            totals.append(total)
        return torch.cat(outs), torch.cat(totals)

    def _picked(self, part: Projected, p: Params, cos: Tensor, sin: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        s, entries, keys = self.net.sizes, part.entries_EC, part.keys_EJ
        assert entries is not None and keys is not None
        S, _, C = part.q_NHC.shape
        outs, totals = [], []
        step = max(BLOCK, TILE_ELEMENTS // (s.index_heads * len(entries)) // BLOCK * BLOCK)
        for t in range(0, S, step):
            span = slice(t, t + step)
            q = part.q_NHC[span]
            count = max((t + len(q)) // s.csa_ratio, 1)
            born = (torch.arange(t, t + len(q), device=q.device) + 1) // s.csa_ratio
            scores = self.net.index(part.low_NQ[span], part.h_ND[span], keys[:count], p, cos[span], sin[span])
            scores = scores.masked_fill(torch.arange(count, device=q.device) >= born.view(-1, 1), float("-inf"))
            best, picks = scores.topk(min(topk, count), dim=-1)
            taken = entries[picks]
            logits = torch.bmm(q, taken.transpose(1, 2)).float() * C**-0.5
            out, total = _softmax_read(logits.masked_fill(best.isneginf().unsqueeze(1), float("-inf")), taken, q.dtype)
            outs.append(out)
            totals.append(total)
        return torch.cat(outs), torch.cat(totals)


def _softmax_read(logits_THE: Tensor, values_TEC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values read [T, H, C], log-sum-exp [T, H]); a query that sees nothing reads zero."""
    total = logits_THE.logsumexp(-1)
    safe = total.masked_fill(total.isneginf(), 0.0)
    weights = (logits_THE - safe.unsqueeze(-1)).exp().to(dtype)
    if values_TEC.stride(0) == 0:  # the same values for every query
        T, H, E = weights.shape
        return (weights.view(T * H, E) @ values_TEC[0]).view(T, H, -1), total
    return torch.bmm(weights, values_TEC), total


__all__ = ["LongForward", "entries_mask"]
