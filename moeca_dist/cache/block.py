"""One block of the network in one step: the caches of its segments, and what the block asks of them.

A segment is a guidance half, whose images lie next to each other in the network's batch. The halves never share
anything.

Shape suffixes: B images of the network's batch, T tokens of one image, D hidden size, N rows: chosen tokens, H heads, C
channels of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branches import BranchCache
from moeca_dist.cache.owned import HomeTable, OwnedBlock
from moeca_dist.cache.policy import Half, ModuleView, Policy
from moeca_dist.cache.rows import KeyValueCache, RowCache, Rows
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import Storage
from moeca_dist.cache.usage import UsageHistory
from moeca_dist.kernels.types import Forecast
from moeca_dist.timing import UNTIMED, Timer
from moeca_dist.types import StepContext


@dataclass(frozen=True)
class Segment:
    """One guidance half in one step: its images in the network's batch, and whether all of it is computed now."""

    half: Half
    images: slice
    full: bool


class SegmentCache:
    """What one block keeps for one segment: ``branches`` in placement ``home``, ``home`` in placement ``owner``."""

    def __init__(self, policy: Policy, num_experts: int, storage: Storage) -> None:
        self._order = policy.order
        self._storage = storage
        self.modules: dict[str, RowCache] = {}
        self.keys_values = KeyValueCache(storage)
        decay = policy.usage_decay
        self.usage = None if decay is None else UsageHistory(decay, num_experts)
        self.branches = BranchCache(forecast=policy.order > 0, storage=storage)
        self.home = HomeTable(forecast=policy.order > 0, storage=storage)

    def module(self, name: str) -> RowCache:
        if name not in self.modules:
            self.modules[name] = RowCache(self._order, self._storage)
        return self.modules[name]

    @property
    def num_bytes(self) -> int:
        usage = 0 if self.usage is None else self.usage.num_bytes
        modules = sum(rows.num_bytes for rows in self.modules.values())
        branches = self.branches.num_bytes + self.home.num_bytes
        return branches + modules + self.keys_values.num_bytes + usage


@dataclass
class Followed:
    """The tokens that the last MoE block of a step refreshed, which the dense blocks after it refresh as well."""

    rows: Rows | None = None


@dataclass(frozen=True)
class BlockStep:
    """One block in one step: what the block asks instead of computing everything.

    ``owned``: this rank's part of placement ``owner``; None in placement ``home``.
    """

    block: int
    step: StepContext
    policy: Policy
    segments: tuple[Segment, ...]
    caches: tuple[SegmentCache, ...]
    image_ids_B: Tensor
    statistics: CacheStatistics
    followed: Followed
    owned: OwnedBlock | None = None
    timer: Timer = UNTIMED

    @property
    def all_full(self) -> bool:
        return all(segment.full for segment in self.segments)

    @property
    def per_branch(self) -> bool:
        return self.policy.unit == "branch"

    @property
    def only_forecasts(self) -> bool:
        """Whether attention, shared expert and dense blocks are all served from the cache, and no row of them not."""
        policy = self.policy
        computed = policy.computes_modules or policy.attention_sync or policy.refreshes_rows
        return not computed and not any(segment.full for segment in self.segments)

    def forecasts(self, name: str) -> Iterator[tuple[slice, Forecast]]:
        """The images of each segment, and what is expected of a module; where ``only_forecasts``."""
        for segment, cache in zip(self.segments, self.caches, strict=True):
            yield segment.images, cache.module(name).forecast(self.step.index)

    def serve(self, name: str, like_BTD: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
        """A module's output [B, T, D]: computed for the full segments and stored, from the cache for the others.

        ``compute(images)`` gives the output for a slice of the batch; where all segments are full it is asked once, for
        the whole batch, as the exact path does. It is asked on all ranks or on none, and measures itself.
        """
        with self.timer.section("bookkeeping"):
            return self._serve(name, like_BTD, compute)

    def _serve(self, name: str, like_BTD: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
        if self.policy.computes_modules:
            out_BTD = compute(slice(None))
            self.count(name, out_BTD)
            return out_BTD
        if self.all_full:
            out_BTD = compute(slice(None))
            self.count(name, out_BTD)
            for segment, cache in zip(self.segments, self.caches, strict=True):
                cache.module(name).store(out_BTD[segment.images], self.step.index)
            return out_BTD
        out_BTD = torch.empty_like(like_BTD)
        for segment, cache in zip(self.segments, self.caches, strict=True):
            if segment.full:
                fresh_BTD = compute(segment.images)
                self.count(name, fresh_BTD)
                cache.module(name).store(fresh_BTD, self.step.index)
                out_BTD[segment.images] = fresh_BTD
            else:
                cache.module(name).forecast_into(out_BTD[segment.images], self.step.index)
        return out_BTD

    def serve_chosen(self, name: str, like_BTD: Tensor, compute: Callable[[Rows], Tensor]) -> Tensor:
        """As ``serve``, but a cache step computes the tokens that the policy chooses.

        ``compute(rows)`` gives outputs [N, D]; it is asked once, on all ranks, for the chosen tokens and for all tokens
        of full segments together.
        """
        with self.timer.section("bookkeeping"):
            return self._serve_chosen(name, like_BTD, compute)

    def _serve_chosen(self, name: str, like_BTD: Tensor, compute: Callable[[Rows], Tensor]) -> Tensor:
        rows = self._chosen(name, like_BTD)
        fresh_ND = compute(rows)
        out_BTD = torch.empty_like(like_BTD)
        for segment, cache in zip(self.segments, self.caches, strict=True):
            if segment.full:
                window, _ = rows.within(segment.images)
                cache.module(name).store(fresh_ND[window].view_as(out_BTD[segment.images]), self.step.index)
            else:
                cache.module(name).forecast_into(out_BTD[segment.images], self.step.index)
        self.refresh_rows(name, out_BTD, rows, fresh_ND)
        return out_BTD

    def refresh_rows(self, name: str, out_BTD: Tensor, rows: Rows, fresh_ND: Tensor) -> None:
        """Put freshly computed rows of a module into its output and into the caches of the segments that are served."""
        with self.timer.section("bookkeeping"):
            out_BTD[rows.image_N, rows.position_N] = fresh_ND
            for segment, cache in zip(self.segments, self.caches, strict=True):
                if not segment.full:
                    window, mine = rows.within(segment.images)
                    cache.module(name).store_rows(mine, fresh_ND[window], self.step.index)
                    self.statistics.rows[name] += mine.flat_N.shape[0]
        self.count(name, fresh_ND)

    def store_keys_values(self, images: slice, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Keep the keys and values of ``images``, as ``serve`` asks for them, where attention is refreshed by rows."""
        if not self.policy.attention_sync:
            return
        with self.timer.section("bookkeeping"):
            for segment, cache in zip(self.segments, self.caches, strict=True):
                if images == slice(None):
                    cache.keys_values.store(keys_BHTC[segment.images], values_BHTC[segment.images])
                elif images == segment.images:
                    cache.keys_values.store(keys_BHTC, values_BHTC)

    def refresh_keys_values(
        self, segment: int, rows: Rows, keys_HNC: Tensor, values_HNC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep fresh keys and values of a segment's tokens; those of all its tokens [B, H, T, C], with these."""
        with self.timer.section("bookkeeping"):
            kept = self.caches[segment].keys_values
            kept.store_rows(rows, keys_HNC, values_HNC)
            return kept.read(rows, keys_HNC, values_HNC)

    def count(self, name: str, computed: Tensor) -> None:
        """Count the tokens of a module's output [..., D]."""
        self.statistics.modules[name] += computed.shape[:-1].numel()

    def _chosen(self, name: str, like_BTD: Tensor) -> Rows:
        chosen = torch.ones(like_BTD.shape[:2], dtype=torch.bool, device=like_BTD.device)
        for segment, cache in zip(self.segments, self.caches, strict=True):
            if not segment.full:
                kept = cache.module(name)
                view = ModuleView(kept.value_BTD, kept.age_BT(self.step.index))
                chosen[segment.images] = self.policy.rows(self.step, view)
        # NOTE: a host synchronisation on CUDA: the number of rows decides the shapes.
        return Rows(chosen.flatten().nonzero().squeeze(1), like_BTD.shape[1])
