"""Routers: which experts a token goes to, and with what weight.

Shape suffixes: T tokens, D hidden size, E experts, G groups of experts, K routed experts per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeca_dist.kernels.types import RouterWeights
from moeca_dist.types import Routing


class Router(nn.Module):
    """Scores of all experts, the choice among them, and the gates of chosen ones."""

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = self.scores(x_TD)
        expert_ids_TK = self.choose(scores_TE)
        return Routing(expert_ids_TK, self.gates(scores_TE, expert_ids_TK))

    def weights(self) -> RouterWeights | None:
        """What a kernel needs to do all of it at once; None where it cannot."""
        return None

    def scores(self, x_TD: Tensor) -> Tensor:
        """[T, E]"""
        raise NotImplementedError

    def choose(self, scores_TE: Tensor) -> Tensor:
        """int64 [T, K] ids of the experts with the highest scores."""
        raise NotImplementedError

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """[T, K] weights of the chosen experts."""
        raise NotImplementedError


class SoftmaxRouter(Router):
    """DiT-MoE: raw softmax probabilities of the top-k, not renormalised, in the activation dtype."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_experts_per_tok = num_experts_per_tok

    def weights(self) -> RouterWeights:
        return RouterWeights(self.weight, None, self.num_experts_per_tok, "softmax", normalised=False, scale=1.0)

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight).softmax(dim=-1)

    def choose(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.topk(self.num_experts_per_tok, dim=-1).indices

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return scores_TE.gather(-1, expert_ids_TK)


class SigmoidRouter(Router):
    """DSMoE (after DeepSeek-V3, arXiv 2412.19437, section 2.1.2): sigmoid scores, all in fp32.

    The correction bias and the groups decide which experts are chosen; the weights are the scores *without* the bias,
    normalised over the chosen experts and scaled.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor

    def weights(self) -> RouterWeights | None:
        if self.topk_group != self.n_group:
            return None
        bias_E = self.e_score_correction_bias
        scale = self.routed_scaling_factor
        return RouterWeights(self.weight, bias_E, self.num_experts_per_tok, "sigmoid", normalised=True, scale=scale)

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float()).sigmoid()

    def choose(self, scores_TE: Tensor) -> Tensor:
        choice_TE = self._within_best_groups(scores_TE + self.e_score_correction_bias)
        return choice_TE.topk(self.num_experts_per_tok, dim=-1).indices

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        chosen_TK = scores_TE.gather(-1, expert_ids_TK)
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Zero the choice scores outside the ``topk_group`` groups whose two best experts score highest."""
        if self.topk_group == self.n_group:
            return choice_TE
        grouped_TGE = choice_TE.unflatten(-1, (self.n_group, -1))
        group_scores_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        kept_TG.scatter_(-1, group_scores_TG.topk(self.topk_group, dim=-1).indices, True)
        return grouped_TGE.masked_fill(~kept_TG[..., None], 0.0).flatten(-2)
