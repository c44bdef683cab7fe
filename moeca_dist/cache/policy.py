"""The interface of caching policies.

There are three kinds, by what is computed or served as one. It is the whole network, a module (attention or
feed-forward), or a branch (one token at one routed expert).

A policy is a frozen value without state. Its decisions follow from the step, the layer, the routing and the cache.
``is_full`` follows from the step alone, so all ranks agree on it without talking.

Shape suffixes: B images, T tokens of one image, E experts, N branches of all images, D hidden size.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import Tensor

from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.types import Routing, StepContext

Half = Literal["conditional", "unconditional"]
HALVES: Final[tuple[Half, Half]] = ("conditional", "unconditional")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The base of the three kinds.

    Attributes:
        order: of the forecast. 0 reuses stored values.
    """

    order: int = 0

    name: ClassVar[str]

    def is_full(self, step: StepContext, half: Half) -> bool:
        """Return whether ``step`` computes and stores everything of this guidance half."""
        raise NotImplementedError

    @property
    def is_scheduled(self) -> bool:
        """Return whether ``is_full`` alone decides which steps are full, before the run."""
        return True

    @property
    def halves_agree(self) -> bool:
        """Return whether both guidance halves are full in the same steps."""
        return True

    def remark(self, statistics: CacheStatistics) -> str | None:
        """Return what the user should know about a finished run, such as a threshold that never fired."""
        return None


@dataclass(frozen=True, kw_only=True)
class NetworkPolicy(Policy):
    """A policy that computes or serves all blocks together.

    With ``delta`` the step alone does not decide: an evaluation is due once the accumulated relative change of the
    time's modulation has reached it.
    """

    delta: float | None = None

    @property
    def is_scheduled(self) -> bool:
        return self.delta is None


@dataclass(frozen=True)
class ModuleView:
    """A policy's view of one module: the newest output of every token [B, T, D], and its age in steps [B, T]."""

    value_BTD: Tensor
    age_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class ModulePolicy(Policy):
    """A policy that computes or serves attention and feed-forwards, each as a whole.

    With ``refreshes_tokens`` a cached step computes the feed-forwards of the tokens that ``tokens`` chooses.
    """

    refreshes_tokens: ClassVar[bool] = False

    def tokens(self, view: ModuleView) -> Tensor:
        """Return bool [B, T]: tokens whose feed-forward a cached step computes."""
        raise NotImplementedError


@dataclass(frozen=True)
class BranchScores:
    """Stored branches as they were when last computed: fp32 [N] gates, and fp32 [N] shares.

    A share is the norm of the stored output in the sum over the token's branches. Both are arbitrary for unmatched
    branches.
    """

    gate_N: Tensor
    share_N: Tensor


@dataclass(frozen=True)
class LayerView:
    """A policy's view of one layer in a cached step.

    Attributes:
        block: index of the block.
        routing: of the current step.
        found_N: bool, branches that the cache holds.
        image_ids_B: int64, seed and index of each image in one number.
        half_B: int64, 0 for conditional images and 1 for unconditional ones.
        scores: None unless the policy has a ``usage_decay``.
        usage_BTE: moving average of expert usage, float32. None as ``scores``.
    """

    block: int
    routing: Routing
    found_N: Tensor
    image_ids_B: Tensor
    half_B: Tensor
    scores: BranchScores | None = None
    usage_BTE: Tensor | None = None

    @property
    def num_images(self) -> int:
        return self.image_ids_B.shape[0]

    @property
    def tokens_per_image(self) -> int:
        return self.routing.num_tokens // max(1, self.num_images)


@dataclass(frozen=True, kw_only=True)
class BranchPolicy(Policy):
    """A policy that decides on each branch. Unmatched branches are always computed.

    Attributes:
        attention_sync: whether a token with a refreshed branch refreshes other rows too. These are its rows of
            attention, of the shared expert and of the dense blocks that follow.
        usage_decay: of the moving average of expert usage. None for policies that do not score stored branches.
        computes_modules: whether attention, shared expert and dense blocks are computed in cached steps too.
        reason: why matched branches are refreshed, for the statistics.
    """

    attention_sync: bool = False
    usage_decay: float | None = None

    computes_modules: ClassVar[bool] = False
    reason: ClassVar[Reason] = Reason.SCORE

    def refresh(self, step: StepContext, view: LayerView) -> Tensor | None:
        """Return bool [N]: matched branches that a cached step computes. None for none of them."""
        return None
