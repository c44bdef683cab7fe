"""Value types shared by all layers of the package.

Shape suffixes: B images, T tokens (of all images of a rank), D hidden size, K routed experts per token, N branches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One image to generate. The image depends on (seed, index, label) and the sampling settings alone."""

    index: int
    label: int
    seed: int = 0


@dataclass(frozen=True)
class Routing:
    """The router's decision for every token of a rank.

    ``expert_ids_TK``: int64 global expert ids, distinct within a row; the slot order carries no meaning.
    ``gates_TK``: float weights of the chosen experts, already normalised and scaled as the model demands.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_TK.shape[0]

    @property
    def num_experts_per_tok(self) -> int:
        return self.expert_ids_TK.shape[1]

    def all_branches(self) -> "Branches":
        """Every branch, token by token, in the order of the slots."""
        tokens = torch.arange(self.num_tokens, device=self.expert_ids_TK.device)
        return Branches(tokens.repeat_interleave(self.num_experts_per_tok), self.expert_ids_TK.flatten())


@dataclass(frozen=True)
class Branches:
    """Some branches of a rank: int64 ``token_N`` and global ``expert_ids_N``."""

    token_N: Tensor
    expert_ids_N: Tensor


@dataclass(frozen=True)
class StepContext:
    """Where in the denoising loop a network evaluation stands.

    It is passed down as an argument, so nothing below a solver counts steps by itself: two samples can interleave, and
    a retried step is the same step.
    """

    index: int  # 0 for the first (noisiest) step, num_steps - 1 for the last, whatever the time convention
    num_steps: int
    time: float  # the value the network gets for every image: in [0, 1] (flow) or an integer in 0..999 (DDPM)


def positions(mask_N: Tensor, count: int | None = None) -> Tensor:
    """Where ``mask_N`` is true, int64, ascending; where the ``count`` is known, without a host synchronisation."""
    if count is None:
        # NOTE: a host synchronisation on CUDA: the count decides the shape.
        return mask_N.nonzero().squeeze(1)
    if count == 0:
        # Without tokens too, where nonzero_static of torch 2.9 fails on CUDA.
        return torch.empty(0, dtype=torch.int64, device=mask_N.device)
    return torch.nonzero_static(mask_N, size=count).squeeze(1)
