"""A history over the steps of which token positions each expert serves (MoECa, arXiv 2606.15615).

Shape suffixes: B images, T tokens of one image, E experts, X tokens of all images.
"""

import torch
from torch import Tensor

from moeca_dist.types import Routing


class UsageHistory:
    """An exponential moving average C[e, i] for each image of "position i is routed to expert e".

    ``C <- decay * C + (1 - decay) * 1[...]``, once per step, full steps included.
    """

    def __init__(self, decay: float, num_experts: int) -> None:
        self.decay = decay
        self.num_experts = num_experts
        self.usage_BTE: Tensor | None = None

    def observe(self, routing: Routing, num_images: int) -> None:
        """Add the routing of a step. All images have the same number of tokens."""
        used_XE = torch.zeros(routing.num_tokens, self.num_experts, device=routing.token_N.device)
        used_XE.view(-1).index_fill_(0, routing.token_N * self.num_experts + routing.expert_N, 1 - self.decay)
        used_BTE = used_XE.view(num_images, routing.num_tokens // max(1, num_images), self.num_experts)
        self.usage_BTE = used_BTE if self.usage_BTE is None else used_BTE.add_(self.usage_BTE, alpha=self.decay)

    @property
    def num_bytes(self) -> int:
        return 0 if self.usage_BTE is None else self.usage_BTE.numel() * self.usage_BTE.element_size()

    @staticmethod
    def bytes_per_token(num_experts: int) -> int:
        """Return what the history of one block keeps of a token."""
        return num_experts * torch.float32.itemsize


def spread(usage_BTE: Tensor) -> Tensor:
    """Return [B, E] in [0, 1]: the entropy of each expert's positions, scaled within the layer.

    The layer's most local expert has 0 and its broadest 1. P_e(i) = C[e, i] / sum_j C[e, j]. "Normalised within the
    layer" is read as min-max over the experts that were used at all. An expert that was never used gets 0.5, which
    changes no threshold. So do all experts if their entropies are equal.
    """
    total_BE = usage_BTE.sum(1)
    shares_BTE = usage_BTE / total_BE.clamp(min=torch.finfo(usage_BTE.dtype).tiny)[:, None]
    entropy_BE = -torch.special.xlogy(shares_BTE, shares_BTE).sum(1)
    used_BE = total_BE > 0
    low_B1 = entropy_BE.masked_fill(~used_BE, torch.inf).amin(-1, keepdim=True)
    range_B1 = entropy_BE.masked_fill(~used_BE, -torch.inf).amax(-1, keepdim=True) - low_B1
    # Equal experts differ by rounding, which must not decide anything.
    comparable_BE = used_BE & (range_B1 > 1e-5)
    return torch.where(comparable_BE, (entropy_BE - low_B1) / range_B1, 0.5)
