"""The cache of one batch of requests: made for it, freed with it.

A session holds one set of caches for each block and segment; a segment is a guidance half, whose images lie next to
each other in the network's batch. The halves never share anything.

Shape suffixes: B images of the network's batch, T tokens (of one image with B, else of a segment), D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branches import BranchCache
from moeca_dist.cache.owned import HomeTable, OwnedBlock, OwnedBranches, RowPool
from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.rows import RowCache
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.types import Request, StepContext

HALVES: tuple[Half, Half] = ("conditional", "unconditional")


@dataclass(frozen=True)
class Segment:
    """One guidance half in one step: its images in the network's batch, and whether all of it is computed now."""

    half: Half
    images: slice
    full: bool


class SegmentCache:
    """What one block keeps for one segment: ``branches`` in placement ``home``, ``home`` in placement ``owner``."""

    def __init__(self, policy: Policy, num_experts_per_tok: int) -> None:
        self._order = policy.order
        self.modules: dict[str, RowCache] = {}
        entries = num_experts_per_tok + policy.extra_entries
        self.branches = BranchCache(entries, forecast=policy.order > 0)
        self.home = HomeTable(entries, forecast=policy.order > 0)

    def module(self, name: str) -> RowCache:
        if name not in self.modules:
            self.modules[name] = RowCache(self._order)
        return self.modules[name]

    @property
    def num_bytes(self) -> int:
        return self.branches.num_bytes + self.home.num_bytes + sum(rows.num_bytes for rows in self.modules.values())


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
    owned: OwnedBlock | None = None

    @property
    def key(self) -> tuple[int, int]:
        """(step, block): where the statistics count."""
        return self.step.index, self.block

    @property
    def all_full(self) -> bool:
        return all(segment.full for segment in self.segments)

    @property
    def per_branch(self) -> bool:
        return self.policy.unit == "branch"

    def serve(self, name: str, like_BTD: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
        """A module's output [B, T, D]: computed for the full segments and stored, from the cache for the others.

        ``compute(images)`` gives the output for a slice of the batch; where all segments are full it is asked once, for
        the whole batch, as the exact path does. It is asked on all ranks or on none.
        """
        if self.all_full:
            out_BTD = compute(slice(None))
            self._computed(name, out_BTD.shape[0])
            for segment, cache in zip(self.segments, self.caches, strict=True):
                cache.module(name).store(out_BTD[segment.images], self.step.index)
            return out_BTD
        out_BTD = torch.empty_like(like_BTD)
        for segment, cache in zip(self.segments, self.caches, strict=True):
            if segment.full:
                fresh_BTD = compute(segment.images)
                self._computed(name, fresh_BTD.shape[0])
                cache.module(name).store(fresh_BTD, self.step.index)
                out_BTD[segment.images] = fresh_BTD
            else:
                cache.module(name).forecast_into(out_BTD[segment.images], self.step.index)
        return out_BTD

    def _computed(self, name: str, num_images: int) -> None:
        self.statistics.modules[name] += num_images


class CacheSession:
    """The caches of one batch. ``at(step)`` is what the network gets with each evaluation.

    ``owner_ranks``: the size of the expert-parallel group in placement ``owner``, where all its ranks open their
    sessions together; None in placement ``home``.
    """

    def __init__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        guided: bool,
        num_blocks: int,
        num_experts_per_tok: int,
        statistics: CacheStatistics,
        device: torch.device | str = "cpu",
        owner_ranks: int | None = None,
    ) -> None:
        self.policy = policy
        self.statistics = statistics
        self._halves = HALVES if guided else HALVES[:1]
        self._num_images = len(requests)
        self._image_ids_B = torch.tensor(
            [request.seed * 2**32 + request.index - 2**63 for request in requests], dtype=torch.int64, device=device
        )
        self._blocks = [
            tuple(SegmentCache(policy, num_experts_per_tok) for _ in self._halves) for _ in range(num_blocks)
        ]
        self._owned = [
            None
            if owner_ranks is None
            else OwnedBlock(RowPool(owner_ranks), OwnedBranches(owner_ranks, forecast=policy.order > 0))
            for _ in range(num_blocks)
        ]

    def at(self, step: StepContext) -> "StepCache":
        segments = tuple(
            Segment(
                half,
                slice(index * self._num_images, (index + 1) * self._num_images),
                self.policy.is_full(step, half),
            )
            for index, half in enumerate(self._halves)
        )
        return StepCache(step, self, segments, self._image_ids_B)

    def block(self, index: int) -> tuple[SegmentCache, ...]:
        return self._blocks[index]

    def owned(self, index: int) -> OwnedBlock | None:
        return self._owned[index]

    def note_peak(self) -> None:
        """Record how much the session holds; asked at its end, when everything is allocated."""
        held = sum(cache.num_bytes for caches in self._blocks for cache in caches)
        held += sum(owned.store.num_bytes for owned in self._owned if owned is not None)
        self.statistics.bytes_peak = max(self.statistics.bytes_peak, held)


@dataclass(frozen=True)
class StepCache:
    """The session in one step."""

    step: StepContext
    session: CacheSession
    segments: tuple[Segment, ...]
    image_ids_B: Tensor

    def block(self, index: int) -> BlockStep:
        session = self.session
        return BlockStep(
            index,
            self.step,
            session.policy,
            self.segments,
            session.block(index),
            self.image_ids_B,
            session.statistics,
            session.owned(index),
        )
