"""Late refreshes: branches of low gate whose fresh value is served from the next step on.

After DICE (arXiv 2411.16786), which keeps deep layers synchronous and lets what weighs little be a step old.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.types import StepContext


@dataclass(frozen=True)
class Landing:
    """Late values on their way back. ``keep``, asked once, waits for them and stores them; ``num_bytes`` of memory are
    held for it until then."""

    keep: Callable[[], None]
    num_bytes: int


Arrive = Callable[[], Landing]


@dataclass
class LateRefreshes:
    """What a session has under way. Everything here happens on all ranks of a group, in the same order.

    ``share``: of the stored branches that an image refreshes in a layer, those of the lowest gates. ``blocks``: the MoE
    blocks in which they may be late.
    """

    share: float
    blocks: frozenset[int]
    _leaving: tuple[int, Arrive] | None = None
    _landing: dict[int, Landing] = field(default_factory=dict)

    def depart(self, block: int, arrive: Arrive) -> None:
        """Rows of a block are on their way. ``arrive``, asked once, computes them and sends the outputs back."""
        assert self._leaving is None
        self._leaving = block, arrive

    def advance(self) -> None:
        """Compute what the block before sent, and send it back."""
        if self._leaving is not None:
            block, arrive = self._leaving
            self._leaving = None
            self._landing[block] = arrive()

    def land(self, block: int) -> None:
        """Keep what a block sent in the last step."""
        if block in self._landing:
            self._landing.pop(block).keep()

    @property
    def num_bytes(self) -> int:
        """What is held between steps, when every block's rows have been computed."""
        return sum(landing.num_bytes for landing in self._landing.values())


def may_be_late(step: StepContext, policy: Policy, halves: Sequence[Half]) -> bool:
    """Whether anything may be late in ``step``: nothing in it or in the next one is full, and it is not the last.

    What lands in a full step is replaced before it is served.
    """
    following = replace(step, index=step.index + 1)
    if following.index == step.num_steps:
        return False
    return not any(policy.is_full(each, half) for each in (step, following) for half in halves)


def shallow_blocks(moe_blocks: Sequence[int]) -> frozenset[int]:
    """All but the last third of the MoE blocks, rounded up."""
    return frozenset(moe_blocks[: len(moe_blocks) - -(-len(moe_blocks) // 3)])
