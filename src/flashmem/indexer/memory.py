"""The Memory Indexer: one scorer per target layer, and how their logits combine.

Shape letters: L = target layers, Q = queries that share a history, m = observed tokens, E = hidden_size, N = chunks,
I = head_dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import RopeConfig
from ..kernels.index_rows import hadamard
from ..kernels.paged import PagedRows, index_row_form
from ..kernels.score_chunks import score_chunks, score_chunks_max, score_history, score_pages
from .checkpoint import check_tensors, digest_tensors, infer_config, read_checkpoint, write_checkpoint
from .config import Ensemble, IndexerConfig, QueryDtype
from .native import read_native, widen
from .scorer import LayerScorer

if TYPE_CHECKING:
    from ..kernels.score_chunks.fused import Precision


class MemoryIndexer(nn.Module):
    """Scores every chunk of a history from hidden states at a few CSA layers.

    The state dict has the keys of the published joint checkpoints, `retrievers.l{csa}...`, and `offset`, a trainable
    scalar added to the combined logit (calibration; stored in the config, not among the weights).
    """

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self._config = config
        self.retrievers = nn.ModuleDict({f"l{csa}": LayerScorer(config) for csa in config.layers})
        self.offset = nn.Parameter(torch.tensor(config.logit_offset))

    @property
    def target_layers(self) -> tuple[int, ...]:
        """CSA indices, ascending."""
        return self._config.layers

    @property
    def layers(self) -> dict[int, LayerScorer]:
        """Scorers by CSA index."""
        return {csa: self.retrievers[f"l{csa}"] for csa in self._config.layers}  # type: ignore[misc]

    @property
    def config(self) -> IndexerConfig:
        """The config with the present offset in it (reads a scalar from the device)."""
        offset = float(self.offset.detach())
        untouched = float(torch.tensor(self._config.logit_offset, dtype=self.offset.dtype, device="cpu")) == offset
        return self._config if untouched else replace(self._config, logit_offset=offset)  # 0.1 stays 0.1

    def chunk_logits(
        self,
        hidden: Mapping[int, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
        positions: torch.Tensor,
        *,
        ensemble: Ensemble | None = None,
    ) -> torch.Tensor:
        """Return float32 logits [N] of all chunks of one session, on the device of the first target layer's keys.

        hidden: by CSA index, [m, E], inputs of the layers' attention at the last m tokens; positions: integer [m];
        keys: by CSA index, index rows uint8 [N, I + 4], or float index keys [N, I] as the backbone makes them. Layers
        may live on different devices: only queries and logits travel. `ensemble` overrides the config's.
        Raises ValueError when layers, tokens or chunks do not agree.
        """
        batched = {csa: states_mE.unsqueeze(0) for csa, states_mE in hidden.items()}
        return self.batch_logits(batched, keys, positions.unsqueeze(0), ensemble=ensemble).squeeze(0)

    def batch_logits(
        self,
        hidden: Mapping[int, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
        positions: torch.Tensor,
        seen: torch.Tensor | None = None,
        *,
        ensemble: Ensemble | None = None,
    ) -> torch.Tensor:
        """Return float32 logits [Q, N] of several queries of one history, as `chunk_logits` gives them one by one.

        hidden: by CSA index, [Q, m, E]; positions: integer [Q, m]; keys as for `chunk_logits`. `seen` is bool [Q, m]:
        False where there is no token (its position is ignored); every query has at least one.
        """
        self._check_layers(hidden, keys)
        if len({len(keys[csa]) for csa in self.target_layers}) > 1:
            raise ValueError(f"layers disagree on chunks: { ({csa: len(keys[csa]) for csa in self.target_layers}) }")
        ensemble = ensemble or self._config.ensemble
        if ensemble not in ("max", "mean"):
            raise ValueError(f"ensemble must be 'max' or 'mean', got {ensemble!r}")
        if not positions.shape[1]:
            raise ValueError("there must be at least one layer and one observed token")
        at = positions if seen is None else positions.masked_fill(~seen, 0)
        per_layer_QN = []
        for csa, scorer in self.layers.items():
            device = scorer.q_norm_weight.device
            q_MHI, w_MH = scorer.queries(hidden[csa].flatten(0, 1).to(device), at.flatten().to(device))
            rows = keys[csa] if keys[csa].dtype is torch.uint8 else hadamard(keys[csa])
            q_QmHI, w_QmH = (x.to(rows.device).unflatten(0, positions.shape) for x in (q_MHI, w_MH))
            there = None if seen is None else seen.to(rows.device)
            reduce = score_chunks_max if ensemble == "max" else _score_chunks_mean
            per_layer_QN.append(reduce(q_QmHI, rows, w_QmH, there))
        device = per_layer_QN[0].device
        stacked_LQN = torch.stack([x_QN.to(device) for x_QN in per_layer_QN])
        combined_QN = stacked_LQN.amax(0) if ensemble == "max" else stacked_LQN.mean(0)
        return combined_QN + self._offset(combined_QN.shape[-1], combined_QN.device)

    def logits_in_place(
        self,
        hidden: Mapping[int, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
        positions: torch.Tensor,
        *,
        ensemble: Ensemble | None = None,
    ) -> torch.Tensor:
        """`chunk_logits` on the fused kernel: one launch for all layers and tokens, `keys` being index rows in place.

        Scorers, hidden states and rows must be on one device. Queries of a float32 indexer stay float32.
        """
        self._check_layers(hidden, keys)
        batched = {csa: states_mE.unsqueeze(0) for csa, states_mE in hidden.items()}
        q, w, rows = self._in_place(batched, {csa: [x] for csa, x in keys.items()}, positions.unsqueeze(0))
        merge, precision = ensemble or self._config.ensemble, self._precision
        with torch.cuda.device_of(q):  # Triton launches on the current device
            logits_N = score_history(q, w, rows, merge=merge, precision=precision, impl="fused")[0]
        return logits_N + self._offset(len(logits_N), logits_N.device)

    def page_scores_in_place(
        self,
        hidden: Mapping[int, torch.Tensor],
        keys: Mapping[int, Sequence[torch.Tensor]],
        positions: torch.Tensor,
        *,
        page_chunks: int,
        temperature: float,
        ensemble: Ensemble | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the logits of several sessions add up to by page, one launch for all: float32 [B, P], as follows.

        The scores temperature * logsumexp(logit / temperature), NaN where a logit is NaN, and the best logits; -inf for
        a page without chunks. hidden: by CSA index, [B, m, E]; positions: integer [B, m]; keys: by CSA index, index
        rows of every session. All must be on the scorers' device, and sessions have observed equally many tokens.
        """
        self._check_layers(hidden, keys)
        q, w, rows = self._in_place(hidden, keys, positions)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            pages = score_pages(
                q, w, rows, page_chunks=page_chunks, temperature=temperature, threshold=0.0,
                merge=ensemble or self._config.ensemble, precision=self._precision, impl="fused",
            )  # fmt: skip
        counts = [len(x) for x in keys[self.target_layers[0]]]
        offsets = {count: self._offset(count, pages.score.device) for count in counts}
        offset_B1 = torch.stack([offsets[count] for count in counts])[:, None]
        return pages.score + offset_B1, pages.best + offset_B1

    def _in_place(
        self, hidden: Mapping[int, torch.Tensor], keys: Mapping[int, Sequence[torch.Tensor]], positions_Bm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, PagedRows]:
        """Queries [L, B, m, H, I], their weights, and the index rows of the batch where they lie."""
        found = []
        for csa, scorer in self.layers.items():
            at = positions_Bm.flatten().to(hidden[csa].device)
            found.append([x.unflatten(0, positions_Bm.shape) for x in scorer.queries(hidden[csa].flatten(0, 1), at)])
        q_LBmHI, w_LBmH = (torch.stack(parts) for parts in zip(*found, strict=True))
        regions = [keys[csa] for csa in self.target_layers]
        rows = PagedRows(index_row_form(self._config.head_dim), regions, [len(x) for x in regions[0]])
        return q_LBmHI, w_LBmH, rows

    @property
    def _precision(self) -> Precision | None:
        return "fp32" if self._config.query_dtype == "fp32" else None

    def _offset(self, num_chunks: int, device: torch.device) -> torch.Tensor:
        """What calibration adds to the logits of so long a history."""
        return self.offset.float().to(device) + self._config.length_offset(num_chunks)

    @staticmethod
    def probability(logits: torch.Tensor) -> torch.Tensor:
        """What a person is shown; everything that decides works on logits."""
        return logits.sigmoid()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        rope: RopeConfig | None = None,
        rms_norm_eps: float | None = None,
        query_dtype: QueryDtype | None = None,
        ensemble: Ensemble | None = None,
        observation_window: int | None = None,
        logit_offset: float | None = None,
        device: torch.device | str = "cpu",
    ) -> MemoryIndexer:
        """Load a directory of ours, or a joint checkpoint in the published format (`.safetensors` or `.pt`).

        Files without a config get the published defaults (DeepSeek-V4-Flash: YaRN on 64 channels, eps 1e-6); the
        arguments override either. Weights become float32. Raises ValueError naming the file, and the key with the
        shape wanted and found where a tensor is missing, extra, mis-shaped or not finite.
        """
        settings: dict[str, Any] = {
            "rope": rope,
            "rms_norm_eps": rms_norm_eps,
            "query_dtype": query_dtype,
            "ensemble": ensemble,
            "observation_window": observation_window,
            "logit_offset": logit_offset,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        checkpoint = read_checkpoint(path)
        if checkpoint.config is None:
            offset = checkpoint.tensors.pop("offset", None)  # a plain state dict of this class has it
            if offset is not None and offset.numel() == 1:
                settings.setdefault("logit_offset", float(offset))
            config = infer_config(checkpoint, **settings)
        else:
            config = replace(checkpoint.config, **settings)
        check_tensors(checkpoint, config)
        return cls._from_tensors(config, checkpoint.tensors).to(device)

    @classmethod
    def native(
        cls,
        model: Any,
        layers: tuple[int, ...] | None = None,
        num_heads: int | None = None,
        q_rank: int | None = None,
        *,
        seed: int = 0,
    ) -> MemoryIndexer:
        """The backbone's own Lightning Indexer at the target layers (CSA indices), as it scores at inference.

        `num_heads` and `q_rank` widen it without changing what it computes (see `indexer.native`; `seed` draws the
        weights that do not speak yet). Lives on the device of the first target layer; shares no memory with the model.
        """
        config, tensors = read_native(model, layers, num_heads, q_rank, seed)
        device = tensors[f"retrievers.l{config.layers[0]}.q_norm_weight"].device
        return cls._from_tensors(config, {key: tensor.to(device) for key, tensor in tensors.items()})

    def derive(
        self,
        *,
        layers: tuple[int, ...] | None = None,
        num_heads: int | None = None,
        q_rank: int | None = None,
        ensemble: Ensemble | None = None,
        observation_window: int | None = None,
        logit_offset: float | None = None,
        length_offsets: tuple[tuple[int, float], ...] | None = None,
        seed: int = 0,
    ) -> MemoryIndexer:
        """A copy with some of the layers, widened without changing what they compute, and with other rules.

        Raises ValueError for layers that are not there, and for fewer heads or a smaller rank.
        """
        config = self.config
        layers = config.layers if layers is None else layers
        heads, rank = num_heads or config.num_heads, q_rank or config.q_rank
        if absent := sorted(set(layers) - set(config.layers)):
            raise ValueError(f"target layers are {list(config.layers)}, not {absent}")
        if heads < config.num_heads or rank < config.q_rank:
            raise ValueError(
                f"an indexer can be widened, not narrowed: heads {config.num_heads} -> {heads}, "
                f"rank {config.q_rank} -> {rank}"
            )
        tensors: dict[str, torch.Tensor] = {}
        for csa in layers:
            parts = {name: tensor.detach().float().clone() for name, tensor in self.layers[csa].state_dict().items()}
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + csa)
            parts = widen(parts, rank=rank, heads=heads, head_dim=config.head_dim, generator=generator)
            tensors |= {f"retrievers.l{csa}.{name}": tensor for name, tensor in parts.items()}
        made = replace(
            config,
            layers=layers,
            num_heads=heads,
            q_rank=rank,
            rms_norm_eps=config.rms_norm_eps * config.q_rank / rank,
            ensemble=ensemble or config.ensemble,
            observation_window=observation_window or config.observation_window,
            logit_offset=config.logit_offset if logit_offset is None else logit_offset,
            length_offsets=config.length_offsets if length_offsets is None else length_offsets,
        )
        return self._from_tensors(made, tensors)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `indexer.safetensors` and `config.json`; readers see the old or the new indexer, never a mixture."""
        write_checkpoint(directory, self._weights(), self.config)

    def fingerprint(self) -> str:
        """Sixteen hex digits that name weights and config, whatever device or file they come from."""
        weights = {key: tensor.detach().float() for key, tensor in self._weights().items()}
        text = json.dumps(self.config.to_mapping(), sort_keys=True) + digest_tensors(weights)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows: plain values only."""
        config, weights = self.config.to_mapping(), self._weights()
        return {
            "kind": "memory-indexer",
            "layers": list(self.target_layers),
            "hidden_size": config["hidden_size"],
            "q_rank": config["q_rank"],
            "num_heads": config["num_heads"],
            "head_dim": config["head_dim"],
            "parameters": sum(tensor.numel() for tensor in weights.values()),
            "bytes": sum(tensor.nbytes for tensor in weights.values()),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}),
            "fingerprint": self.fingerprint(),
            "config": config,
        }

    @classmethod
    def _from_tensors(cls, config: IndexerConfig, tensors: Mapping[str, torch.Tensor]) -> MemoryIndexer:
        with torch.device("meta"):  # no time for initial values that are overwritten
            indexer = cls(config)
        device = next(iter(tensors.values())).device
        state = {**tensors, "offset": torch.tensor(config.logit_offset, device=device)}
        indexer.load_state_dict(state, assign=True)
        return indexer

    def _weights(self) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in self.state_dict().items() if key != "offset"}

    def _check_layers(self, hidden: Mapping[int, Any], keys: Mapping[int, Any]) -> None:
        wanted = set(self.target_layers)
        if set(hidden) != wanted or set(keys) != wanted:
            raise ValueError(
                f"target layers are {sorted(wanted)}; got hidden states of {sorted(hidden)} and keys of {sorted(keys)}"
            )


def _score_chunks_mean(
    q_QmHI: torch.Tensor, keys_NC: torch.Tensor, w_QmH: torch.Tensor, seen_Qm: torch.Tensor | None
) -> torch.Tensor:
    logits_QmN = score_chunks(q_QmHI.flatten(0, 1), keys_NC, w_QmH.flatten(0, 1)).unflatten(0, q_QmHI.shape[:2])
    if seen_Qm is None:
        return logits_QmN.mean(1)
    absent_Qm1 = ~seen_Qm.unsqueeze(-1)
    return logits_QmN.masked_fill(absent_Qm1, 0).sum(1) / (~absent_Qm1).sum(1)


__all__ = ["MemoryIndexer"]
