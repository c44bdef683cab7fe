"""The one place where router, exchange and experts meet.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, R rows.
"""

from torch import Tensor, nn

from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.parallel.dispatch import Dispatcher, LocalDispatcher


class MoELayer(nn.Module):
    """router -> dispatch -> grouped experts -> combine, plus the shared expert.

    Built for one device with all experts; ``models.parallelize`` leaves a rank's own experts here and swaps the
    dispatcher. Every branch is computed: this is the exact path.
    """

    def __init__(
        self, hidden_size: int, router: nn.Module, num_experts: int, expert_width: int, shared_width: int
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = RoutedExperts(hidden_size, expert_width, num_experts)
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None
        self.local_expert_ids = tuple(range(num_experts))
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD)
        dispatched = self.dispatcher.dispatch(x_TD, routing)
        fresh_RD = self.experts(dispatched.rows_RD, dispatched.rows_per_expert_L)
        routed_TD = self.dispatcher.combine(fresh_RD, dispatched)
        # A layer whose shared expert is disabled adds its own input in its place.
        shared_TD = self.shared_experts(x_TD) if self.shared_experts is not None else x_TD
        return (routed_TD + shared_TD).view_as(x_BTD)
