"""The scorer against the published formula, written a second time with complex numbers in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashmem.config import RopeConfig
from flashmem.indexer import PUBLISHED_ROPE, IndexerConfig, LayerScorer, MemoryIndexer
from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows

CONFIG = IndexerConfig(hidden_size=40, q_rank=24, num_heads=6, head_dim=128, layers=(1, 3), query_dtype="fp32")
SMALL = replace(CONFIG, head_dim=12, rope=RopeConfig(theta=100.0, dim=4), layers=(0, 2, 5))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_indexer(config: IndexerConfig, seed: int = 0) -> MemoryIndexer:
    torch.manual_seed(seed)
    indexer = MemoryIndexer(config)
    with torch.no_grad():
        for scorer in indexer.layers.values():
            scorer.q_norm_weight.uniform_(0.5, 1.5)
    return indexer


def published_logits(scorer: LayerScorer, x: torch.Tensor, keys_NI: torch.Tensor, position: int) -> torch.Tensor:
    """Logits [N] of one hidden state [E]; keys are what a row decodes to (Hadamard basis)."""
    weights = {name: tensor.detach().double() for name, tensor in scorer.named_parameters()}
    heads, dim = scorer.config.num_heads, scorer.config.head_dim
    a = weights["wq_a.weight"] @ x.double()
    a = a / (a.square().mean() + 1e-6).sqrt() * weights["q_norm_weight"]
    q = (weights["wq_b.weight"] @ a).view(heads, dim)
    if scorer.config.query_dtype == "bf16":
        q = q.float().bfloat16().double()
    frequency = []
    for pair in range(32):
        ramp = min(max((pair - 15) / 10, 0.0), 1.0)
        frequency.append(160_000.0 ** (-pair / 32) * ((1 - ramp) + ramp / 16))
    turn = torch.polar(torch.ones(32, dtype=torch.float64), position * torch.tensor(frequency, dtype=torch.float64))
    tail = torch.view_as_real(torch.view_as_complex(q[:, 64:].reshape(heads, 32, 2).contiguous()) * turn).flatten(1)
    if scorer.config.query_dtype == "bf16":
        tail = tail.float().bfloat16().double()
    q = torch.cat((q[:, :64], tail), dim=1)
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in range(dim)] for i in range(dim)])
    q = q @ (1.0 - 2.0 * parity.double()) / math.sqrt(dim)
    w = (weights["weights_proj.weight"] @ x.double()) * dim**-0.5 * heads**-0.5
    return (w * torch.relu(keys_NI.double() @ q.T)).sum(dim=1)


@pytest.mark.parametrize("query_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("position", [0, 1, 63, 5000])
def test_logits_follow_the_published_formula(query_dtype: str, position: int) -> None:
    indexer = make_indexer(replace(CONFIG, query_dtype=query_dtype))
    rows = encode_index_rows(draw(2, 9, 128, seed=1))
    hidden = draw(2, 40, seed=2).bfloat16()
    for scorer in indexer.layers.values():
        logits = scorer.logits(hidden, rows, torch.tensor([position, position]))
        assert logits.shape == (2, 9) and logits.dtype is torch.float32
        for b in range(2):
            expected = published_logits(scorer, hidden[b], decode_index_rows(rows[b]), position)
            # one bf16 rounding may fall the other way, since a float32 product rounds before it
            atol = 1e-3 if query_dtype == "bf16" else 2e-5
            torch.testing.assert_close(logits[b].double(), expected, rtol=1e-3, atol=atol)


def test_float_keys_are_the_backbones_keys() -> None:
    scorer = make_indexer(SMALL).layers[2]
    keys, hidden, positions = draw(3, 50, 12, seed=1), draw(3, 40, seed=2), torch.tensor([5, 900, 31])
    exact = scorer.logits(hidden, keys, positions)
    assert (scorer.logits(hidden, encode_index_rows(keys), positions) - exact).abs().max() < 0.1 * exact.std()


def test_every_layer_has_its_own_keys_and_hidden_state() -> None:
    indexer = make_indexer(SMALL)
    hidden = {csa: draw(1, 40, seed=csa) for csa in SMALL.layers}
    keys = {csa: encode_index_rows(draw(30, 12, seed=10 + csa)) for csa in SMALL.layers}
    position = torch.tensor([8])
    by_layer = [indexer.layers[csa].logits(hidden[csa], keys[csa][None], position)[0] for csa in SMALL.layers]
    torch.testing.assert_close(indexer.chunk_logits(hidden, keys, position), torch.stack(by_layer).amax(0))


@pytest.mark.parametrize("tokens", [1, 4])
def test_ensemble_runs_over_layers_and_tokens_alike(tokens: int) -> None:
    indexer = make_indexer(replace(SMALL, logit_offset=0.75))
    hidden = {csa: draw(tokens, 40, seed=csa) for csa in SMALL.layers}
    keys = {csa: encode_index_rows(draw(30, 12, seed=10 + csa)) for csa in SMALL.layers}
    positions = torch.arange(100, 100 + tokens)
    alone = torch.stack(
        [
            indexer.layers[csa].logits(hidden[csa][t : t + 1], keys[csa][None], positions[t : t + 1])[0]
            for csa in SMALL.layers
            for t in range(tokens)
        ]
    )
    torch.testing.assert_close(indexer.chunk_logits(hidden, keys, positions), alone.amax(0) + 0.75)
    mean = indexer.chunk_logits(hidden, keys, positions, ensemble="mean")
    torch.testing.assert_close(mean, alone.mean(0) + 0.75)
    assert torch.equal(
        make_indexer(replace(SMALL, logit_offset=0.75, ensemble="mean")).chunk_logits(hidden, keys, positions), mean
    )
    torch.testing.assert_close(indexer.probability(torch.tensor([0.0, 100.0])), torch.tensor([0.5, 1.0]))


def test_no_chunks_give_no_logits() -> None:
    indexer = make_indexer(SMALL)
    hidden = {csa: draw(2, 40) for csa in SMALL.layers}
    keys = {csa: torch.empty(0, 16, dtype=torch.uint8) for csa in SMALL.layers}
    assert indexer.chunk_logits(hidden, keys, torch.tensor([0, 1])).shape == (0,)
    assert indexer.layers[0].logits(hidden[0], torch.empty(2, 0, 12), torch.tensor([0, 1])).shape == (2, 0)


@pytest.mark.parametrize("ensemble", ["max", "mean"])
def test_queries_of_one_history_in_one_call(ensemble: Any) -> None:
    indexer = make_indexer(replace(SMALL, logit_offset=0.25))
    hidden = {csa: draw(3, 4, 40, seed=csa) for csa in SMALL.layers}
    keys = {csa: encode_index_rows(draw(30, 12, seed=10 + csa)) for csa in SMALL.layers}
    positions = torch.tensor([[6, 7, 8, 9], [-2, -1, 0, 1], [-3, -2, -1, 0]])
    logits = indexer.batch_logits(hidden, keys, positions, positions >= 0, ensemble=ensemble)
    for query, count in enumerate((4, 2, 1)):
        states = {csa: x[query, -count:] for csa, x in hidden.items()}
        single = indexer.chunk_logits(states, keys, positions[query, -count:], ensemble=ensemble)
        torch.testing.assert_close(logits[query], single)


@pytest.mark.parametrize("ensemble", ["max", "mean"])
def test_rows_in_place_give_the_same_logits(ensemble: Any, triton_device: torch.device) -> None:
    indexer = make_indexer(replace(SMALL, logit_offset=0.3, length_offsets=((16, -1.0), (64, 2.0)))).to(triton_device)
    hidden = {csa: draw(3, 40, seed=csa).to(triton_device) for csa in indexer.target_layers}
    rows = {csa: encode_index_rows(draw(37, 12, seed=csa)).to(triton_device) for csa in indexer.target_layers}
    positions = torch.tensor([3, 900, 901])
    with torch.no_grad():
        wanted = indexer.chunk_logits(hidden, rows, positions, ensemble=ensemble)
        got = indexer.logits_in_place(hidden, rows, positions, ensemble=ensemble)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_everything_learns_the_offset_too() -> None:
    indexer = make_indexer(replace(SMALL, query_dtype="bf16", ensemble="mean"))
    hidden = {csa: draw(2, 40, seed=csa) for csa in SMALL.layers}
    keys = {csa: encode_index_rows(draw(30, 12, seed=10 + csa)) for csa in SMALL.layers}
    indexer.chunk_logits(hidden, keys, torch.tensor([0, 1])).square().mean().backward()
    for name, parameter in indexer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_inference_mode_and_bf16_weights() -> None:
    indexer = make_indexer(SMALL)
    hidden, keys, positions = draw(2, 40), draw(2, 20, 12, seed=1), torch.tensor([3, 4])
    full = indexer.layers[0].logits(hidden, keys, positions)
    with torch.inference_mode():
        half = indexer.to(torch.bfloat16).layers[0].logits(hidden.bfloat16(), keys, positions)
    assert half.dtype is torch.float32 and (half - full).abs().max() < 0.1 * full.abs().max()


def test_disagreeing_inputs_are_refused() -> None:
    indexer = make_indexer(SMALL)
    hidden = {csa: draw(1, 40) for csa in SMALL.layers}
    keys = {csa: torch.zeros(4, 16, dtype=torch.uint8) for csa in SMALL.layers}
    position = torch.tensor([0])
    with pytest.raises(ValueError, match=r"target layers are \[0, 2, 5\]; got hidden states of \[0\]"):
        indexer.chunk_logits({0: hidden[0]}, keys, position)
    with pytest.raises(ValueError, match="layers disagree on chunks"):
        indexer.chunk_logits(hidden, keys | {2: keys[2][:3]}, position)
    with pytest.raises(ValueError, match=r"must be \[M, 40\]"):
        indexer.chunk_logits(hidden | {0: draw(1, 41)}, keys, position)
    with pytest.raises(ValueError, match=r"must be \[M, 40\]"):
        indexer.chunk_logits(hidden, keys, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least one layer and one observed token"):
        indexer.chunk_logits({csa: draw(0, 40) for csa in SMALL.layers}, keys, torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="ensemble must be"):
        indexer.chunk_logits(hidden, keys, position, ensemble="or")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rank": 0}, "q_rank must be a positive integer, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a positive integer"),
        ({"layers": ()}, "at least one CSA index"),
        ({"layers": (3, 1)}, "ascending"),
        ({"head_dim": 32}, "rope dim 64 exceeds head_dim 32"),
        ({"query_dtype": "fp8"}, "query_dtype"),
        ({"ensemble": "or"}, "ensemble"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"logit_offset": math.nan}, "logit_offset"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_config_survives_json_and_refuses_unknown_entries() -> None:
    values = CONFIG.to_mapping()
    assert IndexerConfig.from_mapping(values) == CONFIG and CONFIG.rope == PUBLISHED_ROPE
    with pytest.raises(ValueError, match="unknown indexer config entries: colour"):
        IndexerConfig.from_mapping(values | {"colour": 1})
    with pytest.raises(ValueError, match="rope lacks theta"):
        IndexerConfig.from_mapping(values | {"rope": {k: v for k, v in values["rope"].items() if k != "theta"}})
    with pytest.raises(ValueError, match="lacks q_rank"):
        IndexerConfig.from_mapping({k: v for k, v in values.items() if k != "q_rank"})
    with pytest.raises(ValueError, match="logit_offset must be a number"):
        IndexerConfig.from_mapping(values | {"logit_offset": "0"})


@pytest.mark.gpu
@pytest.mark.parametrize("scorer_device", ["cpu", "cuda"])
def test_scorers_and_keys_on_different_devices(scorer_device: str) -> None:
    indexer = make_indexer(replace(SMALL, logit_offset=0.5))
    hidden = {csa: draw(2, 40, seed=csa) for csa in SMALL.layers}
    keys = {csa: encode_index_rows(draw(30, 12, seed=10 + csa)) for csa in SMALL.layers}
    positions = torch.tensor([70_000, 70_001])
    expected = indexer.chunk_logits(hidden, keys, positions)
    device = {0: "cuda", 2: "cpu", 5: "cuda"}
    logits = indexer.to(scorer_device).chunk_logits(
        {csa: x.to(device[csa]) for csa, x in hidden.items()},
        {csa: x.to(device[csa]) for csa, x in keys.items()},
        positions.cuda(),
    )
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
