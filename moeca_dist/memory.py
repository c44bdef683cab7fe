"""How much a cache will keep, known before anything is computed, and the limit that the user sets on it.

Counted is what is kept between steps. A step needs some more for one block at a time.
"""

import os
from collections.abc import Iterator, Sequence
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
from moeca_dist.parallel.placement_table import PlacementTable
from moeca_dist.report import scaled
from moeca_dist.sampling.calibration import Calibration, read_calibration
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Routing, StepContext

_ROW_GROWTH = 17 / 16  # an owner's rows grow by a sixteenth at least, see cache.owned.RowPool


@dataclass(frozen=True)
class CacheSize:
    """Predicts ``cache.bytes_peak`` of one rank's session, in bytes.

    Exact, but an upper bound in placement ``owner``, where what an owner keeps depends on the routing.
    ``element_bytes``: of a value as the network computes it. ``experts_per_owner``: the most that a rank holds of one
    block.
    ``coded``: rows travel as codes, and both ends keep references.
    ``output_history``: outputs of full steps that a calibrated run remembers of each half, None without a calibration;
    ``output_bytes``: size of one of them for one image.
    """

    spec: ModelSpec
    policy: Policy
    storage: Storage
    element_bytes: int
    halves: Sequence[Half]
    num_steps: int
    placement: Placement | None
    ep_size: int
    experts_per_owner: int
    coded: bool
    output_history: int | None
    output_bytes: int

    def of(self, images: int) -> int:
        """For so many images on every rank: the most that is kept after any step."""
        kept_per_image = max(sum(at_step) for at_step in zip(*self._timelines(), strict=True))
        tokens = images * self.spec.num_tokens
        kept = (
            tokens
            * len(self.halves)
            * (len(self.spec.moe_blocks) * self._branches + self.spec.depth * self._keys_values)
        )
        if self.placement == "owner":
            rows = tokens * self.ep_size * len(self.halves) * min(self.spec.num_experts_per_tok, self.experts_per_owner)
            kept += len(self.spec.moe_blocks) * int(_ROW_GROWTH * rows) * (self._values * self._row + 4)
        return images * kept_per_image + kept + tokens * len(self.halves) * self._references

    def _timelines(self) -> Iterator[list[int]]:
        """Bytes per image after each step, of everything that does not keep its size from the first step on."""
        for half in self.halves:
            yield self._outputs(half)
            for per_token in self._per_token(half):
                yield [bytes_ * self.spec.num_tokens for bytes_ in per_token]

    def _per_token(self, half: Half) -> Iterator[list[int]]:
        if self.policy.unit == "network":
            if self.policy.delta is not None:
                yield [self._row] * self.num_steps
            else:
                yield self._kept_rows(half, by_rows=False)
            return
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
            full = self._is_full(index, half)
            if full or by_rows:
                kept = min(kept + 1, self._values)
            held.append(kept * self._row + (4 if by_rows and not full else 0))
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
        row = self.storage.row_bytes(self.spec.hidden_size // self.spec.num_heads, self.element_bytes)
        return 2 * self.spec.num_heads * row if self.policy.attention_sync else 0

    @property
    def _branches(self) -> int:
        """Bytes per token of one MoE block's branches, or in placement ``owner`` of their table and the routed sums."""
        if self.policy.unit != "branch":
            return 0
        k = self.spec.num_experts_per_tok
        usage = 0 if self.policy.usage_decay is None else 4 * self.spec.num_experts
        expert_id, step, row, gate, norm = 8, 4, 8, 4, 4
        if self.placement == "owner":
            return k * (expert_id + row) + 8 + self._values * self._row + usage
        reference = gate + norm if self._keeps_reference else 0
        return k * (expert_id + step + reference + self._values * self._row) + usage

    @property
    def _references(self) -> int:
        """Bytes per token, where all ranks have as many, of what is kept of coded rows, as a home and as an owner."""
        if not self.coded:
            return 0
        # Branches that return one by one are coded by themselves.
        legs = 1 if self.policy.unit == "branch" and self.placement != "owner" else 2
        row = self.spec.hidden_size * self.element_bytes
        return len(self.spec.moe_blocks) * legs * 2 * (self.ep_size - 1) * row

    @property
    def _keeps_reference(self) -> bool:
        shape = (0, self.spec.num_experts_per_tok)
        return (
            self.policy.reference_gates(Routing(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))) is not None
        )


def cache_size(
    config: Config, spec: ModelSpec, num_steps: int, ep_size: int, calibration: Calibration | None = None
) -> CacheSize | None:
    """What ``config`` keeps of the network ``spec``; None without a cache.

    ``calibration``: where there is no file of it, or it was read already.
    """
    guided = config.sampling.cfg_scale != 1
    policy = build_policy(config.cache, num_steps, guided=guided)
    if policy is None:
        return None
    halves = HALVES if guided else HALVES[:1]
    element_bytes = parse_dtype(config.model.dtype).itemsize
    placement = choose_placement(config.cache, policy, spec.num_experts_per_tok, ep_size)
    if calibration is None and config.cache.calibration is not None:
        calibration = read_calibration(config.cache.calibration)
    return CacheSize(
        spec,
        policy,
        storage_of(config.cache.dtype),
        element_bytes,
        halves,
        num_steps,
        placement,
        ep_size,
        experts_per_owner=_experts_per_owner(config, spec, ep_size),
        coded=config.parallel.rows != "exact",
        output_history=None if calibration is None else calibration.weights.history,
        output_bytes=sampler_for(spec).guided_channels * spec.input_size**2 * torch.float32.itemsize,
    )


def _experts_per_owner(config: Config, spec: ModelSpec, ep_size: int) -> int:
    path = config.parallel.expert_placement
    table = (
        PlacementTable.contiguous(spec.moe_blocks, spec.num_experts, ep_size)
        if path is None
        else PlacementTable.read(path)
    )
    return max(
        len(placement.experts_of(rank)) for placement in table.by_block.values() for rank in range(placement.num_ranks)
    )


def check_memory(
    size: CacheSize | None, config: CacheConfig, images: int, device: torch.device, fewer: str = "sampling.batch_size"
) -> None:
    """Raise UserError where one rank's cache of ``images`` images would exceed ``cache.memory_limit``.

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
