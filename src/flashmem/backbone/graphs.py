"""Fused decode steps as CUDA graphs: one launch from the host instead of some dozens per layer.

A graph belongs to the places it was captured over (`fused.StepPlaces`, `fused.PagesInPlace`) and goes with them. What
changes from step to step is in their tensors, so one graph serves every batch of its sizes, in any phase of a chunk,
an HCA block or a cycle. Shape letters: B = places for sessions, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .adapter import Backbone
from .fused import FusedStep

WARM_UPS = 2
"""Runs before a capture: kernels are compiled in the first, and libraries settle on theirs."""


@dataclass(frozen=True, eq=False, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids_B: torch.Tensor
    logits_BV: torch.Tensor


class DecodeGraphs:
    """The captured steps of a backbone whose layers are all on one CUDA device."""

    def __init__(self, backbone: Backbone) -> None:
        devices = {*backbone.device_of_layer.values(), backbone.input_device}
        if len(devices) > 1 or backbone.input_device.type != "cuda":
            raise ValueError(f"cuda_graphs needs all layers on one CUDA device, got {sorted(map(str, devices))}")
        self.backbone, self.device = backbone, backbone.input_device
        self._graphs: WeakKeyDictionary[Any, WeakKeyDictionary[Any, _Captured]] = WeakKeyDictionary()
        self._memory: Any = None

    @staticmethod
    def size(sessions: int) -> int:
        """Places of the graph that runs so many sessions: a power of two."""
        return 1 << (sessions - 1).bit_length()

    def run(self, step: FusedStep, ids: torch.Tensor) -> torch.Tensor:
        """Run a step over token ids (int64 on the CPU, one of each session); float32 logits [sessions, V]."""
        of_pages = self._graphs.setdefault(step.places, WeakKeyDictionary())
        captured = of_pages.get(step.pages)
        if captured is None:
            captured = of_pages[step.pages] = self._capture(step, ids)
        captured.ids_B[: len(ids)].copy_(ids.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.logits_BV[: len(ids)].clone()  # the next graph may overwrite them

    def _capture(self, step: FusedStep, ids: torch.Tensor) -> _Captured:
        """Capture the step, hidden states for level 1 included. Running it first, and then again, changes nothing:
        whatever a step writes has its place by position."""
        ids_B = torch.zeros(step.places.size, dtype=torch.int64, device=self.device)
        ids_B[: len(ids)] = ids.to(self.device)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), self.backbone.capturable_experts():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.backbone.decode(step.again(), ids_B)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool()):
                run = step.again()
                logits_BV = self.backbone.decode(run, ids_B)
                run.observe()
        return _Captured(graph, ids_B, logits_BV)

    def _pool(self) -> Any:
        """Memory for one more graph: graphs run one after the other, and may share it. It ends with its last graph."""
        if not any(self._graphs.values()):
            self._memory = torch.cuda.graph_pool_handle()
        return self._memory


__all__ = ["DecodeGraphs"]
