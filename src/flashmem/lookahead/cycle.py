"""The clock of one session: score, select, prefetch, flip.

Level 1 runs at the end of every append, before the first decode step, and every tau decode steps. With `lead` > 0 it
runs that many steps before the window boundary, so that copies overlap with decoding; the page table always flips at
the boundary.

Rescue (off by default). Widen: when the ceiling cut off pages above threshold, the same scores select again without
it. Early: every `rescue_interval` steps the target layers' own lightning top-k over the whole history is compared with
the resident pages; when less than `rescue_recall` of it is resident, level 1 runs at once and the pages of that top-k join.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from ..backbone import SessionState
from ..config import LSAConfig
from ..indexer import MemoryIndexer
from ..policy import AllPages, Budget, always_kept, page_scores
from ..store import SessionPages
from ..types import PageView, Policy, Selection
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
        self.selection = Selection(())
        self.pending: Selection | None = None
        self.settled = True
        """False from a prefill chunk until level 1 has run: the next decode step must not be blind."""
        self.stats = CycleStats()
        self.layers = state.pool.geometry.csa_layers

    def admit(self, num_chunks: int) -> None:
        """Raise BudgetError if what this policy selects of that many chunks cannot be held."""
        view = self._view(-(-num_chunks // self.config.page_chunks), num_chunks, None)
        if isinstance(self.policy, AllPages):
            self.share.admit(view.num_pages)
        elif isinstance(self.policy, Budget):
            self.share.admit(self.policy.resident_pages(view))

    def after_prefill_chunk(self) -> None:
        """Free what the prefill left on the device beside the last selection and the always-kept pages."""
        self._cancel()
        self.settled = False
        if not isinstance(self.policy, AllPages):
            always, kept = self._always(self.pages.num_pages), self.selection.pages
            if self.share.capacity is not None:
                kept = kept[: max(0, self.share.capacity - len(always))]
            self.pages.evict(keep={*kept, *always})

    def settle(self) -> None:
        """After an append: select now, so that the first decode step is neither blind nor stale."""
        self._cancel()
        self._select()
        self._flip()

    def before_step(self) -> None:
        """Bring residency up to date for the next decode step."""
        if not self.settled:
            self.settle()
        elif self.steps >= self.config.tau:
            if self.pending is None:
                self._select()
            self._flip()
        elif self.pending is None and self.config.lead and self.steps == self.config.tau - self.config.lead:
            self._select(overlap=True)
        elif self.config.rescue and self.steps and self.steps % self.config.rescue_interval == 0:
            self._look()

    def after_step(self) -> None:
        self.steps += 1

    def _always(self, num_pages: int) -> tuple[int, ...]:
        return always_kept(num_pages, self.config.sink_pages, self.config.recency_pages)

    def _view(self, num_pages: int, num_chunks: int, logits_N: torch.Tensor | None) -> PageView:
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
        self.pages.flip()
        self.selection, self.pending, self.steps = self.pending, None, 0
        self.settled = True

    def _cancel(self) -> None:
        self.pages.cancel_prefetch()
        self.pending = None

    def _select(self, overlap: bool = False, extra: frozenset[int] = frozenset()) -> None:
        view = self._view(self.pages.num_pages, self.pages.num_chunks, self._logits(self.policy.scorer))
        selection = self.policy.select(view)
        if self.config.rescue and selection.truncated:
            selection = self.policy.select(replace(view, widen=True))
            self.stats.widened += 1
        if extra:
            selection = replace(selection, pages=tuple(sorted({*selection.pages, *extra})))
        selection = self._fit(selection, view, extra)
        self.stats.cycles += 1
        self.stats.selected_pages += len(selection.pages)
        self.stats.truncated += selection.truncated
        if not overlap:  # nobody reads between here and the flip: free first, so that one set of slots is enough
            self.pages.evict(keep=selection.pages)
        self.pages.prefetch(selection.pages)
        self.pending = selection

    def _fit(self, selection: Selection, view: PageView, extra: frozenset[int]) -> Selection:
        """Cut a selection to the session's share of the pool: least page scores go first, then higher ids.

        Always-kept pages stay; pages that a rescue asks for go after all others.
        """
        capacity = self.share.capacity
        if capacity is None or len(selection.pages) <= capacity:
            return selection
        if view.logits_N is None:
            self.share.admit(len(selection.pages))
        assert view.logits_N is not None
        scores = page_scores(view.logits_N, view.page_chunks, view.num_pages).tolist()
        always = set(view.always)
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
        return indexer.chunk_logits(hidden, rows, positions, ensemble=self.config.ensemble).cpu()

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
            self._select(extra=frozenset(picked))
            self._flip()

    def export(self) -> dict[str, object]:
        """What `load` restores, as JSON values."""
        return {
            "steps": self.steps,
            "settled": self.settled,
            "selection": list(self.selection.pages),
            "resident": list(self.pages.resident),
            "stats": asdict(self.stats),
        }

    def load(self, values: Mapping[str, object]) -> None:
        """Restore the clock, and make resident what was: the selection and the pages born in the window."""
        selection, resident, stats = values["selection"], values["resident"], values["stats"]
        assert isinstance(selection, list) and isinstance(resident, list) and isinstance(stats, dict)
        self.stats = CycleStats(**stats)
        self.share.admit(len(selection))
        self.pages.prefetch(resident)
        self.pending = Selection(tuple(selection))
        self._flip()
        self.steps, self.settled = int(values["steps"]), bool(values["settled"])  # type: ignore[call-overload]

    def check(self) -> None:
        assert 0 <= self.steps <= self.config.tau
        if self.settled and self.steps < self.config.tau:
            assert set(self.selection.pages) <= set(self.pages.resident)
