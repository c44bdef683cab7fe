"""The branch cache: what each routed expert gave for each token, found again by expert id.

Shape suffixes: T tokens of one segment, K routed experts and entries per token, D hidden size, N branches, R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage
from moeca_dist.kernels.reference import match_entries, slopes
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import BranchesToServe, FreshRows, RoutedTokens, RouterWeights, StoredBranches
from moeca_dist.types import Routing


@dataclass(frozen=True)
class Match:
    """Where the branches of a routing are stored.

    ``entry_TK``: the entry that holds, or will hold, each branch; distinct within a token. ``found_TK``: whether the
    entry already holds a value of that expert; the others are unmatched.
    """

    entry_TK: Tensor
    found_TK: Tensor


@dataclass(frozen=True)
class Reference:
    """How matched branches stood when they were last computed.

    ``gates_TK``: the reference gates; ``shares_TK``: the norm of each stored output in the sum over the token's
    entries. Both fp32.
    """

    gates_TK: Tensor
    shares_TK: Tensor


class EntryTable:
    """Which expert's branch each entry of each token stands for, wherever its value is kept.

    A token has as many entries as routed experts, so the branches of experts that left its top-k give way.
    """

    def __init__(self) -> None:
        self._ids_TK: Tensor | None = None

    def match(self, expert_ids_TK: Tensor) -> Match:
        """Find each branch by its expert id; unmatched ones get the entries that are free."""
        if self._ids_TK is None:
            entries = torch.arange(expert_ids_TK.shape[1], device=expert_ids_TK.device)
            return Match(entries.expand_as(expert_ids_TK), torch.zeros_like(expert_ids_TK, dtype=torch.bool))
        return Match(*match_entries(expert_ids_TK, self._ids_TK))

    def route(self, x_TD: Tensor, router: RouterWeights) -> RoutedTokens:
        """Route the tokens and ``match`` them in one."""
        assert self._ids_TK is not None, "the first step of a request is a full step"
        return kernels_for(x_TD.device).route(x_TD, router, self._ids_TK)


class BranchCache(EntryTable):
    """Unweighted expert outputs of one layer and segment, keyed by (token, expert id), with their slopes.

    A slope is the difference of the last two computed values of the *same* branch per step; zero until there are two.
    A policy that compares with the step in which a branch was computed hands over reference gates; then the norms of
    the values are kept as well.
    """

    def __init__(self, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        super().__init__()
        self.forecast = forecast
        self.storage = storage
        # Allocated with the first full step, when shapes and dtype are known.
        self._values_TKD: Packed
        self._slopes_TKD: Packed
        self._steps_TK: Tensor
        self._gates_TK: Tensor | None = None
        self._norms_TK: Tensor | None = None

    def store_all(
        self, expert_ids_TK: Tensor, values_TKD: Tensor, match: Match, step: int, gates_TK: Tensor | None = None
    ) -> None:
        """Keep every branch of a full step; ``gates_TK`` are reference gates, given always or never."""
        tokens, k, hidden = values_TKD.shape
        if self._ids_TK is None:
            self._allocate(values_TKD, with_reference=gates_TK is not None)
        assert self._ids_TK is not None
        token_N = torch.arange(tokens, device=values_TKD.device).repeat_interleave(k)
        at_N = token_N * k + match.entry_TK.flatten()
        self._put(at_N, values_TKD.view(-1, hidden), match.found_TK.flatten(), step)
        self._ids_TK.scatter_(1, match.entry_TK, expert_ids_TK)
        if self._gates_TK is not None and self._norms_TK is not None and gates_TK is not None:
            self._gates_TK.scatter_(1, match.entry_TK, gates_TK.float())
            self._norms_TK.scatter_(1, match.entry_TK, values_TKD.float().norm(dim=-1))

    def serve(
        self,
        routing: Routing,
        match: Match,
        refresh_TK: Tensor,
        fresh: FreshRows,
        step: int,
        reference_gates_TK: Tensor | None = None,
    ) -> Tensor:
        """[T, D]: sum of the *current* gate x branch: fresh where it is refreshed, else stored or forecast.

        ``fresh`` holds what ``refresh_TK`` says; it is kept at the entries that ``match`` gave it.
        ``reference_gates_TK``: given always or never.
        """
        assert self._ids_TK is not None, "the first step of a request is a full step"
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
        stored = StoredBranches(self._values_TKD, self._slopes_TKD if self.forecast else None, self._steps_TK)
        branches = BranchesToServe(gates_TK, match.entry_TK, match.found_TK, refresh_TK)
        total_TD = kernels_for(gates_TK.device).serve_branches(stored, branches, fresh, step)
        _replace(self._ids_TK, match.entry_TK, refresh_TK, ids_TK)
        if self._gates_TK is not None and self._norms_TK is not None and reference_gates_TK is not None:
            _replace(self._gates_TK, match.entry_TK, refresh_TK, reference_gates_TK.float())
            norm_N = fresh.rows_RD.index_select(0, fresh.row_N).float().norm(dim=-1)
            norms_TK = norm_N.new_zeros(refresh_TK.numel()).scatter_(0, fresh.branch_N, norm_N).view_as(refresh_TK)
            _replace(self._norms_TK, match.entry_TK, refresh_TK, norms_TK)
        return total_TD

    def reference(self, match: Match) -> Reference | None:
        """What was kept of the branches of a routing; arbitrary where they are unmatched. None without gates."""
        if self._gates_TK is None or self._norms_TK is None:
            return None
        shares_TK = self._norms_TK / self._norms_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return Reference(self._gates_TK.gather(1, match.entry_TK), shares_TK.gather(1, match.entry_TK))

    @property
    def num_bytes(self) -> int:
        if self._ids_TK is None:
            return 0
        values = self._values_TKD.num_bytes + (self._slopes_TKD.num_bytes if self.forecast else 0)
        tensors = [self._ids_TK, self._steps_TK]
        tensors += [tensor for tensor in (self._gates_TK, self._norms_TK) if tensor is not None]
        return values + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _put(self, at_N: Tensor, values_ND: Tensor, found_N: Tensor, step: int) -> None:
        """Values of ``step`` into entries; ``found_N``: those that hold an older value of the same branch."""
        if self.forecast:
            gap_N = step - self._steps_TK.view(-1)[at_N]
            self._slopes_TKD.put(at_N, slopes(values_ND, self._values_TKD.rows(at_N), gap_N, found_N))
        self._values_TKD.put(at_N, values_ND)
        self._steps_TK.view(-1).index_fill_(0, at_N, step)

    def _allocate(self, like_TKD: Tensor, *, with_reference: bool) -> None:
        shape = like_TKD.shape[:2]
        self._ids_TK = like_TKD.new_empty(shape, dtype=torch.int64)
        self._steps_TK = like_TKD.new_zeros(shape, dtype=torch.int32)
        self._values_TKD = self.storage.zeros(like_TKD.shape, like_TKD)
        if self.forecast:
            self._slopes_TKD = self.storage.zeros(like_TKD.shape, like_TKD)
        if with_reference:
            self._gates_TK = like_TKD.new_zeros(shape, dtype=torch.float32)
            self._norms_TK = like_TKD.new_zeros(shape, dtype=torch.float32)


def _replace(table_TK: Tensor, entry_TK: Tensor, changed_TK: Tensor, new_TK: Tensor) -> None:
    """Write ``new_TK`` to its entries where ``changed_TK``; dense, because the number of changes is not known."""
    table_TK.scatter_(1, entry_TK, torch.where(changed_TK, new_TK, table_TK.gather(1, entry_TK)))
