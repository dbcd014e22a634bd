"""Write and read the small backbone as a transformers folder: bf16 shards with stock names, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .forward import buffers, parameter_shapes
from .recipe import LAYER_TYPES, Recipe, Sizes
from .tokenizer import BOS, EOS, PAD

SHARD_BYTES = 14_000_000


def export(params: Mapping[str, Tensor], recipe: Recipe, folder: Path, corpus: Path) -> None:
    """Write the model and its tokenizer. Matrices are bf16; norms, hyper-connections, biases and sinks stay float32,
    as transformers keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _stored(name, value) for name, value in (dict(params) | buffers(recipe.sizes)).items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name in sorted(state):
        if sum(v.nbytes for v in shards[-1].values()) + state[name].nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = state[name]
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": files}
    _json(folder / "model.safetensors.index.json", index)
    _json(folder / "config.json", recipe.sizes.config())
    _json(
        folder / "generation_config.json", {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    shutil.copyfile(corpus / "tokenizer.json", folder / "tokenizer.json")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _json(folder / "tokenizer_config.json", tokenizer | special | {"model_max_length": recipe.sizes.max_positions})


def load_export(folder: str | Path) -> tuple[Sizes, dict[str, Tensor]]:
    """Sizes, and float32 parameters and buffers, of an exported folder."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    state: dict[str, Tensor] = {}
    for file in sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())):
        state |= load_file(folder / file)
    sizes = sizes_of(config)
    wanted = parameter_shapes(sizes).keys() | buffers(sizes).keys()
    if state.keys() != wanted:
        raise ValueError(f"{folder} lacks or adds tensors: {sorted(state.keys() ^ wanted)[:4]}")
    return sizes, {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def sizes_of(config: Mapping[str, object]) -> Sizes:
    """The sizes behind a config made by `Sizes.config`; raises ValueError where the config says more."""
    kinds = {name: letter for letter, name in LAYER_TYPES.items()}
    c: dict[str, object] = dict(config)
    names = {
        "vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads", "head_dim": "head_dim",
        "q_rank": "q_lora_rank", "o_groups": "o_groups", "o_rank": "o_lora_rank", "window": "sliding_window",
        "experts": "n_routed_experts", "experts_per_token": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size", "routed_scaling": "routed_scaling_factor",
        "swiglu_limit": "swiglu_limit", "streams": "hc_mult", "sinkhorn": "hc_sinkhorn_iters",
        "index_heads": "index_n_heads", "index_dim": "index_head_dim", "index_topk": "index_topk",
        "rope_theta": "rope_theta", "compress_theta": "compress_rope_theta",
        "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "hc_eps": "hc_eps",
    }  # fmt: skip
    values = {ours: c[theirs] for ours, theirs in names.items()}
    yarn = c["rope_parameters"]["compress"]  # type: ignore[index]
    rates = c["compress_rates"]
    sizes = Sizes(
        **values,  # type: ignore[arg-type]
        layers="".join(kinds[name] for name in c["layer_types"]),  # type: ignore[attr-defined]
        hash_layers=sum(name == "hash_moe" for name in c["mlp_layer_types"]),  # type: ignore[attr-defined]
        rope_dim=round(c["partial_rotary_factor"] * c["head_dim"]),  # type: ignore[operator]
        yarn_factor=yarn["factor"], yarn_original=yarn["original_max_position_embeddings"],
        csa_ratio=rates[LAYER_TYPES["C"]], hca_ratio=rates[LAYER_TYPES["H"]],  # type: ignore[index]
    )  # fmt: skip
    if different := [key for key, value in sizes.config().items() if c.get(key) != value]:
        raise ValueError(f"not a config of the small backbone: {', '.join(different)} differ")
    return sizes


def _stored(name: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    wide = value.dim() < 2 or "_hc." in name or "hc_head" in name or name.endswith("position_bias")
    return value if wide or not value.is_floating_point() else value.to(torch.bfloat16)


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


__all__ = ["export", "load_export", "sizes_of"]
