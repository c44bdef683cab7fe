"""What a caching policy decides, and the registry of policies: each is one file in ``cache/policies``.

A policy is a frozen value without state: its decisions follow from the step, the layer, the routing and what the cache
holds. ``is_full`` follows from the step alone, so all ranks agree on it without talking.

Shape suffixes: T tokens of one segment, K routed experts per token.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moeca_dist.cache.branches import Match
from moeca_dist.types import Routing, StepContext

Half = Literal["conditional", "unconditional"]


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of one layer and segment in a cache step.

    ``image_ids_T``: the request's seed and index mixed into one int64 per token, and ``positions_T`` the token's place
    in its image: whatever is drawn at random depends on them, never on the batch.
    """

    layer: int
    half: Half
    routing: Routing
    match: Match
    image_ids_T: Tensor
    positions_T: Tensor


@dataclass(frozen=True)
class RefreshPlan:
    """``refresh_TK``: branches computed now and stored; the others are served from the cache. Covers all unmatched."""

    refresh_TK: Tensor


class Policy(Protocol):
    """``unit``: whether branches or whole modules are served. ``order`` of the forecast: 0 reuses stored values."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Literal["module", "branch"]: ...

    @property
    def order(self) -> int: ...

    @property
    def extra_entries(self) -> int: ...

    def is_full(self, step: StepContext, half: Half) -> bool:
        """Whether ``step`` computes and stores everything for this guidance half."""
        ...

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        """Which branches of a cache step are computed; asked only where ``unit`` is branch."""
        ...
