"""What a session needs beside its pages: sliding windows, compressor rings, HCA entries, observed hidden states.

Rings are indexed by position, so that writing a position twice is harmless: a decode step that failed can be repeated.
Shape letters: R = rows (one per open session), W = sliding window, D = head_dim, I = index_head_dim, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..config import ModelGeometry
from ..kernels.kv_codec import KVFormatSpec


class StatePool:
    """Fixed-size state of all sessions of an engine, one row each, grown when rows run out."""

    def __init__(
        self,
        geometry: ModelGeometry,
        *,
        dtype: torch.dtype,
        device_of_layer: Mapping[int, torch.device],
        target_layers: tuple[int, ...],
        observation_window: int,
        hca_format: KVFormatSpec,
    ) -> None:
        self.geometry, self.dtype, self.hca_format = geometry, dtype, hca_format
        self.device_of_layer, self.target_layers = dict(device_of_layer), target_layers
        self.observation_window = observation_window
        self.rows = 0
        self.free_rows: list[int] = []
        self._padding: int | None = None
        self.tensors: dict[tuple[int, str], torch.Tensor] = {
            (layer, name): torch.zeros(0, *shape, dtype=dtype, device=self.device_of_layer[layer])
            for layer in range(geometry.num_layers)
            for name, shape in self.row_shapes(layer).items()
        }

    def row_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Shape of one session's state tensors in a layer."""
        g, kind = self.geometry, self.geometry.layer_kinds[layer]
        shapes = {"window": (g.sliding_window, g.head_dim)}
        if kind == "csa":
            slots = 2 * g.csa_ratio  # the window being filled and the one before it
            shapes |= {"kv": (slots, 2 * g.head_dim), "gate": (slots, 2 * g.head_dim)}
            shapes |= {"index_kv": (slots, 2 * g.index_head_dim), "index_gate": (slots, 2 * g.index_head_dim)}
        elif kind == "hca":
            shapes |= {"kv": (g.hca_ratio, g.head_dim), "gate": (g.hca_ratio, g.head_dim)}
        if layer in self.target_layers:
            shapes["hidden"] = (self.observation_window, g.hidden_size)
        return shapes

    def open(self) -> SessionState:
        if not self.free_rows:
            added = max(1, self.rows // 2)
            for key, tensor in self.tensors.items():
                self.tensors[key] = torch.cat((tensor, tensor.new_zeros(added, *tensor.shape[1:])))
            self.free_rows = list(range(self.rows, self.rows + added))
            self.rows += added
        return SessionState(self, self.free_rows.pop(0))

    def padding_row(self) -> int:
        """A row of no session, for the pads of a batch to write to."""
        if self._padding is None:
            self._padding = self.open().row
        return self._padding

    def observed(self, layer: int, states: Sequence[SessionState]) -> torch.Tensor:
        """Hidden states [B, m, E] of the last m tokens of sessions that have observed equally many."""
        ring = self.tensors[layer, "hidden"]
        positions_Bm = torch.stack([state.observed_positions() for state in states])
        rows_B1 = torch.tensor([state.row for state in states])[:, None]
        at = torch.stack((rows_B1.expand_as(positions_Bm), positions_Bm % ring.shape[1])).to(ring.device)
        return ring[at[0], at[1]]

    def close(self, row: int) -> None:
        assert row not in self.free_rows
        for tensor in self.tensors.values():
            tensor[row] = 0
        self.free_rows.append(row)


class SessionState:
    """One session's row of the pool, its HCA entries, and its position."""

    def __init__(self, pool: StatePool, row: int) -> None:
        self.pool, self.row = pool, row
        self.position = 0
        """Tokens processed so far: the position of the next token."""
        self.entries = {
            layer: GrowingRows(pool.hca_format.entry_bytes, pool.device_of_layer[layer])
            for layer in pool.geometry.hca_layers
        }
        self.closed = False

    def tensor(self, layer: int, name: str) -> torch.Tensor:
        """View of this session's state tensor."""
        return self.pool.tensors[layer, name][self.row]

    def num_hca_entries(self) -> int:
        return self.position // self.pool.geometry.hca_ratio

    def reserve_hca(self, count: int) -> None:
        """Make room for `count` HCA entries in every layer."""
        for rows in self.entries.values():
            rows.reserve(count)

    def observed(self, layer: int) -> torch.Tensor:
        """Hidden states [m, E] of the last m tokens, oldest first; m is smaller at the start of a session."""
        ring = self.tensor(layer, "hidden")
        count = min(len(ring), self.position)
        return ring[torch.arange(self.position - count, self.position, device=ring.device) % len(ring)]

    def observed_positions(self) -> torch.Tensor:
        count = min(self.pool.observation_window, self.position)
        return torch.arange(self.position - count, self.position)

    def export(self) -> dict[str, torch.Tensor]:
        """Everything but the position, as named CPU tensors."""
        out = {
            f"layers.{layer}.{name}": tensor[self.row].cpu().clone()
            for (layer, name), tensor in self.pool.tensors.items()
        }
        for layer, rows in self.entries.items():
            out[f"layers.{layer}.entries"] = rows.get(self.num_hca_entries()).cpu().clone()
        return out

    def load(self, tensors: Mapping[str, torch.Tensor], position: int) -> None:
        """Restore what `export` gave; raises ValueError on a missing or mis-shaped tensor."""
        current = {k: v for k, v in self.export().items() if not k.endswith(".entries")}
        hca = position // self.pool.geometry.hca_ratio
        for layer in self.entries:
            current[f"layers.{layer}.entries"] = torch.empty(hca, self.pool.hca_format.entry_bytes, dtype=torch.uint8)
        for name, wanted in current.items():
            found = tensors.get(name)
            if found is None or found.shape != wanted.shape or found.dtype is not wanted.dtype:
                got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise ValueError(f"state {name}: expected {wanted.dtype} {tuple(wanted.shape)}, found {got}")
        for (layer, name), tensor in self.pool.tensors.items():
            tensor[self.row] = tensors[f"layers.{layer}.{name}"].to(tensor.device)
        for layer, rows in self.entries.items():
            rows.put(0, tensors[f"layers.{layer}.entries"].to(rows.data.device))
        self.position = position

    def nbytes(self) -> int:
        """Bytes held on devices for this session (capacity of the HCA entries included)."""
        fixed = sum(tensor[self.row].nbytes for tensor in self.pool.tensors.values())
        return fixed + sum(rows.data.nbytes for rows in self.entries.values())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.entries.clear()
            self.pool.close(self.row)

    def check(self) -> None:
        assert not self.closed and 0 <= self.row < self.pool.rows and self.row not in self.pool.free_rows
        for rows in self.entries.values():
            assert len(rows.data) >= self.num_hca_entries()


class GrowingRows:
    """Encoded HCA entries of one layer, uint8 [capacity, entry_bytes], grown by halves."""

    def __init__(self, row_bytes: int, device: torch.device) -> None:
        self.data = torch.empty(0, row_bytes, dtype=torch.uint8, device=device)

    def get(self, count: int) -> torch.Tensor:
        return self.data[:count]

    def reserve(self, needed: int) -> None:
        if needed > len(self.data):
            grown = self.data.new_empty(max(needed, len(self.data) * 3 // 2), self.data.shape[1])
            grown[: len(self.data)] = self.data
            self.data = grown

    def put(self, first: int, rows: torch.Tensor) -> None:
        self.reserve(first + len(rows))
        self.data[first : first + len(rows)] = rows
