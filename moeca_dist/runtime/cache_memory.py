"""How much a cache will keep, known before anything is computed, and the limit that the user sets on it.

Counted is what is kept between steps. A step needs some more for one block at a time.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moeca_dist.cache.policy import BranchPolicy, Half, ModulePolicy, NetworkPolicy, Policy
from moeca_dist.cache.storage import Storage, storage_of
from moeca_dist.checkpoints.options import parse_dtype
from moeca_dist.config import CacheConfig, Config, parse_size
from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.value_location import Location
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.report.schema import scaled
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import StepContext

_SLOT_GROWTH = 17 / 16  # an owner's slots grow by a sixteenth at least, see cache.owner_cache.SlotAllocator


@dataclass(frozen=True)
class CacheSize:
    """Predicts ``cache.bytes_peak`` of one rank's session, in bytes.

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
        kept_per_image = max(sum(at_step) for at_step in zip(*self._timelines(), strict=True))
        tokens = images * self.spec.num_tokens * len(self.halves)
        kept = tokens * (len(self.spec.moe_blocks) * self._branches + self.spec.depth * self._keys_values)
        if self.location == "owner":
            slots = tokens * self.ep_size * min(self.spec.num_experts_per_tok, self.experts_per_owner)
            kept += len(self.spec.moe_blocks) * int(_SLOT_GROWTH * slots) * (self._values * self._row + 4)
        return images * kept_per_image + kept

    def _timelines(self) -> Iterator[list[int]]:
        """Bytes per image after each step, of everything that does not keep its size from the first step on."""
        for half in self.halves:
            yield self._outputs(half)
            for per_token in self._per_token(half):
                yield [bytes_ * self.spec.num_tokens for bytes_ in per_token]

    def _per_token(self, half: Half) -> Iterator[list[int]]:
        if isinstance(self.policy, NetworkPolicy):
            yield self._kept_values(half, by_token=False)
        else:
            yield from (self._modules(half, block) for block in range(self.spec.depth))

    @property
    def _row(self) -> int:
        return self.storage.row_bytes(self.spec.hidden_size, self.element_bytes)

    @property
    def _values(self) -> int:
        """Rows that one branch or routed sum takes: its value, and what a forecast needs."""
        return 1 + self.policy.order

    def _modules(self, half: Half, block: int) -> list[int]:
        """Bytes per token of one block's modules after each step."""
        policy = self.policy
        if isinstance(policy, BranchPolicy) and policy.computes_modules:
            return [0] * self.num_steps
        # Tokens follow the branches of the last MoE block, and before the first there is none.
        syncs = isinstance(policy, BranchPolicy) and policy.attention_sync and block >= min(self.spec.moe_blocks)
        by_token = syncs or (isinstance(policy, ModulePolicy) and policy.refreshes_tokens)
        pairs = zip(self._kept_values(half, syncs), self._kept_values(half, by_token), strict=True)
        return [attention + feed_forward for attention, feed_forward in pairs]

    def _kept_values(self, half: Half, by_token: bool) -> list[int]:
        """Return bytes per token of one ``ModuleCache`` after each step; ``by_token``: cached steps store single tokens."""
        kept, held = 0, []
        for index in range(self.num_steps):
            full = self._is_full(index, half)
            if full or by_token:
                kept = min(kept + 1, self._values)
            held.append(kept * self._row + (4 if by_token and not full else 0))
        return held

    def _outputs(self, half: Half) -> list[int]:
        """Bytes per image of the outputs that a calibrated run remembers, after each step."""
        if self.output_history is None:
            return [0] * self.num_steps
        full_steps, held = 0, []
        for index in range(self.num_steps):
            full = self._is_full(index, half)
            full_steps += full
            held.append((min(full_steps, self.output_history) + (not full)) * self.output_bytes)
        return held

    def _is_full(self, index: int, half: Half) -> bool:
        return self.policy.is_full(StepContext(index, self.num_steps, 0.0), half)

    @property
    def _keys_values(self) -> int:
        """Bytes per token of one block's keys and values."""
        if not (isinstance(self.policy, BranchPolicy) and self.policy.attention_sync):
            return 0
        return 2 * self.spec.num_heads * self.storage.row_bytes(self.spec.head_dim, self.element_bytes)

    @property
    def _branches(self) -> int:
        """Return bytes per token of one MoE block's branches, or at owners of their table and the routed sums."""
        if not isinstance(self.policy, BranchPolicy):
            return 0
        spec, scored = self.spec, self.policy.usage_decay is not None
        row_in_table, step, gate, norm, usage = 4, 4, 4, 4, 4
        table = spec.num_experts * (row_in_table + (usage if scored else 0))
        if self.location == "owner":
            return table + 8 + self._values * self._row
        return table + spec.num_experts_per_tok * (step + (gate + norm if scored else 0) + self._values * self._row)


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
