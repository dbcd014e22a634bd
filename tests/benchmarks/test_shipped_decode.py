"""Agreement of a decode loop with the reference: what is compared, and when it passes."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.shipped_decode import Batch, Variant

from benchmarks import shipped_decode


def batch(best: list[list[int]], inside: list[list[bool]]) -> Batch:
    """Nearly all of the mass on the best token of every step and question."""
    log_SQV = (torch.nn.functional.one_hot(torch.tensor(best), 5).float() * 20).log_softmax(-1)
    return Batch([], log_SQV, torch.tensor(inside))


def test_only_tokens_within_answers_are_compared() -> None:
    inside = [[True, True], [True, False], [True, False]]
    wanted, found = batch([[0, 1], [2, 3], [4, 0]], inside), batch([[0, 1], [2, 0], [1, 1]], inside)
    same, nats = shipped_decode._compared(wanted, found)
    assert same.tolist() == [True, True, True, False]
    np.testing.assert_allclose(nats, [0, 0, 0, 20], atol=1e-5)


def test_exact_variants_pass_with_every_token_and_others_within_bounds() -> None:
    exact, rounded = Variant("float32", "float32"), Variant("bfloat16", "bfloat16")
    equal, nats = [np.ones(60, bool), np.ones(39, bool)], [np.zeros(60), np.zeros(39)]
    row = shipped_decode._row(exact, equal, nats)
    assert row["passed"] and row["tokens"] == row["equal_tokens"] == 99 and row["agreement_interval"] == (1.0, 1.0)
    one_lost = [equal[0], np.arange(39) > 0]
    assert not shipped_decode._row(exact, one_lost, nats)["passed"]
    row = shipped_decode._row(rounded, one_lost, nats)
    assert row["passed"] and row["agreement_interval"][0] < 98 / 99 < row["agreement_interval"][1]
    assert not shipped_decode._row(rounded, one_lost, [nats[0] + 0.1, nats[1]])["passed"]
    assert not shipped_decode._row(rounded, [equal[0], np.arange(39) > 9], nats)["passed"]
