"""Saved memories: a directory with a JSON manifest, a state file and a page file, both safetensors.

Saving writes new data files under fresh names, then replaces the manifest, which names them: that is the moment at
which the new memory exists; a crash at any other moment leaves the old one. Opening checks the manifest and the state
file at once, and every page when it is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import load_file, save_file

from .store import MappedRecords
from .types import DamagedError

FORMAT = "flashmem-memory"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_RECORDS = "records"


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """An opened memory: its manifest's `session` values, its state tensors and its mapped pages."""

    session: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    records: MappedRecords


def save_memory(
    directory: str | Path,
    session: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    records: Iterator[torch.Tensor],
    num_records: int,
    record_bytes: int,
) -> None:
    """Write or replace a memory atomically.

    `session` holds JSON values; `records` yields `num_records` uint8 tensors [record_bytes] in page order. OSError
    (a full disk, say) leaves an older memory as it was and no new files behind.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a memory is a directory")
    if (
        directory.is_dir()
        and any(directory.iterdir())
        and not _data_files(directory)
        and not _manifest(directory).exists()
    ):
        raise ValueError(f"{directory} is a directory that holds something other than a memory")
    directory.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    state_path, pages_path = directory / f"state-{name}.safetensors", directory / f"pages-{name}.safetensors"
    temporary = directory / f"manifest-{name}.tmp"
    try:
        save_file({key: value.contiguous() for key, value in state.items()}, state_path)
        _sync(state_path)
        offset, crcs = _write_records(pages_path, records, num_records, record_bytes)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "state": {"file": state_path.name, "bytes": state_path.stat().st_size, "sha256": _sha256(state_path)},
            "pages": {
                "file": pages_path.name,
                "bytes": pages_path.stat().st_size,
                "offset": offset,
                "count": num_records,
                "record_bytes": record_bytes,
                "crc32": crcs,
            },
            "session": dict(session),
        }
        manifest["sha256"] = _digest(manifest)
        temporary.write_text(json.dumps(manifest))
        _sync(temporary)
        os.replace(temporary, _manifest(directory))
        _sync(directory)
    except BaseException:
        for path in (state_path, pages_path, temporary):
            path.unlink(missing_ok=True)
        raise
    for path in _data_files(directory):  # the old memory's, and what an interrupted save left
        if name not in path.name:
            path.unlink(missing_ok=True)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read and verify a manifest; raises DamagedError (or ValueError where there is no memory)."""
    path = _manifest(Path(directory))
    if not path.is_file():
        raise ValueError(f"{directory} is not a memory: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{path} is not the manifest of a flashmem memory")
    if manifest.get("version") != FORMAT_VERSION:
        raise DamagedError(
            f"{path} has format version {manifest.get('version')!r}; this flashmem reads {FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(f"{path} is damaged: its checksum does not fit")
    return manifest


def open_memory(directory: str | Path) -> SavedMemory:
    """Open a memory; pages are mapped, and verified when first read."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for part in ("state", "pages"):
        path = directory / manifest[part]["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != manifest[part]["bytes"]:
            found = "missing" if size is None else f"{size} bytes long"
            raise DamagedError(f"{path} is {found}; the manifest says {manifest[part]['bytes']} bytes")
    state_path = directory / manifest["state"]["file"]
    if _sha256(state_path) != manifest["state"]["sha256"]:
        raise DamagedError(f"{state_path} is damaged: its checksum does not fit")
    try:
        state = load_file(state_path)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{state_path} is damaged: {error}") from error
    pages = manifest["pages"]
    records = MappedRecords(
        directory / pages["file"], offset=pages["offset"], count=pages["count"], record_bytes=pages["record_bytes"],
        crcs=pages["crc32"],
    )  # fmt: skip
    return SavedMemory(manifest["session"], state, records)


def _write_records(path: Path, records: Iterator[torch.Tensor], count: int, record_bytes: int) -> tuple[int, list[int]]:
    """Stream records into a safetensors file of one tensor; returns the offset of its data and the records' crc32."""
    entry = {"dtype": "U8", "shape": [count, record_bytes], "data_offsets": [0, count * record_bytes]}
    header = json.dumps({_RECORDS: entry}).encode()
    header += b" " * (-(8 + len(header)) % 4096)  # data starts on a disk page
    crcs: list[int] = []
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for record in records:
            data = record.contiguous().numpy().data
            assert data.nbytes == record_bytes
            crcs.append(zlib.crc32(data))
            file.write(data)
        if len(crcs) != count:
            raise RuntimeError(f"{len(crcs)} records written, {count} announced")
        _flush(file)
    return 8 + len(header), crcs


def _manifest(directory: Path) -> Path:
    return directory / MANIFEST


def _data_files(directory: Path) -> list[Path]:
    patterns = ("state-*.safetensors", "pages-*.safetensors", "manifest-*.tmp")
    return [path for pattern in patterns for path in directory.glob(pattern)]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
