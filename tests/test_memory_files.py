"""Memory files: atomic under kills, failing writes and other savers; damaged and foreign ones refused. No model."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import memory
from flashmem.memory import open_memory, read_manifest, save_memory
from flashmem.types import DamagedError

RECORD, COUNT = 1000, 5
FILES = {"manifest.json", "state", "pages"}


def content(version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    session = {"position": version, "num_chunks": 0, "policy": "all", "settings": {}, "cycle": {}}
    state = {"a": torch.randn(3, 7, generator=generator), "empty": torch.zeros(0, 4)}
    pages = [torch.randint(256, (RECORD,), generator=generator, dtype=torch.uint8) for _ in range(COUNT)]
    return session, state, pages


def save(directory: Path, version: int, hook: Callable[[int], None] = lambda record: None) -> None:
    session, state, pages = content(version)

    def records() -> Iterator[torch.Tensor]:
        for index, record in enumerate(pages):
            hook(index)
            yield record

    save_memory(directory, session, state, records(), COUNT, RECORD)


def version_of(directory: Path) -> int:
    """The version that is there, every byte of it compared."""
    saved = open_memory(directory)
    session, state, pages = content(saved.session["position"])
    assert saved.session == session
    assert saved.state.keys() == state.keys()
    assert all(torch.equal(saved.state[name], value) for name, value in state.items())
    assert saved.records.num_records == COUNT
    assert all(torch.equal(saved.records.row(index), record) for index, record in enumerate(pages))
    return int(session["position"])


def names(directory: Path) -> set[str]:
    """File names without their random part."""
    found = [path.name.split("-")[0] for path in directory.iterdir()]
    assert len(found) == len(set(found)), sorted(os.listdir(directory))
    return set(found)


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process; returns its wait status."""
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001 - a child must never run the rest of the tests
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_at_line(number: int, action: Callable[[], object]) -> int:
    """Run in a forked process and kill it at its n-th line within memory.py."""

    def child() -> None:
        left = number

        def trace(frame: Any, event: str, argument: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != memory.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        action()

    return in_child(child)


# ---- atomic


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with version 1."""
    save(tmp_path / "m", 1)
    return tmp_path / "m"


def test_save_and_replace(there: Path) -> None:
    for version in range(1, 8):
        save(there, version)
        assert version_of(there) == version
        assert names(there) == FILES


def test_a_memory_of_no_pages(tmp_path: Path) -> None:
    session, state, _ = content(0)
    save_memory(tmp_path / "m", session, state, [], 0, RECORD)
    saved = open_memory(tmp_path / "m")
    assert saved.records.num_records == 0 and saved.session == session


def test_open_files_outlive_their_replacement(there: Path) -> None:
    opened = open_memory(there)
    save(there, 2)
    assert torch.equal(opened.records.row(COUNT - 1), content(1)[2][COUNT - 1])
    assert version_of(there) == 2


def test_killed_at_any_line(there: Path) -> None:
    """The old memory or the new one, never less; and the next save cleans up."""
    seen, line = [], 1
    while (status := kill_at_line(line, lambda: save(there, 2))) != 0:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        seen.append(version_of(there))
        if seen[-1] == 2 or len(seen) % 5 == 0:
            save(there, 1)
            assert names(there) == FILES and version_of(there) == 1
        line += 3
    assert len(seen) > 25 and seen == sorted(seen) and set(seen) == {1, 2}
    assert version_of(there) == 2 and names(there) == FILES


def test_killed_at_any_line_of_the_first_save(tmp_path: Path) -> None:
    for line in range(1, 400, 19):
        if kill_at_line(line, lambda: save(tmp_path / "m", 1)) == 0:
            break
        if (tmp_path / "m" / "manifest.json").exists():
            assert version_of(tmp_path / "m") == 1
        else:
            with pytest.raises(ValueError, match="is not a memory"):
                open_memory(tmp_path / "m")
    else:
        pytest.fail("the save never finished")
    assert version_of(tmp_path / "m") == 1 and names(tmp_path / "m") == FILES


def test_killed_at_random_times(there: Path) -> None:
    draw = random.Random(0)
    for _ in range(25):
        if (child := os.fork()) == 0:
            while True:
                for version in range(2, 50):
                    save(there, version)
        time.sleep(draw.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert version_of(there) >= 1
    save(there, 1)
    assert version_of(there) == 1 and names(there) == FILES


OPERATIONS = [
    (os, "fsync"),
    (os, "replace"),
    (os, "open"),
    (Path, "open"),
    (memory, "save"),
    (memory, "_digest"),
]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize(("owner", "name"), OPERATIONS, ids=[name for _, name in OPERATIONS])
def test_every_operation_may_fail(
    there: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException
) -> None:
    """The n-th call of an operation fails: the old memory is whole and alone, or the new one is in its place."""
    original, outcomes = getattr(owner, name), []
    for nth in range(1, 12):
        left = nth

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise error
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                save(there, 2)
            except type(error) as caught:
                assert caught is error
            failed = left <= 0
        if not failed:
            assert version_of(there) == 2
            break
        outcomes.append(version_of(there))
        if outcomes[-1] == 1:
            assert names(there) == FILES
        save(there, 1)
    else:
        pytest.fail(f"{name} is called more than ten times")
    assert outcomes and outcomes.count(2) <= (2 if name in ("fsync", "open") else 0), outcomes


def test_after_the_replacement_nothing_new_is_deleted(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*args: Any) -> None:
        replace(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        save(there, 2)
    assert version_of(there) == 2
    save(there, 3)
    assert version_of(there) == 3 and names(there) == FILES


def test_leftovers_that_cannot_be_deleted_do_no_harm(
    there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        save(there, 2)
    assert version_of(there) == 2 and "cannot be deleted" in caplog.text
    save(there, 3)
    assert version_of(there) == 3 and names(there) == FILES


@pytest.mark.parametrize("limit", [0, 1, 200, 4096, 4500, 9000])
def test_a_real_write_that_does_not_fit(there: Path, limit: int) -> None:
    """No simulation: the kernel refuses to write beyond `limit` bytes."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large"):
            save(there, 2)

    assert in_child(child) == 0
    assert version_of(there) == 1 and names(there) == FILES


def test_a_first_save_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path / "m", 1)

    assert in_child(child) == 0
    assert not list(tmp_path.iterdir())
    save(tmp_path / "m", 1)
    assert version_of(tmp_path / "m") == 1


def test_a_record_that_cannot_be_read_leaves_the_old_memory(there: Path) -> None:
    def damaged(record: int) -> None:
        if record == 3:
            raise DamagedError("record 3")

    with pytest.raises(DamagedError, match="record 3"):
        save(there, 2, damaged)
    assert version_of(there) == 1 and names(there) == FILES


def test_too_few_records(there: Path) -> None:
    session, state, pages = content(2)
    with pytest.raises(RuntimeError, match="4 records written, 5 announced"):
        save_memory(there, session, state, pages[:4], COUNT, RECORD)
    assert version_of(there) == 1 and names(there) == FILES


def test_data_is_on_the_disk_before_its_name(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, and the directory, is flushed before the manifest is replaced; deletion comes last."""
    events: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def kind(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0]

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(f"flush {kind(handle)}"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("replace"), replace(*args))[1])
    monkeypatch.setattr(Path, "unlink", lambda self, **kw: (events.append("delete"), unlink(self, **kw))[1])
    save(there, 2)
    assert events == [
        "flush state", "flush pages", "flush manifest", "flush m", "replace", "flush m", "delete", "delete",
    ]  # fmt: skip


# ---- several at once


def test_savers_take_turns(there: Path) -> None:
    """Processes that save to one directory: the last one wins, and nobody deletes another one's files."""
    children = []
    for worker in range(4):
        if (child := os.fork()) == 0:
            for round_ in range(12):
                save(there, 100 * worker + round_ + 1, lambda record: time.sleep(0.0005))
            os._exit(0)
        children.append(child)
    while children:
        assert 1 <= version_of(there) <= 312  # readers never wait, and never see half of it
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert status == 0
            children.remove(done)
    assert version_of(there) % 100 == 12 and names(there) == FILES


def test_threads_take_turns(there: Path) -> None:
    threads = [threading.Thread(target=save, args=(there, version)) for version in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 <= version_of(there) <= 9 and names(there) == FILES


def test_a_slow_reader_gets_the_newer_memory(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files disappear between the manifest and their opening."""
    read, calls = memory.read_manifest, []

    def slow(directory: Path) -> dict[str, Any]:
        manifest = read(directory)
        if not calls:
            save(there, 2)
        calls.append(manifest["session"]["position"])
        return manifest

    monkeypatch.setattr(memory, "read_manifest", slow)
    assert version_of(there) == 2
    assert calls[0] == 1 and calls[-1] == 2


# ---- what is refused


@pytest.mark.parametrize("kind", ["manifest", "state", "pages"])
def test_truncated(there: Path, kind: str) -> None:
    path = next(there.glob(f"{kind}*"))
    data = path.read_bytes()
    for length in sorted({0, 1, 8, len(data) // 2, len(data) - RECORD, len(data) - 1} & set(range(len(data)))):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedError, match=path.name):
            open_memory(there)
    path.write_bytes(data + b"x")
    with pytest.raises(DamagedError, match=path.name):
        open_memory(there)
    path.unlink()
    with pytest.raises(ValueError if kind == "manifest" else DamagedError, match=r"manifest\.json|missing"):
        open_memory(there)


def flipped(data: bytes, bit: int) -> bytes:
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


@pytest.mark.parametrize("kind", ["manifest", "state"])
def test_flipped_bits_are_found_at_once(there: Path, kind: str) -> None:
    path = next(there.glob(f"{kind}*"))
    data = path.read_bytes()
    bits = range(0, 8 * len(data), 7) if kind == "manifest" else random.Random(0).sample(range(8 * len(data)), 100)
    for bit in bits:
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DamagedError, match=path.name):
            open_memory(there)


def test_flipped_bits_of_pages_are_found_when_read(there: Path) -> None:
    path = next(there.glob("pages*"))
    data, draw = path.read_bytes(), random.Random(0)
    header = read_manifest(there)["pages"]["offset"]
    for bit in (0, 63, 64, *draw.sample(range(8 * header), 40), 8 * header - 1):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DamagedError, match=path.name):
            open_memory(there)
    for record in range(COUNT):
        first = 8 * (header + record * RECORD)
        for bit in (first, first + draw.randrange(8 * RECORD), first + 8 * RECORD - 1):
            path.write_bytes(flipped(data, bit))
            saved = open_memory(there)
            for other in range(COUNT):
                if other != record:
                    assert torch.equal(saved.records.row(other), content(1)[2][other])
            for _ in range(2):  # it stays damaged
                with pytest.raises(DamagedError, match=f"{path.name}: page record {record} "):
                    saved.records.row(record)


def forge(there: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its checksum fit."""
    path = there / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def put(keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        *path, last = keys.split(".")
        for key in path:
            manifest = manifest[key]
        if value is ...:
            del manifest[last]
        else:
            manifest[last] = value

    return change


STRANGE = [None, "5", -1, 1.0, True, [], {}, 10**30, ...]
FIELDS = {
    **{f"{part}.bytes": STRANGE for part in ("state", "pages")},
    **{f"{part}.file": ["../x", "/etc/passwd", "", ".", "state-0123456789abcdef.safetensors/..", *STRANGE]
       for part in ("state", "pages")},
    "state.sha256": ["", "00", *STRANGE],
    **{f"pages.{name}": [0, 2**63, *STRANGE] for name in ("offset", "count", "record_bytes")},
    "pages.crc32": [[0] * COUNT, [0] * (COUNT - 1), ["0"] * COUNT, [-1] * COUNT, *STRANGE],
    **{f"session.{name}": [None, "5", -1, 1.5, True, [], {}, ...] for name in ("position", "num_chunks")},
    "session.policy": [None, 1, [], {}, ...],
    "session.settings": [None, 1, [], "x", ...],
    "session.cycle": [None, 1, [], "x", ...],
    **{name: [None, 1, [], "x", ...] for name in ("state", "pages", "session")},
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_forged_manifests(there: Path, field: str) -> None:
    """A checksum that fits makes no nonsense believed, and no file outside of the directory read."""
    original = (there / "manifest.json").read_text()
    for value in FIELDS[field]:
        (there / "manifest.json").write_text(original)
        forge(there, put(field, value))
        with pytest.raises(DamagedError, match=str(there)):
            saved = open_memory(there)
            for record in range(COUNT):  # checksums of pages are compared when they are read
                saved.records.row(record)


def test_files_of_each_other_and_of_others(there: Path, tmp_path: Path) -> None:
    manifest = read_manifest(there)
    outside = tmp_path / manifest["state"]["file"]
    outside.write_bytes((there / manifest["state"]["file"]).read_bytes())
    for name in (f"../{outside.name}", str(outside), manifest["pages"]["file"]):
        forge(there, put("state.file", name))
        with pytest.raises(DamagedError, match=r"state\.file"):
            open_memory(there)


def test_a_huge_memory_is_not_allocated(there: Path) -> None:
    count = 1 << 40
    header = len(memory._pages_header(count, RECORD))

    def change(manifest: dict[str, Any]) -> None:
        manifest["pages"] |= {"count": count, "offset": header, "bytes": header + count * RECORD}

    forge(there, change)
    with pytest.raises(DamagedError, match="crc32"):
        open_memory(there)


def test_a_future_version(there: Path) -> None:
    forge(there, put("version", 2))
    with pytest.raises(DamagedError, match="version 2; this flashmem reads 1"):
        open_memory(there)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"format": "other"}', "\x00", "[" * 100_000, "1" * 10_000, '{"a": NaN', "é" * 9]
)
def test_manifests_that_are_none(there: Path, text: str) -> None:
    for encoding in ("utf-8", "latin-1"):
        (there / "manifest.json").write_text(text, encoding=encoding)
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            open_memory(there)


def test_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for name in ("missing", "file", "other"):
        with pytest.raises(ValueError, match=f"{name} is not a memory"):
            open_memory(tmp_path / name)


def test_saving_overwrites_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        save(tmp_path / "file", 1)
    for names_ in (["notes.txt"], ["manifest.json"], ["manifest.json", "state-final.safetensors"]):
        other = tmp_path / "-".join(names_)
        other.mkdir()
        for name in names_:
            (other / name).write_text("x")
        with pytest.raises(ValueError, match="something other than a memory"):
            save(other, 1)
        assert sorted(os.listdir(other)) == names_
    assert (tmp_path / "file").read_text() == "x"


def test_other_files_beside_a_memory_stay(there: Path) -> None:
    for name in ("notes.txt", "state-final.safetensors", "pages-1.safetensors"):
        (there / name).write_text("mine")
    save(there, 2)
    assert version_of(there) == 2
    assert {(there / name).read_text() for name in ("notes.txt", "state-final.safetensors")} == {"mine"}


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Not a directory"):
        save(tmp_path / "file" / "m", 1)
