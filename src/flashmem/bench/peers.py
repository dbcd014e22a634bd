"""Other systems that could be measured beside ours, if they are installed."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = {
    "vllm": "vllm",
    "sglang": "sglang",
    "deep-gemm": "deep_gemm",
    "flash-mla": "flash_mla",
    "tilelang": "tilelang",
}


def state(name: str) -> str:
    """What a report says about a peer; raises ValueError for a name that is not known."""
    if name not in MODULES:
        raise ValueError(f"no peer {name!r}; peers are {', '.join(MODULES)}")
    return "peer absent" if find_spec(MODULES[name]) is None else "peer present, not measured: it has no adapter yet"


__all__ = ["MODULES", "state"]
