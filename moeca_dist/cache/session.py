"""The cache of one batch of requests: made for it, freed with it.

The batch of the network holds the images of the requests, with guidance twice: conditional ones, then unconditional
ones. A session divides it into parts. Guidance halves with one schedule are one part, and run as one batch. Halves
with schedules of their own are a part each, and the blocks are evaluated part by part.

Shape suffixes: B images of a part, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branch_cache import BranchCache
from moeca_dist.cache.layer_cache import BlockStore, LayerCache
from moeca_dist.cache.network_cache import NetworkCache, NetworkStep
from moeca_dist.cache.owner_cache import OwnerCache
from moeca_dist.cache.policy import HALVES, BranchPolicy, Half, ModulePolicy, NetworkPolicy, Policy
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import AS_COMPUTED, Storage
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import Kernels
from moeca_dist.timing import UNTIMED, Timer
from moeca_dist.types import Request, StepContext


@dataclass(frozen=True)
class PartCache:
    """The caches of images that are full in the same steps, block by block.

    Attributes:
        images: their positions in the batch of the network.
        half: the guidance half whose schedule they follow.
        image_ids_B: int64, seed and index of each image in one number.
        half_B: int64, the guidance half of each image.
    """

    images: slice
    half: Half
    blocks: tuple[BlockStore, ...]
    image_ids_B: Tensor
    half_B: Tensor


@dataclass(frozen=True)
class PartStep:
    """One part of the batch in one evaluation."""

    step: StepContext
    part: PartCache
    policy: ModulePolicy | BranchPolicy
    statistics: CacheStatistics
    timer: Timer

    @property
    def images(self) -> slice:
        return self.part.images

    def block(self, index: int) -> LayerCache:
        """Return the cache of the block ``index`` in this evaluation."""
        part, is_full = self.part, self.policy.is_full(self.step, self.part.half)
        return LayerCache(
            index, self.step, is_full, self.policy, part.blocks[index], part.image_ids_B, part.half_B,
            self.statistics, self.timer,
        )  # fmt: skip


StepCache = NetworkStep | tuple[PartStep, ...]
"""What the network gets with an evaluation: one cache for all blocks, or the parts of the batch."""


class CacheSession:
    """The caches of one batch. ``at(step)`` is what the network gets with each evaluation."""

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
        kernels: Kernels = REFERENCE,
        timer: Timer = UNTIMED,
    ) -> None:
        """Open the caches. Nothing is allocated before the first evaluation.

        Args:
            owner_ranks: size of the expert-parallel group if the owners of the experts keep branch values. All its
                ranks then open their sessions together. None if values are kept at home.
        """
        self.policy = policy
        self.statistics = statistics
        self.timer = timer
        halves = HALVES if guided else HALVES[:1]
        self._network: NetworkCache | None = None
        self._parts: list[PartCache] = []
        if isinstance(policy, NetworkPolicy):
            self._network = NetworkCache(policy, len(requests), halves, storage)
            return
        assert isinstance(policy, ModulePolicy | BranchPolicy)
        image_ids_B = _image_ids(requests).to(device)
        for part_halves in [halves] if policy.halves_agree else [(half,) for half in halves]:
            first = len(requests) * halves.index(part_halves[0])
            blocks = tuple(
                BlockStore(policy, num_experts, _branches(policy, num_experts, owner_ranks, storage, kernels), storage)
                for _ in range(num_blocks)
            )
            half_B = torch.tensor([HALVES.index(half) for half in part_halves], device=device)
            self._parts.append(
                PartCache(
                    slice(first, first + len(requests) * len(part_halves)),
                    part_halves[0],
                    blocks,
                    image_ids_B.repeat(len(part_halves)),
                    half_B.repeat_interleave(len(requests)),
                )
            )

    def at(self, step: StepContext) -> StepCache:
        """Return the cache of one evaluation, for the network."""
        if self._network is not None:
            return NetworkStep(step, self._network, self.statistics, self.timer)
        assert isinstance(self.policy, ModulePolicy | BranchPolicy)
        return tuple(PartStep(step, part, self.policy, self.statistics, self.timer) for part in self._parts)

    @property
    def parts(self) -> tuple[PartCache, ...]:
        return tuple(self._parts)

    @property
    def num_bytes(self) -> int:
        """Return how much the session holds now."""
        blocks = sum(block.num_bytes for part in self._parts for block in part.blocks)
        return blocks + (0 if self._network is None else self._network.num_bytes)

    def note_peak(self, bytes_beside: int = 0) -> None:
        """Record how much is held now.

        Args:
            bytes_beside: what belongs to the cache and is kept elsewhere.
        """
        self.statistics.bytes_peak = max(self.statistics.bytes_peak, self.num_bytes + bytes_beside)


def _branches(
    policy: Policy, num_experts: int, owner_ranks: int | None, storage: Storage, kernels: Kernels
) -> BranchCache | OwnerCache | None:
    if not isinstance(policy, BranchPolicy):
        return None
    forecast = policy.order > 0
    if owner_ranks is not None:
        return OwnerCache(num_experts, owner_ranks, forecast=forecast, storage=storage)
    return BranchCache(num_experts, kernels, forecast=forecast, scored=policy.usage_decay is not None, storage=storage)


def _image_ids(requests: Sequence[Request]) -> Tensor:
    """Return int64 [B], on the host: seed and index of each request in one number."""
    return torch.tensor([request.seed * 2**32 + request.index - 2**63 for request in requests], dtype=torch.int64)
