"""The definition of the index row format."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # keeps the scale of an all-zero key finite


def hadamard_reference(x: torch.Tensor) -> torch.Tensor:
    dim = x.shape[-1]
    block = dim & -dim
    y = x.float()
    half = 1
    while half < block:
        even, odd = y.unflatten(-1, (dim // (2 * half), 2, half)).unbind(-2)
        y = torch.stack((even + odd, even - odd), dim=-2).flatten(-3)
        half *= 2
    return y * block**-0.5


def encode_index_rows_reference(keys_NI: torch.Tensor) -> torch.Tensor:
    rotated = hadamard_reference(keys_NI)
    # a product, not a quotient: dividing by a constant rounds differently on CPU and CUDA, and rows must be equal
    scale = rotated.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_AMAX) * (1 / E4M3_MAX)
    values = (rotated / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.cat((values.view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=-1)


def split_index_rows_reference(rows_NR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = rows_NR[..., :-4].contiguous().view(torch.float8_e4m3fn)
    return values, rows_NR[..., -4:].contiguous().view(torch.float32).squeeze(-1)


def decode_index_rows_reference(rows_NR: torch.Tensor) -> torch.Tensor:
    values_NI, scale_N = split_index_rows_reference(rows_NR)
    return values_NI.float() * scale_N.unsqueeze(-1)
