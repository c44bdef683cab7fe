"""The interface of the kernels, and the values that go in and come out.

Shape suffixes: S source rows, D hidden size, R rows, L experts held here, T tokens, N branches of a routing (rows of
the branch cache), M refreshed branches, B images, X any leading sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatheredRows:
    """Rows grouped by expert, in their order within each.

    Attributes:
        counts_L: int64 rows of each expert, on the device.
        position_R: int64 new position of each row.
    """

    rows_RD: Tensor
    counts_L: Tensor
    position_R: Tensor


class RowStore(Protocol):
    """Rows [X, D] that may be kept smaller than they are computed."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def exact(self) -> Tensor | None:
        """Return the stored rows themselves if they are kept as they are computed, else None."""
        ...

    def unpack(self) -> Tensor:
        """Return all rows in the dtype of the computation."""
        ...

    def rows(self, index_N: Tensor) -> Tensor:
        """Return [N, D] of all rows, flattened to [rows, D]."""
        ...

    def put(self, index_N: Tensor, values_ND: Tensor) -> None:
        """Keep ``values_ND`` as the rows ``index_N`` of all."""
        ...


@dataclass(frozen=True)
class StoredBranches:
    """The rows of a branch cache: values [N, D], their change per step, and the int32 step of each."""

    values_ND: RowStore
    slopes_ND: RowStore | None
    step_N: Tensor


@dataclass(frozen=True)
class BranchesToServe:
    """The branches of a routing, by token.

    Attributes:
        token_N: int64 token of each branch.
        gate_N: float gate of each branch.
        start_T: int64 first branch of each token.
        row_N: int64 row of the cache, all distinct.
        found_N: bool, whether the row holds an older value of the branch.
        refresh_N: bool, whether the branch is computed now.
    """

    token_N: Tensor
    start_T: Tensor
    gate_N: Tensor
    row_N: Tensor
    found_N: Tensor
    refresh_N: Tensor


@dataclass(frozen=True)
class FreshRows:
    """Computed branches: int64 positions ``branch_M`` in the routing, ascending, and int64 rows ``row_M`` of them."""

    rows_RD: Tensor
    branch_M: Tensor
    row_M: Tensor


@dataclass(frozen=True)
class Forecast:
    """A module's output: ``value + sum(factor * difference)``, without terms if it was computed or is reused.

    Factors are numbers, or tensors [B, T, 1] if tokens are of different age.
    """

    value_BTD: Tensor
    terms: Sequence[tuple[Tensor, float | Tensor]] = ()

    def sum(self, out: Tensor | None = None) -> Tensor:
        """Return [B, T, D] in a tensor of its own, or in ``out``.

        One pass for each term: copying first would be another over memory, which is all that a forecast costs.
        """
        if not self.terms:
            return self.value_BTD.clone() if out is None else out.copy_(self.value_BTD)
        sum_BTD = self.value_BTD
        for difference_BTD, factor in self.terms:
            if isinstance(factor, Tensor):
                sum_BTD = torch.addcmul(sum_BTD, difference_BTD, factor.to(difference_BTD.dtype), out=out)
            else:
                sum_BTD = torch.add(sum_BTD, difference_BTD, alpha=factor, out=out)
        return sum_BTD


@dataclass(frozen=True)
class Entering:
    """The input of the next module: the tensor that it is written to [B, T, D], and its modulation."""

    out_BTD: Tensor
    shift_BD: Tensor
    scale_BD: Tensor


class Kernels(Protocol):
    """The interface of the kernels. ``reference`` defines the meaning of each in plain PyTorch."""

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        """Group ``x_SD[source_R]`` by expert."""
        ...

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        """Return [T, D]: the sum of gate x (fresh, stored or forecast) branch. Store fresh ones with their slopes."""
        ...

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        """Write ``x + gate * forecast`` [B, T, D] to ``after``."""
        ...

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        """Write what ``gated_residual`` writes, and ``norm(after) * (1 + scale) + shift`` to ``entering``."""
        ...
