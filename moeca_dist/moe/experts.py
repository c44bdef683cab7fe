"""Expert networks: DeepSpeed's grouped SwiGLU for routed experts, a plain one for the shared expert.

Shape suffixes: R rows (branches, grouped by expert), D hidden size, L experts held here.
"""

from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RoutedExperts(GroupedExperts):
    """DeepSpeed's ``GroupedExperts``: w1 [L, I, D] gate, w3 [L, I, D] up, w2 [L, D, I] down.

    The grouped GEMM is chosen by the device of the rows: on CPU its fixed cost per call exceeds the loop's for all but
    the finest experts, and the fused activation it insists on is a GPU kernel.
    """

    def forward(self, rows_RD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """[R, D] -> [R, D]; rows of expert l follow those of l - 1. R may be 0, and so may any count."""
        if rows_RD.shape[0] == 0:
            return rows_RD
        self.use_grouped_mm = rows_RD.device.type != "cpu"
        return super().forward(rows_RD, rows_per_expert_L)
