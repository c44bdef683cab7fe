"""Value types shared by all layers of the package.

Shape suffixes: T tokens (of all images of a rank), K routed experts per token, N branches.
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
class Branches:
    """Some branches of a rank: int64 tokens [N], ascending, and int64 global expert ids [N]."""

    token_N: Tensor
    expert_N: Tensor


@dataclass(frozen=True)
class Routing:
    """The router's decision for every token of a rank: a list of branches in the order of their tokens.

    A token may have any number of distinct experts, none included. Images have equal numbers of branches.

    Attributes:
        token_N: int64 token of each branch, ascending.
        expert_N: int64 global expert id of each branch.
        gate_N: float weight of each branch, normalised and scaled as the model demands.
        start_T: int64 first branch of each token.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    start_T: Tensor

    @classmethod
    def top_k(cls, expert_ids_TK: Tensor, gates_TK: Tensor) -> "Routing":
        """List the branches of a router that gives every token K experts, slot by slot."""
        tokens, k = expert_ids_TK.shape
        start_T = torch.arange(0, tokens * k, k, device=expert_ids_TK.device)
        token_N = torch.arange(tokens, device=expert_ids_TK.device).repeat_interleave(k)
        return cls(token_N, expert_ids_TK.flatten(), gates_TK.flatten(), start_T)

    @classmethod
    def listed(cls, token_N: Tensor, expert_N: Tensor, gate_N: Tensor, num_tokens: int) -> "Routing":
        """List branches of any number per token.

        Args:
            token_N: int64, ascending.
        """
        per_token_T = torch.bincount(token_N, minlength=num_tokens)
        return cls(token_N, expert_N, gate_N, per_token_T.cumsum(0) - per_token_T)

    @property
    def num_tokens(self) -> int:
        return self.start_T.shape[0]

    @property
    def branches(self) -> Branches:
        """Return all branches without their gates."""
        return Branches(self.token_N, self.expert_N)

    def tokens_with(self, mask_N: Tensor) -> Tensor:
        """Return bool [T]: tokens with at least one branch in ``mask_N``."""
        count_T = torch.zeros(self.num_tokens, dtype=torch.int64, device=mask_N.device)
        return count_T.index_add_(0, self.token_N, mask_N.long()) > 0


@dataclass(frozen=True)
class StepContext:
    """The position of a network evaluation in the denoising loop.

    It is passed down as an argument, so nothing below a solver counts steps by itself. Two samples can interleave, and
    a retried step is the same step.
    """

    index: int  # 0 for the first (noisiest) step, num_steps - 1 for the last, whatever the time convention
    num_steps: int
    time: float  # the value the network gets for every image: in [0, 1] (flow) or an integer in 0..999 (DDPM)


def positions(mask_N: Tensor, count: int | None = None) -> Tensor:
    """Return the positions at which ``mask_N`` is true, int64, ascending.

    Args:
        count: number of positions. If it is given, the host does not wait for the device.
    """
    if count is None:
        # NOTE: a host synchronisation on CUDA: the count decides the shape.
        return mask_N.nonzero().squeeze(1)
    if count == 0:
        # Without tokens too, where nonzero_static of torch 2.9 fails on CUDA.
        return torch.empty(0, dtype=torch.int64, device=mask_N.device)
    return torch.nonzero_static(mask_N, size=count).squeeze(1)
