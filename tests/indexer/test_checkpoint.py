from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashmem.config import RopeConfig
from flashmem.indexer import PUBLISHED_ROPE, IndexerConfig, MemoryIndexer
from flashmem.indexer import checkpoint as files

ROPE = RopeConfig(theta=100.0, dim=4)
CONFIG = IndexerConfig(hidden_size=10, q_rank=6, num_heads=3, head_dim=8, layers=(10, 12, 20), rope=ROPE)


def make_indexer(seed: int = 0, **changes: object) -> MemoryIndexer:
    torch.manual_seed(seed)
    return MemoryIndexer(replace(CONFIG, **changes))


def published(indexer: MemoryIndexer) -> dict[str, torch.Tensor]:
    state = {key: tensor.detach().clone() for key, tensor in indexer.state_dict().items() if key != "offset"}
    assert sorted(state)[:4] == [
        f"retrievers.l10.{part}" for part in ("q_norm_weight", "weights_proj.weight", "wq_a.weight", "wq_b.weight")
    ]
    return state


def assert_same(one: MemoryIndexer, other: MemoryIndexer) -> None:
    assert one.config == other.config
    assert one.fingerprint() == other.fingerprint()
    state = other.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())


# --- ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_indexer(tmp_path: Path, dtype: torch.dtype) -> None:
    indexer = make_indexer(ensemble="mean", observation_window=8, query_dtype="fp32").to(dtype)
    with torch.no_grad():
        indexer.offset.fill_(0.375)
    indexer.save_pretrained(tmp_path / "new" / "indexer")
    loaded = MemoryIndexer.from_pretrained(tmp_path / "new" / "indexer")
    assert_same(loaded, indexer.float())
    assert loaded.config.logit_offset == 0.375
    assert all(parameter.requires_grad and parameter.dtype is torch.float32 for parameter in loaded.parameters())
    assert_same(MemoryIndexer.from_pretrained(str(tmp_path / "new" / "indexer" / "indexer.safetensors")), loaded)
    assert sorted(os.listdir(tmp_path / "new" / "indexer")) == ["config.json", "indexer.safetensors"]


def test_weights_alone_carry_their_config(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    os.rename(tmp_path / "indexer.safetensors", tmp_path / "alone.safetensors")
    assert_same(MemoryIndexer.from_pretrained(tmp_path / "alone.safetensors"), make_indexer())


def test_config_edited_by_hand_counts(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logit_offset": 1.5}))
    assert MemoryIndexer.from_pretrained(tmp_path).config.logit_offset == 1.5


def test_arguments_override_the_config(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    assert MemoryIndexer.from_pretrained(tmp_path, logit_offset=-2.0, ensemble="mean").config == replace(
        CONFIG, logit_offset=-2.0, ensemble="mean"
    )


def test_save_between_weights_and_config_reads_as_the_new_indexer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_indexer(seed=1, logit_offset=1.0).save_pretrained(tmp_path)
    replace_file = files._replace

    def die_at_config(path: Path, write: Callable[[str], object]) -> None:
        if path.name == "config.json":
            raise OSError("disk full")
        replace_file(path, write)

    monkeypatch.setattr(files, "_replace", die_at_config)
    with pytest.raises(OSError, match="disk full"):
        make_indexer(seed=2, logit_offset=2.0).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert_same(MemoryIndexer.from_pretrained(tmp_path), make_indexer(seed=2, logit_offset=2.0))
    assert "a save was interrupted" in caplog.text


def test_failing_write_leaves_the_old_indexer_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_indexer(seed=1).save_pretrained(tmp_path)

    def fill_disk(tensors: dict, path: str, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fill_disk)
    with pytest.raises(OSError, match="disk full"):
        make_indexer(seed=2).save_pretrained(tmp_path)
    assert_same(MemoryIndexer.from_pretrained(tmp_path), make_indexer(seed=1))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "indexer.safetensors"]


def test_damaged_weights_are_refused_at_any_byte(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    path = tmp_path / "indexer.safetensors"
    good = path.read_bytes()
    draw = random.Random(0)
    for size in (0, 1, 7, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"indexer\.safetensors"):
            MemoryIndexer.from_pretrained(tmp_path)
    first_tensor_byte = 8 + int.from_bytes(good[:8], "little")
    for _ in range(40):
        at = draw.randrange(first_tensor_byte, len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            MemoryIndexer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "no indexer config"),
        ('{"model_type": "deepseek_v4"}', "no indexer config"),
    ],
)
def test_foreign_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    make_indexer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        MemoryIndexer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"colour": 1}, "unknown indexer config entries: colour"),
        ({"q_rank": "6"}, "q_rank must be a positive integer, got '6'"),
        ({"q_rank": 7}, r"retrievers\.l10\.wq_a\.weight must be \(7, 10\), found \(6, 10\)"),
        ({"layers": [10, 12]}, r"unexpected retrievers\.l20"),
        ({"layers": [10, 12, 20, 21]}, r"lacks retrievers\.l21"),
        ({"layers": 3}, "layers a list"),
        ({"rope": {"theta": 2.0, "dim": 3}}, "rope lacks"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    make_indexer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        MemoryIndexer.from_pretrained(tmp_path)


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no indexer checkpoint at"):
        MemoryIndexer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no indexer\.safetensors$"):
        MemoryIndexer.from_pretrained(tmp_path)
    save_file(published(make_indexer()), tmp_path / "joint.safetensors")
    with pytest.raises(ValueError, match=r"give one of its files: joint\.safetensors"):
        MemoryIndexer.from_pretrained(tmp_path)
    make_indexer().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        MemoryIndexer.from_pretrained(tmp_path)


# --- the published format


def save_as(suffix: str, state: dict[str, torch.Tensor], directory: Path) -> Path:
    path = directory / f"joint{suffix}"
    if suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_joint_checkpoints_load_with_published_defaults(tmp_path: Path, suffix: str) -> None:
    indexer = make_indexer(head_dim=128, rope=PUBLISHED_ROPE)
    state = published(indexer)
    for csa in (10, 12, 20):  # tables that published checkpoints carry
        angles = torch.zeros(16, 32)
        state[f"retrievers.l{csa}.freqs_cis"] = torch.polar(torch.ones_like(angles), angles)
    loaded = MemoryIndexer.from_pretrained(save_as(suffix, state, tmp_path))
    assert_same(loaded, indexer)
    config = loaded.config
    assert (config.rope, config.rms_norm_eps, config.query_dtype, config.ensemble) == (
        RopeConfig(theta=160_000.0, dim=64, factor=16.0, original_positions=65_536, beta_fast=32.0, beta_slow=1.0),
        1e-6,
        "bf16",
        "max",
    )


@pytest.mark.parametrize("nest", ["model", "state_dict", "model_state", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_training_wrappers_are_unwrapped(tmp_path: Path, nest: str | None, prefix: str) -> None:
    state = {prefix + key: tensor for key, tensor in published(make_indexer()).items()}
    wrapped = {nest: state, "epoch": 3, "best": {"f1": 0.5}} if nest else state
    torch.save(wrapped, tmp_path / "joint.pt")
    assert_same(MemoryIndexer.from_pretrained(tmp_path / "joint.pt", rope=ROPE), make_indexer())


def test_half_precision_becomes_float32_and_overrides_apply(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in published(make_indexer()).items()}
    torch.save(state, tmp_path / "joint.pt")
    loaded = MemoryIndexer.from_pretrained(
        tmp_path / "joint.pt",
        rope=ROPE,
        rms_norm_eps=1e-5,
        query_dtype="fp32",
        ensemble="mean",
        observation_window=4,
        logit_offset=0.1,
    )
    expected = replace(
        CONFIG, rms_norm_eps=1e-5, query_dtype="fp32", ensemble="mean", observation_window=4, logit_offset=0.1
    )
    assert loaded.config == expected
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_plain_state_dict_keeps_its_offset(tmp_path: Path) -> None:
    torch.save(make_indexer(logit_offset=0.25).state_dict(), tmp_path / "own.pt")
    assert_same(MemoryIndexer.from_pretrained(tmp_path / "own.pt", rope=ROPE), make_indexer(logit_offset=0.25))


def drop(state: dict) -> None:
    del state["retrievers.l12.wq_b.weight"]


def drop_first(state: dict) -> None:
    del state["retrievers.l10.q_norm_weight"]


def add(state: dict) -> None:
    state["retrievers.l12.bias"] = torch.zeros(3)


def add_layer_rest(state: dict) -> None:
    state["retrievers.l21.wq_a.weight"] = torch.zeros(6, 10)


def poison(state: dict) -> None:
    state["retrievers.l20.wq_a.weight"][3, 4] = torch.nan


def overflow(state: dict) -> None:
    state["retrievers.l20.weights_proj.weight"][0, 0] = -torch.inf


def transpose(state: dict) -> None:
    state["retrievers.l12.wq_a.weight"] = state["retrievers.l12.wq_a.weight"].T.contiguous()


def flatten(state: dict) -> None:
    state["retrievers.l10.wq_a.weight"] = state["retrievers.l10.wq_a.weight"].flatten()


def tear_head(state: dict) -> None:
    state["retrievers.l10.wq_b.weight"] = state["retrievers.l10.wq_b.weight"][:-1].contiguous()


def other_size(state: dict) -> None:
    state["retrievers.l20.weights_proj.weight"] = torch.zeros(4, 10)


def integers(state: dict) -> None:
    state["retrievers.l10.q_norm_weight"] = torch.ones(6, dtype=torch.int64)


def empty_layer(state: dict) -> None:
    state["retrievers.l10.wq_a.weight"] = torch.zeros(0, 10)


def rename_all(state: dict) -> None:
    for key in list(state):
        state["x." + key] = state.pop(key)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"lacks retrievers\.l12\.wq_b\.weight$"),
        (drop_first, r"lacks retrievers\.l10\.q_norm_weight$"),
        (add, r"unexpected retrievers\.l12\.bias"),
        (add_layer_rest, r"lacks retrievers\.l21\.q_norm_weight, "),
        (poison, r"retrievers\.l20\.wq_a\.weight \(6, 10\) holds NaN"),
        (overflow, r"retrievers\.l20\.weights_proj\.weight \(3, 10\) holds NaN or infinite"),
        (transpose, r"retrievers\.l12\.wq_a\.weight must be \(6, 10\), found \(10, 6\)"),
        (flatten, r"retrievers\.l10\.wq_a\.weight must have 2 dimensions, none empty; found \(60,\)"),
        (tear_head, r"retrievers\.l10\.wq_b\.weight must have a multiple of 3 rows.*found \(23, 6\)"),
        (other_size, r"retrievers\.l20\.weights_proj\.weight must be \(3, 10\), found \(4, 10\)"),
        (integers, r"retrievers\.l10\.q_norm_weight must be a float32.*found torch\.int64 \(6,\)"),
        (empty_layer, r"retrievers\.l10\.wq_a\.weight must have 2 dimensions, none empty; found \(0, 10\)"),
        (rename_all, r"no tensor named retrievers\.l"),
    ],
)
def test_bad_tensors_are_one_clear_error(
    tmp_path: Path, suffix: str, spoil: Callable[[dict], None], message: str
) -> None:
    state = published(make_indexer())
    spoil(state)
    path = save_as(suffix, state, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        MemoryIndexer.from_pretrained(path, rope=ROPE)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rope_wider_than_the_heads_names_the_file(tmp_path: Path) -> None:
    path = save_as(".pt", published(make_indexer()), tmp_path)
    with pytest.raises(ValueError, match=r"joint\.pt: rope dim 64 exceeds head_dim 8"):
        MemoryIndexer.from_pretrained(path)


class RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, legacy: bool) -> None:
    state = {**published(make_indexer()), "extra": RunsCode(tmp_path / "owned")}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pt is damaged or holds more than tensors") as caught:
        MemoryIndexer.from_pretrained(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_and_random_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = save_as(suffix, published(make_indexer()), tmp_path)
    good, draw = path.read_bytes(), random.Random(1)
    broken = [good[:size] for size in (0, 1, 9, 300, len(good) // 2, len(good) - 30)]
    broken += [draw.randbytes(size) for size in (1, 10, 1000)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="joint"):
            MemoryIndexer.from_pretrained(path, rope=ROPE)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"retrievers.l1.wq_a.weight": 3}])
def test_pt_files_of_other_things_are_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        MemoryIndexer.from_pretrained(tmp_path / "other.pt")


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a directory, a \.safetensors or a \.pt file"):
        MemoryIndexer.from_pretrained(tmp_path / "x.gguf")


# --- what it is


def test_fingerprint_follows_weights_and_config_only(tmp_path: Path) -> None:
    indexer = make_indexer()
    name = indexer.fingerprint()
    assert len(name) == 16 and name == make_indexer().fingerprint()
    assert name != make_indexer(seed=1).fingerprint() and name != make_indexer(logit_offset=0.5).fingerprint()
    with torch.no_grad():
        indexer.offset.add_(1)
    assert name != indexer.fingerprint()


def test_describe_is_plain_and_counts(tmp_path: Path) -> None:
    facts = make_indexer().describe()
    assert json.loads(json.dumps(facts)) == facts
    per_layer = 6 * 10 + 6 + 24 * 6 + 3 * 10
    assert facts["parameters"] == 3 * per_layer and facts["bytes"] == 12 * per_layer
    assert facts["layers"] == [10, 12, 20] and facts["dtypes"] == ["float32"]


def test_published_file_written_by_a_fresh_process_is_what_safetensors_reads(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    state = load_file(tmp_path / "indexer.safetensors")
    assert state.keys() == published(make_indexer()).keys()


KILLED = """
import os, sys, threading, torch
from dataclasses import replace
from flashmem.indexer import MemoryIndexer
start = MemoryIndexer.from_pretrained(sys.argv[1])
torch.manual_seed(1)
new = MemoryIndexer(replace(start.config, logit_offset=1.0))
threading.Timer(0.05, lambda: os.kill(os.getpid(), 9)).start()
while True:
    new.save_pretrained(sys.argv[1])
    start.save_pretrained(sys.argv[1])
"""


def test_killed_while_saving_leaves_a_whole_indexer(tmp_path: Path) -> None:
    make_indexer().save_pretrained(tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert process.returncode == -9
    whole = {make_indexer().fingerprint(), make_indexer(seed=1, logit_offset=1.0).fingerprint()}
    assert MemoryIndexer.from_pretrained(tmp_path).fingerprint() in whole
