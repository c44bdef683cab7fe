"""What a caching policy decides; each policy is one file in ``cache/policies``.

A policy is a frozen value without state: its decisions follow from the step, the layer, the routing and what the cache
holds. ``is_full`` follows from the step alone, so all ranks agree on it without talking.

Shape suffixes: B images of one segment, T tokens of one segment (of one image with B), K routed experts per token,
E experts, D hidden size.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moeca_dist.cache.branches import Match, Reference
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.types import Routing, StepContext

Half = Literal["conditional", "unconditional"]
Unit = Literal["network", "module", "branch"]


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of one layer and segment in a cache step.

    ``image_ids_T``: the request's seed and index mixed into one int64 per token, and ``positions_T`` the token's place
    in its image: whatever is drawn at random depends on them, never on the batch. ``reference`` and ``usage_BTE`` are
    there for policies that asked for them with ``reference_gates`` and ``usage_decay``.
    """

    layer: int
    half: Half
    routing: Routing
    match: Match
    image_ids_T: Tensor
    positions_T: Tensor
    num_images: int
    reference: Reference | None = None
    usage_BTE: Tensor | None = None


@dataclass(frozen=True)
class ModuleView:
    """What a policy sees of one module and segment: the newest output of every token and its age in steps."""

    value_BTD: Tensor
    age_BT: Tensor


@dataclass(frozen=True)
class RefreshPlan:
    """``refresh_TK``: branches computed now and stored; the others are served from the cache. Covers all unmatched.

    ``forced_TK``: those among them that were not judged each on its own; None where all matched ones were.
    """

    refresh_TK: Tensor
    forced_TK: Tensor | None = None


class Policy(Protocol):
    """``unit``: whether branches, whole modules or the whole network is served from the cache.

    ``order`` of the forecast: 0 reuses stored values. ``attention_sync``: a token with a refreshed branch refreshes its
    rows of attention and of the shared expert with it, and of the dense blocks that follow. ``computes_modules``:
    attention, shared expert and dense blocks are computed in cache steps too. ``refreshes_rows``: ``rows`` chooses
    tokens of the feed-forward. ``delta``: threshold of a policy that skips the network while its input changes little,
    None where the step alone says what is skipped. ``usage_decay``: of the moving average of expert usage, None
    without one.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Unit: ...

    @property
    def order(self) -> int: ...

    @property
    def attention_sync(self) -> bool: ...

    @property
    def computes_modules(self) -> bool: ...

    @property
    def refreshes_rows(self) -> bool: ...

    @property
    def delta(self) -> float | None: ...

    @property
    def usage_decay(self) -> float | None: ...

    def is_full(self, step: StepContext, half: Half) -> bool:
        """Whether ``step`` computes and stores everything for this guidance half."""
        ...

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        """Which branches of a cache step are computed; asked only where ``unit`` is branch."""
        ...

    def rows(self, step: StepContext, view: ModuleView) -> Tensor:
        """bool [B, T]: tokens whose feed-forward is computed in a cache step; asked only with ``refreshes_rows``."""
        ...

    def reference_gates(self, routing: Routing) -> Tensor | None:
        """[T, K]: what to remember of the gates of branches that are computed now; None for nothing."""
        ...

    def remark(self, statistics: CacheStatistics) -> str | None:
        """What the user should know about a finished run, such as a threshold that never fired."""
        ...
