"""A decode step on the fused kernels: pages, rings and HCA entries are read and written where they lie.

Nothing in a step depends on values that only the device knows, and nothing waits for the device: what a step needs to
know of its sessions is in tensors of a fixed place (`StepPlaces`, and those behind `PagesInPlace`), filled before it
runs. Every session gets an entry in every step; only that of a session that completes a window is pooled, and stored.

Shape letters: B = places for sessions, E = hidden size, H = heads, D = head_dim, I = index_head_dim, W = window,
L = HCA layers of a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..kernels.hyper_connection import MOST_HIDDEN, MOST_STREAMS
from ..kernels.kv_codec import KVFormatSpec, PlanarForm, encode_rows, exact_spec
from ..kernels.paged import PagedRows, interleaved_form, overwrite, places
from ..kernels.put_rows import put_rows
from ..kernels.select_chunks import select_resident
from ..kernels.sparse_attention import EntrySource, attend_rows
from .compressor import first_token_rope, pool_newest, project
from .state import SessionState, StatePool
from .steps import TokenStep, project_query

if TYPE_CHECKING:
    from ..kernels.score_chunks.fused import Precision

MOST_INDEX_HEADS, MOST_PICKS = 256, 1024
MOST_SIZES = 64
"""Places that `FusedSteps` keeps before it starts anew."""


class PagesInPlace(Protocol):
    """The resident pages of a batch, as a fused step reads and extends them; counts include the chunk born in it."""

    @property
    def keys_rotated(self) -> bool: ...

    @property
    def kv_spec(self) -> KVFormatSpec: ...

    def keys(self, layer: int) -> PagedRows:
        """Index keys of every session's resident chunks, in the order of chunks."""
        ...

    def entries(self, layer: int) -> PagedRows:
        """KV entries of the same chunks."""
        ...

    def write(self, layer: int, kv_BD: torch.Tensor, keys_BI: torch.Tensor) -> None:
        """Store the entries of the sessions that complete a chunk in this step; drop what the others give."""
        ...


class StepPlaces:
    """What a step must know of the sessions' state, in tensors that stay where they are.

    Places beyond the sessions of a batch stand for a session at position 0 whose state nobody reads.
    """

    def __init__(self, pool: StatePool, size: int, hca_rows: int) -> None:
        self.pool, self.size = pool, size
        self.window_spec = exact_spec(pool.dtype, pool.geometry.head_dim, pool.geometry.compress_rope.dim)
        self.devices = {
            device: _OnDevice(self, device, hca_rows) for device in dict.fromkeys(pool.device_of_layer.values())
        }

    def fill(self, states: Sequence[SessionState]) -> None:
        """Set the sessions of the next step; grows their HCA entries where the step completes one."""
        g = self.pool.geometry
        positions = [state.position for state in states]
        counts = [(position + 1) // g.hca_ratio for position in positions]
        born = [count - 1 if (p + 1) % g.hca_ratio == 0 else -1 for p, count in zip(positions, counts, strict=True)]
        for state, count in zip(states, counts, strict=True):
            state.reserve_hca(count)
        rows, pads = [state.row for state in states], self.size - len(states)
        if pads:
            rows += [self.pool.padding_row()] * pads
        slots = [position % g.sliding_window for position in positions]
        numbers = [rows, positions + [0] * pads, slots + [0] * pads, born + [-1] * pads]
        windows = [min(position + 1, g.sliding_window) for position in positions] + [1] * pads
        for device in self.devices.values():
            device.fill(states, numbers, [windows, counts + [0] * pads])


class _OnDevice:
    """The tensors of `StepPlaces` on one device, and the rows that they describe."""

    def __init__(self, places: StepPlaces, device: torch.device, hca_rows: int) -> None:
        pool, size = places.pool, places.size
        g, layers = pool.geometry, [layer for layer, at in pool.device_of_layer.items() if at == device]
        self.hca_layers = [layer for layer in g.hca_layers if layer in layers]
        self.numbers = torch.zeros(4 + len(self.hca_layers), size, dtype=torch.int64, device=device)
        self.rows_B, self.positions_B, self.window_slot_B, self.hca_born_B = self.numbers[:4]
        self.counts = torch.zeros(2, size, dtype=torch.int32, device=device)
        ring_form = PlanarForm(g.sliding_window, places.window_spec.data_bytes, 0, multiple=1)
        spec = pool.hca_format
        entry_form = interleaved_form(spec.data_bytes, spec.scale_bytes)
        self.windows = {
            layer: PagedRows(
                ring_form, [[pool.tensors[layer, "window"].view(torch.uint8).flatten(1)]], self.counts[0],
                self.rows_B.view(size, 1),
            )
            for layer in layers
        }  # fmt: skip
        self.entries = {
            layer: PagedRows.at(entry_form, self.numbers[4 + place : 5 + place], self.counts[1], hca_rows)
            for place, layer in enumerate(self.hca_layers)
        }

    def fill(self, states: Sequence[SessionState], numbers: list[list[int]], counts: list[list[int]]) -> None:
        pads = len(numbers[0]) - len(states)
        addresses = [[s.entries[layer].data.data_ptr() for s in states] + [0] * pads for layer in self.hca_layers]
        overwrite(self.numbers, torch.tensor([*numbers, *addresses]))
        overwrite(self.counts, torch.tensor(counts, dtype=torch.int32))


class FusedStep(TokenStep):
    """One token of each session of a batch, over its resident pages; see `steps.DecodeStep` for what it computes."""

    fused = True

    def __init__(self, states: Sequence[SessionState], places: StepPlaces, pages: PagesInPlace) -> None:
        super().__init__(states)
        self.places, self.pages = places, pages
        self.pool: StatePool = places.pool
        self.precision: Precision | None = "fp32" if self.pool.dtype is torch.float32 else None
        self._ropes: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def positions(self) -> torch.Tensor:
        """Int64 [B], on the first layer's device."""
        return next(iter(self.places.devices.values())).positions_B

    def attend(
        self,
        attention: Any,
        hidden: torch.Tensor,
        q_residual: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        layer, kind = attention.layer_idx, self.pool.geometry.layer_kinds[attention.layer_idx]
        hidden_BE, here = hidden[:, 0], self.places.devices[self.pool.device_of_layer[attention.layer_idx]]
        if layer in self.pool.target_layers:
            self._observed.append((layer, hidden_BE))
        put_rows(here.windows[layer], here.window_slot_B, kv[:, 0].contiguous().view(torch.uint8), impl="fused")
        sources = [EntrySource(here.windows[layer], self.places.window_spec)]
        if kind == "csa":
            sources.append(self._csa_source(attention.compressor, layer, hidden_BE, q_residual, rope))
        elif kind == "hca":
            sources.append(self._hca_source(attention.compressor, layer, hidden_BE))
        return attend_rows(q[:, 0], sources, attention.sinks, attention.scaling, impl="fused")[:, None]

    def again(self) -> FusedStep:
        """The same step, not run yet."""
        return FusedStep(self.states, self.places, self.pages)

    def _put(self, layer: int, name: str, values: torch.Tensor) -> torch.Tensor:
        """Write one token's values into every session's ring; return the whole tensor of rings."""
        ring, here = self.pool.tensors[layer, name], self.places.devices[self.pool.device_of_layer[layer]]
        ring[here.rows_B, here.positions_B % ring.shape[1]] = values
        return ring

    def _csa_source(
        self, compressor: Any, layer: int, hidden_BE: torch.Tensor, q_residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> EntrySource:  # fmt: skip
        pages = self.pages
        kv_BD = self._window(compressor, layer, "", hidden_BE)
        pages.write(layer, kv_BD, self._window(compressor.indexer, layer, "index_", hidden_BE))
        q, weights, finish = project_query(
            compressor.indexer, hidden_BE[:, None], q_residual, rope, pages.keys_rotated
        )  # fmt: skip
        picks = select_resident(
            q[:, 0], weights[:, 0], pages.keys(layer), self.pool.geometry.index_topk, ordered=False,
            finish=finish, precision=self.precision, impl="fused",
        )  # fmt: skip
        return EntrySource(pages.entries(layer), pages.kv_spec, picks)

    def _hca_source(self, compressor: Any, layer: int, hidden_BE: torch.Tensor) -> EntrySource:
        spec, here = self.pool.hca_format, self.places.devices[self.pool.device_of_layer[layer]]
        entries_BD = self._window(compressor, layer, "", hidden_BE)
        put_rows(here.entries[layer], here.hca_born_B, encode_rows(spec, entries_BD, impl="fused"), impl="fused")
        return EntrySource(here.entries[layer], spec)

    def _window(self, module: Any, layer: int, prefix: str, hidden_BE: torch.Tensor) -> torch.Tensor:
        """Put this token into the sessions' rings; return the entries of the windows that it completes."""
        here = self.places.devices[self.pool.device_of_layer[layer]]
        rings = self.pool.tensors[layer, f"{prefix}kv"], self.pool.tensors[layer, f"{prefix}gate"]
        rope = self._first_token_rope(module, here)
        return pool_newest(module, rings, project(module, hidden_BE), here.rows_B, here.positions_B, rope)

    def _first_token_rope(self, module: Any, here: _OnDevice) -> tuple[torch.Tensor, torch.Tensor]:
        """Made once for all layers of a device whose windows are equally long: their tables are the same."""
        key = here.rows_B.device, module.compress_rate
        if key not in self._ropes:
            self._ropes[key] = first_token_rope(module, here.positions_B, self.pool.dtype)
        return self._ropes[key]


class FusedSteps:
    """Makes the fused steps of an engine, over places that are kept by their sizes."""

    def __init__(self, pool: StatePool) -> None:
        check_fused(pool, "kernels")
        self.pool = pool
        self._places: dict[tuple[int, int], StepPlaces] = {}
        self._rows = 0  # of the pool when they were made: it grows by moving

    def step(self, states: Sequence[SessionState], pages: PagesInPlace, size: int | None = None) -> FusedStep:
        """A step of these sessions, and of pads up to `size`; what an earlier step has not launched yet is lost."""
        size = size or len(states)
        if size > len(states):
            self.pool.padding_row()
        if self._rows != self.pool.rows or len(self._places) >= MOST_SIZES:
            self._places, self._rows = {}, self.pool.rows
        longest = max((state.position + 1) // self.pool.geometry.hca_ratio for state in states)
        key = (size, places(longest, 64))
        if key not in self._places:
            self._places[key] = StepPlaces(self.pool, *key)
        self._places[key].fill(states)
        return FusedStep(states, self._places[key], pages)


def check_fused(pool: StatePool, setting: str) -> None:
    """Raise ValueError where the fused kernels cannot run a model: no Triton, no CUDA, or sizes beyond their limits.

    `setting` asks for them.
    """
    g, asked = pool.geometry, f"{setting}='fused'"
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError(f"{asked} needs the package triton") from error
    stray = [str(device) for device in pool.device_of_layer.values() if device.type != "cuda"]
    if stray and not knobs.runtime.interpret:
        raise ValueError(f"{asked} needs all layers on CUDA devices, got one on {stray[0]}")
    for name, value, most in (
        ("index heads", g.index_heads, MOST_INDEX_HEADS),
        ("index_topk", g.index_topk, MOST_PICKS),
        ("residual streams", g.hc_mult, MOST_STREAMS),
        ("channels of a stream", g.hidden_size, MOST_HIDDEN),
    ):
        if value > most:
            raise ValueError(f"{asked} takes at most {most} {name}, the model has {value}")
    if g.index_head_dim & (g.index_head_dim - 1):
        raise ValueError(f"{asked} needs a power of two of index channels, the model has {g.index_head_dim}")


__all__ = ["FusedStep", "FusedSteps", "PagesInPlace", "StepPlaces", "check_fused"]
