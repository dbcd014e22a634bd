"""Where each layer's bytes lie in a record.

A record holds one page over all CSA layers: per layer a KV region, then a region of index keys. Layers that live on
several devices split the record into parts, one per device; a host record is the concatenation of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashmem.config import KVFormat, ModelGeometry
from flashmem.kernels.index_rows import SCALE_BYTES, encode_index_rows
from flashmem.kernels.kv_codec import Impl, KVFormatSpec, PlanarForm, encode_rows


@dataclass(frozen=True, slots=True)
class Region:
    """One plane pair of one layer: its form and where it starts."""

    form: PlanarForm
    part: int
    """Index into `RecordLayout.parts`."""
    offset: int
    """First byte within the part."""
    record_offset: int
    """First byte within a host record."""

    def of_part(self, part_SB: torch.Tensor) -> torch.Tensor:
        """This region of a pool [slots, part_bytes]."""
        return part_SB[:, self.offset : self.offset + self.form.page_bytes]

    def of_records(self, records_RB: torch.Tensor) -> torch.Tensor:
        """This region of host records [records, record_bytes]."""
        return records_RB[:, self.record_offset : self.record_offset + self.form.page_bytes]


@dataclass(frozen=True, slots=True)
class RecordPart:
    """The bytes of a record that one device holds."""

    device: torch.device
    begin: int
    """First byte within a host record."""
    num_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes


class RecordLayout:
    """Sizes and offsets of a record; no tensors.

    `target_layers` and the keys of `device_of_layer` are transformer layers. In fp8 the index keys of target layers are
    left out: those layers keep all their keys on the device as index rows anyway.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        *,
        page_chunks: int,
        kv_format: KVFormat,
        target_layers: tuple[int, ...],
        device_of_layer: Mapping[int, torch.device],
    ) -> None:
        self.csa_layers = geometry.csa_layers
        self.target_layers = tuple(target_layers)
        self.page_chunks = page_chunks
        self.kv_format = kv_format
        self.index_head_dim = geometry.index_head_dim
        self.kv_spec = KVFormatSpec(kv_format, geometry.head_dim, geometry.compress_rope.dim)
        if page_chunks < 1:
            raise ValueError(f"page_chunks must be positive, got {page_chunks}")
        if stray := sorted(set(target_layers) - set(self.csa_layers)):
            raise ValueError(f"target layers {stray} are not CSA layers; those are {list(self.csa_layers)}")
        if missing := sorted(set(self.csa_layers) - device_of_layer.keys()):
            raise ValueError(f"no device given for CSA layers {missing}")
        self._place({layer: _with_index(device_of_layer[layer]) for layer in self.csa_layers})

    @property
    def keys_rotated(self) -> bool:
        """True when stored keys are in the Hadamard basis (fp8)."""
        return self.kv_format == "fp8"

    @property
    def kv_entry_bytes(self) -> int:
        return self.kv_spec.entry_bytes

    @property
    def key_entry_bytes(self) -> int:
        """Bytes of one index key in a record."""
        return self.key_form.row_bytes

    @property
    def index_row_bytes(self) -> int:
        """Bytes of one full index row of a target layer, beside the records."""
        return self.index_head_dim + SCALE_BYTES

    @property
    def key_form(self) -> PlanarForm:
        exact = self.kv_spec.exact_dtype
        if exact is None:
            return PlanarForm(self.page_chunks, self.index_head_dim, SCALE_BYTES)
        return PlanarForm(self.page_chunks, self.index_head_dim * exact.itemsize, 0)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(part.device for part in self.parts)

    def device_of(self, layer: int) -> torch.device:
        return self.parts[self.kv_regions[layer].part].device

    def pages(self, num_chunks: int) -> int:
        """Pages that hold `num_chunks` chunks, the last one perhaps partly."""
        return -(-num_chunks // self.page_chunks)

    def _place(self, device_of_layer: Mapping[int, torch.device]) -> None:
        """Lay the parts out in the order of their first layers, and each part's layers in the order of the model."""
        kv_form, key_form = self.kv_spec.planar(self.page_chunks), self.key_form
        kv_regions: dict[int, Region] = {}
        key_regions: dict[int, Region] = {}
        parts: list[RecordPart] = []
        begin = 0
        for device in dict.fromkeys(device_of_layer.values()):
            size = 0
            for layer in (layer for layer in self.csa_layers if device_of_layer[layer] == device):
                kv_regions[layer] = Region(kv_form, len(parts), size, begin + size)
                size += kv_form.page_bytes
                if not self.keys_rotated or layer not in self.target_layers:
                    key_regions[layer] = Region(key_form, len(parts), size, begin + size)
                    size += key_form.page_bytes
            parts.append(RecordPart(device, begin, size))
            begin += size
        self.parts = tuple(parts)
        self.kv_regions: Mapping[int, Region] = kv_regions
        self.key_regions: Mapping[int, Region] = key_regions
        self.record_bytes = begin
        self.layer_order = tuple(kv_regions)
        """CSA layers in the order of their bytes: records of equal sizes and orders are interchangeable."""


class EncodedRows(NamedTuple):
    """Rows uint8 [N, bytes] of one layer's chunks; None where the layer has no such rows."""

    kv: torch.Tensor
    """As records hold them."""
    keys: torch.Tensor | None
    """As records hold them: not those of a target layer in fp8."""
    index_rows: torch.Tensor | None
    """Index rows of a target layer."""


def encode_entries(
    layout: RecordLayout, layer: int, kv_ND: torch.Tensor, keys_NI: torch.Tensor, *, impl: Impl | None = None
) -> EncodedRows:
    """Entries and keys as they are stored."""
    is_target, exact = layer in layout.target_layers, layout.kv_spec.exact_dtype
    index_rows = encode_index_rows(keys_NI, impl=impl) if is_target or exact is None else None
    key_rows = index_rows if exact is None else keys_NI.to(exact).contiguous().view(torch.uint8)
    return EncodedRows(
        encode_rows(layout.kv_spec, kv_ND, impl=impl),
        key_rows if layer in layout.key_regions else None,
        index_rows if is_target else None,
    )


def _with_index(device: torch.device) -> torch.device:
    """ "cuda" and "cuda:0" are one device."""
    device = torch.device(device)
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


__all__ = ["EncodedRows", "RecordLayout", "RecordPart", "Region", "encode_entries"]
