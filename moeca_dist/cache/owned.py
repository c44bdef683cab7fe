"""The branch cache of placement ``owner``: values beside the experts, the table of what is where beside the tokens.

The home rank decides everything: it matches branches, and hands out the rows of each owner's cache. So it knows what
an owner holds without asking, and an owner writes and reads the rows that it is told.

Shape suffixes: T tokens of one segment, K routed experts and entries per token, D hidden size, N branches, S tokens
that are summed here, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.cache.branches import EntryTable, Match
from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage
from moeca_dist.kernels.reference import slopes

_EMPTY = -1  # an entry that stands for no expert yet


class RowPool:
    """Which rows of each owner's cache this home rank uses, for one block; both guidance halves draw from it."""

    def __init__(self, num_owners: int) -> None:
        self._taken: list[Tensor] = [torch.zeros(0, dtype=torch.bool) for _ in range(num_owners)]

    @property
    def capacities(self) -> list[int]:
        """Rows that each owner must have room for."""
        return [taken.shape[0] for taken in self._taken]

    @property
    def in_use(self) -> list[int]:
        return [int(taken.sum()) for taken in self._taken]

    def release(self, owner_N: Tensor, row_N: Tensor) -> None:
        for owner, taken in enumerate(self._taken):
            if taken.shape[0]:
                taken[row_N[owner_N == owner]] = False

    def take(self, owner_N: Tensor) -> Tensor:
        """A row [N] at each owner that nothing else uses; the lowest ones, so that caches stay compact."""
        row_N = torch.empty_like(owner_N)
        for owner in range(len(self._taken)):
            wanted_N = owner_N == owner
            if count := int(wanted_N.sum()):
                row_N[wanted_N] = self._take_from(owner, count, owner_N.device)
        return row_N

    def _take_from(self, owner: int, count: int, device: torch.device) -> Tensor:
        taken = self._taken[owner].to(device)
        free = (~taken).nonzero().squeeze(1)[:count]
        if missing := count - free.shape[0]:
            # Growing copies the owner's cache: by a sixteenth at least, so that it is rare.
            grown = taken.new_zeros(missing if not taken.shape[0] else max(missing, taken.shape[0] // 16))
            taken = torch.cat([taken, grown])
            free = (~taken).nonzero().squeeze(1)[:count]
        taken[free] = True
        self._taken[owner] = taken
        return free


class HomeTable(EntryTable):
    """What a home rank keeps for one block and segment: where each branch is, and each token's routed sum.

    Tokens of which nothing is refreshed are served from the sums: the last one, or with ``forecast`` the line through
    the last two. Two sums over different experts give no slope, so a token whose experts changed keeps its old one:
    on the shipped model that is 0.3 dB better than a slope across the change.
    """

    def __init__(self, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        super().__init__()
        self.forecast = forecast
        self.storage = storage
        self._rows_TK: Tensor
        # Allocated with the first sums, when shapes and dtype are known.
        self._sums_TD: Packed | None = None
        self._slopes_TD: Packed
        self._steps_T: Tensor

    def assign(self, expert_ids_TK: Tensor, match: Match, pool: RowPool, owner_of_expert_E: Tensor) -> Tensor:
        """The row [T, K] of every branch at its owner; unmatched ones take over the entries that ``match`` gave."""
        if self._ids_TK is None:
            self._ids_TK = torch.full_like(expert_ids_TK, _EMPTY)
            self._rows_TK = torch.zeros_like(self._ids_TK)
        token_N, slot_N = (~match.found_TK).nonzero().unbind(1)
        if token_N.shape[0]:
            entry_N, ids_N = match.entry_TK[token_N, slot_N], expert_ids_TK[token_N, slot_N]
            left_N = self._ids_TK[token_N, entry_N]
            held_N = left_N != _EMPTY
            pool.release(owner_of_expert_E[left_N[held_N]], self._rows_TK[token_N, entry_N][held_N])
            self._rows_TK[token_N, entry_N] = pool.take(owner_of_expert_E[ids_N])
            self._ids_TK[token_N, entry_N] = ids_N
        return self._rows_TK.gather(1, match.entry_TK)

    def serve(self, touched_T: Tensor, changed_T: Tensor, fresh_TD: Tensor, step: int) -> Tensor:
        """[T, D] routed sums: ``fresh_TD`` where touched, and kept; elsewhere what is expected in ``step``.

        ``changed_T``: touched tokens of which some branch was unmatched.
        """
        if self._sums_TD is None:
            self._sums_TD = self.storage.pack(fresh_TD.clone())
            self._steps_T = torch.full_like(touched_T, step, dtype=torch.int64)
            if self.forecast:
                self._slopes_TD = self.storage.zeros(fresh_TD.shape, fresh_TD)
            return fresh_TD
        if self.forecast:
            steady_N = (touched_T & ~changed_T).nonzero().squeeze(1)
            gap_N = (step - self._steps_T[steady_N]).to(fresh_TD.dtype)
            change_ND = fresh_TD.index_select(0, steady_N) - self._sums_TD.rows(steady_N)
            self._slopes_TD.put(steady_N, change_ND / gap_N[:, None])
        token_N = touched_T.nonzero().squeeze(1)
        fresh_ND = fresh_TD.index_select(0, token_N)
        self._sums_TD.put(token_N, fresh_ND)
        self._steps_T[token_N] = step
        expected_TD = self._sums_TD.unpack()
        if self.forecast:
            ahead_T = (step - self._steps_T).to(fresh_TD.dtype)
            expected_TD = torch.addcmul(expected_TD, self._slopes_TD.unpack(), ahead_T[:, None])
        elif self._sums_TD.is_exact:
            expected_TD = expected_TD.clone()
        # What was computed now is used as computed, not as stored.
        return expected_TD if self._sums_TD.is_exact else expected_TD.index_copy_(0, token_N, fresh_ND)

    @property
    def num_bytes(self) -> int:
        if self._ids_TK is None or self._sums_TD is None:
            return 0
        values = self._sums_TD.num_bytes + (self._slopes_TD.num_bytes if self.forecast else 0)
        tensors = [self._ids_TK, self._rows_TK, self._steps_T]
        return values + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class OwnedBranches:
    """The unweighted outputs of this rank's experts for all ranks' tokens in one block, row by row, with slopes.

    Each home rank has rows of its own, which it numbers from 0.
    """

    def __init__(self, num_homes: int, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        self.forecast = forecast
        self.storage = storage
        self._rows_per_home = [0] * num_homes
        self._bases_P: Tensor
        self._values_RD: Packed | None = None
        self._slopes_RD: Packed
        self._steps_R: Tensor

    def make_room(self, rows_per_home: Sequence[int], like_RD: Tensor) -> None:
        """Hold at least so many rows for each home rank, of the width and dtype of ``like_RD``."""
        if self._values_RD is not None and self._rows_per_home == list(rows_per_home):
            return
        before, self._rows_per_home = self._rows_per_home, list(rows_per_home)
        ends = torch.tensor(self._rows_per_home, device=like_RD.device).cumsum(0)
        self._bases_P = ends - ends.new_tensor(self._rows_per_home)
        if self._values_RD is None:
            self._values_RD = self.storage.zeros((0, like_RD.shape[1]), like_RD)
            self._slopes_RD = self._values_RD
            self._steps_R = torch.zeros(0, dtype=torch.int32, device=like_RD.device)

        def stretched(rows: Tensor) -> Tensor:
            return _stretched(rows, before, self._rows_per_home)

        self._values_RD = self._values_RD.map(stretched)
        self._steps_R = stretched(self._steps_R)
        if self.forecast:
            self._slopes_RD = self._slopes_RD.map(stretched)

    def places(self, home_N: Tensor, row_N: Tensor) -> Tensor:
        return self._bases_P[home_N] + row_N

    def store(self, place_N: Tensor, found_N: Tensor, values_ND: Tensor, step: int) -> None:
        """Keep freshly computed branches; ``found_N``: whether the row holds an older value of the same branch."""
        assert self._values_RD is not None
        if self.forecast:
            gap_N = step - self._steps_R[place_N]
            self._slopes_RD.put(place_N, slopes(values_ND, self._values_RD.rows(place_N), gap_N, found_N))
        self._values_RD.put(place_N, values_ND)
        self._steps_R[place_N] = step

    def weighted_sums(
        self, place_N: Tensor, gates_N: Tensor, starts_S: Tensor, step: int, fresh: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[S, D]: sum of gate x stored (or forecast) value over consecutive branches, from each start to the next.

        ``fresh``: which of the branches were computed and stored in this step, and their values [F, D].
        """
        assert self._values_RD is not None
        if not starts_S.shape[0]:
            return fresh[1].new_zeros(0, self._values_RD.shape[1])
        weights_N = gates_N.to(self._values_RD.dtype)
        if not self._values_RD.is_exact:
            values_ND = self._expected(place_N, step).index_copy_(0, *fresh)
            each_N = torch.arange(place_N.shape[0], device=place_N.device)
            return F.embedding_bag(each_N, values_ND, starts_S, mode="sum", per_sample_weights=weights_N)
        values_RD = self._values_RD.unpack()
        sums_SD = F.embedding_bag(place_N, values_RD, starts_S, mode="sum", per_sample_weights=weights_N)
        if self.forecast:
            ahead_N, slopes_RD = weights_N * (step - self._steps_R[place_N]), self._slopes_RD.unpack()
            sums_SD += F.embedding_bag(place_N, slopes_RD, starts_S, mode="sum", per_sample_weights=ahead_N)
        return sums_SD

    def _expected(self, place_N: Tensor, step: int) -> Tensor:
        """[N, D] values of branches in ``step``, a tensor of their own."""
        assert self._values_RD is not None
        values_ND = self._values_RD.rows(place_N)
        if self.forecast:
            ahead_N1 = (step - self._steps_R[place_N]).to(values_ND.dtype)[:, None]
            values_ND.addcmul_(self._slopes_RD.rows(place_N), ahead_N1)
        return values_ND

    @property
    def num_bytes(self) -> int:
        if self._values_RD is None:
            return 0
        values = self._values_RD.num_bytes + (self._slopes_RD.num_bytes if self.forecast else 0)
        return values + self._steps_R.numel() * self._steps_R.element_size()


@dataclass(frozen=True)
class OwnedBlock:
    """One block in placement ``owner``: this rank as a home (``pool``) and as an owner (``store``)."""

    pool: RowPool
    store: OwnedBranches


def _stretched(rows: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Runs of ``before[p]`` rows, each lengthened to ``after[p]`` with zeros."""
    parts = []
    for run, old, new in zip(rows.split(list(before)), before, after, strict=True):
        parts += [run, rows.new_zeros(new - old, *rows.shape[1:])]
    return torch.cat(parts)
