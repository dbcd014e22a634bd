"""A session that looks as if it had read a long context, without the prefill: random entries, keys and state.

Shape letters: N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

import torch

from ..engine import Engine, Session
from ..kernels.kv_codec import encode_rows

MOST_CHUNKS = 1 << 14
"""Written at a time: many enough that launches take no time, few enough that their values take little memory."""


@torch.no_grad()
def fill(engine: Engine, session: Session, tokens: int, *, seed: int = 0) -> None:
    """Give an empty session `tokens` tokens of random history, then run level 1.

    Pages go through the store as in a prefill, so homes, index rows, evictions and budgets are the real ones. Values
    are drawn where the layers are: the same seed gives the same ones on the same kind of device.
    """
    g = engine.geometry
    draws: dict[torch.device, torch.Generator] = {}

    def random(*shape: int, layer: int) -> torch.Tensor:
        device = engine.backbone.device_of_layer[layer]
        draw = draws.setdefault(device, torch.Generator(device).manual_seed(seed))
        return torch.randn(*shape, generator=draw, device=device).to(engine.backbone.dtype)

    total, at_a_time = tokens // g.csa_ratio, _chunks_at_a_time(engine)
    session.cycle.admit(total)
    while (count := min(at_a_time, total - session.pages.num_chunks)) > 0:
        session.cycle.before_prefill_chunk()
        session.pages.reserve(count)
        for layer in g.csa_layers:
            kv_ND, keys_NI = random(count, g.head_dim, layer=layer), random(count, g.index_head_dim, layer=layer)
            session.pages.write(layer, kv_ND, keys_NI)
        session.pages.commit(count)
    for (layer, _), tensor in engine.states.tensors.items():
        ring = tensor[session.state.row]
        ring.copy_(random(*ring.shape, layer=layer))
    for layer, entries in session.state.entries.items():
        entries_ND = random(tokens // g.hca_ratio, g.head_dim, layer=layer)
        entries.put(0, encode_rows(engine.states.hca_format, entries_ND))
    session.state.position = tokens
    session.ids = torch.randint(0, g.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    session.cycle.settle()


def _chunks_at_a_time(engine: Engine) -> int:
    """As many as a prefill writes, or more where a session's slots hold them: nothing is selected yet.

    A pool without a budget grows with what is asked of it, and would stay larger than a prefill leaves it.
    """
    config, slots = engine.config, engine.share.slots
    of_prefill = max(1, config.prefill_chunk // engine.geometry.csa_ratio)
    if slots is None:
        return of_prefill
    kept = config.sink_pages + config.recency_pages + 1  # and the page being filled
    return max(of_prefill, min(MOST_CHUNKS, (slots - kept) * config.page_chunks))


__all__ = ["fill"]
