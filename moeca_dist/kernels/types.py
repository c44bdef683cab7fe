"""What goes into the kernels and what comes out of them.

Shape suffixes: S source rows, D hidden size, R rows, L experts held here, T tokens of one segment, K routed experts and
entries per token, N refreshed branches or coded rows, E experts, B images, X any leading sizes, W bytes of a coded row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moeca_dist.kernels.row_codes import RowFormat


@dataclass(frozen=True)
class GatheredRows:
    """Rows grouped by expert, in their order within each.

    ``counts_L``: int64, on the device. ``position_R``: where each row went.
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
        """The stored rows themselves where they are kept as they are computed."""
        ...

    def unpack(self) -> Tensor:
        """All rows in the dtype of the computation."""
        ...

    def rows(self, index_N: Tensor) -> Tensor:
        """[N, D] of all rows, flattened to [rows, D]."""
        ...

    def put(self, index_N: Tensor, values_ND: Tensor) -> None:
        """Keep ``values_ND`` as the rows ``index_N`` of all."""
        ...


@dataclass(frozen=True)
class StoredBranches:
    """Entries of one block and segment, K per token: values, their change per step, and the step of each, int32."""

    values_TKD: RowStore
    slopes_TKD: RowStore | None
    steps_TK: Tensor


@dataclass(frozen=True)
class BranchesToServe:
    """A segment's branches: where each is stored, whether it is there already, and whether it is computed now."""

    gates_TK: Tensor
    entry_TK: Tensor
    found_TK: Tensor
    refresh_TK: Tensor


@dataclass(frozen=True)
class FreshRows:
    """Computed branches of a segment.

    ``branch_N``: positions among the segment's branches, ascending; ``row_N``: which of ``rows_RD`` each is.
    """

    rows_RD: Tensor
    branch_N: Tensor
    row_N: Tensor


@dataclass(frozen=True)
class Forecast:
    """A module's stored output with its differences: ``value + sum(factor * difference)``, none of them at order 0.

    Factors are numbers, or tensors [B, T, 1] where rows are of different age.
    """

    value_BTD: Tensor
    terms: Sequence[tuple[Tensor, float | Tensor]] = ()


@dataclass(frozen=True)
class RouterWeights:
    """``bias_E`` chooses, but does not weigh (DeepSeek-V3, section 2.1.2); ``normalised`` over the chosen experts."""

    weight_ED: Tensor
    bias_E: Tensor | None
    k: int
    scoring: Literal["sigmoid", "softmax"]
    normalised: bool
    scale: float


@dataclass(frozen=True)
class RoutedTokens:
    """The chosen experts and their gates; ``entry_TK`` and ``found_TK`` as ``cache.branches.Match`` has them."""

    expert_ids_TK: Tensor
    gates_TK: Tensor
    entry_TK: Tensor
    found_TK: Tensor


@dataclass(frozen=True)
class Entering:
    """What enters the next module: where it is written [B, T, D], and how it is modulated."""

    out_BTD: Tensor
    shift_BD: Tensor
    scale_BD: Tensor


@dataclass(frozen=True)
class HeldRows:
    """What the other end of an exchange holds too: of ``rows_SD`` those of ``key_N``, each of which comes once."""

    rows_SD: Tensor
    key_N: Tensor


class Kernels(Protocol):
    """Every function has one meaning; ``reference`` says it in plain PyTorch.

    ``fuses_routing``: whether ``route`` is faster than routing and matching one after the other.
    """

    @property
    def fuses_routing(self) -> bool: ...

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        """``x_SD[source_R]`` grouped by expert."""
        ...

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        """[T, D]: sum of gate x (fresh, stored or forecast) branch; fresh ones are stored, with their slopes."""
        ...

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        """Write ``x + gate * forecast`` [B, T, D] to ``after``."""
        ...

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        """The same, and ``norm(after) * (1 + scale) + shift`` to ``entering``."""
        ...

    def route(self, x_TD: Tensor, router: RouterWeights, stored_ids_TK: Tensor) -> RoutedTokens:
        """Router, top-k and id match in one; see ``cache.branches.EntryTable.match`` for the entries."""
        ...

    def encode_rows(self, rows_ND: Tensor, held: HeldRows | None, form: RowFormat) -> Tensor:
        """uint8 [N, W], see ``row_codes``; what is held becomes what the other end decodes, 0 where not finite."""
        ...

    def decode_rows(
        self, coded_NW: Tensor, held: HeldRows | None, form: RowFormat, width: int, dtype: torch.dtype
    ) -> Tensor:
        """[N, ``width``]; what is held becomes these rows, 0 where not finite: bit for bit as at the other end."""
        ...
