"""Expert networks: DeepSpeed's grouped SwiGLU for routed experts, modules of other libraries, and the shared expert.

Shape suffixes: R rows (branches, grouped by expert), D hidden size, I expert width, L experts held here.
"""

from collections.abc import Sequence

import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """The feed-forward ``down(silu(gate(x)) * up(x))``, without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts of one rank: ``forward(rows_RD, rows_per_expert_L)`` returns each row's output [R, D].

    Rows of expert l follow those of l - 1. R may be 0, and so may any count.
    """

    def keep_only(self, expert_ids: Sequence[int]) -> None:
        """Drop all other experts, before weights are loaded."""
        raise NotImplementedError


class ExpertModules(Experts):
    """Experts of any library, as one module [R, D] -> [R, D] for each. They are called one after the other."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, rows_RD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        if rows_RD.shape[0] == 0:
            return rows_RD  # also of a rank without experts
        # NOTE: a host synchronisation on CUDA: each expert gets a tensor of its own.
        groups = rows_RD.split(rows_per_expert_L.tolist())
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, groups, strict=True)])

    def keep_only(self, expert_ids: Sequence[int]) -> None:
        self.experts = nn.ModuleList([expert for index, expert in enumerate(self.experts) if index in expert_ids])


class RoutedExperts(GroupedExperts, Experts):
    """DeepSpeed's ``GroupedExperts``: w1 [L, I, D] gate, w3 [L, I, D] up, w2 [L, D, I] down.

    The grouped GEMM serves CPU too. It saves 2 to 10% against a loop over experts if each gets few rows, as in a cached
    step. If narrow experts get a hundred rows or more, it costs up to 4%.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def forward(self, rows_RD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        if rows_RD.shape[0] == 0:
            return rows_RD
        # It wants strides of whole 16-byte units; the odd widths of toy networks take the loop.
        self.use_grouped_mm = all(w.shape[-1] * w.element_size() % 16 == 0 for w in (self.w1, self.w2))
        if self.use_grouped_mm and rows_RD.device.type == "cpu":
            return self._grouped_on_cpu(rows_RD, rows_per_expert_L)
        return super().forward(rows_RD, rows_per_expert_L)

    def keep_only(self, expert_ids: Sequence[int]) -> None:
        for name in ("w1", "w2", "w3"):
            whole = getattr(self, name)
            kept = whole.new_empty(len(expert_ids), *whole.shape[1:])
            setattr(self, name, nn.Parameter(kept, requires_grad=False))
        self.num_experts = len(expert_ids)

    def _grouped_on_cpu(self, rows_RD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """Compute DeepSpeed's grouped path with a plain activation.

        Its own is a GPU kernel wherever Triton is found.
        """
        ends_L = rows_per_expert_L.cumsum(0, dtype=torch.int32)
        hidden_RI = _silu(torch._grouped_mm(rows_RD, self.w1.transpose(1, 2), offs=ends_L))
        hidden_RI *= torch._grouped_mm(rows_RD, self.w3.transpose(1, 2), offs=ends_L)
        return torch._grouped_mm(hidden_RI, self.w2.transpose(1, 2), offs=ends_L)


def _silu(x_RI: Tensor) -> Tensor:
    """Apply SiLU in place. A row's result is the same bit for bit, whatever rows stand beside it.

    On CPU the last elements of a tensor, those that fill no vector register, get another exponential than the rest.
    """
    flat = x_RI.view(-1)
    rest = flat.shape[0] % _VECTOR
    whole, last = flat[: flat.shape[0] - rest], flat[flat.shape[0] - rest :]
    F.silu(whole, inplace=True)
    last.copy_(F.silu(F.pad(last, (0, _VECTOR - rest)))[:rest])
    return x_RI


_VECTOR = 64  # a multiple of what any CPU takes at once
