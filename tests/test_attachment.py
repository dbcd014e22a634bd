"""A model attached in somebody's own transformers code: `generate` with an `LSACache`, and everything it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import flashmem
from flashmem import Engine, LSACache, LSAConfig
from support.stock import InjectedError, failing_layer, make_model

ALL = LSAConfig(policy="all", page_chunks=4, tau=5)
IDS = torch.randint(0, 256, (2, 170), generator=torch.Generator().manual_seed(0))


def endless() -> Any:
    """Random weights would stop anywhere."""
    model = make_model("yarn")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def stock() -> Any:
    return endless()


@pytest.fixture
def model() -> Iterator[Any]:
    model = endless()
    flashmem.attach(model, config=ALL)
    yield model
    if hasattr(model, "_flashmem"):
        flashmem.detach(model)


def generate(model: Any, ids: torch.Tensor, count: int, **arguments: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, **arguments)


@pytest.mark.parametrize("length", [1, 3, 15, 33, 127, 130])
def test_generate_says_what_the_stock_model_says(model: Any, stock: Any, length: int) -> None:
    """Two rows; both orders, so that a row's state is its own."""
    for ids in (IDS[:, :length], IDS.flip(0)[:, :length]):
        cache = LSACache.for_model(model)
        got = generate(model, ids, 20, past_key_values=cache)
        assert torch.equal(got, generate(stock, ids, 20))
        assert cache.get_seq_length() == length + 19 and cache.stats()[1]["tokens"] == length + 19
        model._flashmem.check()
        cache.close()
    assert not model._flashmem.sessions


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_prompts_may_be_read_in_pieces(model: Any, stock: Any, chunk: int) -> None:
    got = generate(model, IDS, 8, past_key_values=LSACache.for_model(model), prefill_chunk_size=chunk)
    assert torch.equal(got, generate(stock, IDS, 8))


def test_a_cache_goes_on_with_a_longer_input(model: Any, stock: Any) -> None:
    cache, ids = LSACache.for_model(model), IDS[:, :40]
    for extra in (1, 30, 2):
        said = generate(model, ids, 6, past_key_values=cache)
        assert torch.equal(said, generate(stock, ids, 6))
        ids = torch.cat((said, IDS[:, :extra]), dim=1)


@torch.no_grad()
def test_forwards_by_hand(model: Any, stock: Any) -> None:
    """Arguments by position too, single tokens and pieces by turns."""
    cache, wanted = LSACache.for_model(model), stock(IDS, use_cache=False).logits
    got = [model(IDS[:, :90], torch.ones(2, 90), None, cache).logits]
    got += [model(IDS[:, 90:91], past_key_values=cache).logits, model(IDS[:, 91:150], past_key_values=cache).logits]
    got += [model(IDS[:, place : place + 1], past_key_values=cache).logits for place in range(150, 170)]
    torch.testing.assert_close(torch.cat(got, dim=1), wanted, rtol=0, atol=1e-4)


def test_a_selection_is_held_while_generating(model: Any) -> None:
    flashmem.detach(model)
    flashmem.attach(model, config=LSAConfig(policy="native", keep=0.3, page_chunks=4, tau=5))
    with_cache, engine = LSACache.for_model(model), model._flashmem
    got = generate(model, IDS[:1], 16, past_key_values=with_cache)
    stats = with_cache.stats()[0]
    assert stats["resident_pages"] < 0.5 * stats["pages"] and stats["cycles"] == 3
    with engine.session() as session:  # the same engine, without transformers' generate around it
        session.append(IDS[0].tolist())
        assert session.generate(max_new_tokens=16) == got[0, 170:].tolist()


def test_any_other_cache_is_the_stock_model(model: Any, stock: Any) -> None:
    assert torch.equal(generate(model, IDS, 9), generate(stock, IDS, 9))
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, IDS, 9, past_key_values=cache), generate(stock, IDS, 9))
    assert torch.equal(model(IDS, use_cache=False).logits, stock(IDS, use_cache=False).logits)  # with gradients too


def test_detach_gives_the_stock_model_back(model: Any, stock: Any) -> None:
    cache = LSACache.for_model(model)
    generate(model, IDS, 4, past_key_values=cache)
    flashmem.detach(model)
    assert not hasattr(model, "_flashmem")
    assert not model._forward_pre_hooks and not model._forward_hooks
    modules = zip(model.named_modules(), stock.named_modules(), strict=True)
    assert all(name == other and type(mine) is type(theirs) for (name, mine), (other, theirs) in modules)
    assert torch.equal(generate(model, IDS, 9), generate(stock, IDS, 9))
    with pytest.raises(RuntimeError, match="flashmem is attached to"):
        generate(model, IDS, 4, past_key_values=cache)
    for call in (lambda: flashmem.detach(model), lambda: LSACache.for_model(model)):
        with pytest.raises(ValueError, match="not attached"):
            call()
    flashmem.attach(model, config=ALL)  # once more
    with pytest.raises(ValueError, match="another model, or before flashmem was detached"):
        generate(model, IDS, 4, past_key_values=cache)
    assert torch.equal(
        generate(model, IDS, 9, past_key_values=LSACache.for_model(model)), generate(stock, IDS, 9)
    )  # fmt: skip


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_no_new_parameters_and_the_same_files(model: Any, stock: Any, tmp_path: Path) -> None:
    generate(model, IDS, 4, past_key_values=LSACache.for_model(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]
    for name, saved in (("attached", model), ("stock", stock)):
        saved.save_pretrained(tmp_path / name)
    assert digests(tmp_path / "attached") == digests(tmp_path / "stock")


# ---- what is refused


def padded(columns: slice) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, columns] = 0
    return mask


REFUSED: dict[str, tuple[Callable[[Any, LSACache], Any], str]] = {
    "left padding": (
        lambda model, cache: generate(model, IDS, 2, past_key_values=cache, attention_mask=padded(slice(0, 3))),
        "padded batches",
    ),
    "right padding": (
        lambda model, cache: generate(model, IDS, 2, past_key_values=cache, attention_mask=padded(slice(-2, None))),
        "padded batches",
    ),
    "padding in a forward": (
        lambda model, cache: model(IDS, padded(slice(0, 1)), past_key_values=cache),
        "padded batches",
    ),
    "a mask of one's own": (
        lambda model, cache: model(IDS, torch.ones(2, 1, 170, 170).tril(), past_key_values=cache),
        "makes its own masks",
    ),
    "beams": (lambda model, cache: generate(model, IDS, 3, past_key_values=cache, num_beams=2), "beam search"),
    "prompt lookup": (
        lambda model, cache: generate(model, IDS[:1], 3, past_key_values=cache, prompt_lookup_num_tokens=2),
        "assisted generation is not supported",
    ),
    "an assistant": (
        lambda model, cache: generate(model, IDS[:1], 3, past_key_values=cache, assistant_model=endless()),
        "assisted generation is not supported",
    ),
    "embeddings": (
        lambda model, cache: model(inputs_embeds=model.model.embed_tokens(IDS), past_key_values=cache),
        "needs input_ids",
    ),
    "attention weights": (
        lambda model, cache: model(IDS, past_key_values=cache, output_attentions=True),
        "no attention weights",
    ),
    "positions of one's own": (
        lambda model, cache: model(IDS, position_ids=torch.arange(5, 175)[None], past_key_values=cache),
        "must continue the cache at 0",
    ),
    "nothing": (lambda model, cache: model(IDS[:, :0], past_key_values=cache), "at least one token"),
    "tokens of another vocabulary": (
        lambda model, cache: model(torch.tensor([[5, 320]]), past_key_values=cache),
        r"0\.\.319, got 320",
    ),
    "crop": (lambda model, cache: cache.crop(-1), "cannot crop"),
    "reorder": (lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])), "beam search"),
    "repeat": (lambda model, cache: cache.batch_repeat_interleave(2), "cannot repeat"),
    "select": (lambda model, cache: cache.batch_select_indices(torch.tensor([0])), "cannot select"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model: Any, stock: Any, name: str) -> None:
    """Each with one clear error, after which the model works as before."""
    call, message = REFUSED[name]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(model, LSACache.for_model(model))
    got = generate(model, IDS[:, :30], 3, past_key_values=LSACache.for_model(model))
    assert torch.equal(got, generate(stock, IDS[:, :30], 3))
    model._flashmem.check()


def test_what_does_not_fit_a_cache_is_refused(model: Any) -> None:
    cache = LSACache.for_model(model)
    with pytest.raises(ValueError, match="inference"):
        model(IDS, past_key_values=cache)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="a batch of 1 rows for a cache of 2"):
            model(IDS[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="must continue the cache at 170"):
            model(IDS[:, :1], position_ids=torch.tensor([[3]]), past_key_values=cache)
        with pytest.raises(RuntimeError, match="no forward in progress"):
            model.model(IDS[:, :1], past_key_values=cache)
        other = endless()
        with pytest.raises(ValueError, match="another model"):
            flashmem.attach(other)
            other(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 170


def test_attaching_twice_and_to_something_else(model: Any) -> None:
    for make in (flashmem.attach, Engine):
        with pytest.raises(ValueError, match="already attached"):
            make(model)
    with pytest.raises(ValueError, match="runs DeepseekV4ForCausalLM, got Linear"):
        flashmem.attach(torch.nn.Linear(2, 2))


@torch.no_grad()
@pytest.mark.parametrize("failing", [0, 3])
def test_a_failed_forward_may_be_repeated(model: Any, stock: Any, failing: int) -> None:
    cache, wanted = LSACache.for_model(model), stock(IDS[:, :131], use_cache=False).logits
    for first, last in ((0, 127), (127, 128), (128, 131)):  # a prefill, a step that completes an HCA block, a prefill
        with failing_layer(model, failing), pytest.raises(InjectedError):
            model(IDS[:, first:last], past_key_values=cache)
        assert cache.get_seq_length() == first
        logits = model(IDS[:, first:last], past_key_values=cache).logits
        torch.testing.assert_close(logits, wanted[:, first:last], rtol=0, atol=1e-4)
        model._flashmem.check()
