"""Saved memories: a directory with a JSON manifest, a state file and a page file, both safetensors.

Saving writes new data files under fresh names, then replaces the manifest, which names them: that is the moment at
which the new memory exists; a crash at any other moment leaves the old one. Opening checks the manifest and the state
file at once, and every page when it is first read. A manifest is believed only if every field of it makes sense: its
checksum tells damage, not intent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from .store import MappedRecords, Records
from .types import DamagedError

FORMAT = "flashmem-memory"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_RECORDS = "records"
_DATA_FILE = re.compile(r"(state|pages)-[0-9a-f]{16}\.safetensors|manifest-[0-9a-f]{16}\.tmp")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """An opened memory, or a session's snapshot: the manifest's `session` values, state tensors and pages."""

    session: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    records: Records


def save_memory(
    directory: str | Path,
    session: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    records: Iterable[torch.Tensor],
    num_records: int,
    record_bytes: int,
) -> None:
    """Write or replace a memory atomically; waits while another process saves to the same directory.

    `session` holds JSON values, `position`, `num_chunks`, `policy`, `settings` and `cycle` among them; `records` yields
    `num_records` uint8 tensors [record_bytes] in page order. OSError (a full disk, say) leaves an older memory as it
    was and nothing new behind; only where the directory itself cannot be flushed at the very end is the new memory
    already in its place. ValueError where the directory holds something else.
    """
    directory = Path(directory)
    _check_target(directory)
    made = _make(directory)
    name = secrets.token_hex(8)
    state_path, pages_path = directory / f"state-{name}.safetensors", directory / f"pages-{name}.safetensors"
    temporary = directory / f"manifest-{name}.tmp"
    with _locked(directory):
        try:
            data = save({key: value.contiguous() for key, value in state.items()})
            _write(state_path, [data])
            header = _pages_header(num_records, record_bytes)
            crcs: list[int] = []
            _write(pages_path, _page_bytes(header, records, num_records, record_bytes, crcs))
            manifest = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "state": {"file": state_path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
                "pages": {
                    "file": pages_path.name,
                    "bytes": len(header) + num_records * record_bytes,
                    "offset": len(header),
                    "count": num_records,
                    "record_bytes": record_bytes,
                    "crc32": crcs,
                },
                "session": dict(session),
            }
            manifest["sha256"] = _digest(manifest)
            _write(temporary, [json.dumps(manifest).encode()])
            _sync(directory)  # the new names are on the disk before the manifest that needs them
            os.replace(temporary, _manifest(directory))
            _sync(directory)
        except BaseException:
            if not _is_current(directory, name):
                _remove([state_path, pages_path, temporary])
                if made:
                    with suppress(OSError):  # another process may have saved here since
                        directory.rmdir()
            raise
        # the old memory's files, and what an interrupted save left; whoever has them open still reads them
        _remove([path for path in _data_files(directory) if name not in path.name])


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read and verify a manifest; raises DamagedError (or ValueError where there is no memory)."""
    path = _manifest(Path(directory))
    if not path.is_file():
        raise ValueError(f"{directory} is not a memory: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{path} is not the manifest of a flashmem memory")
    if manifest.get("version") != FORMAT_VERSION:
        raise DamagedError(
            f"{path} has format version {manifest.get('version')!r}; this flashmem reads {FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(f"{path} is damaged: its checksum does not fit")
    if wrong := _wrong_field(manifest):
        raise DamagedError(f"{path} is damaged: {wrong} makes no sense")
    return manifest


def open_memory(directory: str | Path) -> SavedMemory:
    """Open a memory; pages are mapped, and verified when first read.

    Raises DamagedError naming the file that is missing, truncated or altered, ValueError where there is no memory.
    """
    directory = Path(directory)
    while True:
        manifest = read_manifest(directory)
        try:
            return _open_files(directory, manifest)
        except (DamagedError, FileNotFoundError):
            if read_manifest(directory) == manifest:
                raise
            # a save replaced this memory and removed its files while we read them: there is a newer one to open


def _open_files(directory: Path, manifest: Mapping[str, Any]) -> SavedMemory:
    state, pages = manifest["state"], manifest["pages"]
    for part in (state, pages):
        path = directory / part["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != part["bytes"]:
            found = "missing" if size is None else f"{size:,} bytes long"
            raise DamagedError(f"{path} is {found}; the manifest says {part['bytes']:,} bytes")
    state_path, pages_path = directory / state["file"], directory / pages["file"]
    data = state_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != state["sha256"]:
        raise DamagedError(f"{state_path} is damaged: its checksum does not fit")
    try:
        tensors = load(data)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{state_path} is damaged: {error}") from error
    with pages_path.open("rb") as file:
        if file.read(pages["offset"]) != _pages_header(pages["count"], pages["record_bytes"]):
            raise DamagedError(f"{pages_path} is damaged: its header does not fit")
    records = MappedRecords(
        pages_path, offset=pages["offset"], count=pages["count"], record_bytes=pages["record_bytes"],
        crcs=pages["crc32"],
    )  # fmt: skip
    return SavedMemory(manifest["session"], tensors, records)


def _wrong_field(manifest: Mapping[str, Any]) -> str | None:
    """Name of the first field that no save would have written."""
    state, pages, session = (manifest.get(name) for name in ("state", "pages", "session"))
    if not isinstance(state, dict) or not isinstance(pages, dict) or not isinstance(session, dict):
        return "'state', 'pages' or 'session'"
    for name, part in (("state", state), ("pages", pages)):
        file = part.get("file")  # a name in this directory and no path
        if not isinstance(file, str) or not _DATA_FILE.fullmatch(file) or not file.startswith(f"{name}-"):
            return f"'{name}.file'"
        if not _is_count(part.get("bytes")):
            return f"'{name}.bytes'"
    if not isinstance(state.get("sha256"), str):
        return "'state.sha256'"
    for name in ("offset", "count", "record_bytes"):
        if not _is_count(pages.get(name)):
            return f"'pages.{name}'"
    crcs = pages.get("crc32")
    if not isinstance(crcs, list) or len(crcs) != pages["count"] or not all(map(_is_count, crcs)):
        return "'pages.crc32'"
    if (
        pages["offset"] != len(_pages_header(pages["count"], pages["record_bytes"]))
        or pages["bytes"] != pages["offset"] + pages["count"] * pages["record_bytes"]
    ):
        return "'pages.bytes'"
    for name in ("position", "num_chunks"):
        if not _is_count(session.get(name)):
            return f"'session.{name}'"
    for name, kind in (("policy", str), ("settings", dict), ("cycle", dict)):
        if not isinstance(session.get(name), kind):
            return f"'session.{name}'"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int too


def _check_target(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a memory is a directory")
    if directory.is_dir() and any(directory.iterdir()) and not _data_files(directory):
        raise ValueError(f"{directory} is a directory that holds something other than a memory")


def _make(directory: Path) -> bool:
    """Whether it was not there."""
    if directory.is_dir():
        return False
    directory.mkdir(parents=True, exist_ok=True)
    _sync(directory.parent)
    return True


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One save at a time: two would take each other's new files for leftovers."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _pages_header(count: int, record_bytes: int) -> bytes:
    """What stands before the records: the safetensors header of one uint8 tensor [count, record_bytes]."""
    entry = {"dtype": "U8", "shape": [count, record_bytes], "data_offsets": [0, count * record_bytes]}
    header = json.dumps({_RECORDS: entry}).encode()
    header += b" " * (-(8 + len(header)) % 4096)  # data starts on a disk page
    return struct.pack("<Q", len(header)) + header


def _page_bytes(
    header: bytes, records: Iterable[torch.Tensor], count: int, record_bytes: int, crcs: list[int]
) -> Iterator[bytes | memoryview]:
    """The page file piece by piece; the records' crc32 are added to `crcs`."""
    yield header
    for record in records:
        data = record.contiguous().numpy().data
        assert data.nbytes == record_bytes
        crcs.append(zlib.crc32(data))
        yield data
    if len(crcs) != count:
        raise RuntimeError(f"{len(crcs)} records written, {count} announced")


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _remove(paths: Iterable[Path]) -> None:
    """Delete files that no memory needs any more; what cannot be deleted now goes with the next save."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is no longer needed but cannot be deleted: %s", path, error)


def _manifest(directory: Path) -> Path:
    return directory / MANIFEST


def _is_current(directory: Path, name: str) -> bool:
    """Whether the manifest in place names the files of this save."""
    try:
        return name.encode() in _manifest(directory).read_bytes()
    except FileNotFoundError:
        return False


def _data_files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _DATA_FILE.fullmatch(path.name)]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Flush a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
