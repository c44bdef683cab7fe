"""The branch cache at the owners: values beside the experts, and the table of their slots beside the tokens.

    home rank: OwnerSlotTable                      owner rank: OwnerBranchStore
    slot_TE  expert 0   1   2                      home 0: row 0, row 1, ...   values_RD, slopes_RD, step_R
    token 0         4   -   0   <- slot at the     home 1: row 0, row 1, ...
    token 1         -   1   -      expert's owner

The home rank decides everything: it matches branches, and hands out slots of each owner's store (``SlotAllocator``). So
it knows what an owner holds without asking. An owner writes and reads the slots that it is told. Each home rank numbers
its own slots from 0.

Shape suffixes: T tokens of the home rank, E experts, D hidden size, N branches, R rows at an owner, S tokens that are
summed here, P ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.cache.branch_cache import EMPTY, Match
from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage, stretched
from moeca_dist.kernels.reference import store_rows
from moeca_dist.kernels.types import StoredBranches
from moeca_dist.types import Routing

_GROWTH = 16  # a store that is too small grows by one part of so many at least, because growing copies it


class SlotAllocator:
    """The slots of each owner's store that this home rank uses, for one block."""

    def __init__(self, num_owners: int) -> None:
        self._taken: list[Tensor] = [torch.zeros(0, dtype=torch.bool) for _ in range(num_owners)]

    @property
    def capacities(self) -> list[int]:
        """Return the number of slots that each owner must have room for."""
        return [taken.shape[0] for taken in self._taken]

    @property
    def in_use(self) -> list[int]:
        """Return the number of slots in use at each owner."""
        return [int(taken.sum()) for taken in self._taken]

    def release(self, owner_N: Tensor, slot_N: Tensor) -> None:
        """Give slots back."""
        for owner, taken in enumerate(self._taken):
            if taken.shape[0]:
                taken[slot_N[owner_N == owner]] = False

    def take(self, owner_N: Tensor) -> Tensor:
        """Return a free slot [N] at each owner. The lowest ones are taken, so that stores stay compact."""
        slot_N = torch.empty_like(owner_N)
        for owner in range(len(self._taken)):
            wanted_N = owner_N == owner
            # NOTE: a host synchronisation on CUDA: the number of slots decides the shapes.
            if count := int(wanted_N.sum()):
                slot_N[wanted_N] = self._take_from(owner, count, owner_N.device)
        return slot_N

    def _take_from(self, owner: int, count: int, device: torch.device) -> Tensor:
        taken = self._taken[owner].to(device)
        free = (~taken).nonzero().squeeze(1)[:count]
        if missing := count - free.shape[0]:
            grown = taken.new_zeros(missing if not taken.shape[0] else max(missing, taken.shape[0] // _GROWTH))
            taken = torch.cat([taken, grown])
            free = (~taken).nonzero().squeeze(1)[:count]
        taken[free] = True
        self._taken[owner] = taken
        return free

    @staticmethod
    def most_slots(num_branches: int) -> int:
        """Return the most slots that owners make room for if so many branches need one at a time."""
        return num_branches + num_branches // _GROWTH


class OwnerSlotTable:
    """The table of one block at a home rank: the slot of each branch at its owner, and each token's routed sum.

    Tokens without a refreshed or dropped branch are served from the sums: the last one, or with ``forecast`` the line
    through the last two. Sums over different experts give no slope, so a token whose experts changed keeps its old one.
    On the shipped model that is 0.3 dB better than a slope across the change.
    """

    def __init__(self, num_experts: int, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        self.num_experts = num_experts
        self.forecast = forecast
        self.storage = storage
        self._slot_TE: Tensor | None = None
        # Allocated with the first sums, when shapes and dtype are known.
        self._sums_TD: Packed | None = None
        self._slopes_TD: Packed
        self._step_T: Tensor

    def match(self, routing: Routing) -> Match:
        """Find the slot of each branch. Unmatched branches have none before ``assign``."""
        if self._slot_TE is None:
            shape, device = (routing.num_tokens, self.num_experts), routing.token_N.device
            self._slot_TE = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
        place_N = routing.token_N * self.num_experts + routing.expert_N
        slot_N = self._slot_TE.view(-1).index_select(0, place_N).long()
        return Match(slot_N, slot_N != EMPTY, place_N)

    def assign(
        self, routing: Routing, match: Match, slots: SlotAllocator, owner_of_expert_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give slots to unmatched branches. Dropped branches leave theirs.

        Returns:
            The slot [N] of every branch, and bool [T]: tokens of which the routing dropped a branch.
        """
        assert self._slot_TE is not None
        # NOTE: host synchronisations on CUDA, here and below: numbers of branches decide the shapes.
        new_N = (~match.found_N).nonzero().squeeze(1)
        has_dropped_T = torch.zeros_like(routing.start_T, dtype=torch.bool)
        if not new_N.shape[0]:
            # An image has equally many branches in every step, so nothing is dropped either.
            return match.row_N, has_dropped_T
        is_routed_TE = torch.zeros_like(self._slot_TE, dtype=torch.bool)
        is_routed_TE.view(-1)[match.place_N] = True
        token_X, expert_X = (~is_routed_TE & (self._slot_TE != EMPTY)).nonzero().unbind(1)
        slots.release(owner_of_expert_E[expert_X], self._slot_TE[token_X, expert_X].long())
        self._slot_TE[token_X, expert_X] = EMPTY
        new_slot_N = slots.take(owner_of_expert_E[routing.expert_N[new_N]])
        self._slot_TE.view(-1)[match.place_N[new_N]] = new_slot_N.int()
        return match.row_N.index_copy(0, new_N, new_slot_N), has_dropped_T.index_fill_(0, token_X, True)

    def serve(self, touched_T: Tensor, changed_T: Tensor, fresh_TD: Tensor, step: int) -> Tensor:
        """Return the routed sums [T, D], and keep the fresh ones.

        Args:
            touched_T: bool, tokens whose sum is ``fresh_TD``. The others get the sum that is expected in ``step``.
            changed_T: bool, tokens with an unmatched or a dropped branch.
        """
        if self._sums_TD is None:
            self._sums_TD = self.storage.pack(fresh_TD.clone())
            self._step_T = torch.full_like(touched_T, step, dtype=torch.int64)
            if self.forecast:
                self._slopes_TD = self.storage.zeros(fresh_TD.shape, fresh_TD)
            return fresh_TD
        if self.forecast:
            steady_N = (touched_T & ~changed_T).nonzero().squeeze(1)
            gap_N = (step - self._step_T[steady_N]).to(fresh_TD.dtype)
            change_ND = fresh_TD.index_select(0, steady_N) - self._sums_TD.rows(steady_N)
            self._slopes_TD.put(steady_N, change_ND / gap_N[:, None])
        token_N = touched_T.nonzero().squeeze(1)
        fresh_ND = fresh_TD.index_select(0, token_N)
        self._sums_TD.put(token_N, fresh_ND)
        self._step_T[token_N] = step
        expected_TD = self._sums_TD.unpack()
        if self.forecast:
            ahead_T = (step - self._step_T).to(fresh_TD.dtype)
            expected_TD = torch.addcmul(expected_TD, self._slopes_TD.unpack(), ahead_T[:, None])
        elif self._sums_TD.is_exact:
            expected_TD = expected_TD.clone()
        # What was computed now is used as computed, not as stored.
        return expected_TD if self._sums_TD.is_exact else expected_TD.index_copy_(0, token_N, fresh_ND)

    @property
    def num_bytes(self) -> int:
        if self._slot_TE is None or self._sums_TD is None:
            return 0
        values = self._sums_TD.num_bytes + (self._slopes_TD.num_bytes if self.forecast else 0)
        return values + self._slot_TE.nbytes + self._step_T.nbytes

    @staticmethod
    def bytes_per_token(num_experts: int, row_bytes: int, *, forecast: bool) -> int:
        """Return what the table of one block keeps of a token."""
        slot_in_table, step = 4, 8
        return num_experts * slot_in_table + (1 + forecast) * row_bytes + step


class OwnerBranchStore:
    """The unweighted outputs of this rank's experts for all ranks' tokens in one block, row by row, with slopes.

    Each home rank has rows of its own, which it numbers from 0.
    """

    def __init__(self, num_homes: int, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        self.forecast = forecast
        self.storage = storage
        self._slots_per_home = [0] * num_homes
        self._bases_P: Tensor
        self._values_RD: Packed | None = None
        self._slopes_RD: Packed
        self._step_R: Tensor

    def make_room(self, slots_per_home: Sequence[int], like_RD: Tensor) -> None:
        """Hold at least so many slots for each home rank, of the width and dtype of ``like_RD``."""
        if self._values_RD is not None and self._slots_per_home == list(slots_per_home):
            return
        before, self._slots_per_home = self._slots_per_home, list(slots_per_home)
        ends = torch.tensor(self._slots_per_home, device=like_RD.device).cumsum(0)
        self._bases_P = ends - ends.new_tensor(self._slots_per_home)
        if self._values_RD is None:
            self._values_RD = self.storage.zeros((0, like_RD.shape[1]), like_RD)
            self._slopes_RD = self._values_RD
            self._step_R = torch.zeros(0, dtype=torch.int32, device=like_RD.device)
        after = self._slots_per_home
        self._values_RD = self._values_RD.stretched(before, after)
        self._step_R = stretched(self._step_R, before, after)
        if self.forecast:
            self._slopes_RD = self._slopes_RD.stretched(before, after)

    def rows(self, home_N: Tensor, slot_N: Tensor) -> Tensor:
        """Return the row [N] of each slot, given with its home rank."""
        return self._bases_P[home_N] + slot_N

    def store(self, row_N: Tensor, found_N: Tensor, values_ND: Tensor, step: int) -> None:
        """Keep freshly computed branches.

        Args:
            found_N: bool, whether the row holds an older value of the same branch.
        """
        assert self._values_RD is not None
        slopes_RD = self._slopes_RD if self.forecast else None
        store_rows(StoredBranches(self._values_RD, slopes_RD, self._step_R), row_N, found_N, values_ND, step)

    def weighted_sums(
        self, row_N: Tensor, gates_N: Tensor, starts_S: Tensor, step: int, fresh: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the sums [S, D] of gate x value over consecutive branches, from each start to the next.

        Values are stored, forecast or fresh.

        Args:
            fresh: positions of the branches that were computed and stored in this step, and their values [F, D].
        """
        assert self._values_RD is not None
        if not starts_S.shape[0]:
            return fresh[1].new_zeros(0, self._values_RD.shape[1])
        weights_N = gates_N.to(self._values_RD.dtype)
        if not self._values_RD.is_exact:
            values_ND = self._expected(row_N, step).index_copy_(0, *fresh)
            each_N = torch.arange(row_N.shape[0], device=row_N.device)
            return F.embedding_bag(each_N, values_ND, starts_S, mode="sum", per_sample_weights=weights_N)
        values_RD = self._values_RD.unpack()
        sums_SD = F.embedding_bag(row_N, values_RD, starts_S, mode="sum", per_sample_weights=weights_N)
        if self.forecast:
            ahead_N, slopes_RD = weights_N * (step - self._step_R[row_N]), self._slopes_RD.unpack()
            sums_SD += F.embedding_bag(row_N, slopes_RD, starts_S, mode="sum", per_sample_weights=ahead_N)
        return sums_SD

    def _expected(self, row_N: Tensor, step: int) -> Tensor:
        """Return the values [N, D] of branches in ``step``, in a tensor of their own."""
        assert self._values_RD is not None
        values_ND = self._values_RD.rows(row_N)
        if self.forecast:
            ahead_N1 = (step - self._step_R[row_N]).to(values_ND.dtype)[:, None]
            values_ND.addcmul_(self._slopes_RD.rows(row_N), ahead_N1)
        return values_ND

    @property
    def num_bytes(self) -> int:
        if self._values_RD is None:
            return 0
        values = self._values_RD.num_bytes + (self._slopes_RD.num_bytes if self.forecast else 0)
        return values + self._step_R.numel() * self._step_R.element_size()

    @staticmethod
    def bytes_per_slot(row_bytes: int, *, forecast: bool) -> int:
        """Return what the store keeps of one branch."""
        step = 4
        return (1 + forecast) * row_bytes + step


class OwnerCache:
    """One block with branch values at the owners: this rank as a home (``table``, ``slots``) and as an owner."""

    def __init__(self, num_experts: int, num_ranks: int, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        self.table = OwnerSlotTable(num_experts, forecast=forecast, storage=storage)
        self.slots = SlotAllocator(num_ranks)
        self.store = OwnerBranchStore(num_ranks, forecast=forecast, storage=storage)

    @property
    def num_bytes(self) -> int:
        return self.table.num_bytes + self.store.num_bytes
