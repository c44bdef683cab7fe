"""Exchange mode ``budget``: a fixed number of rows, and which branches get them.

Every image, guidance half and group of experts has the same number of rows in a layer, whatever else is in the batch.
So which branches are computed follows from the image alone, and no shape from the data.

Shape suffixes: B images of one segment, X branches of one image (token by token, slot by slot), G groups of experts,
R rows of an image and group, T tokens of one segment, K routed experts per token, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branch_cache import EMPTY

_POSITION_BITS, _SCORE_BITS = 20, 32
_LONGEST_WAIT = 255


@dataclass(frozen=True)
class Budget:
    """``rows``: of each image, half and group, by MoE block; the same on all ranks.

    ``group_of_expert_E``: int64, on the device; the groups of a rank are consecutive, equally many on every rank.
    ``most_images``: of the rank that has most of them.
    """

    rows: Mapping[int, int]
    group_of_expert_E: Tensor
    num_groups: int
    num_ranks: int
    most_images: int
    fill: bool

    @property
    def num_experts(self) -> int:
        return self.group_of_expert_E.shape[0]

    @property
    def groups_per_rank(self) -> int:
        return self.num_groups // self.num_ranks


class Backlog:
    """Branches of one block and segment that found no room in the last step, and for how many steps they wait.

    A branch is forgotten when its expert is not routed to in the next step.
    """

    def __init__(self) -> None:
        self._ids_TK: Tensor | None = None
        self._waited_TK: Tensor

    def waited(self, expert_ids_TK: Tensor) -> Tensor:
        """int64 [T, K]: steps that each branch has waited."""
        if self._ids_TK is None:
            return torch.zeros_like(expert_ids_TK)
        same_TKK = expert_ids_TK[:, :, None] == self._ids_TK[:, None, :]
        return (same_TKK * self._waited_TK[:, None, :]).sum(-1)

    def note(self, expert_ids_TK: Tensor, deferred_TK: Tensor, waited_TK: Tensor) -> None:
        """Those of ``expert_ids_TK`` that found no room now, having waited so long before."""
        self._ids_TK = torch.where(deferred_TK, expert_ids_TK, EMPTY)
        self._waited_TK = (waited_TK + 1).clamp(max=_LONGEST_WAIT).to(torch.uint8)

    def clear(self) -> None:
        """After a full step nobody waits."""
        if self._ids_TK is not None:
            self._ids_TK.fill_(EMPTY)

    @property
    def num_bytes(self) -> int:
        return 0 if self._ids_TK is None else self._ids_TK.numel() * (8 + 1)


@dataclass(frozen=True)
class Candidates:
    """The branches of one segment that may get a row, image by image.

    ``wanted_BX``: by the policy, or still waiting; ``score_BX``: among equals, higher first.
    """

    group_BX: Tensor
    wanted_BX: Tensor
    unmatched_BX: Tensor
    waited_BX: Tensor
    score_BX: Tensor

    def demand(self, num_groups: int) -> Tensor:
        """int64 [B, G]: rows that would take all who are wanted."""
        counts_BG = self.waited_BX.new_zeros(self.group_BX.shape[0], num_groups)
        return counts_BG.scatter_add_(1, self.group_BX, self.wanted_BX.long())

    def keys(self, *, fill: bool) -> Tensor:
        """int64 [B, X], distinct within an image: who goes first has the highest; -1 for who does not go at all.

        Who has waited longest, then unmatched branches, then by score, then by position. With ``fill`` branches that
        nobody wants come last.
        """
        branches = self.score_BX.shape[1]
        assert branches <= 2**_POSITION_BITS
        urgency_BX = self.waited_BX * 4 + self.unmatched_BX * 2 + self.wanted_BX
        position_X = torch.arange(branches, device=self.score_BX.device)
        key_BX = (urgency_BX << _SCORE_BITS) + _ordered(self.score_BX)
        key_BX = (key_BX << _POSITION_BITS) + (branches - 1 - position_X)
        return key_BX if fill else torch.where(self.wanted_BX, key_BX, -1)


def select(key_BX: Tensor, group_BX: Tensor, num_groups: int, rows: int) -> Tensor:
    """int64 [B, G, R]: the branches of each group with the highest keys, ascending; X stands for an empty row.

    Of a fixed shape: ``rows`` is at most X.
    """
    images, branches = key_BX.shape
    if not images:
        return key_BX.new_empty(0, num_groups, rows)
    group_G = torch.arange(num_groups, device=key_BX.device)[:, None]
    key_BGX = torch.where(group_BX[:, None] == group_G, key_BX[:, None], -1)
    best = key_BGX.topk(rows, dim=-1)
    return torch.where(best.values >= 0, best.indices, branches).sort(dim=-1).values


def chosen(branch_BGR: Tensor, branches: int) -> Tensor:
    """bool [B, X]: which branches got a row."""
    images = branch_BGR.shape[0]
    marks = torch.zeros(images, branches + 1, dtype=torch.bool, device=branch_BGR.device)
    return marks.scatter_(1, branch_BGR.reshape(images, -1 if images else 0), True)[:, :-1]


def _ordered(score_BX: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the fp32 scores."""
    # Adding 0 makes one zero of the two.
    bits_BX = (score_BX.float() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits_BX >= 0, bits_BX + 2 ** (_SCORE_BITS - 1), -1 - bits_BX)
