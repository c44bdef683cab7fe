"""Figures of the report computed from the counters of the cache: FLOP, branches, and entries per layer.

Shape suffixes: S steps, Y reasons, E experts.
"""

from typing import Any

from torch import Tensor

from moeca_dist.cache.policy import BranchPolicy, ModulePolicy, NetworkPolicy, Policy
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.models.flops import forward_flops, signal_flops
from moeca_dist.models.spec import ModelSpec
from moeca_dist.report.schema import BranchReport, FlopsReport


class RunFigures:
    """Totals over all ranks of a run with ``evaluations`` image evaluations. Without a policy everything was
    computed.
    """

    def __init__(self, spec: ModelSpec, evaluations: int, policy: Policy | None, statistics: CacheStatistics) -> None:
        self._spec = spec
        self._evaluations = evaluations
        self._policy = policy
        self._statistics = statistics

    def flops(self) -> FlopsReport:
        """Return the FLOP computed, from the tokens of each module and the number of refreshed branches."""
        per_image = forward_flops(self._spec)
        full = self._evaluations * per_image.total
        if self._policy is None:
            return FlopsReport(full, full, 1.0)
        spec, ran = self._spec, self._statistics.modules
        if isinstance(self._policy, NetworkPolicy):
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
        """Return the branches of all evaluations, by how they were served."""
        spec, counted = self._spec, self._statistics
        per_image = spec.num_tokens * spec.num_experts_per_tok
        routed = self._evaluations * len(spec.moe_blocks) * per_image
        if self._policy is None:
            return BranchReport(routed, routed, 0, 0, 0, 0.0, full_step=routed)
        full, unmatched, forced, score = (counted.total(reason) for reason in REFRESHED)
        if isinstance(self._policy, NetworkPolicy):
            full = routed - counted.skipped * len(spec.moe_blocks) * per_image
        elif isinstance(self._policy, ModulePolicy):
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
        """Return the tokens of all evaluations by module: ``computed`` as a whole, as single ``rows``, or ``served``.

        Rows belong to tokens that the policy chose, or with ``attention_sync`` to tokens with a refreshed branch.
        """
        if self._policy is None or isinstance(self._policy, NetworkPolicy):
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
        """Scale a count from the evaluations in which routers ran to all evaluations.

        If the routers ran in all evaluations, or in none, the count is returned as given.
        """
        if self._policy is None:
            return while_routed
        every = self._evaluations * len(self._spec.moe_blocks) * self._spec.num_tokens
        ran = self._statistics.modules["router"] + self._statistics.modules["moe"]
        if isinstance(self._policy, NetworkPolicy):
            ran = every - self._statistics.skipped * len(self._spec.moe_blocks) * self._spec.num_tokens
        if ran in (0, every):
            return while_routed
        return round(while_routed * every / ran)

    def bytes_per_step(self) -> tuple[int, ...]:
        """Return the bytes that all ranks sent in each step. The tuple is empty if nothing was sent."""
        sent = self._statistics.bytes_per_step
        return tuple(sent[step] for step in range(1 + max(sent, default=-1)))

    def per_layer(self) -> tuple[dict[str, Any], ...]:
        """Return one entry per MoE block with its branches by reason: in all, by step and by expert.

        ``refreshed_per_step`` and ``refreshed_per_expert`` add up the computed branches of all reasons. The tuple is
        empty without a branch cache.
        """
        if not isinstance(self._policy, BranchPolicy):
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
