"""The cache of one batch of requests: made for it, freed with it.

A session holds one set of caches for each block and segment, and one for the network as a whole.

Shape suffixes: B images of the network's batch, T tokens of one image, D hidden size, S signal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_dist.cache.block import BlockStep, Followed, Segment, SegmentCache
from moeca_dist.cache.network import NetworkCache
from moeca_dist.cache.owned import OwnedBlock, OwnedBranches, RowPool
from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.rows import RowCache
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import AS_COMPUTED, Storage
from moeca_dist.timing import UNTIMED, Timer
from moeca_dist.types import Request, StepContext

HALVES: tuple[Half, Half] = ("conditional", "unconditional")
Compute = Callable[[slice], Tensor]
"""A slice of the batch's images -> what all blocks make of them [B, T, D]."""


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
        num_experts: int,
        statistics: CacheStatistics,
        device: torch.device | str = "cpu",
        owner_ranks: int | None = None,
        storage: Storage = AS_COMPUTED,
        timer: Timer = UNTIMED,
        bytes_beside: Callable[[], int] = lambda: 0,
    ) -> None:
        self.policy = policy
        self.timer = timer
        self.statistics = statistics
        self._bytes_beside = bytes_beside
        self._halves = HALVES if guided else HALVES[:1]
        self._num_images = len(requests)
        self._image_ids_B = torch.tensor(
            [request.seed * 2**32 + request.index - 2**63 for request in requests], dtype=torch.int64, device=device
        )
        self._blocks = [
            tuple(SegmentCache(policy, num_experts, storage) for _ in self._halves) for _ in range(num_blocks)
        ]
        self.network = NetworkCache(storage)
        self.changes = tuple(RowCache(policy.order, storage) for _ in self._halves)  # of the whole network, by schedule
        self._owned = [
            None
            if owner_ranks is None
            else OwnedBlock(
                RowPool(owner_ranks), OwnedBranches(owner_ranks, forecast=policy.order > 0, storage=storage)
            )
            for _ in range(num_blocks)
        ]

    def at(self, step: StepContext) -> "StepCache":
        self.note_peak()
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
        """Record how much the session holds, and what is kept beside it; asked before every step and at its end."""
        held = sum(cache.num_bytes for caches in self._blocks for cache in caches) + self.network.num_bytes
        held += sum(change.num_bytes for change in self.changes)
        held += sum(owned.store.num_bytes for owned in self._owned if owned is not None) + self._bytes_beside()
        self.statistics.bytes_peak = max(self.statistics.bytes_peak, held)


@dataclass(frozen=True)
class StepCache:
    """The session in one step."""

    step: StepContext
    session: CacheSession
    segments: tuple[Segment, ...]
    image_ids_B: Tensor
    followed: Followed = field(default_factory=Followed)

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
            self.followed,
            session.owned(index),
            session.timer,
        )

    @property
    def per_network(self) -> bool:
        """Whether the blocks are computed or skipped all together."""
        return self.session.policy.unit == "network"

    def serve_network(self, x_BTD: Tensor, signal: Callable[[], Tensor], compute: Compute) -> Tensor:
        """The output of all blocks [B, T, D] for the input ``x_BTD``: computed, or the input plus the expected change.

        ``compute(images)`` runs the blocks for a slice of the batch and measures itself; ``signal()`` is the time alone
        [S], asked where a threshold on its change decides. Which of them run is the same on all ranks.
        """
        delta = self.session.policy.delta
        return self._by_schedule(x_BTD, compute) if delta is None else self._by_change(x_BTD, signal(), delta, compute)

    def _by_change(self, x_BTD: Tensor, signal_S: Tensor, delta: float, compute: Compute) -> Tensor:
        session, network = self.session, self.session.network
        session.statistics.signals += 1
        with session.timer.section("bookkeeping"):
            if not network.is_due(signal_S, delta):
                session.statistics.skipped += x_BTD.shape[0]
                return network.apply(x_BTD)
        session.statistics.reached += self.step.index > 0
        out_BTD = compute(slice(None))
        with session.timer.section("bookkeeping"):
            network.store(out_BTD - x_BTD)
        return out_BTD

    def _by_schedule(self, x_BTD: Tensor, compute: Compute) -> Tensor:
        changes, index, timer = self.session.changes, self.step.index, self.session.timer
        if all(segment.full for segment in self.segments):
            out_BTD = compute(slice(None))
            with timer.section("bookkeeping"):
                for segment, change in zip(self.segments, changes, strict=True):
                    change.store(out_BTD[segment.images] - x_BTD[segment.images], index)
            return out_BTD
        out_BTD = torch.empty_like(x_BTD)
        for segment, change in zip(self.segments, changes, strict=True):
            here_BTD = x_BTD[segment.images]
            if segment.full:
                out_BTD[segment.images] = compute(segment.images)
                with timer.section("bookkeeping"):
                    change.store(out_BTD[segment.images] - here_BTD, index)
                continue
            with timer.section("bookkeeping"):
                change.forecast_into(out_BTD[segment.images], index)
                out_BTD[segment.images] += here_BTD
            self.session.statistics.skipped += here_BTD.shape[0]
        return out_BTD
