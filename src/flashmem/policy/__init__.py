"""Scores in, `Selection` out: the rules of Lookahead Sparse Attention and the baselines it is compared with."""

from __future__ import annotations

from collections.abc import Callable

from ..config import LSAConfig
from ..types import Policy, Scorer
from .policies import (
    AllPages,
    Budget,
    BudgetPolicy,
    CarryOverPolicy,
    OraclePolicy,
    RandomPolicy,
    RecencyPolicy,
    ThresholdPolicy,
)
from .scores import TEMPERATURE, always_kept, best_first, eligible_chunks, page_maxima, page_scores, pool_pages

POLICY_NAMES = ("lsa", "all", "recency", "random", "carry-over", "native")

_BUDGETED: dict[str, Callable[..., Policy]] = {
    "recency": RecencyPolicy,
    "random": RandomPolicy,
    "carry-over": CarryOverPolicy,
}


def make_policy(config: LSAConfig) -> Policy:
    """Return the policy that `config.policy` names, or is.

    With `keep` set, 'lsa' and 'native' fill a fixed budget, else they follow the threshold; 'recency', 'random' and
    'carry-over' need `keep`. Raises ValueError for an unknown name, a missing budget or an object that is no policy.
    """
    name = config.policy
    if not isinstance(name, str):
        if isinstance(name, type) or not isinstance(name, Policy):
            raise ValueError(f"policy must be a name or have name, scorer and select(view), got {name!r}")
        if name.scorer not in ("memory", "native", "none"):
            raise ValueError(f"a policy's scorer must be 'memory', 'native' or 'none', got {name.scorer!r}")
        return name
    if name == "all":
        return AllPages()
    if name in ("lsa", "native"):
        return _scored(config, name, "memory" if name == "lsa" else "native")
    if name not in _BUDGETED:
        raise ValueError(f"unknown policy {name!r}; choose from {', '.join(POLICY_NAMES)}")
    if config.keep is None:
        raise ValueError(f"policy {name!r} needs a budget: set keep, the share of pages to hold on the device")
    return _BUDGETED[name](keep=config.keep)


def _scored(config: LSAConfig, name: str, scorer: Scorer) -> Policy:
    if config.keep is None:
        return ThresholdPolicy(
            threshold=config.threshold,
            floor_pages=config.floor_pages,
            ceiling_pages=config.ceiling_pages,
            scorer=scorer,
            name=name,
        )
    # native logits are no log-odds, so a threshold on them would tell nothing about a budget
    return BudgetPolicy(
        keep=config.keep, threshold=config.threshold if scorer == "memory" else None, scorer=scorer, name=name
    )


__all__ = [
    "POLICY_NAMES",
    "TEMPERATURE",
    "AllPages",
    "Budget",
    "BudgetPolicy",
    "CarryOverPolicy",
    "OraclePolicy",
    "RandomPolicy",
    "RecencyPolicy",
    "ThresholdPolicy",
    "always_kept",
    "best_first",
    "eligible_chunks",
    "make_policy",
    "page_maxima",
    "page_scores",
    "pool_pages",
]
