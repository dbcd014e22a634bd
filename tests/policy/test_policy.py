from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmem.config import LSAConfig
from flashmem.policy import (
    POLICY_NAMES,
    AllPages,
    BudgetPolicy,
    CarryOverPolicy,
    OraclePolicy,
    RandomPolicy,
    RecencyPolicy,
    ThresholdPolicy,
    always_kept,
    best_first,
    eligible_chunks,
    make_policy,
    page_scores,
)
from flashmem.types import PageView, Policy, Selection

quick = settings(max_examples=60, deadline=None)


def make_view(logits: list[float], page_chunks: int = 4, **changes: object) -> PageView:
    num_pages = -(-len(logits) // page_chunks)
    values = {
        "num_pages": num_pages,
        "page_chunks": page_chunks,
        "num_chunks": len(logits),
        "always": always_kept(num_pages, 1, 1),
        "logits_N": torch.tensor(logits),
    }
    return PageView(**(values | changes))


def page_view(page_logits: list[float], **changes: object) -> PageView:
    """One chunk per page; nothing always kept unless asked for."""
    return make_view(page_logits, page_chunks=1, **({"always": ()} | changes))


@st.composite
def views(draw: st.DrawFn) -> PageView:
    page_chunks = draw(st.sampled_from([1, 4, 8]))
    num_chunks = draw(st.integers(0, 12 * page_chunks))
    empty_pages = draw(st.integers(0, 1))  # a page being filled may have no chunk yet
    num_pages = -(-num_chunks // page_chunks) + empty_pages
    few = st.sampled_from([-8.0, -1.0, 0.0, 0.5, 6.0])  # ties are common
    logits = draw(st.lists(few | st.floats(-30, 30, width=32), min_size=num_chunks, max_size=num_chunks))
    previous = draw(st.sets(st.integers(0, 14), max_size=8))
    return make_view(
        logits,
        page_chunks,
        num_pages=num_pages,
        always=always_kept(num_pages, draw(st.integers(0, 2)), draw(st.integers(0, 3))),
        previous=tuple(sorted(previous)),
        cycle=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 3)),
        widen=draw(st.booleans()),
    )


def budgeted(**budget: object) -> list[Policy]:
    future = [torch.tensor([3.0, -1.0, 3.0, 8.0, -math.inf, 0.0]), [0.0] * 20, []]
    return [
        BudgetPolicy(**budget),
        BudgetPolicy(**budget, scorer="native", name="native"),
        BudgetPolicy(**budget, threshold=0.5),
        RecencyPolicy(**budget),
        RandomPolicy(**budget),
        CarryOverPolicy(**budget),
        OraclePolicy(**budget, scores=future),
    ]


def check(view: PageView, selection: Selection) -> None:
    pages = selection.pages
    assert set(view.always) <= set(pages)
    assert list(pages) == sorted(set(pages))
    assert all(0 <= page < view.num_pages for page in pages)
    assert 0.0 <= selection.eligible_share <= 1.0


# --- what holds for every policy


@quick
@given(views(), st.floats(0.01, 1.0), st.integers(0, 12))
def test_budgets_are_kept_and_choices_repeat(view: PageView, keep: float, pages: int) -> None:
    share = max(len(view.always), math.ceil(round(keep * view.num_pages, 9)) * (2 if view.widen else 1))
    count = max(len(view.always), pages * (2 if view.widen else 1))
    for limit, policies in ((share, budgeted(keep=keep)), (count, budgeted(pages=pages))):
        for policy in policies:
            selection = policy.select(view)
            check(view, selection)
            assert len(selection.pages) <= limit
            if not isinstance(policy, CarryOverPolicy):  # which adds nothing
                assert len(selection.pages) == min(limit, view.num_pages)
            assert policy.select(view) == selection


@quick
@given(views(), st.integers(0, 10), st.integers(0, 4))
def test_a_bigger_budget_keeps_what_a_smaller_one_kept(view: PageView, pages: int, more: int) -> None:
    for small, big in zip(budgeted(pages=pages), budgeted(pages=pages + more), strict=True):
        assert set(small.select(view).pages) <= set(big.select(view).pages)


@quick
@given(views())
def test_the_whole_budget_keeps_every_page(view: PageView) -> None:
    everything = tuple(range(view.num_pages))
    for policy in budgeted(keep=1.0):
        if not isinstance(policy, CarryOverPolicy):
            assert policy.select(view).pages == everything
    assert AllPages().select(view).pages == everything


@quick
@given(views(), st.integers(0, 5), st.none() | st.integers(5, 8), st.floats(0.05, 0.95))
def test_threshold_keeps_floor_and_ceiling(view: PageView, floor: int, ceiling: int | None, threshold: float) -> None:
    selection = ThresholdPolicy(threshold=threshold, floor_pages=floor, ceiling_pages=ceiling).select(view)
    check(view, selection)
    eligible = sorted(set(range(view.num_pages)) - set(view.always))
    chosen = [page for page in selection.pages if page in eligible]
    cut = math.log(threshold / (1 - threshold))
    size, logits = view.page_chunks, view.logits_N.tolist()
    above = {page for page in eligible if any(x > cut for x in logits[page * size : (page + 1) * size])}
    assert selection.eligible_share == (len(above) / len(eligible) if eligible else 0)
    limit = len(eligible) if ceiling is None or view.widen else ceiling
    assert selection.truncated == (len(above) > limit)
    assert len(chosen) == min(len(eligible), max(min(len(above), limit), floor))
    assert above <= set(chosen) or (set(chosen) <= above and len(chosen) == limit)


@quick
@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_moving_pages_moves_the_choice(values: list[float], random: object) -> None:
    distinct = [value + 0.01 * i for i, value in enumerate(values)]
    order = list(range(len(values)))
    random.shuffle(order)
    keep = BudgetPolicy(pages=len(values) // 2)
    before = keep.select(page_view(distinct)).pages
    after = keep.select(page_view([distinct[old] for old in order])).pages
    assert sorted(order[new] for new in after) == list(before)


@pytest.mark.parametrize("policy", [*budgeted(keep=0.5), ThresholdPolicy(), AllPages()], ids=lambda p: p.name)
def test_no_history_and_one_page(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    assert policy.select(make_view([])).pages == ()
    assert policy.select(make_view([], logits_N=None)).pages == ()
    assert policy.select(make_view([0.0])).pages == (0,)
    # a page that waits for its first chunk
    assert policy.select(make_view([], num_pages=1, always=(0,), logits_N=None)).pages == (0,)


# --- page scores


def test_one_certain_chunk_beats_a_page_of_doubtful_ones() -> None:
    needle = [-9.0] * 64
    needle[17] = 6.0
    scores = page_scores(torch.tensor([0.0] * 64 + needle + [-9.0] * 64), 64, 3)
    assert best_first(scores) == [1, 0, 2]
    assert scores[0] == pytest.approx(0.25 * math.log(64))
    assert scores[1] == pytest.approx(6.0)
    view = make_view([0.1] * 64 + needle + [0.1] * 64, 64, always=())
    assert BudgetPolicy(pages=1).select(view).pages == (1,)
    assert ThresholdPolicy(floor_pages=0, ceiling_pages=1).select(view).pages == (1,)


def test_among_equal_best_chunks_more_good_ones_win() -> None:
    assert best_first(page_scores(torch.tensor([2.0, -5, -5, -5, 2.0, 2.0, 1.9, -5]), 4, 2)) == [1, 0]


def test_page_scores_equal_float64_and_do_not_overflow() -> None:
    logits = 400 * torch.randn(22, generator=torch.Generator().manual_seed(0))
    scores = page_scores(logits, 8, 4)
    for page in range(3):
        part = logits[8 * page : 8 * page + 8].double()
        assert float(scores[page]) == pytest.approx(float(0.25 * torch.logsumexp(part / 0.25, 0)), rel=1e-6)
    assert scores[3] == -math.inf


def test_page_scores_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="hold NaN"):
        page_scores(torch.tensor([0.0, math.nan]), 4, 1)
    with pytest.raises(ValueError, match="do not fit 1 pages of 4 chunks"):
        page_scores(torch.zeros(5), 4, 1)
    with pytest.raises(ValueError, match="do not fit"):
        page_scores(torch.zeros(2, 2), 4, 1)
    assert page_scores(torch.empty(0), 4, 0).tolist() == []
    assert page_scores(torch.empty(0), 4, 2).tolist() == [-math.inf] * 2


def test_ties_go_to_the_lower_page() -> None:
    assert best_first(torch.tensor([1.0, 2.0, 1.0, 2.0, -math.inf, -math.inf]), {3}) == [1, 0, 2, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 1, 2), ()),
        ((1, 1, 2), (0,)),
        ((3, 1, 2), (0, 1, 2)),
        ((4, 1, 2), (0, 2, 3)),
        ((9, 0, 2), (7, 8)),
        ((9, 2, 0), (0, 1)),
        ((3, 9, 9), (0, 1, 2)),
    ],
)
def test_always_kept(arguments: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    assert always_kept(*arguments) == expected


def test_eligible_chunks_are_those_a_policy_can_choose() -> None:
    mask = eligible_chunks(11, 4, always_kept(3, 1, 1))  # the last page has three chunks
    assert mask.tolist() == [False] * 4 + [True] * 4 + [False] * 3
    assert eligible_chunks(0, 4, ()).tolist() == [] and eligible_chunks(3, 4, (0, 1)).tolist() == [False] * 3


# --- each rule


def test_threshold_takes_what_is_above_and_fills_up_to_the_floor() -> None:
    view = page_view([9.0, -3.0, 0.2, -1.0, -2.0, 9.0], always=(0, 5))
    assert ThresholdPolicy(floor_pages=0).select(view) == Selection((0, 2, 5), eligible_share=0.25)
    assert ThresholdPolicy(floor_pages=3).select(view) == Selection((0, 2, 3, 4, 5), eligible_share=0.25)
    assert ThresholdPolicy(floor_pages=99).select(view).pages == (0, 1, 2, 3, 4, 5)
    assert ThresholdPolicy(threshold=0.6, floor_pages=0).select(view).pages == (0, 5)  # logit 0.2 is 0.55


def test_a_page_at_the_threshold_is_not_above_it() -> None:
    assert ThresholdPolicy(floor_pages=0).select(page_view([0.0, 1e-6])).pages == (1,)


def test_a_page_of_many_doubtful_chunks_is_not_above_the_threshold() -> None:
    view = make_view([-0.1] * 64, 64, always=())
    assert page_scores(view.logits_N, 64, 1)[0] > 0.9
    assert ThresholdPolicy(floor_pages=0).select(view).pages == ()


def test_ceiling_keeps_the_best_and_widening_lifts_it() -> None:
    logits = [1.0, 5.0, 3.0, 2.0, -4.0]
    policy = ThresholdPolicy(floor_pages=0, ceiling_pages=2)
    assert policy.select(page_view(logits)) == Selection((1, 2), eligible_share=0.8, truncated=True)
    assert policy.select(page_view(logits, widen=True)) == Selection((0, 1, 2, 3), eligible_share=0.8)


def test_budget_counts_the_always_kept_pages_and_rounds_a_share_up() -> None:
    view = page_view([float(i % 7) for i in range(30)], always=(0, 28, 29))
    assert len(BudgetPolicy(keep=0.1).select(view).pages) == 3  # 0.1 * 30 is 3, though not in binary
    assert BudgetPolicy(keep=0.11).select(view).pages == (0, 6, 28, 29)
    assert len(BudgetPolicy(keep=0.2).select(view).pages) == 6
    assert len(BudgetPolicy(pages=1).select(view).pages) == 3
    widened = page_view([0.0] * 30, always=(0, 28, 29), widen=True)
    assert len(BudgetPolicy(keep=0.2).select(widened).pages) == 12
    assert len(BudgetPolicy(keep=0.8).select(widened).pages) == 30


def test_budget_with_a_threshold_tells_what_it_cut_off() -> None:
    view = page_view([1.0, 2.0, -1.0, -1.0])
    assert BudgetPolicy(pages=1, threshold=0.5).select(view) == Selection((1,), eligible_share=0.5, truncated=True)
    assert BudgetPolicy(pages=2, threshold=0.5).select(view) == Selection((0, 1), eligible_share=0.5)
    assert BudgetPolicy(pages=1).select(view) == Selection((1,))


def test_recency_random_carry_over_and_oracle() -> None:
    view = page_view([0.0] * 10, always=(0, 9), previous=(0, 3, 4, 7, 12), seed=5)
    assert RecencyPolicy(pages=4).select(view).pages == (0, 7, 8, 9)
    assert CarryOverPolicy(pages=9).select(view).pages == (0, 3, 4, 7, 9)
    assert CarryOverPolicy(pages=4).select(view).pages == (0, 4, 7, 9)
    scores = [[0.0, 1, 2, 9, 4], [0.0, 5, 5, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert OraclePolicy(pages=4, scores=scores).select(view).pages == (0, 3, 4, 9)
    later = page_view([0.0] * 10, always=(0, 9), cycle=1)
    assert OraclePolicy(pages=3, scores=scores).select(later).pages == (0, 1, 9)
    with pytest.raises(ValueError, match=r"knows cycles 0\.\.1, not 2"):
        OraclePolicy(pages=3, scores=scores).select(page_view([0.0], cycle=2))


def test_random_depends_on_seed_and_cycle() -> None:
    def draw(seed: int, cycle: int) -> tuple[int, ...]:
        return RandomPolicy(pages=10).select(page_view([0.0] * 100, seed=seed, cycle=cycle)).pages

    assert draw(0, 0) == draw(0, 0) and len({draw(0, 0), draw(0, 1), draw(1, 0), draw(1, 1)}) == 4
    counts = torch.zeros(100)
    for cycle in range(500):
        counts[list(draw(0, cycle))] += 1
    assert counts.min() > 20 and counts.max() < 90  # 50 expected, standard deviation 6.7


def test_logits_that_do_not_belong_are_refused() -> None:
    for policy in (ThresholdPolicy(), BudgetPolicy(pages=1)):
        with pytest.raises(ValueError, match="policy 'lsa' needs the logits of 2 chunks, got none"):
            policy.select(page_view([0.0, 0.0], logits_N=None))
        with pytest.raises(ValueError, match="policy 'lsa' needs 2 logits, got 1"):
            policy.select(page_view([0.0, 0.0], logits_N=torch.zeros(1)))


# --- by name


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_policies_by_name(name: str) -> None:
    policy = make_policy(LSAConfig(policy=name, keep=0.25))
    assert isinstance(policy, Policy) and policy.name == name
    assert policy.scorer == {"lsa": "memory", "native": "native"}.get(name, "none")
    view = page_view([float(i) for i in range(8)], always=(0, 7))
    assert len(policy.select(view).pages) == {"all": 8, "carry-over": 2}.get(name, 2)


def test_without_keep_the_threshold_rules() -> None:
    config = LSAConfig(threshold=0.7, floor_pages=3, ceiling_pages=9)
    assert make_policy(config) == ThresholdPolicy(threshold=0.7, floor_pages=3, ceiling_pages=9)
    native = make_policy(LSAConfig(policy="native"))
    assert isinstance(native, ThresholdPolicy) and (native.scorer, native.name) == ("native", "native")
    assert make_policy(LSAConfig(policy="all")) == AllPages()
    for name in ("recency", "random", "carry-over"):
        with pytest.raises(ValueError, match=f"policy '{name}' needs a budget: set keep"):
            make_policy(LSAConfig(policy=name))


def test_own_objects_pass_and_other_things_do_not() -> None:
    own = OraclePolicy(keep=0.5, scores=[])
    assert make_policy(LSAConfig(policy=own)) is own
    with pytest.raises(
        ValueError, match="unknown policy 'best'; choose from lsa, all, recency, random, carry-over, native"
    ):
        make_policy(LSAConfig(policy="best"))
    for wrong in (None, 3, AllPages, object()):
        with pytest.raises(ValueError, match="policy must be a name or have name, scorer and select"):
            make_policy(LSAConfig(policy=wrong))

    class Odd(RecencyPolicy):
        pass

    odd = Odd(keep=0.5)
    odd.scorer = "best"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="scorer must be"):
        make_policy(LSAConfig(policy=odd))


@pytest.mark.parametrize(
    "make",
    [
        lambda: BudgetPolicy(),
        lambda: BudgetPolicy(keep=0.5, pages=3),
        lambda: BudgetPolicy(keep=0.0),
        lambda: BudgetPolicy(keep=1.5),
        lambda: RecencyPolicy(pages=-1),
        lambda: BudgetPolicy(pages=1, threshold=1.0),
        lambda: BudgetPolicy(pages=1, scorer="none"),
        lambda: ThresholdPolicy(threshold=0.0),
        lambda: ThresholdPolicy(floor_pages=-1),
        lambda: ThresholdPolicy(floor_pages=3, ceiling_pages=2),
        lambda: always_kept(3, -1, 0),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"must|either"):
        make()
