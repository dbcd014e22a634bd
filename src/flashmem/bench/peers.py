"""Other systems that could be measured beside ours, if they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

MODULES = {
    "vllm": "vllm",
    "sglang": "sglang",
    "deep-gemm": "deep_gemm",
    "flash-mla": "flash_mla",
    "tilelang": "tilelang",
}
ABSENT = "peer absent"
MEASURED = ("deep-gemm",)
"""Peers with an adapter: `flashmem bench kernels` measures them on CUDA."""


def state(name: str) -> str:
    """What a report says about a peer that it does not measure; raises ValueError for a name that is not known."""
    check(name)
    if find_spec(MODULES[name]) is None:
        return ABSENT
    if name in MEASURED:
        return "peer present, measured by `flashmem bench kernels` on CUDA"
    return "peer present, not measured: it has no adapter yet"


def check(name: str) -> None:
    """Raise ValueError for a name that is not known."""
    if name not in MODULES:
        raise ValueError(f"no peer {name!r}; peers are {', '.join(MODULES)}")


class PeerError(RuntimeError):
    """A call of a peer failed, for these inputs at least."""


class DeepGemm:
    """Paged logits of DeepGEMM: sum over heads of w * relu(q . key) over fp8 pages of 64 chunks.

    Made for its builds of 2026 for Hopper (`sgl-deep-gemm` 0.1.4): 32 or 64 heads a row, one or two rows a session,
    and all rows of a session in one pass over its keys.
    Shape letters: B = sessions, R = rows of a session, H = heads of a row, I = channels, P = pages, N = chunks.
    """

    HEADS = 64

    def __init__(self, module: Any) -> None:
        self._module = module

    @classmethod
    def load(cls) -> DeepGemm:
        """Raises ImportError where it is not installed, and OSError or RuntimeError where it cannot be loaded."""
        return cls(import_module(MODULES["deep-gemm"]))

    def batch(self, table_BP: torch.Tensor, num_chunks: int, rows: int) -> DeepGemmBatch:
        """Sessions of one length and their page tables, int32; its schedule is made once, as for a whole step."""
        lengths_BR = torch.full((len(table_BP), rows), num_chunks, dtype=torch.int32, device=table_BP.device)
        with peer_errors():
            schedule = self._module.get_paged_mqa_logits_metadata(lengths_BR, 64, self._module.get_num_sms())
        return DeepGemmBatch(self._module, table_BP, lengths_BR, schedule, num_chunks)


@dataclass(frozen=True, eq=False, slots=True)
class DeepGemmBatch:
    """What DeepGEMM must know of a batch."""

    module: Any
    table_BP: torch.Tensor
    lengths_BR: torch.Tensor
    schedule: torch.Tensor
    num_chunks: int

    def logits(self, q_BRHI: torch.Tensor, w_BRH: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Float32 [B, R, N]; q is e4m3, w float32, `pages` uint8 [P, 64 * (I + 4)]: all values, then all scales."""
        channels = q_BRHI.shape[-1]
        keys = pages.view(len(pages), 64, 1, channels + 4)
        with peer_errors():
            out = self.module.fp8_paged_mqa_logits(
                q_BRHI, keys, w_BRH.flatten(0, 1), context_lens=self.lengths_BR, block_table=self.table_BP,
                schedule_meta=self.schedule, max_context_len=self.num_chunks,
            )  # fmt: skip
        return out[:, : self.num_chunks].unflatten(0, self.lengths_BR.shape)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Name the errors of a peer's call, so that no other error is taken for one."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(str(error)) from error


__all__ = ["ABSENT", "MEASURED", "MODULES", "DeepGemm", "DeepGemmBatch", "PeerError", "check", "peer_errors", "state"]
