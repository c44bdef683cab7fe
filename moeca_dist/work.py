"""From what the cache counted to what the report says: FLOP computed, branches served, per layer.

Shape suffixes: S steps, Y reasons, E experts.
"""

from typing import Any

from torch import Tensor

from moeca_dist.cache.policy import Policy
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
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
            return BranchReport(routed, routed, 0, 0, 0, 0.0, full_step=routed)
        full, unmatched, forced, score = (counted.total(reason) for reason in REFRESHED)
        if self._policy.unit == "network":
            full = routed - counted.skipped * len(spec.moe_blocks) * per_image
        elif self._policy.unit == "module":
            # A token that the policy chooses takes all its branches along.
            forced = counted.rows["moe"] * spec.num_experts_per_tok
            full = counted.modules["moe"] * spec.num_experts_per_tok - forced
        refreshed = full + unmatched + score + forced
        served = routed - refreshed
        forecast = served if self._policy.order else 0
        ratio = served / routed if routed else 0.0
        return BranchReport(
            routed,
            refreshed,
            unmatched,
            served - forecast,
            forecast,
            ratio,
            full_step=full,
            score=score,
            forced=forced,
        )

    def modules(self) -> dict[str, dict[str, int]]:
        """Tokens of all evaluations by module: ``computed`` as a whole, as single ``rows``, or ``served``.

        Rows are those of the policy's choice, or with ``attention_sync`` those of tokens with a refreshed branch.
        """
        if self._policy is None or self._policy.unit == "network":
            return {}
        spec, counted = self._spec, self._statistics
        layers = {"attention": spec.depth, "dense": spec.depth - len(spec.moe_blocks)}
        found = {}
        for name in sorted({"attention", "dense", "shared", "moe"} & set(counted.modules)):
            every = self._evaluations * spec.num_tokens * layers.get(name, len(spec.moe_blocks))
            computed, rows = counted.modules[name], counted.rows[name]
            found[name] = {"computed": computed - rows, "rows": rows, "served": every - computed}
        return found

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
        """One entry per MoE block: branches by reason, in all, by step and by expert; empty without a branch cache.

        ``refreshed_per_step`` and ``refreshed_per_expert`` add up what was computed, for whatever reason.
        """
        if self._policy is None or self._policy.unit != "branch":
            return ()
        return tuple(
            _entry(block, self._statistics.branches[block])
            for block in self._spec.moe_blocks
            if block in self._statistics.branches
        )


def _entry(block: int, counts_SYE: Tensor) -> dict[str, Any]:
    by_step, by_expert, refreshed_SE = counts_SYE.sum(2), counts_SYE.sum(0), counts_SYE[:, list(REFRESHED)].sum(1)
    names = {reason: reason.name.lower() for reason in Reason}
    return (
        {"block": block}
        | {name: int(by_step[:, reason].sum()) for reason, name in names.items()}
        | {"refreshed_per_step": refreshed_SE.sum(1).tolist(), "refreshed_per_expert": refreshed_SE.sum(0).tolist()}
        | {"per_step": {name: by_step[:, reason].tolist() for reason, name in names.items()}}
        | {"per_expert": {name: by_expert[reason].tolist() for reason, name in names.items()}}
    )
