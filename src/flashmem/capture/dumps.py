"""From published training dumps (`doc_*.pkl`) to shards.

A dump is a pickled dict of tensors. Unpickling can run any code, so names are resolved here through a short list:
tensors, their storages and plain containers; a dump that asks for anything else is refused.

Dumps hold, per decoded token, hidden states at a few CSA layers and the chunks that enough layers voted for, and the
index rows of prompt and answer; nothing that a mass could be summed from. Names inside: `hidden_layer_L` [T, E],
`positions_layer_L` [T], `compk_layer_L` [N, I + 4], and the votes as `label_indices`, `label_scores` and
`label_pointers` [T + 1], L being a CSA index. Shape letters: T = decoded tokens, N = chunks, E = hidden size,
I = index_head_dim, Q = queries, m = observed tokens.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..config import ModelGeometry
from ..types import DamagedError
from .format import Document, ShardMeta, ShardWriter
from .labels import Query, sample_queries, vote_windows, windows

_HIDDEN, _ROWS, _POSITIONS = "hidden_layer_", "compk_layer_", "positions_layer_"
_LABELS = ("label_indices", "label_scores", "label_pointers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What a user chooses about conversion; the vote's p and least number of layers are those of the dump's maker."""

    layers: tuple[int, ...] | None = None
    """CSA indices to keep; None means all of the first dump."""
    tau: int = 64
    observe: int = 1
    queries: int = 32
    vote_p: float = 0.6
    vote_layers: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "observe", "queries", "vote_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def convert(
    dumps: str | Path,
    directory: str | Path,
    geometry: ModelGeometry,
    config: ConvertConfig | None = None,
    on_progress: Callable[[str, str], None] | None = None,
) -> tuple[int, int]:
    """Convert a folder of dumps; returns how many documents were written and how many were there already.

    `geometry` is the model's that made the dumps. Raises ValueError naming the file for a dump that is refused or does
    not fit the geometry; documents written before stay, and a later run goes on from there.
    """
    config = config or ConvertConfig()
    paths = sorted(Path(dumps).glob("doc_*.pkl"))
    if not paths:
        raise ValueError(f"{dumps} holds no doc_*.pkl")
    meta = _meta(load_dump(paths[0]), paths[0], geometry, config)
    tell = on_progress or (lambda rid, what: None)
    written = there = 0
    with ShardWriter(directory, meta) as writer:
        for path in paths:
            source = f"{path.name} {path.stat().st_size}"
            if writer.holds(path.stem, source):
                there += 1
                tell(path.stem, "there")
                continue
            try:
                writer.write(document_of(load_dump(path), path.stem, source, meta, config))
            except ValueError as error:
                raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
            written += 1
            tell(path.stem, "written")
    return written, there


def document_of(
    dump: Mapping[str, torch.Tensor], rid: str, source: str, meta: ShardMeta, config: ConvertConfig
) -> Document:
    """One dump as a document; raises ValueError for what is missing or does not fit.

    The dump's first decoded token stands for the end of the prompt: it is the first with hidden states.
    """
    needed = (*(f"{kind}{csa}" for csa in meta.layers for kind in (_HIDDEN, _ROWS, _POSITIONS)), *_LABELS)
    if missing := [name for name in needed if name not in dump]:
        raise ValueError(f"the dump lacks {missing[0]}")
    positions_T = dump[f"{_POSITIONS}{meta.layers[0]}"]
    if not len(positions_T):
        raise ValueError("the dump has no decoded token")
    first, count, ratio = int(positions_T[0]), len(positions_T), meta.geometry.csa_ratio
    expected = torch.arange(first, first + count)
    for csa in meta.layers:
        if not torch.equal(dump[f"{_POSITIONS}{csa}"], expected):
            raise ValueError(f"positions of CSA index {csa} are not consecutive, or differ between layers")
        if len(dump[f"{_HIDDEN}{csa}"]) != count:
            raise ValueError(f"hidden states of CSA index {csa}: {len(dump[f'{_HIDDEN}{csa}'])} for {count} tokens")
        if len(dump[f"{_ROWS}{csa}"]) < (first + count) // ratio:
            raise ValueError(
                f"CSA index {csa} has keys of {len(dump[f'{_ROWS}{csa}'])} chunks; its tokens need "
                f"{(first + count) // ratio}: was the answer's second pass left out?"
            )
    token_votes = _votes(dump, count)
    sampled = sample_queries([(first + 1, first + count)], config.tau, config.queries, config.seed, rid)
    sampled = sampled or [Query(first, first + 1, first + 1)]
    queries = [query.position for query in sampled]
    spans = windows(sampled, first, config.tau)
    num_chunks = [(position + 1) // ratio for position in queries]
    m = config.observe
    observed = [min(m, position - first + 1) for position in queries]
    hidden = {}
    for csa in meta.layers:
        states_TE = dump[f"{_HIDDEN}{csa}"].to(meta.torch_dtype)
        hidden[csa] = states_TE.new_zeros(len(queries), m, states_TE.shape[1])
        for row, position, seen in zip(hidden[csa], queries, observed, strict=True):
            end = position - first + 1
            row[m - seen :] = states_TE[end - seen : end]
    return Document(
        rid=rid,
        tokens=first + count,
        prompt_tokens=first + 1,
        source=source,
        positions=torch.tensor(queries),
        num_chunks=torch.tensor(num_chunks),
        observed=torch.tensor(observed),
        turns=torch.tensor([[query.start, query.end] for query in sampled]),
        hidden=hidden,
        rows={csa: dump[f"{_ROWS}{csa}"][: (first + count) // ratio] for csa in meta.layers},
        mass={},
        lightning={},
        vote=vote_windows(token_votes[1:], spans, num_chunks),
    )


def load_dump(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a dump, by name. Raises ValueError for a dump that asks for anything but tensors and containers,
    DamagedError for one that cannot be read."""
    with Path(path).open("rb") as file:
        try:
            dump = _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            if isinstance(error, _RefusedError):
                raise ValueError(f"{path}: {error}") from error
            raise DamagedError(f"{path} is damaged: {error}") from error
        except (
            EOFError,
            IndexError,
            KeyError,
            AttributeError,
            TypeError,
            RuntimeError,
            ValueError,
            OverflowError,
        ) as error:
            raise DamagedError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(dump, dict):
        raise ValueError(f"{path} holds a {type(dump).__name__}, not a dict of tensors")
    return {str(name): value for name, value in dump.items() if isinstance(value, torch.Tensor)}


class _RefusedError(pickle.UnpicklingError):
    pass


def _load_storage(data: bytes) -> Any:
    """What torch's own pickles call on a storage's bytes; torch's version would unpickle anything inside."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise _refusal(name[1] if name else "something else inside a tensor") from error


def _refusal(name: str) -> _RefusedError:
    return _RefusedError(f"refused: it asks for {name}; a dump holds tensors and containers only")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _refusal(f"{module}.{name}")
        found = _ALLOWED[module, name]
        # a pickle may set attributes of what it is given: let that be something of its own
        return found if isinstance(found, type) else lambda *arguments: found(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("refused: it refers to objects outside the file")


def _meta(dump: Mapping[str, torch.Tensor], path: Path, geometry: ModelGeometry, config: ConvertConfig) -> ShardMeta:
    layers = config.layers
    if layers is None:
        layers = tuple(sorted(int(name.removeprefix(_HIDDEN)) for name in dump if name.startswith(_HIDDEN)))
    if not layers:
        raise ValueError(f"{path} has no hidden states: it is no training dump")
    some = dump.get(f"{_HIDDEN}{layers[0]}")
    return ShardMeta(
        model="",
        geometry=geometry,
        layers=layers,
        labels=(),
        dtype="float32" if some is not None and some.dtype is torch.float32 else "bfloat16",
        tau=config.tau,
        observe=config.observe,
        vote_p=config.vote_p,
        vote_layers=config.vote_layers,
        origin="published dump",
        settings={"queries": config.queries, "seed": config.seed},
    )


def _votes(dump: Mapping[str, torch.Tensor], count: int) -> list[tuple[torch.Tensor, ...]]:
    chunks, scores, pointers = (dump[name] for name in _LABELS)
    good = len(pointers) == count + 1 and int(pointers[0]) == 0 and int(pointers[-1]) == len(chunks) == len(scores)
    if not good or bool((pointers.diff() < 0).any()):
        raise ValueError(f"the labels' pointers do not fit {len(chunks)} labels of {count} tokens")
    bounds = pointers.tolist()
    return [(chunks[lo:hi], scores[lo:hi]) for lo, hi in pairwise(bounds)]


__all__ = ["ConvertConfig", "convert", "document_of", "load_dump"]
