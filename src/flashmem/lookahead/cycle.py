"""The clock of one session: score, select, prefetch, flip.

Level 1 runs at the end of every append, before the first decode step, and every tau decode steps. With `lead` > 0 it
runs that many steps before the window boundary, so that copies overlap with decoding; the page table always flips at
the boundary.

Rescue (off by default). Widen: when the ceiling cut off pages above threshold, the same scores select again without
it. Early: every `rescue_interval` steps the target layers' own lightning top-k over the whole history is compared with
the resident pages; when less than `rescue_recall` of it is resident, level 1 runs at once, and its pages and the missed
ones join those selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..backbone import SessionState
from ..config import LSAConfig
from ..indexer import MemoryIndexer
from ..policy import AllPages, Budget, always_kept, page_scores
from ..store import SessionPages
from ..types import DamagedError, PageView, Policy, Selection
from .level_1 import Choice, choose
from .scheduler import SlotShare


@dataclass(slots=True)
class CycleStats:
    """Counts of one session's level 1."""

    cycles: int = 0
    """Level 1 runs, those after appends included."""
    selected_pages: int = 0
    """Sum over cycles of pages selected."""
    truncated: int = 0
    """Cycles whose selection was cut by the ceiling or by the device share."""
    misses: int = 0
    """Lightning picks of target layers seen outside the resident pages (looked at only with rescue on)."""
    looks: int = 0
    """Lightning picks looked at."""
    widened: int = 0
    early: int = 0

    @property
    def fallbacks(self) -> int:
        """Rescues of either kind."""
        return self.widened + self.early


class Cycle:
    """Owner of a session's time and selection."""

    def __init__(
        self,
        config: LSAConfig,
        policy: Policy,
        scorers: Mapping[str, MemoryIndexer],
        state: SessionState,
        pages: SessionPages,
        share: SlotShare,
    ) -> None:
        self.config, self.policy, self.scorers = config, policy, scorers
        self.state, self.pages, self.share = state, pages, share
        self.steps = 0
        """Decode steps since the last flip."""
        self.due = False
        """Level 1 must run before the next step: tokens were appended, or a selection could not be brought in."""
        self.selection = Selection(())
        self.pending: Selection | None = None
        self.stats = CycleStats()
        self.layers = state.pool.geometry.csa_layers

    def admit(self, num_chunks: int) -> None:
        """Raise BudgetError if what this policy selects of that many chunks cannot be held."""
        view = self._view(-(-num_chunks // self.config.page_chunks), num_chunks)
        if self.keeps_all:
            self.share.admit(view.num_pages)
        elif isinstance(self.policy, Budget):
            self.share.admit(self.policy.resident_pages(view))

    @property
    def keeps_all(self) -> bool:
        """Whether every page stays on the device."""
        return isinstance(self.policy, AllPages)

    def before_prefill_chunk(self) -> None:
        """Leave on the device the last selection and the always-kept pages, so that the chunk's pages fit."""
        self._cancel()
        self.due = True
        if self.keeps_all:
            return
        always = set(self._always(self.pages.num_pages))
        keep, capacity = always | set(self.selection.pages), self.share.capacity
        self.pages.evict(keep=keep if capacity is None or len(keep) <= capacity else always)

    def settle(self, choice: Choice | None = None) -> None:
        """After an append: select now, so that the first decode step is neither blind nor stale."""
        self._cancel()
        self._select(choice)
        self._flip()

    @property
    def selects_next(self) -> bool:
        """Whether `before_step` will run level 1 by the clock."""
        config = self.config
        leads = config.lead > 0 and self.steps == config.tau - config.lead
        return self.due or (self.pending is None and (self.steps >= config.tau or leads))

    def before_step(self, choice: Choice | None = None) -> None:
        """Bring residency up to date for the next decode step; a choice is that of level 1, if it ran already."""
        if self.due:
            self.settle(choice)
        elif self.steps >= self.config.tau:
            if self.pending is None:
                self._select(choice)
            self._flip()
        elif self.pending is None and self.config.lead and self.steps == self.config.tau - self.config.lead:
            self._select(choice, overlap=True)
        elif self.config.rescue and self.steps and self.steps % self.config.rescue_interval == 0:
            self._look()

    def after_step(self) -> None:
        self.steps += 1

    def _always(self, num_pages: int) -> tuple[int, ...]:
        return always_kept(num_pages, self.config.sink_pages, self.config.recency_pages)

    def view(self, logits_N: torch.Tensor | None = None) -> PageView:
        """What a policy sees of the session now."""
        return self._view(self.pages.num_pages, self.pages.num_chunks, logits_N)

    def _view(self, num_pages: int, num_chunks: int, logits_N: torch.Tensor | None = None) -> PageView:
        return PageView(
            num_pages=num_pages,
            page_chunks=self.config.page_chunks,
            num_chunks=num_chunks,
            always=self._always(num_pages),
            logits_N=logits_N,
            previous=self.selection.pages,
            cycle=self.stats.cycles,
            seed=self.config.seed,
        )

    def _flip(self) -> None:
        assert self.pending is not None
        if self.pages.prefetching:
            self.pages.flip()
        self.selection, self.pending, self.steps, self.due = self.pending, None, 0, False

    def _cancel(self) -> None:
        self.pages.cancel_prefetch()
        self.pending = None

    def choose_by_logits(self) -> Choice:
        """Level 1 from the logits of all chunks."""
        view = self.view(self._logits(self.policy.scorer))
        selection = self.policy.select(view)
        if self.config.rescue and selection.truncated:
            selection = self.policy.select(replace(view, widen=True))
            self.stats.widened += 1
        return Choice(selection, view)

    def _select(
        self,
        choice: Choice | None = None,
        *,
        overlap: bool = False,
        extra: frozenset[int] = frozenset(),
        stay: frozenset[int] = frozenset(),
    ) -> None:
        (choice,) = choose([self]) if choice is None else (choice,)
        selection = choice.selection
        if extra or stay:
            selection = replace(selection, pages=tuple(sorted({*selection.pages, *extra, *stay})))
        selection = self._fit(selection, choice, extra)
        if not (self.keeps_all and self.pages.all_resident):
            if not overlap:  # nobody reads between here and the flip: free first, so that one set of slots is enough
                self.due, self.pending = True, None  # a prefetch that fails must not leave a window with pages missing
                self.pages.evict(keep=selection.pages)
            self.pages.prefetch(selection.pages)
        self.pending = selection
        self.stats.cycles += 1
        self.stats.selected_pages += len(selection.pages)
        self.stats.truncated += selection.truncated

    def _fit(self, selection: Selection, choice: Choice, extra: frozenset[int]) -> Selection:
        """Cut a selection to the session's share of the pool: least page scores go first, then higher ids.

        Always-kept pages stay; pages that a rescue asks for go after all others.
        """
        capacity, view, scores_P = self.share.capacity, choice.view, choice.scores_P
        if capacity is None or len(selection.pages) <= capacity:
            return selection
        if scores_P is None and view.logits_N is not None:
            scores_P = page_scores(view.logits_N, view.page_chunks, view.num_pages)
        if scores_P is None:
            self.share.admit(len(selection.pages))
        assert scores_P is not None
        scores, always = scores_P.tolist(), set(view.always)
        ranked = sorted(selection.pages, key=lambda page: (page not in always, page not in extra, -scores[page], page))
        return replace(selection, pages=tuple(sorted(ranked[:capacity])), truncated=True)

    def _logits(self, scorer: str) -> torch.Tensor | None:
        """Chunk logits [N] of a scorer over the whole history, on the CPU; None where the policy wants none."""
        if scorer == "none":
            return None
        if not self.pages.num_chunks:
            return torch.empty(0)
        indexer = self.scorers[scorer]
        hidden = {csa: self.state.observed(self.layers[csa]) for csa in indexer.target_layers}
        rows = {csa: self.pages.index_rows(self.layers[csa]) for csa in indexer.target_layers}
        positions = self.state.observed_positions()
        score = indexer.chunk_logits
        if self.config.kernels == "fused" and len({x.device for x in rows.values()}) == 1:
            score = indexer.logits_in_place  # one launch cannot read the layers of several devices
        return score(hidden, rows, positions, ensemble=self.config.ensemble).cpu()

    def _look(self) -> None:
        """Rescue: are the target layers' own top-k chunks resident?"""
        native, resident = self.scorers["native"], torch.zeros(self.pages.num_pages, dtype=torch.bool)
        resident[list(self.pages.resident)] = True
        picked: set[int] = set()
        hits = looks = 0
        position = self.state.observed_positions()[-1:]
        for csa in native.target_layers:
            layer = self.layers[csa]
            rows = self.pages.index_rows(layer)
            hidden = self.state.observed(layer)[-1:]
            scores = native.layers[csa].logits(hidden, rows[None], position.to(rows.device))[0]
            best = scores.topk(min(len(scores), self.state.pool.geometry.index_topk)).indices.cpu()
            pages = best // self.config.page_chunks
            hits, looks = hits + int(resident[pages].sum()), looks + len(best)
            picked |= set(pages.tolist())
        self.stats.looks += looks
        self.stats.misses += looks - hits
        if hits < self.config.rescue_recall * looks:
            self.stats.early += 1
            self._cancel()
            self._select(extra=frozenset(picked), stay=frozenset(self.selection.pages))
            self._flip()

    def export(self) -> dict[str, object]:
        """What `load` restores, as JSON values.

        `resident` is more than `selection` where pages were born in the window; `next` is a selection whose copies run.
        """
        ahead = self.pages.prefetched
        return {
            "steps": self.steps,
            "due": self.due,
            "selection": list(self.selection.pages),
            "resident": list(self.pages.resident),
            "next": None
            if self.pending is None or ahead is None
            else {"selection": list(self.pending.pages), "resident": list(ahead)},
            "stats": asdict(self.stats),
        }

    def load(self, values: Mapping[str, Any], *, same_settings: bool) -> None:
        """Restore the clock and what was resident; where settings or budget differ, select anew.

        Raises DamagedError for values that `export` does not give, BudgetError where a selection does not fit.
        """
        self._check_saved(values)
        self.stats = CycleStats(**values["stats"])
        self.selection = Selection(tuple(values["selection"]))
        if values["due"]:
            self.due = True
        elif not same_settings or not self.share.holds(len(self.selection.pages)):
            self.settle()
        else:
            self.steps = values["steps"]
            self.pages.prefetch(values["resident"])
            self.pages.flip()
            if (ahead := values["next"]) is not None:
                self.pages.prefetch(ahead["resident"])
                self.pending = Selection(tuple(ahead["selection"]))

    def _check_saved(self, values: Mapping[str, Any]) -> None:
        ahead, stats = values.get("next"), values.get("stats")
        tables = [values] if ahead is None else [values, ahead]
        counts = [values.get("steps"), *(stats.values() if isinstance(stats, dict) else ())]
        if (
            not isinstance(values.get("due"), bool)
            or not all(isinstance(table, dict) and self._is_table(table, values["due"]) for table in tables)
            or not isinstance(stats, dict)
            or stats.keys() != {item.name for item in fields(CycleStats)}
            or not all(type(count) is int and count >= 0 for count in counts)
        ):
            raise DamagedError("the memory is damaged: its cycle makes no sense")

    def _is_table(self, table: Mapping[str, Any], due: bool) -> bool:
        """Whether a saved page table is one of this session: the selection within it, the page being filled too.

        Where level 1 is due the selection may be an old one: a prefill that failed has made room already.
        """
        selection, resident, count = table.get("selection"), table.get("resident"), self.pages.num_pages
        for pages in (selection, resident):
            if not isinstance(pages, list) or not all(type(page) is int and 0 <= page < count for page in pages):
                return False
            if pages != sorted(set(pages)):
                return False
        assert isinstance(selection, list) and isinstance(resident, list)
        filling = self.pages.num_chunks % self.config.page_chunks
        return (due or set(selection) <= set(resident)) and (not filling or count - 1 in resident)

    def check(self) -> None:
        assert 0 <= self.steps <= self.config.tau
        if self.steps < self.config.tau and not self.due:
            assert set(self.selection.pages) <= set(self.pages.resident)
