"""From what the cache counted to what the report says: FLOP computed, branches served, per layer."""

from typing import Any

from moeca_dist.cache.policy import Policy
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.models.flops import forward_flops, signal_flops
from moeca_dist.models.spec import ModelSpec
from moeca_dist.report import BranchReport, FlopsReport


class Work:
    """Totals over all ranks of a run of ``evaluations`` image evaluations; without a policy everything was computed."""

    def __init__(self, spec: ModelSpec, evaluations: int, policy: Policy | None, statistics: CacheStatistics) -> None:
        self._spec = spec
        self._evaluations = evaluations
        self._policy = policy
        self._statistics = statistics

    def flops(self) -> FlopsReport:
        """``computed`` from the tokens for which each module ran and the branches that were refreshed."""
        per_image = forward_flops(self._spec)
        full = self._evaluations * per_image.total
        if self._policy is None:
            return FlopsReport(full, full, 1.0)
        spec, ran = self._spec, self._statistics.modules
        if self._policy.unit == "network":
            computed = self._evaluations * per_image.total - self._statistics.skipped * per_image.blocks
            computed += self._statistics.signals * signal_flops(spec)
            return FlopsReport(computed, full, full / computed if computed else 1.0)
        # The tokens that all layers of a kind have in one image evaluation; a row costs as much as any other.
        moe_tokens = max(1, len(spec.moe_blocks) * spec.num_tokens)
        dense_tokens = max(1, (spec.depth - len(spec.moe_blocks)) * spec.num_tokens)
        computed = self._evaluations * per_image.embedding
        computed += ran["attention"] * per_image.attention // (spec.depth * spec.num_tokens)
        computed += ran["dense"] * per_image.dense // dense_tokens
        computed += (ran["shared"] + ran["moe"]) * per_image.shared // moe_tokens
        computed += (ran["router"] + ran["moe"]) * per_image.router // moe_tokens
        computed += self.branches().refreshed * 6 * self._spec.hidden_size * self._spec.expert_width
        return FlopsReport(computed, full, full / computed if computed else 1.0)

    def branches(self) -> BranchReport:
        """Branches of all evaluations, by how they were served."""
        spec, counted = self._spec, self._statistics
        per_image = spec.num_tokens * spec.num_experts_per_tok
        routed = self._evaluations * len(spec.moe_blocks) * per_image
        if self._policy is None:
            return BranchReport(routed, routed, 0, 0, 0, 0.0)
        unmatched = counted.unmatched.total()
        if self._policy.unit == "network":
            refreshed = routed - counted.skipped * len(spec.moe_blocks) * per_image
        else:
            whole = counted.modules["moe"] * spec.num_experts_per_tok
            refreshed = counted.full.total() + unmatched + counted.chosen.total() + whole
        served = routed - refreshed
        forecast = served if self._policy.order else 0
        ratio = served / routed if routed else 0.0
        return BranchReport(routed, refreshed, unmatched, served - forecast, forecast, ratio)

    def extrapolated(self, while_routed: int) -> int:
        """What was counted where the routers ran -> over all evaluations; the same where they ran in all of them."""
        if self._policy is None:
            return while_routed
        every = self._evaluations * len(self._spec.moe_blocks) * self._spec.num_tokens
        ran = self._statistics.modules["router"] + self._statistics.modules["moe"]
        if self._policy.unit == "network":
            ran = every - self._statistics.skipped * len(self._spec.moe_blocks) * self._spec.num_tokens
        if ran in (0, every):
            return while_routed
        return round(while_routed * every / ran)

    def bytes_per_step(self) -> tuple[int, ...]:
        """What all ranks sent in each step; empty where nothing was."""
        sent = self._statistics.bytes_per_step
        return tuple(sent[step] for step in range(1 + max(sent, default=-1)))

    def per_layer(self) -> tuple[dict[str, Any], ...]:
        """One entry per MoE block: branches by how they were served; empty without a branch cache.

        ``refreshed_per_step`` and ``refreshed_per_expert`` divide what was computed (full, unmatched and chosen).
        """
        if self._policy is None or self._policy.unit != "branch":
            return ()
        counted = self._statistics
        num_steps = 1 + max((step for kind in _KINDS for step, _ in getattr(counted, kind)), default=-1)
        rows = []
        for block in self._spec.moe_blocks:
            counts = {kind: _of_block(getattr(counted, kind), block) for kind in _KINDS}
            per_step = [sum(getattr(counted, kind)[step, block] for kind in _REFRESHED) for step in range(num_steps)]
            per_expert = counted.experts[block].tolist() if block in counted.experts else []
            rows.append(
                {"block": block} | counts | {"refreshed_per_step": per_step, "refreshed_per_expert": per_expert}
            )
        return tuple(rows)


_REFRESHED = ("full", "unmatched", "chosen")
_KINDS = (*_REFRESHED, "served")


def _of_block(counter: dict[tuple[int, int], int], block: int) -> int:
    return sum(count for (_, counted), count in counter.items() if counted == block)
