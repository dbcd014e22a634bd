"""What the store tests share: a small geometry, stores over it, and a plain model of a session's chunks.

Shape letters: N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

import torch

from flashmem.config import ModelGeometry, RopeConfig
from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows
from flashmem.kernels.kv_codec import decode_rows, encode_rows
from flashmem.store import PageStore, RecordLayout, SessionPages

C = 4
CPU = torch.device("cpu", 0)
CPU_TWO = torch.device("cpu", 1)  # torch keeps CPU indices apart as keys, and puts the tensors in the same place
CSA_LAYERS = (1, 3, 4)
TARGETS = (3,)


def geometry(**changes: object) -> ModelGeometry:
    values: dict[str, object] = {
        "layer_kinds": ("window", "csa", "hca", "csa", "csa"),
        "hidden_size": 32,
        "vocab_size": 64,
        "num_heads": 2,
        "head_dim": 70,
        "q_lora_rank": 16,
        "o_groups": 1,
        "o_lora_rank": 16,
        "sliding_window": 8,
        "csa_ratio": 4,
        "hca_ratio": 128,
        "index_heads": 2,
        "index_head_dim": 12,
        "index_topk": 8,
        "compress_rope": RopeConfig(theta=1e4, dim=4),
        "rms_norm_eps": 1e-6,
        "hc_mult": 4,
        "moe_intermediate_size": 16,
        "num_experts": 2,
        "num_experts_per_token": 1,
        "num_shared_experts": 1,
        "max_positions": 1 << 20,
    }
    return ModelGeometry(**{**values, **changes})  # type: ignore[arg-type]


def make_layout(
    kv_format: str = "fp32", *, devices: tuple[torch.device, ...] = (CPU,), page_chunks: int = C
) -> RecordLayout:
    """Layers are dealt to the devices in turn, so that parts interleave."""
    return RecordLayout(
        geometry(),
        page_chunks=page_chunks,
        kv_format=kv_format,  # type: ignore[arg-type]
        target_layers=TARGETS,
        device_of_layer={layer: devices[i % len(devices)] for i, layer in enumerate(CSA_LAYERS)},
    )


def make_store(layout: RecordLayout, **options: object) -> PageStore:
    values: dict[str, object] = {
        "device_budget_bytes": None,
        "host_budget_bytes": None,
        "disk_path": None,
        "disk_budget_bytes": None,
        "dtype": torch.bfloat16 if layout.kv_format == "bf16" else torch.float32,
        "poison": True,
    }
    return PageStore(layout, **{**values, **options})  # type: ignore[arg-type]


class Chunks:
    """What a session should hold: per layer the KV entries and index keys as they come back from the format."""

    def __init__(self, layout: RecordLayout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        spec = layout.kv_spec
        self.kv = {layer: torch.empty(0, spec.head_dim, dtype=dtype) for layer in layout.csa_layers}
        self.keys = {layer: torch.empty(0, layout.index_head_dim, dtype=dtype) for layer in layout.csa_layers}
        self.rows = {layer: torch.empty(0, layout.index_row_bytes, dtype=torch.uint8) for layer in layout.target_layers}

    @property
    def count(self) -> int:
        return self.kv[self.layout.csa_layers[0]].shape[0]

    def copy(self) -> Chunks:
        other = Chunks(self.layout, self.dtype)
        other.kv, other.keys, other.rows = dict(self.kv), dict(self.keys), dict(self.rows)
        return other

    def append(self, layer: int, kv_ND: torch.Tensor, keys_NI: torch.Tensor) -> None:
        spec = self.layout.kv_spec
        stored = decode_rows(spec, encode_rows(spec, kv_ND), self.dtype)
        rows = encode_index_rows(keys_NI)
        exact = spec.exact_dtype is not None
        keys = keys_NI if exact else decode_index_rows(rows).to(self.dtype)
        self.kv[layer] = torch.cat((self.kv[layer], stored))
        self.keys[layer] = torch.cat((self.keys[layer], keys))
        if layer in self.rows:
            self.rows[layer] = torch.cat((self.rows[layer], rows))

    def cut(self, count: int) -> None:
        for table in (self.kv, self.keys, self.rows):
            for layer in table:
                table[layer] = table[layer][:count]


def random_chunks(
    layout: RecordLayout, count: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [N, D] and index keys [N, I]."""
    kv = torch.randn(count, layout.kv_spec.head_dim, generator=generator)
    keys = torch.randn(count, layout.index_head_dim, generator=generator)
    return kv.to(dtype), keys.to(dtype)


def append(session: SessionPages, chunks: Chunks, count: int, generator: torch.Generator) -> None:
    """One prefill forward: reserve, write every layer, commit."""
    session.reserve(count)
    write(session, chunks, count, generator)
    session.commit(count)


def write(session: SessionPages, chunks: Chunks, count: int, generator: torch.Generator) -> None:
    layout = session.store.layout
    for layer in layout.csa_layers:
        kv, keys = random_chunks(layout, count, session.store.dtype, generator)
        device = session.store.layout.device_of(layer)
        session.write(layer, kv.to(device), keys.to(device))
        chunks.append(layer, kv, keys)
