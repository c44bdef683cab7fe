"""The cache of one block: what it keeps between evaluations, and what the block asks of it in one of them.

Shape suffixes: B images, T tokens of one image, D hidden size, N branches, R rows, H heads, C channels of a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeca_dist.cache.branch_cache import BranchCache, Match
from moeca_dist.cache.expert_usage import UsageHistory
from moeca_dist.cache.module_cache import KeyValueCache, ModuleCache, TokenIndex
from moeca_dist.cache.owner_cache import OwnerCache
from moeca_dist.cache.policy import BranchPolicy, LayerView, ModulePolicy, ModuleView
from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.cache.storage import Storage
from moeca_dist.kernels.types import Forecast, FreshRows
from moeca_dist.timing import Timer
from moeca_dist.types import Branches, Routing, StepContext, positions

Module = Literal["attention", "dense", "moe", "shared"]
"""``moe``: a MoE layer as a whole, for module policies. ``shared``: its shared expert, for branch policies."""


class BlockStore:
    """The values that one block keeps: module outputs, keys and values, expert usage and branches."""

    def __init__(
        self, policy: ModulePolicy | BranchPolicy, num_experts: int, branches: BranchCache | OwnerCache | None,
        storage: Storage,
    ) -> None:  # fmt: skip
        """Make an empty store.

        Args:
            branches: None for policies of modules.
        """
        self.num_experts = num_experts
        self.modules: dict[Module, ModuleCache] = {}
        self.keys_values = KeyValueCache(storage)
        self.branches = branches
        self.usage: UsageHistory | None = None
        if isinstance(policy, BranchPolicy) and policy.usage_decay is not None:
            self.usage = UsageHistory(policy.usage_decay, num_experts)
        self._order = policy.order
        self._storage = storage

    def module(self, name: Module) -> ModuleCache:
        """Return the cache of a module's output. It is made at the first call."""
        if name not in self.modules:
            self.modules[name] = ModuleCache(self._order, self._storage)
        return self.modules[name]

    @property
    def num_bytes(self) -> int:
        held = [*self.modules.values(), self.keys_values, self.branches, self.usage]
        return sum(cache.num_bytes for cache in held if cache is not None)


@dataclass(frozen=True)
class RefreshPlan:
    """The branches that a MoE layer computes in one evaluation, decided before anything is computed.

    Attributes:
        routing: of the current step.
        match: the row of each stored branch. None without a cache.
        refresh_N: bool, branches that are computed now. None if all are.
        branch_N: int64 positions of these branches in the routing, ascending. None if all are.
    """

    routing: Routing
    match: Match | None = None
    refresh_N: Tensor | None = None
    branch_N: Tensor | None = None

    @property
    def branches(self) -> Branches:
        """Return the branches that are computed now."""
        every = self.routing.branches
        if self.branch_N is None:
            return every
        return Branches(*(each.index_select(0, self.branch_N) for each in (every.token_N, every.expert_N)))

    def refreshed_tokens(self, tokens_per_image: int) -> TokenIndex:
        """Return the tokens of which some branch is computed now."""
        assert self.refresh_N is not None
        # NOTE: a host synchronisation on CUDA: the number of tokens decides the shapes.
        return TokenIndex(self.routing.tokens_with(self.refresh_N).nonzero().squeeze(1), tokens_per_image)


@dataclass(frozen=True)
class LayerCache:
    """One block's cache in one evaluation: what the block asks in place of computing everything.

    Attributes:
        is_full: whether everything is computed and stored.
        image_ids_B: int64, seed and index of each image in one number.
        half_B: int64, the guidance half of each image.
    """

    block: int
    step: StepContext
    is_full: bool
    policy: ModulePolicy | BranchPolicy
    store: BlockStore
    image_ids_B: Tensor
    half_B: Tensor
    statistics: CacheStatistics
    timer: Timer

    # ---- modules -----------------------------------------------------------------------------------------------------

    @property
    def computes_modules(self) -> bool:
        """Return whether attention, shared expert and dense blocks are computed now, for all tokens."""
        return self.is_full or (isinstance(self.policy, BranchPolicy) and self.policy.computes_modules)

    @property
    def syncs_attention(self) -> bool:
        """Return whether a token with a refreshed branch refreshes its row of attention too."""
        return isinstance(self.policy, BranchPolicy) and self.policy.attention_sync

    def forecast(self, name: Module) -> Forecast:
        """Return what is expected of a module's output, to be summed up by its user."""
        with self.timer.section("bookkeeping"):
            return self.store.module(name).forecast(self.step.index)

    def keep(self, name: Module, output_BTD: Tensor) -> None:
        """Store a module's output for later forecasts, if there will be any. Its tokens are counted."""
        self.count(name, output_BTD)
        if not (isinstance(self.policy, BranchPolicy) and self.policy.computes_modules):
            with self.timer.section("bookkeeping"):
                self.store.module(name).store(output_BTD, self.step.index)

    def keep_tokens(self, name: Module, tokens: TokenIndex, fresh_ND: Tensor) -> None:
        """Store a module's output for some tokens of a cached step, and count these tokens."""
        self.count(name, fresh_ND)
        self.statistics.rows[name] += fresh_ND.shape[0]
        with self.timer.section("bookkeeping"):
            self.store.module(name).store_tokens(tokens, fresh_ND, self.step.index)

    def tokens_to_compute(self, name: Module) -> TokenIndex:
        """Return the tokens that a module policy computes in a cached step."""
        assert isinstance(self.policy, ModulePolicy)
        with self.timer.section("bookkeeping"):
            kept = self.store.module(name)
            chosen_BT = self.policy.tokens(ModuleView(kept.value_BTD, kept.age_BT(self.step.index)))
            # NOTE: a host synchronisation on CUDA: the number of tokens decides the shapes.
            return TokenIndex(chosen_BT.flatten().nonzero().squeeze(1), chosen_BT.shape[1])

    def count(self, name: Module | Literal["router"], computed: Tensor) -> None:
        """Count the tokens of a module's output [..., D]."""
        self.statistics.modules[name] += computed.shape[:-1].numel()

    # ---- branches at home --------------------------------------------------------------------------------------------

    def plan(self, routing: Routing) -> RefreshPlan:
        """Decide which branches are computed now: all in a full step, else unmatched ones and the policy's choice."""
        with self.timer.section("bookkeeping"):
            assert isinstance(self.store.branches, BranchCache)
            match = self.store.branches.match(routing)
            refresh_N = self.decide(routing, match)
            if refresh_N is None:
                return RefreshPlan(routing, match)
            # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
            return RefreshPlan(routing, match, refresh_N, positions(refresh_N))

    def decide(self, routing: Routing, match: Match) -> Tensor | None:
        """Decide which branches are computed now. Observes expert usage and counts reasons.

        Returns:
            bool [N], true for branches that are computed. None if all are.
        """
        policy, found_N = self.policy, match.found_N
        assert isinstance(policy, BranchPolicy)
        if self.store.usage is not None:
            self.store.usage.observe(routing, self.image_ids_B.shape[0])
        if self.is_full:
            self.statistics.count_branches(self.step, self.block, routing.expert_N, Reason.FULL, self.store.num_experts)
            return None
        chosen_N = policy.refresh(self.step, self._view(routing, match))
        reason_N = torch.where(found_N, Reason.SERVED.value, Reason.UNMATCHED.value)
        if chosen_N is not None:
            reason_N.masked_fill_(chosen_N & found_N, policy.reason.value)
        self.statistics.count_branches(self.step, self.block, routing.expert_N, reason_N, self.store.num_experts)
        return ~found_N if chosen_N is None else ~found_N | chosen_N

    def merge(self, plan: RefreshPlan, rows_RD: Tensor, row_N: Tensor) -> Tensor:
        """Return the routed sums [T, D] of a cached step, and keep the computed branches.

        ``row_N``: which of ``rows_RD`` each branch of ``plan.branch_N`` is.
        """
        assert isinstance(self.store.branches, BranchCache)
        assert plan.match is not None and plan.refresh_N is not None and plan.branch_N is not None
        with self.timer.section("bookkeeping"):
            fresh = FreshRows(rows_RD, plan.branch_N, row_N)
            return self.store.branches.serve(plan.routing, plan.match, plan.refresh_N, fresh, self.step.index)

    def keep_all(self, plan: RefreshPlan, values_ND: Tensor) -> None:
        """Keep all branches of a full step, in the order of the routing."""
        assert isinstance(self.store.branches, BranchCache) and plan.match is not None
        with self.timer.section("bookkeeping"):
            self.store.branches.store_all(plan.routing, plan.match, values_ND, self.step.index)

    def _view(self, routing: Routing, match: Match) -> LayerView:
        branches, usage = self.store.branches, self.store.usage
        return LayerView(
            self.block,
            routing,
            match.found_N,
            self.image_ids_B,
            self.half_B,
            branches.scores(routing, match) if isinstance(branches, BranchCache) else None,
            None if usage is None else usage.usage_BTE,
        )
