"""The branch cache at home: the output of each routed expert for each token, found again by (token, expert).

The cache holds exactly the branches of the last routing, one row each, newly computed or not. A branch that the routing
drops leaves its row to a new branch. Dropped and new branches are equally many, because the number of branches of an
image is constant.

    row_TE [T, E]     expert 0   1   2   3          values_ND, slopes_ND, step_N
    token 0               0   -   1   -             row 0: token 0, expert 0
    token 1               -   2   3   -             row 1: token 0, expert 2 ...

Shape suffixes: T tokens, E experts, N branches, D hidden size, R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.policy import BranchScores
from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage
from moeca_dist.kernels.reference import store_rows
from moeca_dist.kernels.types import BranchesToServe, FreshRows, Kernels, StoredBranches
from moeca_dist.types import Routing

EMPTY = -1


@dataclass(frozen=True)
class Match:
    """The rows in which the branches of a routing are stored.

    Attributes:
        row_N: int64 row that holds, or will hold, each branch. All rows are distinct.
        found_N: bool, whether the row already holds a value of the branch. The others are unmatched.
        place_N: int64 place of each branch in a flattened table [T, E].
    """

    row_N: Tensor
    found_N: Tensor
    place_N: Tensor


class BranchCache:
    """Unweighted expert outputs of one block, with their slopes if it forecasts.

    A slope is the difference per step of the last two computed values of the same branch. It is zero until there are
    two. With ``scored`` the gates and norms of the time of computation are kept as well.
    """

    def __init__(
        self, num_experts: int, kernels: Kernels, *, forecast: bool, scored: bool, storage: Storage = AS_COMPUTED
    ) -> None:
        self.num_experts = num_experts
        self.kernels = kernels
        self.forecast = forecast
        self.scored = scored
        self.storage = storage
        # Allocated with the first full step, when shapes and dtype are known.
        self._row_TE: Tensor | None = None
        self._values_ND: Packed
        self._slopes_ND: Packed | None = None
        self._step_N: Tensor
        self._gate_N: Tensor
        self._norm_N: Tensor

    def match(self, routing: Routing) -> Match:
        """Find the row of each branch. Unmatched branches get the rows of branches that the routing dropped."""
        place_N = routing.token_N * self.num_experts + routing.expert_N
        if self._row_TE is None:
            row_N = torch.arange(place_N.shape[0], device=place_N.device)
            return Match(row_N, torch.zeros_like(row_N, dtype=torch.bool), place_N)
        assert place_N.shape == self._step_N.shape, "the number of branches is the same in every step"
        found_row_N = self._row_TE.view(-1).index_select(0, place_N).long()
        found_N = found_row_N != EMPTY
        return Match(torch.where(found_N, found_row_N, _dropped_rows(found_row_N, found_N)), found_N, place_N)

    def store_all(self, routing: Routing, match: Match, values_ND: Tensor, step: int) -> None:
        """Keep every branch of a full step: ``values_ND`` in the order of the routing."""
        if self._row_TE is None:
            self._allocate(routing.num_tokens, values_ND)
        store_rows(self._stored, match.row_N, match.found_N, values_ND, step)
        self._note(match)
        if self.scored:
            self._gate_N[match.row_N] = routing.gate_N.float()
            self._norm_N[match.row_N] = values_ND.float().norm(dim=-1)

    def serve(self, routing: Routing, match: Match, refresh_N: Tensor, fresh: FreshRows, step: int) -> Tensor:
        """Return [T, D]: the sum of current gate x branch, fresh if refreshed, else stored or forecast.

        ``fresh`` holds the branches of ``refresh_N``, and is kept.
        """
        wanted = BranchesToServe(
            routing.token_N, routing.start_T, routing.gate_N, match.row_N, match.found_N, refresh_N
        )
        total_TD = self.kernels.serve_branches(self._stored, wanted, fresh, step)
        self._note(match)
        if self.scored:
            row_N = match.row_N.index_select(0, fresh.branch_M)
            self._gate_N[row_N] = routing.gate_N.index_select(0, fresh.branch_M).float()
            self._norm_N[row_N] = fresh.rows_RD.index_select(0, fresh.row_M).float().norm(dim=-1)
        return total_TD

    def scores(self, routing: Routing, match: Match) -> BranchScores | None:
        """Return what was kept of the branches of a routing, if the cache is ``scored``."""
        if not self.scored:
            return None
        smallest = torch.finfo(torch.float32).tiny
        norm_N = self._norm_N[match.row_N]
        total_T = norm_N.new_zeros(routing.num_tokens).index_add_(0, routing.token_N, norm_N)
        return BranchScores(self._gate_N[match.row_N], norm_N / total_T.clamp(min=smallest)[routing.token_N])

    @property
    def num_bytes(self) -> int:
        if self._row_TE is None:
            return 0
        tensors = [self._row_TE, self._step_N, *([self._gate_N, self._norm_N] if self.scored else [])]
        packed = [self._values_ND, *([] if self._slopes_ND is None else [self._slopes_ND])]
        return sum(tensor.nbytes for tensor in tensors) + sum(rows.num_bytes for rows in packed)

    @property
    def _stored(self) -> StoredBranches:
        return StoredBranches(self._values_ND, self._slopes_ND, self._step_N)

    def _note(self, match: Match) -> None:
        """Record which branches the rows now stand for."""
        assert self._row_TE is not None
        self._row_TE.fill_(EMPTY).view(-1).index_copy_(0, match.place_N, match.row_N.int())

    def _allocate(self, num_tokens: int, like_ND: Tensor) -> None:
        self._row_TE = torch.full((num_tokens, self.num_experts), EMPTY, dtype=torch.int32, device=like_ND.device)
        self._values_ND = self.storage.zeros(like_ND.shape, like_ND)
        self._step_N = torch.zeros(like_ND.shape[0], dtype=torch.int32, device=like_ND.device)
        if self.forecast:
            self._slopes_ND = self.storage.zeros(like_ND.shape, like_ND)
        if self.scored:
            self._gate_N = torch.zeros(like_ND.shape[0], device=like_ND.device)
            self._norm_N = torch.zeros(like_ND.shape[0], device=like_ND.device)

    @staticmethod
    def bytes_per_token(num_experts: int, per_token: int, row_bytes: int, *, forecast: bool, scored: bool) -> int:
        """Return what ``_allocate`` takes for a token with ``per_token`` routed experts."""
        row_in_table, step, gate, norm = 4, 4, 4, 4
        branch = (1 + forecast) * row_bytes + step + (gate + norm if scored else 0)
        return num_experts * row_in_table + per_token * branch


def _dropped_rows(found_row_N: Tensor, found_N: Tensor) -> Tensor:
    """Return int64 [N]: for the n-th unmatched branch the n-th row in which no branch was found.

    The rows of matched branches are arbitrary. Rows and branches lie in the order of the images, so a row stays with
    its image. Nothing waits for the device.
    """
    num_rows = found_row_N.shape[0]
    # The last place takes the writes of branches that need none.
    is_free_N = torch.ones(num_rows + 1, dtype=torch.bool, device=found_N.device)
    is_free_N[torch.where(found_N, found_row_N, num_rows)] = False
    is_free_N = is_free_N[:num_rows]
    nth_free_N = torch.where(is_free_N, is_free_N.cumsum(0) - 1, num_rows)
    row_of_nth_N = torch.zeros(num_rows + 1, dtype=torch.int64, device=found_N.device)
    row_of_nth_N[nth_free_N] = torch.arange(num_rows, device=found_N.device)
    nth_unmatched_N = ((~found_N).cumsum(0) - 1).clamp(min=0)
    return row_of_nth_N[nth_unmatched_N]
