"""The memory that a cache will keep, predicted before anything is computed, and the limit that the user sets.

The prediction counts what is kept between steps. A step needs some more for one block at a time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_dist.cache.branch_cache import BranchCache
from moeca_dist.cache.expert_usage import UsageHistory
from moeca_dist.cache.module_cache import KeyValueCache, ModuleCache
from moeca_dist.cache.owner_cache import OwnerBranchStore, OwnerSlotTable, SlotAllocator
from moeca_dist.cache.policy import BranchPolicy, Half, ModulePolicy, NetworkPolicy, Policy
from moeca_dist.cache.storage import Storage, storage_of
from moeca_dist.calibration.correction import OutputMemory
from moeca_dist.checkpoints.options import parse_dtype
from moeca_dist.config import CacheConfig, Config, parse_size
from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.value_location import Location
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.report.schema import scaled
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import StepContext


@dataclass(frozen=True)
class CacheSize:
    """A prediction of ``cache.bytes_peak`` of one rank's session: what its caches state, added up.

    Exact for values at home. For values at the owners it is an upper bound: what an owner keeps depends on the routing.

    Attributes:
        element_bytes: size of a value as the network computes it.
        experts_per_owner: the most that a rank holds of one block.
        output_history: outputs of full steps that a calibrated run remembers of each half. None without a calibration.
        output_bytes: size of one of them for one image.
    """

    spec: ModelSpec
    policy: Policy
    storage: Storage
    element_bytes: int
    halves: Sequence[Half]
    num_steps: int
    location: Location | None
    ep_size: int
    experts_per_owner: int
    output_history: int | None
    output_bytes: int

    @classmethod
    def of_run(
        cls, config: Config, spec: ModelSpec, policy: Policy, halves: Sequence[Half], location: Location | None,
        placement: PlacementTable | None, *, output_history: int | None,
    ) -> "CacheSize":  # fmt: skip
        """Return what a resolved ``config`` keeps of the network ``spec``."""
        ep_size, num_steps = config.parallel.ep_size, config.sampling.num_steps
        assert ep_size is not None and num_steps is not None
        table = placement or PlacementTable.contiguous(spec.moe_blocks, spec.num_experts, ep_size)
        per_owner = [len(each.experts_of(rank)) for each in table.by_block.values() for rank in range(each.num_ranks)]
        output_bytes = sampler_for(spec).guided_channels * spec.input_size**2 * torch.float32.itemsize
        return cls(
            spec,
            policy,
            storage_of(config.cache.dtype),
            parse_dtype(config.model.dtype).itemsize,
            halves,
            num_steps,
            location,
            ep_size,
            max(per_owner),
            output_history,
            output_bytes,
        )

    def of(self, images: int) -> int:
        """Return the most that is kept after any step, for so many images on every rank."""
        at_steps = zip(*map(self._per_image, self.halves), strict=True)
        return images * max(map(sum, at_steps)) + self._at_owner(images)

    def _per_image(self, half: Half) -> list[int]:
        """Return the bytes of one guidance half of an image after each step."""
        num_full, held = 0, []
        for index in range(self.num_steps):
            is_full = self.policy.is_full(StepContext(index, self.num_steps, 0.0), half)
            num_full += is_full
            held.append(self.spec.num_tokens * self._per_token(index, num_full, is_full))
            if self.output_history is not None:
                held[-1] += self.output_bytes * OutputMemory.num_kept(self.output_history, num_full, is_full=is_full)
        return held

    def _per_token(self, index: int, num_full: int, is_full: bool) -> int:
        """Return the bytes of one token after step ``index``."""
        policy, row, order = self.policy, self._row_bytes, self.policy.order
        whole = ModuleCache.bytes_per_token(row, order, num_full)
        if isinstance(policy, NetworkPolicy):
            return whole
        by_token = ModuleCache.bytes_per_token(row, order, index + 1, with_steps=not is_full)
        kept = sum(by_token if refreshed else whole for refreshed in self._modules())
        return kept + (self._branches(policy) if isinstance(policy, BranchPolicy) else 0)

    def _modules(self) -> list[bool]:
        """Return for each module that is kept whether cached steps refresh single tokens of it."""
        policy, depth = self.policy, self.spec.depth
        if isinstance(policy, BranchPolicy):
            if policy.computes_modules:
                return []
            # Tokens follow the branches of the last MoE block, and before the first there is none.
            return [policy.attention_sync and block >= min(self.spec.moe_blocks) for block in range(depth)] * 2
        return [False] * depth + [isinstance(policy, ModulePolicy) and policy.refreshes_tokens] * depth

    def _branches(self, policy: BranchPolicy) -> int:
        """Return the bytes of one token's branches in all MoE blocks, and of what is kept to refresh them."""
        spec, row, forecast, scored = self.spec, self._row_bytes, policy.order > 0, policy.usage_decay is not None
        if self.location == "owner":
            kept = OwnerSlotTable.bytes_per_token(spec.num_experts, row, forecast=forecast)
        else:
            k = spec.num_experts_per_tok
            kept = BranchCache.bytes_per_token(spec.num_experts, k, row, forecast=forecast, scored=scored)
        kept += UsageHistory.bytes_per_token(spec.num_experts) if scored else 0
        kept *= len(spec.moe_blocks)
        if policy.attention_sync:
            head_bytes = self.storage.row_bytes(spec.head_dim, self.element_bytes)
            kept += spec.depth * KeyValueCache.bytes_per_token(spec.num_heads, head_bytes)
        return kept

    def _at_owner(self, images: int) -> int:
        """Return the most bytes that the branches of this rank's experts can take, for all ranks."""
        if self.location != "owner":
            return 0
        spec = self.spec
        per_token = self.ep_size * len(self.halves) * min(spec.num_experts_per_tok, self.experts_per_owner)
        slots = SlotAllocator.most_slots(images * spec.num_tokens * per_token)
        slot = OwnerBranchStore.bytes_per_slot(self._row_bytes, forecast=self.policy.order > 0)
        return len(spec.moe_blocks) * slots * slot

    @property
    def _row_bytes(self) -> int:
        return self.storage.row_bytes(self.spec.hidden_size, self.element_bytes)


def check_memory(
    size: CacheSize | None, config: CacheConfig, images: int, device: torch.device, fewer: str = "sampling.batch_size"
) -> None:
    """Raise UserError if one rank's cache of ``images`` images would exceed ``cache.memory_limit``.

    ``fewer``: how the user takes fewer images at once.
    """
    if size is None or config.memory_limit is None:
        return
    limit, needed = _limit_bytes(config, device), size.of(images)
    if needed <= limit:
        return
    fitting = next((count for count in range(images - 1, 0, -1) if size.of(count) <= limit), 0)
    batch = f"take {fewer} {fitting}" if fitting else "one image is too much already; take a larger limit"
    smaller = ", cache.dtype float8_e4m3fn or bfloat16" if config.dtype == "model" else ""
    bound = " at most" if size.location == "owner" else ""
    raise UserError(
        f"the cache of policy {config.policy} would need{bound} {scaled(needed, 1024)}iB on a rank with {images} "
        f"images, over cache.memory_limit {config.memory_limit} ({scaled(limit, 1024)}iB): {batch}{smaller}, or a "
        "policy that keeps less (fora keeps no branches, order 0 one value of each)"
    )


def _limit_bytes(config: CacheConfig, device: torch.device) -> int:
    limit = config.memory_limit
    if isinstance(limit, str):
        return parse_size(limit)
    assert limit is not None
    if device.type == "cuda":
        return int(limit * torch.cuda.get_device_properties(device).total_memory)
    return int(limit * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
