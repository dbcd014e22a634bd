"""The definition of norm and rotary embedding of rows."""

from __future__ import annotations

import torch


def norm_rope_reference(
    x: torch.Tensor,
    eps: float | None,
    weight_D: torch.Tensor | None,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    inverse: bool,
) -> torch.Tensor:
    y = x if eps is None else _norm(x, eps, weight_D)
    return y if rope is None else _rotate(y, *rope, inverse)


def _norm(x: torch.Tensor, eps: float, weight_D: torch.Tensor | None) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x * scale.to(x.dtype) if weight_D is None else (weight_D.float() * (wide * scale)).to(x.dtype)


def _rotate(y: torch.Tensor, cos_GP: torch.Tensor, sin_GP: torch.Tensor, inverse: bool) -> torch.Tensor:
    tables, pairs = cos_GP.shape
    cos, sin = cos_GP.float()[:, None], (-sin_GP if inverse else sin_GP).float()[:, None]
    plain = y.shape[-1] - 2 * pairs
    a, b = (
        y.reshape(tables, y.numel() // (tables * y.shape[-1]), y.shape[-1])[..., plain:]
        .float()
        .unflatten(-1, (pairs, 2))
        .unbind(-1)
    )
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y[..., :plain], turned.to(y.dtype).view(*y.shape[:-1], 2 * pairs)), dim=-1)
