"""Routers: they choose the experts of each token and their weights.

Shape suffixes: T tokens, D hidden size, E experts, G groups of experts, K routed experts per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeca_dist.types import Routing


class Router(nn.Module):
    """The interface of routers: ``forward(x_TD)`` returns a ``Routing``, the branches of every token with their final
    gates.
    """


class TopKRouter(Router):
    """A router in three steps: the scores of all experts, the choice of K of them per token, and the gates of these."""

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = self.scores(x_TD)
        expert_ids_TK = self.choose(scores_TE)
        return Routing.top_k(expert_ids_TK, self.gates(scores_TE, expert_ids_TK))

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return the scores of all experts, [T, E]."""
        raise NotImplementedError

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Return the ids of the experts with the highest scores, int64 [T, K]."""
        raise NotImplementedError

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Return the weights [T, K] of distinct experts, normalised over the chosen experts as the model does."""
        raise NotImplementedError


class SoftmaxRouter(TopKRouter):
    """The router of DiT-MoE: softmax probabilities of the top k, not renormalised, in the activation dtype."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_experts_per_tok = num_experts_per_tok

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight).softmax(dim=-1)

    def choose(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.topk(self.num_experts_per_tok, dim=-1).indices

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return scores_TE.gather(-1, expert_ids_TK)


class SigmoidRouter(TopKRouter):
    """The router of DSMoE, with sigmoid scores, all in fp32 (after DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The correction bias and the groups decide which experts are chosen. The weights are the scores *without* the bias,
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

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float()).sigmoid()

    def choose(self, scores_TE: Tensor) -> Tensor:
        choice_TE = self._within_best_groups(scores_TE + self.e_score_correction_bias)
        return choice_TE.topk(self.num_experts_per_tok, dim=-1).indices

    def gates(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        chosen_TK = scores_TE.gather(-1, expert_ids_TK)
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Set to zero the choice scores outside the ``topk_group`` groups whose two best experts score highest."""
        if self.topk_group == self.n_group:
            return choice_TE
        grouped_TGE = choice_TE.unflatten(-1, (self.n_group, -1))
        group_scores_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        kept_TG.scatter_(-1, group_scores_TG.topk(self.topk_group, dim=-1).indices, True)
        return grouped_TGE.masked_fill(~kept_TG[..., None], 0.0).flatten(-2)
