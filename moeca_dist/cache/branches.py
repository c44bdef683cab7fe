"""The branch cache: what each routed expert gave for each token, found again by expert id.

Shape suffixes: T tokens of one segment, K routed experts per token, J entries per token, D hidden size, N branches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage

EMPTY = -1


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

    More entries than routed experts keep the branches of experts that just left the top-k: routes near a tie flip
    back. The entries used longest ago give way first.
    """

    def __init__(self, num_entries: int) -> None:
        self.num_entries = num_entries
        self._last_step = 0
        self._ids_TJ: Tensor | None = None
        self._used_TJ: Tensor

    def match(self, expert_ids_TK: Tensor) -> Match:
        """Find each branch by its expert id; unmatched ones get the entries that were used longest ago."""
        if self._ids_TJ is None:
            entries = torch.arange(expert_ids_TK.shape[1], device=expert_ids_TK.device)
            return Match(entries.expand_as(expert_ids_TK), torch.zeros_like(expert_ids_TK, dtype=torch.bool))
        same_TKJ = expert_ids_TK[:, :, None] == self._ids_TJ[:, None, :]
        found_TK = same_TKJ.any(-1)
        # Entries in use are sorted behind all others; the stable sort makes the choice independent of the device.
        age_TJ = self._used_TJ + same_TKJ.any(1) * (int(self._last_step) + 2)
        free_TJ = age_TJ.argsort(dim=-1, stable=True)
        nth_TK = ((~found_TK).cumsum(-1) - 1).clamp(min=0)
        entry_TK = torch.where(found_TK, same_TKJ.int().argmax(-1), free_TJ.gather(1, nth_TK))
        return Match(entry_TK, found_TK)

    def touch(self, match: Match, step: int) -> None:
        """Note which entries the routing of ``step`` used."""
        self._used_TJ.scatter_(1, match.entry_TK, step)
        self._last_step = max(self._last_step, step)

    def _allocate_entries(self, tokens: int, device: torch.device) -> None:
        shape = (tokens, self.num_entries)
        self._ids_TJ = torch.full(shape, EMPTY, dtype=torch.int64, device=device)
        self._used_TJ = torch.full(shape, EMPTY, dtype=torch.int32, device=device)


class BranchCache(EntryTable):
    """Unweighted expert outputs of one layer and segment, keyed by (token, expert id), with their slopes.

    A slope is the difference of the last two computed values of the *same* branch per step; zero until there are two.
    A policy that compares with the step in which a branch was computed hands over reference gates; then the norms of
    the values are kept as well.
    """

    def __init__(self, num_entries: int, *, forecast: bool, storage: Storage = AS_COMPUTED) -> None:
        super().__init__(num_entries)
        self.forecast = forecast
        self.storage = storage
        # Allocated with the first full step, when shapes and dtype are known.
        self._values_TJD: Packed
        self._slopes_TJD: Packed
        self._steps_TJ: Tensor
        self._gates_TJ: Tensor | None = None
        self._norms_TJ: Tensor | None = None

    def store_all(
        self, expert_ids_TK: Tensor, values_TKD: Tensor, match: Match, step: int, gates_TK: Tensor | None = None
    ) -> None:
        """Keep every branch of a full step; ``gates_TK`` are reference gates, given always or never."""
        tokens, k, hidden = values_TKD.shape
        if self._ids_TJ is None:
            self._allocate(tokens, values_TKD, with_reference=gates_TK is not None)
        token_N = torch.arange(tokens, device=values_TKD.device).repeat_interleave(k)
        self.store(
            token_N, match.entry_TK.flatten(), match.found_TK.flatten(), expert_ids_TK.flatten(),
            values_TKD.view(-1, hidden), step, None if gates_TK is None else gates_TK.flatten(),
        )  # fmt: skip
        self.touch(match, step)

    def store(
        self,
        token_N: Tensor,
        entry_N: Tensor,
        found_N: Tensor,
        expert_ids_N: Tensor,
        values_ND: Tensor,
        step: int,
        gates_N: Tensor | None = None,
    ) -> None:
        """Keep some freshly computed branches, at the entries that ``match`` gave them."""
        assert self._ids_TJ is not None, "the first step of a request is a full step"
        at_N = token_N * self.num_entries + entry_N
        if self.forecast:
            gap_N = step - self._steps_TJ.view(-1)[at_N]
            self._slopes_TJD.put(at_N, slopes(values_ND, self._values_TJD.rows(at_N), gap_N, found_N))
        self._values_TJD.put(at_N, values_ND)
        self._ids_TJ.view(-1)[at_N] = expert_ids_N
        self._steps_TJ.view(-1)[at_N] = step
        if self._gates_TJ is not None and self._norms_TJ is not None and gates_N is not None:
            self._gates_TJ.view(-1)[at_N] = gates_N.float()
            self._norms_TJ.view(-1)[at_N] = values_ND.float().norm(dim=-1)
        self._last_step = max(self._last_step, step)

    def weighted_sum(self, gates_TK: Tensor, served_TK: Tensor, match: Match, step: int) -> Tensor:
        """[T, D]: sum of the *current* gate x stored (or forecast) value over the branches in ``served_TK``."""
        # Bags of rows take a third of the time of a batched product of weights and entries on CPU.
        weights_TK = (gates_TK * served_TK).to(self._values_TJD.dtype)
        first_T1 = torch.arange(0, self._steps_TJ.numel(), self.num_entries, device=weights_TK.device)[:, None]
        at_TK = match.entry_TK + first_T1
        total_TD = _weighted_rows(at_TK, self._values_TJD, weights_TK)
        if self.forecast:
            ahead_TK = weights_TK * (step - self._steps_TJ.gather(1, match.entry_TK))
            total_TD += _weighted_rows(at_TK, self._slopes_TJD, ahead_TK)
        return total_TD

    def reference(self, match: Match) -> Reference | None:
        """What was kept of the branches of a routing; arbitrary where they are unmatched. None without gates."""
        if self._gates_TJ is None or self._norms_TJ is None:
            return None
        shares_TJ = self._norms_TJ / self._norms_TJ.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return Reference(self._gates_TJ.gather(1, match.entry_TK), shares_TJ.gather(1, match.entry_TK))

    def nothing(self, num_tokens: int) -> Tensor:
        """[T, D] zeros: what a full step serves from the cache."""
        stored = self._values_TJD
        return torch.zeros(num_tokens, stored.shape[2], dtype=stored.dtype, device=stored.data_XD.device)

    @property
    def num_bytes(self) -> int:
        if self._ids_TJ is None:
            return 0
        values = self._values_TJD.num_bytes + (self._slopes_TJD.num_bytes if self.forecast else 0)
        tensors = [self._ids_TJ, self._steps_TJ, self._used_TJ]
        tensors += [tensor for tensor in (self._gates_TJ, self._norms_TJ) if tensor is not None]
        return values + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _allocate(self, tokens: int, like_TKD: Tensor, *, with_reference: bool) -> None:
        shape = (tokens, self.num_entries)
        self._allocate_entries(tokens, like_TKD.device)
        self._steps_TJ = torch.zeros(shape, dtype=torch.int32, device=like_TKD.device)
        self._values_TJD = self.storage.zeros((*shape, like_TKD.shape[2]), like_TKD)
        if self.forecast:
            self._slopes_TJD = self.storage.zeros((*shape, like_TKD.shape[2]), like_TKD)
        if with_reference:
            self._gates_TJ = torch.zeros(shape, device=like_TKD.device)
            self._norms_TJ = torch.zeros(shape, device=like_TKD.device)


def _weighted_rows(at_TK: Tensor, stored_TJD: Packed, weights_TK: Tensor) -> Tensor:
    """[T, D]: sum over k of weight x the row ``at`` of all stored ones."""
    rows = stored_TJD.unpack().view(-1, stored_TJD.shape[-1])
    return F.embedding_bag(at_TK, rows, per_sample_weights=weights_TK, mode="sum")


def slopes(values_ND: Tensor, before_ND: Tensor, gap_N: Tensor, found_N: Tensor) -> Tensor:
    """[N, D] change per step; zero where ``before`` is another expert's value, or none."""
    inverse_N = torch.where(found_N, gap_N.to(values_ND.dtype).reciprocal(), 0.0)
    return (values_ND - before_ND) * inverse_N[:, None]
