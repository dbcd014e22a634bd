"""Shards: what capture writes and training reads. The only reader and the only writer.

A directory with one safetensors file per document and a `manifest.json` that names them with their checksums. A
document's file is written under another name and renamed; the manifest then replaces the old one: a document exists
from that moment, and an interruption at any other leaves the shards as they were.

Tensors of a file, L being a CSA index: positions, num_chunks and observed int64 [Q]; turns int64
[Q, 2]; hidden.lL [Q, m, E];
rows.lL uint8 [N, I + 4]; mass.lL, lightning.lL, vote and evidence as `.indptr`, `.chunks` and `.values` of a `Csr`.
Shape letters: Q = sampled queries, m = observed tokens kept per query, E = hidden size, N = chunks of prompt and
answer, I = index_head_dim, Z = stored values.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors
import torch
from safetensors.torch import load_file, save_file

from ..config import ModelGeometry, RopeConfig
from ..types import DamagedError, FlashmemError

FORMAT = "flashmem-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LONGEST_NAME = 200  # bytes of a quoted rid, so that file names stay below the usual limit of 255


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMeta:
    """What all documents of a directory share; JSON values but for the geometry."""

    model: str
    """Fingerprint of the backbone."""
    geometry: ModelGeometry
    layers: tuple[int, ...]
    """CSA indices with hidden states and index rows, ascending."""
    labels: tuple[int, ...]
    """CSA indices with mass and lightning labels: all of the model's when captured, none when converted."""
    dtype: str
    """Of the hidden states: 'float32' or 'bfloat16'."""
    tokenizer: str | None = None
    """Hash of the tokenizer."""
    tau: int = 64
    """Tokens after a query that its labels sum over."""
    observe: int = 1
    """Hidden states kept per query (m)."""
    vote_p: float = 0.6
    vote_layers: int = 3
    """Least number of layers whose top-p set holds a chunk."""
    origin: str = "capture"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How queries were sampled and answers made."""

    def __post_init__(self) -> None:
        for name in ("layers", "labels"):
            values, count = getattr(self, name), len(self.geometry.csa_layers)
            if list(values) != sorted(set(values)) or any(not 0 <= csa < count for csa in values):
                raise ValueError(f"{name} must be ascending CSA indices below {count}, got {values}")
        if not self.layers:
            raise ValueError("layers must name at least one CSA index")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        for name in ("tau", "observe", "vote_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.vote_p <= 1:
            raise ValueError(f"vote_p must lie in (0, 1], got {self.vote_p}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def to_mapping(self) -> dict[str, Any]:
        """What JSON can hold; `from_mapping` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ShardMeta:
        """Raises ValueError for unknown, missing or wrong entries."""
        _check_names("shard meta", values, cls)
        geometry = dict(values["geometry"])
        _check_names("geometry", geometry, ModelGeometry)
        geometry["layer_kinds"] = tuple(geometry["layer_kinds"])
        geometry["compress_rope"] = RopeConfig(**geometry["compress_rope"])
        tuples = {name: tuple(values[name]) for name in ("layers", "labels")}
        return cls(**{**values, **tuples, "geometry": ModelGeometry(**geometry)})


@dataclass(frozen=True, eq=False, slots=True)
class Csr:
    """Rows of (chunk, value), one row per query; chunks ascend within a row."""

    indptr: torch.Tensor
    """Int64 [Q + 1]."""
    chunks: torch.Tensor
    """Int32 [Z]."""
    values: torch.Tensor
    """Float32 [Z]."""

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def row(self, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks and values of one query."""
        lo, hi = self.indptr[query : query + 2].tolist()
        return self.chunks[lo:hi], self.values[lo:hi]

    def rows(self) -> torch.Tensor:
        """Int64 [Z]: the query of every value."""
        return torch.repeat_interleave(torch.arange(len(self)), self.indptr.diff())

    def dense(self, num_chunks: int) -> torch.Tensor:
        """Float32 [Q, num_chunks]."""
        out = torch.zeros(len(self), num_chunks)
        out[self.rows(), self.chunks.long()] = self.values
        return out

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Csr:
        """Chunks (ascending) and values of each query."""
        counts = torch.tensor([0, *(len(chunks) for chunks, _ in rows)])
        chunks = torch.cat([torch.empty(0, dtype=torch.int32), *(chunks.int() for chunks, _ in rows)])
        values = torch.cat([torch.empty(0), *(values.float() for _, values in rows)])
        return cls(counts.cumsum(0), chunks, values)

    def check(self, num_chunks: torch.Tensor) -> None:
        """Raise ValueError unless rows are well-formed and name only chunks that their query sees."""
        for name, dtype in (("indptr", torch.int64), ("chunks", torch.int32), ("values", torch.float32)):
            _expect(getattr(self, name).dtype is dtype, f"{name} must be {dtype}")
        good = len(self) == len(num_chunks) and int(self.indptr[0]) == 0 and int(self.indptr[-1]) == len(self.chunks)
        _expect(good and len(self.values) == len(self.chunks), "indptr, chunks and values do not fit")
        _expect(bool((self.indptr.diff() >= 0).all()), "indptr must not fall")
        rows, chunks = self.rows(), self.chunks.long()
        _expect(bool(((chunks >= 0) & (chunks < num_chunks[rows])).all()), "a chunk is not visible at its query")
        _expect(bool(((chunks.diff() > 0) | (rows.diff() > 0)).all()), "chunks must ascend within a row")
        _expect(bool((self.values.isfinite() & (self.values >= 0)).all()), "values must be finite and not negative")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Document:
    """One captured document; tensors read from a shard are views of the mapped file."""

    rid: str
    tokens: int
    """Tokens that ran, prompt and answer."""
    prompt_tokens: int
    """Tokens read by prefill: level 1 first runs at position prompt_tokens - 1."""
    source: str = ""
    """Hash of the prompt and of what else decides the document."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt's author said of it: JSON values."""
    positions: torch.Tensor
    """Int64 [Q], ascending: the query is made of the tokens up to and including this one."""
    num_chunks: torch.Tensor
    """Int64 [Q]: chunks visible at the query, (position + 1) // csa_ratio; labels name only these."""
    observed: torch.Tensor
    """Int64 [Q]: how many of the m hidden states are there, the last ones."""
    turns: torch.Tensor
    """Int64 [Q, 2]: the answer's tokens [start, end) that the query belongs to; labels do not look past its end."""
    hidden: Mapping[int, torch.Tensor]
    """By CSA index, [Q, m, E], oldest first, zeros where there is none."""
    rows: Mapping[int, torch.Tensor]
    """By CSA index, index rows uint8 [N, I + 4]."""
    mass: Mapping[int, Csr]
    """By CSA index: attention probability per chunk, head mean, sink in the denominator, summed over tau tokens."""
    lightning: Mapping[int, Csr]
    """By CSA index: softmax over the lightning top-k, summed over tau tokens."""
    vote: Csr
    """Most layers whose top-p set held the chunk at one of the tau tokens, where that reaches vote_layers."""
    evidence: Csr | None = None
    """Chunks that hold what the answer needs; values are 1."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def total_chunks(self) -> int:
        """N."""
        return len(next(iter(self.rows.values())))

    def check(self, meta: ShardMeta) -> None:
        """Raise ValueError if a tensor is missing, mis-shaped, of a wrong type or contradicts another."""
        queries, g = len(self), meta.geometry
        for name in ("positions", "num_chunks", "observed"):
            tensor = getattr(self, name)
            _expect(tensor.dtype is torch.int64 and tensor.shape == (queries,), f"{name} must be int64 [{queries}]")
        _expect(0 < self.prompt_tokens <= self.tokens, "tokens and prompt_tokens do not fit")
        inside = (self.positions >= 0) & (self.positions < self.tokens)
        _expect(bool(inside.all()) and bool((self.positions.diff() > 0).all()), "positions must ascend within tokens")
        _expect(torch.equal(self.num_chunks, (self.positions + 1) // g.csa_ratio), "num_chunks contradicts positions")
        _expect(
            self.turns.dtype is torch.int64 and self.turns.shape == (queries, 2), f"turns is not int64 [{queries}, 2]"
        )
        start, end = self.turns.unbind(1)
        within = (start <= self.positions + 1) & (self.positions < end) & (end <= self.tokens)
        _expect(bool(within.all()), "turns must hold their queries, within tokens")
        observed = (self.observed > 0) & (self.observed <= meta.observe)
        _expect(bool(observed.all()), f"observed must lie in 1..{meta.observe}")
        _expect(tuple(self.hidden) == meta.layers and tuple(self.rows) == meta.layers, f"layers are not {meta.layers}")
        _expect(tuple(self.mass) == meta.labels and tuple(self.lightning) == meta.labels, "label layers are missing")
        total = self.tokens // g.csa_ratio
        for csa in meta.layers:
            hidden, rows = self.hidden[csa], self.rows[csa]
            wanted = (queries, meta.observe, g.hidden_size)
            _expect(hidden.dtype is meta.torch_dtype and hidden.shape == wanted, f"hidden.l{csa} is not {wanted}")
            row_shape = (total, g.index_head_dim + 4)
            _expect(rows.dtype is torch.uint8 and rows.shape == row_shape, f"rows.l{csa} is not uint8 {row_shape}")
        for csr in (*self.mass.values(), *self.lightning.values(), self.vote, self.evidence):
            if csr is not None:
                csr.check(self.num_chunks)


@dataclass(frozen=True, slots=True)
class Entry:
    """A document's line in the manifest."""

    rid: str
    file: str
    tokens: int
    prompt_tokens: int
    chunks: int
    queries: int
    source: str
    meta: Mapping[str, Any]
    bytes: int
    sha256: str


class ShardWriter:
    """Writes documents into a directory, or goes on where an earlier writer stopped.

    Raises ValueError where the directory holds something else or shards with another meta, DamagedError for a damaged
    manifest, FlashmemError while another process writes there.
    """

    def __init__(self, directory: str | Path, meta: ShardMeta) -> None:
        self.directory, self.meta = Path(directory), meta
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{directory} is a file; shards are a directory")
        names = {path.name for path in self.directory.iterdir()} if self.directory.is_dir() else set()
        if MANIFEST not in names and any(not name.endswith(".tmp") for name in names):
            raise ValueError(f"{directory} holds something other than shards")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.entries = self._resume()
            self._write_manifest()
        except BlockingIOError as error:
            os.close(self._lock)
            raise FlashmemError(f"another process writes to {directory}") from error
        except BaseException:
            os.close(self._lock)
            raise

    def _resume(self) -> dict[str, Entry]:
        if not (self.directory / MANIFEST).exists():
            return {}
        meta, entries = _read_manifest(self.directory)
        mine, theirs = self.meta.to_mapping(), meta.to_mapping()
        for name, value in mine.items():
            if value != theirs[name]:
                raise ValueError(f"{self.directory} has shards with another {name}: {theirs[name]!r}, not {value!r}")
        for path in self.directory.glob("*.tmp"):  # an interrupted writer's
            path.unlink()
        return {entry.rid: entry for entry in entries}

    def holds(self, rid: str, source: str | None = None) -> bool:
        """Whether the document is there, whole and made from this source.

        A damaged or missing file is forgotten, so that it is written again. Raises ValueError for another source.
        """
        entry = self.entries.get(rid)
        if entry is None:
            return False
        if _fault(self.directory, entry) is not None:
            del self.entries[rid]
            self._write_manifest()
            return False
        if source is not None and source != entry.source:
            raise ValueError(f"{self.directory} holds document {rid!r} made from another prompt")
        return True

    def write(self, document: Document) -> Entry:
        """Add or replace a document, atomically; raises ValueError if it contradicts itself or the meta."""
        document.check(self.meta)
        path = self.directory / file_name(document.rid)
        temporary = path.with_suffix(".tmp")
        try:
            # one entry of metadata: several are written in any order, and equal documents must be equal files
            save_file(_tensors_of(document), temporary, metadata={"rid": document.rid})
            _sync(temporary)
            size, digest = temporary.stat().st_size, _sha256(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        entry = Entry(
            document.rid, path.name, document.tokens, document.prompt_tokens, document.total_chunks, len(document),
            document.source, dict(document.meta), size, digest,
        )  # fmt: skip
        self.entries[document.rid] = entry
        self._write_manifest()
        return entry

    def _write_manifest(self) -> None:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "meta": self.meta.to_mapping(),
            "documents": [asdict(entry) for entry in self.entries.values()],
        }
        manifest["sha256"] = _digest(manifest)
        temporary = self.directory / "manifest.tmp"
        temporary.write_text(json.dumps(manifest))
        _sync(temporary)
        os.replace(temporary, self.directory / MANIFEST)
        _sync(self.directory)

    def close(self) -> None:
        """Let others write here."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardReader:
    """The documents of one or more directories, by index or rid, memory-mapped.

    Opening checks manifests and the files' sizes; `check` reads everything. Raises ValueError where there are no shards
    or the directories do not go together, DamagedError for damaged ones.
    """

    def __init__(self, directory: str | Path, *more: str | Path) -> None:
        self.directory = Path(directory)
        """The first one: where the start of training is."""
        self.meta, _ = _read_manifest(self.directory)
        self.entries: list[Entry] = []
        self._places: list[Path] = []
        self._index: dict[str, int] = {}
        for folder in (self.directory, *map(Path, more)):
            meta, entries = _read_manifest(folder)
            names = [item.name for item in fields(meta)]
            if differing := [name for name in names if getattr(meta, name) != getattr(self.meta, name)]:
                raise ValueError(f"{folder} and {self.directory} differ in {', '.join(differing)}")
            for entry in entries:
                if entry.rid in self._index:
                    raise ValueError(f"{folder} holds document {entry.rid!r}, which {self._place(entry.rid)} holds too")
                if fault := _fault(folder, entry, deep=False):
                    raise DamagedError(fault)
                self._index[entry.rid] = len(self.entries)
                self.entries.append(entry)
                self._places.append(folder)

    @property
    def rids(self) -> tuple[str, ...]:
        return tuple(self._index)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | str) -> Document:
        entry = self.entries[self._index[key] if isinstance(key, str) else key]
        path = self._place(entry.rid) / entry.file
        try:
            return _document_of(entry, self.meta, load_file(path))
        except (safetensors.SafetensorError, KeyError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def check(self) -> None:
        """Verify the checksum and the content of every document; raises DamagedError naming the file."""
        for index, entry in enumerate(self.entries):
            folder = self._place(entry.rid)
            if fault := _fault(folder, entry):
                raise DamagedError(fault)
            try:
                self[index].check(self.meta)
            except ValueError as error:
                raise DamagedError(f"{folder / entry.file}: {error}") from error

    def _place(self, rid: str) -> Path:
        return self._places[self._index[rid]]


def file_name(rid: str) -> str:
    """Name of a document's file; raises ValueError for an empty or too long rid."""
    name = quote(rid, safe="")
    if not rid or len(name) > LONGEST_NAME:
        raise ValueError(f"a document's id must have 1 to {LONGEST_NAME} bytes when quoted, got {rid[:40]!r}")
    return f"doc-{name}.safetensors"


def _tensors_of(document: Document) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(document, name) for name in ("positions", "num_chunks", "observed", "turns")}
    for name in ("hidden", "rows"):
        tensors |= {f"{name}.l{csa}": tensor for csa, tensor in getattr(document, name).items()}
    tables: dict[str, Csr | None] = {"vote": document.vote, "evidence": document.evidence}
    for name in ("mass", "lightning"):
        tables |= {f"{name}.l{csa}": csr for csa, csr in getattr(document, name).items()}
    for name, csr in tables.items():
        if csr is not None:
            tensors |= {f"{name}.{part.name}": getattr(csr, part.name) for part in fields(csr)}
    # copies: the file format refuses tensors that share memory
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _document_of(entry: Entry, meta: ShardMeta, tensors: Mapping[str, torch.Tensor]) -> Document:
    def table(name: str) -> Csr:
        return Csr(**{part.name: tensors[f"{name}.{part.name}"] for part in fields(Csr)})

    return Document(
        rid=entry.rid,
        tokens=entry.tokens,
        prompt_tokens=entry.prompt_tokens,
        source=entry.source,
        meta=entry.meta,
        positions=tensors["positions"],
        num_chunks=tensors["num_chunks"],
        observed=tensors["observed"],
        turns=tensors["turns"],
        hidden={csa: tensors[f"hidden.l{csa}"] for csa in meta.layers},
        rows={csa: tensors[f"rows.l{csa}"] for csa in meta.layers},
        mass={csa: table(f"mass.l{csa}") for csa in meta.labels},
        lightning={csa: table(f"lightning.l{csa}") for csa in meta.labels},
        vote=table("vote"),
        evidence=table("evidence") if "evidence.indptr" in tensors else None,
    )


def _read_manifest(directory: Path) -> tuple[ShardMeta, list[Entry]]:
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no shards: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of flashmem shards")
    if manifest.get("version") != FORMAT_VERSION:
        raise DamagedError(f"{path} has version {manifest.get('version')!r}; this flashmem reads {FORMAT_VERSION}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(f"{path} is damaged: its checksum does not fit")
    return ShardMeta.from_mapping(manifest["meta"]), [Entry(**values) for values in manifest["documents"]]


def _fault(directory: Path, entry: Entry, *, deep: bool = True) -> str | None:
    """What is wrong with a document's file; `deep` reads it."""
    path = directory / entry.file
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"{path} is missing"
    if size != entry.bytes:
        return f"{path} is {size} bytes long; the manifest says {entry.bytes}"
    if deep and _sha256(path) != entry.sha256:
        return f"{path} is damaged: its checksum does not fit"
    return None


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_names(what: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    names = {item.name for item in fields(cls)}
    if wrong := sorted(names ^ values.keys()):
        raise ValueError(f"{what}: unknown or missing entries {', '.join(wrong)}")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["FORMAT_VERSION", "Csr", "Document", "Entry", "ShardMeta", "ShardReader", "ShardWriter", "file_name"]
