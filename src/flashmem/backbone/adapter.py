"""Class swap of the layers of a loaded `DeepseekV4ForCausalLM` and of their attention, and its forwards.

Swapped modules behave as before unless the cache they are given carries a `step`; there are no new parameters, and
`Backbone.detach` puts the stock classes back. Works with transformers from 5.17, whose modules call the cache argument
`past_key_values`, and with the newest, which call it `cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from ..config import ModelGeometry
from ..kernels.hyper_connection import Connection, collapse, spread
from ..kernels.norm_rope import norm_rope
from .fused import FusedStep
from .steps import DecodeStep, PrefillStep, Step


class LSAAttention(stock.DeepseekV4Attention):
    """Attention that hands its queries to the step of a flashmem cache; stock attention for any other cache."""

    def forward(self, hidden_states, position_embeddings, position_ids, attention_mask=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        cache = args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None or not hasattr(cache, "step"):
            return super().forward(hidden_states, position_embeddings, position_ids, attention_mask, *args, **kwargs)
        if cache.step is None:
            raise RuntimeError("this cache has no forward in progress: call the model that flashmem is attached to")
        rope = cos, sin = position_embeddings[self.rope_layer_type]
        if cache.step.fused:
            return self._fused(cache.step, hidden_states, rope), None
        q_residual = self.q_a_norm(self.q_a_proj(hidden_states))
        q = self.q_b_norm(self.q_b_proj(q_residual).unflatten(-1, (-1, self.head_dim)))
        q = stock.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
        kv = self.kv_norm(self.kv_proj(hidden_states))
        kv = stock.apply_rotary_pos_emb(kv[:, :, None], cos, sin, unsqueeze_dim=2)[:, :, 0]
        out = cache.step.attend(self, hidden_states, q_residual, q, kv, rope)
        out = stock.apply_rotary_pos_emb(out, cos, -sin, unsqueeze_dim=2)  # V carries its position: take it off
        return self._project_out(out), None

    def _fused(self, step: Step, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The same in a fused step: a norm and its rotary embedding are one launch."""
        norm = self.q_a_norm
        q_residual = norm_rope(self.q_a_proj(hidden), eps=norm.variance_epsilon, weight_D=norm.weight, impl="fused")
        q = self.q_b_proj(q_residual).unflatten(-1, (-1, self.head_dim))
        q = norm_rope(q, eps=self.q_b_norm.eps, rope=rope, impl="fused")
        norm = self.kv_norm
        kv = norm_rope(self.kv_proj(hidden), eps=norm.variance_epsilon, weight_D=norm.weight, rope=rope, impl="fused")
        out = step.attend(self, hidden, q_residual, q, kv, rope)
        return self._project_out(norm_rope(out, rope=rope, inverse=True, impl="fused"))

    def _project_out(self, out: torch.Tensor) -> torch.Tensor:
        out = self.o_a_proj(out.reshape(*out.shape[:2], self.config.o_groups, -1)).flatten(2)
        return self.o_b_proj(out)


class LSADecoderLayer(stock.DeepseekV4DecoderLayer):
    """Layer whose hyper-connections and norms run on the fused kernels in a fused step; the stock layer otherwise."""

    def forward(self, hidden_states, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        with torch.cuda.device_of(hidden_states):  # Triton launches on the current device, wherever its tensors are
            if getattr(getattr(cache, "step", None), "fused", False):
                return self._fused(hidden_states, input_ids, **kwargs)
            return super().forward(hidden_states, input_ids, **kwargs)

    def _fused(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """T tokens, of whatever sessions: their streams [T, N, E] and inputs of blocks [T, E] know of no sessions."""
        shape, streams_TNE = hidden_states.shape[:2], hidden_states.flatten(0, 1)
        post, comb, normed_TE = collapse(streams_TNE, _connection(self.attn_hc, self.input_layernorm), impl="fused")
        out, _ = self.self_attn(normed_TE.unflatten(0, shape), **kwargs)
        streams_TNE = spread(out.flatten(0, 1), post, comb, streams_TNE, impl="fused")
        connection = _connection(self.ffn_hc, self.post_attention_layernorm)
        post, comb, normed_TE = collapse(streams_TNE, connection, impl="fused")
        out = self.mlp(normed_TE.unflatten(0, shape), input_ids=input_ids)
        return spread(out.flatten(0, 1), post, comb, streams_TNE, impl="fused").unflatten(0, shape)


def _connection(module: Any, norm: Any) -> Connection:
    return Connection(
        fn_OF=module.fn, base_O=module.base, scale_3=module.scale, norm_weight_E=norm.weight,
        streams_eps=module.input_norm.eps, mix_eps=module.hc_eps, norm_eps=norm.variance_epsilon,
        sinkhorn_iterations=module.hc_sinkhorn_iters,
    )  # fmt: skip


def cache_argument(model: Any) -> str:
    """What this version of transformers calls the cache that a forward is given, and gives back."""
    return "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"


class Backbone:
    """A loaded model whose attention reads pages."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, stock.DeepseekV4ForCausalLM):
            raise ValueError(f"flashmem runs DeepseekV4ForCausalLM, got {type(model).__name__}")
        attentions = [layer.self_attn for layer in model.model.layers]
        for layer in model.model.layers:
            attention = layer.self_attn
            if type(layer) is not stock.DeepseekV4DecoderLayer:
                raise ValueError(f"layer {attention.layer_idx} is a {type(layer).__name__}: already attached?")
            if type(attention) is not stock.DeepseekV4Attention:
                raise ValueError(f"layer {attention.layer_idx} has {type(attention).__name__}: already attached?")
            if "forward" in attention.__dict__:
                raise ValueError(
                    f"layer {attention.layer_idx} is offloaded by accelerate hooks; keep cpu and disk out of device_map"
                )
        self.model = model.eval()
        self.geometry = ModelGeometry.from_mapping(model.config.to_dict())
        self.dtype: torch.dtype = model.model.embed_tokens.weight.dtype
        self.device_of_layer = {a.layer_idx: a.sinks.device for a in attentions}
        self.input_device: torch.device = model.model.embed_tokens.weight.device
        self.cache_argument = cache_argument(model)
        self._keep_norms_in_dtype()
        self._become(LSADecoderLayer, LSAAttention)
        self.attached = True

    def detach(self) -> None:
        """Put the stock classes back."""
        self._become(stock.DeepseekV4DecoderLayer, stock.DeepseekV4Attention)
        self.attached = False

    def _become(self, layer_class: Any, attention_class: Any) -> None:
        for layer in self.model.model.layers:
            layer.__class__ = layer_class
            layer.self_attn.__class__ = attention_class
            # where layers lie on several devices, accelerate wraps the forward that a layer had when it was loaded
            if "_old_forward" in layer.__dict__:
                layer._old_forward = layer_class.forward.__get__(layer)

    def _keep_norms_in_dtype(self) -> None:
        """Before transformers 5.20, a float32 norm weight makes a bf16 model's norms return float32 and crash."""
        if self.dtype is torch.float32:
            return
        for module in self.model.modules():
            if isinstance(module, stock.DeepseekV4RMSNorm):
                probe = module(torch.zeros(1, module.weight.shape[0], dtype=self.dtype, device=module.weight.device))
                if probe.dtype is not self.dtype:
                    module.to(self.dtype)

    def prefill(self, step: PrefillStep, ids_S: torch.Tensor, *, all_logits: bool = False) -> torch.Tensor:
        """Run the step's tokens; returns float32 logits [1, V] of the last one, or [S, V]."""
        positions = torch.arange(step.first, step.end)
        hidden = self._run(step, ids_S[None], positions[None])
        return self._logits(hidden[0] if all_logits else hidden[0, -1:])

    def decode(self, step: DecodeStep | FusedStep, ids_B: torch.Tensor) -> torch.Tensor:
        """Run one token of every session of the step; returns float32 logits [B, V]."""
        return self._logits(self._run(step, ids_B[:, None], step.positions[:, None])[:, -1])

    @contextmanager
    def capturable_experts(self) -> Iterator[None]:
        """Run routed experts in a form that a CUDA graph can hold.

        The loop over experts ("eager") and PyTorch's grouped product in other types than bfloat16, or on other devices
        than Hopper and Blackwell, ask the device how many tokens each expert got, and wait. "batched_mm" does not; it
        copies an expert's weights for each token that it gets. Other implementations are left as they are.
        """
        model, device = self.model, self.input_device
        before: str = model.config._experts_implementation
        if before in ("eager", "grouped_mm"):
            grouped = self.dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
            model.set_experts_implementation("grouped_mm" if grouped else "batched_mm")
        try:
            yield
        finally:
            model.set_experts_implementation(before)

    def _run(self, step: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self.attached:
            raise RuntimeError("flashmem is detached from this model")
        carrier = {self.cache_argument: SimpleNamespace(step=step)}
        device = self.input_device
        # a mask dict keeps the stock code from building one: windows are the step's business
        output = self.model.model(
            input_ids=ids.to(device), position_ids=positions.to(device), attention_mask={"none": None},
            use_cache=False, **carrier,
        )  # fmt: skip
        return output.last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float()
