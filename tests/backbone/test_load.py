"""Loading a model: what goes to transformers, and what is refused before anything random is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

import flashmem.engine
from flashmem import Engine, LSAConfig, MemoryIndexer
from flashmem.backbone import Backbone, adapter, fused, load_model, random_model
from flashmem.kernels.hyper_connection import collapse

IDS = list(range(5, 60))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "plain"
    random_model("WCHC", seed=1, eos_token_id=None).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(name: Any, **arguments: Any) -> Any:
    return load_model(name, **{"device": "cpu", "dtype": "auto", "device_map": None} | arguments)[0]


def greedy(engine: Engine) -> list[int]:
    return engine.session().generate(IDS, max_new_tokens=8)


def test_a_directory_is_the_model_that_was_saved(saved: Path) -> None:
    wanted = random_model("WCHC", seed=1).state_dict()
    for arguments in ({}, {"device": None, "device_map": {"": "cpu"}}, {"device": torch.device("cpu", 0)}):
        got = load(saved, **arguments).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name].to("cpu"), value) for name, value in wanted.items())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_model_loaded_in_bf16_runs(saved: Path, dtype: Any) -> None:
    """Some releases of transformers keep norms in float32 when they load, and then fail in their own forward."""
    engine = Engine.from_pretrained(saved, dtype=dtype, device="cpu", config=LSAConfig(policy="all", page_chunks=4))
    assert engine.backbone.dtype is torch.bfloat16 and engine.layout.kv_format == "bf16"
    assert len(greedy(engine)) == 8
    engine.check()


def test_what_flashmem_does_not_know_goes_to_transformers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = DeepseekV4ForCausalLM.from_pretrained

    def noted(name: Any, **arguments: Any) -> Any:
        seen.update(arguments)
        for key in ("quantization_config", "max_memory", "revision"):
            arguments.pop(key)
        return original(name, **arguments)

    monkeypatch.setattr(DeepseekV4ForCausalLM, "from_pretrained", noted)
    quantisation = object()
    Engine.from_pretrained(
        saved, device_map={"": "cpu"}, dtype="float32", quantization_config=quantisation, max_memory={0: "1GiB"},
        revision="main",
    )  # fmt: skip
    assert seen["quantization_config"] is quantisation
    assert seen["device_map"] == {"": "cpu"} and seen["dtype"] == "float32"
    assert seen["max_memory"] == {0: "1GiB"} and seen["revision"] == "main"


def test_a_hub_name_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def absent(name: Any, **arguments: Any) -> Any:
        seen.append(name)
        raise OSError("no such repository")

    monkeypatch.setattr(DeepseekV4ForCausalLM, "from_pretrained", absent)
    with pytest.raises(ValueError, match="some/where: the model cannot be loaded: no such repository"):
        load("some/where")
    assert seen == ["some/where"]


def test_a_bundled_indexer_is_used_unless_another_is_given(copy: Path) -> None:
    engine = Engine.from_pretrained(copy, device="cpu")
    assert engine.indexer is engine.scorers["native"]
    one = MemoryIndexer.native(random_model("WCHC", seed=1), layers=(1,))
    one.save_pretrained(copy / "indexer")
    assert Engine.from_pretrained(copy, device="cpu").indexer.target_layers == (1,)
    two = MemoryIndexer.native(random_model("WCHC", seed=1), layers=(0,))
    two.save_pretrained(copy / "other")
    for given in (two, copy / "other", str(copy / "other")):
        assert Engine.from_pretrained(copy, device="cpu", indexer=given).indexer.target_layers == (0,)


# ---- refused


def change(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_weights_that_are_missing_or_of_another_shape(copy: Path) -> None:
    """transformers would fill them with random values and a warning."""
    path = copy / "model.safetensors"
    original = path.read_bytes()
    name, saved = "model.layers.1.self_attn.sinks", sorted(key for key in load_file(path) if "sink" in key)[1]
    change(copy, lambda tensors: tensors.pop(saved))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {name}, or has it in another shape"):
        load(copy)
    path.write_bytes(original)
    change(copy, lambda tensors: tensors.update({saved: torch.zeros(7)}))
    with pytest.raises(ValueError, match=f"{name}, or has it in another shape"):
        load(copy)
    for size in (0, 8, 1000, len(original) - 1):
        path.write_bytes(original[:size])
        with pytest.raises(ValueError, match="the model cannot be loaded"):
            load(copy)
    path.unlink()
    with pytest.raises(ValueError, match="the model cannot be loaded"):
        load(copy)


def test_directories_that_hold_no_deepseek_v4(copy: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not here", copy / "config.json"):
        with pytest.raises(ValueError, match="is no model directory: it has no config"):
            load(path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type must be 'deepseek_v4', got 'llama'"):
        load(copy)


def test_devices_that_are_not_there(saved: Path) -> None:
    with pytest.raises(ValueError, match="device or device_map, not both"):
        load(saved, device="cpu", device_map="auto")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            load(saved, device=device)


def test_settings_are_refused_before_weights_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashmem.engine, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        Engine.from_pretrained(saved, config=LSAConfig(policy="best"))
    with pytest.raises(ValueError, match="no indexer checkpoint"):
        Engine.from_pretrained(saved, indexer=saved / "missing")


def test_layers_that_accelerate_offloads_are_refused() -> None:
    """A class swap would not reach the forward that accelerate puts on the instance."""
    model = random_model("WCHC")
    add_hook_to_module(model.model.layers[1].self_attn, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match="layer 1 is offloaded by accelerate hooks; keep cpu and disk out"):
        Backbone(model)
    assert type(model.model.layers[0].self_attn).__name__ == "DeepseekV4Attention"


def test_layers_that_are_already_attached_are_refused() -> None:
    model = random_model("WCHC")
    backbone = Backbone(model)
    with pytest.raises(ValueError, match="layer 0 is a LSADecoderLayer: already attached"):
        Backbone(model)
    backbone.detach()
    model.model.layers[2].self_attn.__class__ = type("Other", (type(model.model.layers[2].self_attn),), {})
    with pytest.raises(ValueError, match="layer 2 has Other: already attached"):
        Backbone(model)
    assert type(model.model.layers[0]).__name__ == "DeepseekV4DecoderLayer"


@pytest.mark.usefixtures("triton_device")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's device is the CPU")
@pytest.mark.parametrize("hooked", [False, True])
def test_fused_steps_alone_run_hyper_connections_on_kernels(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where accelerate has put a hook on a layer, as it does when layers lie on several devices."""
    seen: list[str | None] = []

    def noted(*arguments: Any, impl: Any = None) -> Any:
        seen.append(impl)
        return collapse(*arguments, impl=impl)

    monkeypatch.setattr(adapter, "collapse", noted)
    model = random_model("WC")
    if hooked:
        add_hook_to_module(model.model.layers[1], AlignDevicesHook(execution_device="cpu"))
    engine = Engine(model, config=LSAConfig(policy="all", page_chunks=4, kernels="fused"))
    session = engine.session()
    session.append(IDS)
    assert seen == []
    engine.decode([session], [7])
    assert seen == ["fused"] * 4
    engine.close()
    model(torch.tensor([IDS]), use_cache=False)
    assert len(seen) == 4
    for layer in model.model.layers:
        assert type(layer).__name__ == "DeepseekV4DecoderLayer"
        bound = getattr(layer, "_old_forward", layer.forward)
        assert bound.__func__ is type(layer).forward


@pytest.mark.usefixtures("triton_device")
def test_streams_beyond_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MOST_HIDDEN", 48)
    monkeypatch.setattr(fused, "MOST_STREAMS", 4)
    for sizes, message in (
        ({}, "at most 48 channels of a stream, the model has 64"),
        ({"hc_mult": 5}, "at most 4 residual streams, the model has 5"),
    ):
        model = random_model("WC", **sizes)
        model = model.cuda() if torch.cuda.is_available() else model
        with pytest.raises(ValueError, match=message):
            Engine(model, config=LSAConfig(kernels="fused"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_format": "bf16"}, "kv_format 'bf16' does not fit a torch.float32 model"),
        ({"page_chunks": 1 << 20}, "page_chunks 1048576: 4194304 tokens exceed the model's 1048576 positions"),
        ({"observation_window": 1 << 21}, "observation_window 2097152: 2097152 tokens exceed"),
    ],
)
def test_settings_that_do_not_fit_a_model_leave_it_as_it_was(config: dict[str, Any], message: str) -> None:
    model = random_model("WCHC")
    with pytest.raises(ValueError, match=message):
        Engine(model, config=LSAConfig(**config))
    assert type(model.model.layers[0].self_attn).__name__ == "DeepseekV4Attention"
    Engine(model).close()


def test_indexers_of_another_model_are_refused() -> None:
    model = random_model("WCHC")
    deep = MemoryIndexer.native(random_model("CHCHC"), layers=(2,))
    wide = MemoryIndexer.native(random_model("WCHC", hidden_size=96), layers=(1,))
    narrow = MemoryIndexer.native(random_model("WCHC", index_head_dim=32), layers=(1,))
    for indexer, message in (
        (deep, "reads CSA index 2, the model has 2 CSA layers"),
        (wide, "the indexer's hidden_size is 96, the model's is 64"),
        (narrow, "the indexer's head_dim is 32, the model's is 16"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, indexer=indexer)
