"""A session that looks as if it had read a long context, without the prefill: random entries, keys and state.

Shape letters: N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

import torch

from flashmem import Engine, Session
from flashmem.kernels.kv_codec import encode_rows

CHUNKS_AT_A_TIME = 4096


@torch.no_grad()
def fill(engine: Engine, session: Session, tokens: int, *, seed: int = 0) -> None:
    """Give an empty session `tokens` tokens of random history, then run level 1.

    Pages go through the store as in a prefill, so homes, index rows, evictions and budgets are the real ones.
    """
    g = engine.geometry
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, layer: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(engine.backbone.device_of_layer[layer], engine.backbone.dtype)

    session.cycle.admit(tokens // g.csa_ratio)
    while (count := min(CHUNKS_AT_A_TIME, tokens // g.csa_ratio - session.pages.num_chunks)) > 0:
        session.pages.reserve(count)
        for layer in g.csa_layers:
            kv_ND, keys_NI = random(count, g.head_dim, layer=layer), random(count, g.index_head_dim, layer=layer)
            session.pages.write(layer, kv_ND, keys_NI)
        session.pages.commit(count)
        session.cycle.after_prefill_chunk()
    for (layer, _), tensor in engine.states.tensors.items():
        ring = tensor[session.state.row]
        ring.copy_(random(*ring.shape, layer=layer))
    for layer, entries in session.state.entries.items():
        entries_ND = random(tokens // g.hca_ratio, g.head_dim, layer=layer)
        entries.put(0, encode_rows(engine.states.hca_format, entries_ND))
    session.state.position = tokens
    session.ids = torch.randint(0, g.vocab_size, (tokens,), generator=generator).tolist()
    session.cycle.settle()
