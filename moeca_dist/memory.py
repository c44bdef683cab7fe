"""How much a cache will keep, known before anything is computed, and the limit that the user sets on it.

Counted is what is kept between steps. A step needs some more for one block at a time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_dist.cache.policies import build_policy
from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.session import HALVES
from moeca_dist.cache.storage import Storage, storage_of
from moeca_dist.config import CacheConfig, Config, parse_size
from moeca_dist.errors import UserError
from moeca_dist.models.options import parse_dtype
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.placement import Placement, choose_placement
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.report import scaled
from moeca_dist.types import Routing, StepContext

_ROW_GROWTH = 17 / 16  # an owner's rows grow by a sixteenth at least, see cache.owned.RowPool


@dataclass(frozen=True)
class CacheSize:
    """Predicts ``cache.bytes_peak`` of one rank's session, in bytes.

    Exact, except in placement ``owner``: there an upper bound, because what an owner keeps depends on the routing.
    ``element_bytes``: of a value as the network computes it.
    """

    spec: ModelSpec
    policy: Policy
    storage: Storage
    element_bytes: int
    halves: Sequence[Half]
    num_steps: int
    placement: Placement | None
    ep_size: int

    def of(self, images: int) -> int:
        """For so many images on every rank: the most that is kept after any step."""
        if self.policy.unit == "network":
            return images * len(self.halves) * self.spec.num_tokens * self._row
        timelines = [self._modules(half, block) for half in self.halves for block in range(self.spec.depth)]
        modules = max(sum(at_step) for at_step in zip(*timelines, strict=True))
        others = len(self.halves) * len(self.spec.moe_blocks) * self._branches
        others += len(self.halves) * self.spec.depth * self._keys_values
        owned = 0
        if self.placement == "owner":
            rows = images * self.ep_size * self.spec.num_tokens * len(self.halves) * self._entries_at_an_owner
            owned = len(self.spec.moe_blocks) * int(_ROW_GROWTH * rows) * (self._values * self._row + 4)
        return images * self.spec.num_tokens * (modules + others) + owned

    @property
    def _row(self) -> int:
        return self.storage.row_bytes(self.spec.hidden_size, self.element_bytes)

    @property
    def _values(self) -> int:
        """Rows that one branch or routed sum takes: its value, and what a forecast needs."""
        return 1 + self.policy.order

    @property
    def _entries(self) -> int:
        return self.spec.num_experts_per_tok + self.policy.extra_entries

    @property
    def _entries_at_an_owner(self) -> int:
        return min(self._entries, -(-self.spec.num_experts // self.ep_size))

    def _modules(self, half: Half, block: int) -> list[int]:
        """Bytes per token of one block's modules after each step."""
        policy = self.policy
        if policy.computes_modules:
            return [0] * self.num_steps
        # Rows follow the branches of the last MoE block, and before the first there is none.
        synchronised = policy.attention_sync and block >= min(self.spec.moe_blocks)
        attention = self._kept_rows(half, synchronised)
        feed_forward = self._kept_rows(half, synchronised or policy.refreshes_rows)
        return [sum(both) for both in zip(attention, feed_forward, strict=True)]

    def _kept_rows(self, half: Half, by_rows: bool) -> list[int]:
        """Bytes per token of one ``RowCache`` after each step; ``by_rows``: cache steps store single rows."""
        kept, held = 0, []
        for index in range(self.num_steps):
            full = self.policy.is_full(StepContext(index, self.num_steps, 0.0), half)
            if full or by_rows:
                kept = min(kept + 1, self._values)
            held.append(kept * self._row + (4 if by_rows and not full else 0))
        return held

    @property
    def _keys_values(self) -> int:
        """Bytes per token of one block's keys and values."""
        row = self.storage.row_bytes(self.spec.hidden_size // self.spec.num_heads, self.element_bytes)
        return 2 * self.spec.num_heads * row if self.policy.attention_sync else 0

    @property
    def _branches(self) -> int:
        """Bytes per token of one MoE block's branches, or in placement ``owner`` of their table and the routed sums."""
        if self.policy.unit != "branch":
            return 0
        usage = 0 if self.policy.usage_decay is None else 4 * self.spec.num_experts
        expert_id, used, step, row, gate, norm = 8, 4, 4, 8, 4, 4
        if self.placement == "owner":
            return self._entries * (expert_id + used + row) + 8 + self._values * self._row + usage
        reference = gate + norm if self._keeps_reference else 0
        return self._entries * (expert_id + used + step + reference + self._values * self._row) + usage

    @property
    def _keeps_reference(self) -> bool:
        shape = (0, self.spec.num_experts_per_tok)
        return (
            self.policy.reference_gates(Routing(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))) is not None
        )


def cache_size(config: Config, spec: ModelSpec, num_steps: int, ep_size: int) -> CacheSize | None:
    """What ``config`` keeps of the network ``spec``; None without a cache."""
    guided = config.sampling.cfg_scale != 1
    policy = build_policy(config.cache, num_steps, guided=guided)
    if policy is None:
        return None
    halves = HALVES if guided else HALVES[:1]
    element_bytes = parse_dtype(config.model.dtype).itemsize
    placement = choose_placement(
        config.cache, policy, num_steps, halves, spec.num_experts_per_tok, spec.hidden_size * element_bytes,
        ExpertPlacement.contiguous(spec.num_experts, ep_size),
    )  # fmt: skip
    storage = storage_of(config.cache.dtype)
    return CacheSize(spec, policy, storage, element_bytes, halves, num_steps, placement, ep_size)


def check_memory(size: CacheSize | None, config: CacheConfig, images: int, device: torch.device) -> None:
    """Raise UserError where one rank's cache of ``images`` images would exceed ``cache.memory_limit``."""
    if size is None or config.memory_limit is None:
        return
    limit, needed = _limit_bytes(config, device), size.of(images)
    if needed <= limit:
        return
    fitting = next((fewer for fewer in range(images - 1, 0, -1) if size.of(fewer) <= limit), 0)
    batch = f"take sampling.batch_size {fitting}" if fitting else "one image is too much already; take a larger limit"
    smaller = ", cache.dtype float8_e4m3fn or bfloat16" if config.dtype == "model" else ""
    bound = " at most" if size.placement == "owner" else ""
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
