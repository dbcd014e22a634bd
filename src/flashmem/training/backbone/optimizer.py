"""Muon for the projection matrices, AdamW for everything else; one learning-rate factor as a device tensor.

Muon: momentum, then an approximate orthogonalisation of the update by five Newton-Schulz steps (Jordan et al., 2024).
Every state is a tensor, so a step can be captured in a CUDA graph and a run resumed exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .recipe import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-9


def is_muon(name: str, value: Tensor) -> bool:
    """Projections and experts; the scorer's per-head weights, embeddings, gates and hyper-connections are not."""
    return value.dim() >= 2 and "_proj" in name and "weights_proj" not in name


def is_indexer(name: str) -> bool:
    return ".indexer." in name


def orthogonalise(update: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal matrices from [..., m, n] updates."""
    x = update.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Clips, then steps; main parameters and the indexer's are clipped apart, since their losses are apart."""

    def __init__(self, params: dict[str, Tensor], recipe: Recipe, dtype: torch.dtype) -> None:
        self.params, self.recipe, self.dtype = params, recipe, dtype
        device = next(iter(params.values())).device
        self.factor = torch.zeros((), device=device)
        self.steps = torch.zeros((), device=device)
        names = sorted(params)
        self.groups: dict[tuple[int, int], list[str]] = {}
        for name in (n for n in names if is_muon(n, params[n])):
            self.groups.setdefault(tuple(params[name].shape[-2:]), []).append(name)  # type: ignore[arg-type]
        self.adam = [n for n in names if not is_muon(n, params[n])]
        self.momentum = {shape: torch.zeros_like(self._stack(shape)) for shape in self.groups}
        self.first = {name: torch.zeros_like(params[name]) for name in self.adam}
        self.second = {name: torch.zeros_like(params[name]) for name in self.adam}

    def _stack(self, shape: tuple[int, int], *, grads: bool = False) -> Tensor:
        picked = [self.params[name].grad if grads else self.params[name].detach() for name in self.groups[shape]]
        return torch.cat([value.reshape(-1, *shape) for value in picked if value is not None])

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update all parameters; returns the norm of the main gradient before clipping."""
        main = [value for name, value in self.params.items() if not is_indexer(name)]
        norm = torch.nn.utils.clip_grad_norm_(main, self.recipe.clip, foreach=True)
        indexer = [value for name, value in self.params.items() if is_indexer(name)]
        torch.nn.utils.clip_grad_norm_(indexer, self.recipe.clip, foreach=True)
        self.steps += 1
        self._muon_step()
        self._adam_step()
        return norm

    def _muon_step(self) -> None:
        rate = self.factor * self.recipe.muon_rate
        for shape, names in self.groups.items():
            grad = self._stack(shape, grads=True)
            momentum = self.momentum[shape]
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            update = orthogonalise(grad.lerp(momentum, MUON_MOMENTUM), self.dtype).float()
            update = update * (max(1.0, shape[0] / shape[1]) ** 0.5 * rate)
            parts = update.split([self.params[n].numel() // (shape[0] * shape[1]) for n in names])
            values = [self.params[name] for name in names]
            torch._foreach_mul_(values, 1 - rate * self.recipe.weight_decay)
            torch._foreach_sub_(values, [part.view_as(v) for part, v in zip(parts, values, strict=True)])

    def _adam_step(self) -> None:
        (beta1, beta2), rate = ADAM_BETAS, self.factor * self.recipe.adam_rate
        values = [self.params[name] for name in self.adam]
        grads = [value.grad for value in values if value.grad is not None]
        first, second = [self.first[n] for n in self.adam], [self.second[n] for n in self.adam]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        below = torch._foreach_sqrt(second)
        torch._foreach_div_(below, torch.sqrt(1 - beta2**self.steps))
        torch._foreach_add_(below, ADAM_EPS)
        updates = torch._foreach_div(first, below)
        torch._foreach_mul_(updates, rate / (1 - beta1**self.steps))
        decayed = [value for value in values if value.dim() >= 2]
        torch._foreach_mul_(decayed, 1 - rate * self.recipe.weight_decay)
        torch._foreach_sub_(values, updates)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor by name; writing into them restores a state."""
        yield "steps", self.steps
        for shape, value in self.momentum.items():
            yield f"momentum.{shape[0]}x{shape[1]}", value
        for name in self.adam:
            yield f"first.{name}", self.first[name]
            yield f"second.{name}", self.second[name]


__all__ = ["Optimizer", "is_indexer", "is_muon", "orthogonalise"]
