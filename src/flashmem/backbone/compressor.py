"""CSA and HCA entries from hidden states: the weights are the stock modules', the state is a session's rings.

A CSA entry of window c pools the Ca series of window c - 1 with the Cb series of window c (DeepSeek-V4 report,
equations 9-12); an HCA entry pools its own window only (equations 20-23). Entries carry the rotary embedding of their
first token. Shape letters: B = sessions, S = tokens, R = tokens per window, D = channels of the entry.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

from ..kernels.compress import compress
from ..kernels.norm_rope import norm_rope
from ..kernels.pool_in_place import pool_in_place


def project(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kv and gate projections of a stock compressor or indexer."""
    return module.kv_proj(hidden), module.gate_proj(hidden)


def pool_overlapping(module: Any, kv: torch.Tensor, gate: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """CSA entries [N, D] of windows that start at `positions_N`.

    kv and gate are [N, 2R, 2D]: the previous window's tokens, then the window's own. A window that starts at position 0
    has no previous one: what its first half holds is ignored.
    """
    ratio, dim = module.compress_rate, module.head_dim
    gate = gate.float() + module.position_bias.repeat(2, 1)
    previous, own = gate[:, :ratio, :dim], gate[:, ratio:, dim:]
    previous = previous.masked_fill((positions_N == 0)[:, None, None], float("-inf"))
    kv = torch.cat((kv[:, :ratio, :dim], kv[:, ratio:, dim:]), dim=1)
    return _finish(module, compress(kv, torch.cat((previous, own), dim=1)), positions_N)


def pool_rings(module: Any, kv: torch.Tensor, gate: torch.Tensor, newest_N: torch.Tensor) -> torch.Tensor:
    """CSA entries [N, D] of the windows that end with tokens `newest_N`, from rings [N, 2R, 2D] of two windows."""
    slots = 2 * module.compress_rate
    first = newest_N - (slots - 1)  # the previous window's first token
    order = (first[:, None] + torch.arange(slots, device=kv.device)) % slots
    pick = torch.arange(len(kv), device=kv.device)[:, None]
    return pool_overlapping(module, kv[pick, order], gate[pick, order], first + module.compress_rate)


def pool_plain(module: Any, kv: torch.Tensor, gate: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """HCA entries [N, D] from kv and gate [N, R, D]."""
    return _finish(module, compress(kv, gate.float() + module.position_bias), positions_N)


def pool_newest(
    module: Any,
    rings: tuple[torch.Tensor, torch.Tensor],
    projected: tuple[torch.Tensor, torch.Tensor],
    rows_B: torch.Tensor,
    positions_B: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """CSA or HCA entries [B, D] of the windows that end with the projected tokens, on the fused kernels.

    The tokens go into the kv and gate rings [rows of the pool, slots, channels] first. Sessions whose window is not
    complete get zeros. `rope` is `first_token_rope` of this module's ratio.
    """
    pooled_BD = pool_in_place(*rings, *projected, module.position_bias, rows_B, positions_B, impl="fused")
    norm = module.kv_norm
    return norm_rope(pooled_BD, eps=norm.variance_epsilon, weight_D=norm.weight, rope=rope, impl="fused")


def first_token_rope(module: Any, newest_B: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, rope / 2] of the first tokens of the windows that end with tokens `newest_B`."""
    return _rope(module, newest_B + 1 - module.compress_rate, newest_B.new_empty(0, dtype=dtype))


def _finish(module: Any, pooled_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    normed = module.kv_norm(pooled_ND).to(pooled_ND.dtype)[None]
    cos, sin = _rope(module, positions_N, normed)
    return apply_rotary_pos_emb(normed[:, None], cos[None], sin[None])[0, 0]


def _rope(module: Any, positions_N: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables in the dtype and on the device of `like`."""
    cos, sin = module.rotary_emb(like, position_ids=positions_N[None], layer_type=module.rope_layer_type)
    return cos[0], sin[0]
