"""Late refreshes in one MoE layer: which branches are late, how their rows travel, and how their values are kept.

The ranks agree on both kinds of rows together. When the layer has served its tokens, the late rows leave; they travel
until the next MoE layer, where their owners compute them, and what returns is kept when the layer comes up again.

Shape suffixes: T tokens (of a segment, of all in a plan), K routed experts per token, B images of one segment,
X branches of one image, D hidden size, N late branches, P ranks of the group, C counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moeca_dist.cache.late import Landing, may_be_late, shallow_blocks
from moeca_dist.cache.layer_cache import BlockStep
from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.statistics import Reason
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.moe.cached_layer import LayerPlan, Part
from moeca_dist.parallel.dispatcher import DispatchedRows, Dispatcher
from moeca_dist.parallel.handle import Pending
from moeca_dist.types import Branches, Routing, StepContext

Compute = Callable[[DispatchedRows], Pending[Tensor]]


def check_late(
    config: Config, policy: Policy | None, moe_blocks: tuple[int, ...], num_steps: int, halves: tuple[Half, ...]
) -> None:
    """Raise UserError for ``cache.late_refresh`` where nothing would ever be late, or it cannot be carried out."""
    if config.cache.late_refresh is None or policy is None:
        return
    if config.parallel.exchange != "exact":
        raise UserError(
            f"cache.late_refresh is for parallel.exchange exact, not {config.parallel.exchange}: remove one of them"
        )
    if config.cache.placement not in (None, "home"):
        raise UserError(
            "cache.late_refresh keeps branch values at home, not where cache.placement "
            f"{config.cache.placement} may put them: remove one of them"
        )
    if not shallow_blocks(moe_blocks):
        raise UserError("cache.late_refresh has no effect: the last third of the MoE blocks, here all, is never late")
    steps = (StepContext(index, num_steps, 0.0) for index in range(num_steps))
    if not any(may_be_late(step, policy, halves) for step in steps):
        raise UserError(
            "cache.late_refresh has no effect: no two steps in a row are without a full part; place fewer full steps"
        )


def may_be_late_here(cache: BlockStep) -> bool:
    """Whether the layer sends late rows in this step, perhaps none; the same on all ranks."""
    if cache.late is None or cache.block not in cache.late.blocks:
        return False
    return may_be_late(cache.step, cache.policy, [segment.half for segment in cache.segments])


def delayed(part: Part, mine: Routing, reason_TK: Tensor, cache: BlockStep) -> Tensor:
    """uint8 [T, K]: the reasons, with those of the branches that may be late replaced.

    Only stored branches are: in place of the others there is nothing to serve. Image by image, ties by position.
    """
    if cache.late is None or not may_be_late_here(cache):
        return reason_TK
    shape = (part.num_images, part.tokens_per_image * mine.num_experts_per_tok)
    may_BX = ((reason_TK == Reason.SCORE) | (reason_TK == Reason.FORCED)).reshape(shape)
    gates_BX = mine.gates_TK.float().reshape(shape).masked_fill(~may_BX, torch.inf)
    order_BX = gates_BX.argsort(dim=-1, stable=True)
    places = torch.arange(shape[1], device=order_BX.device).expand(shape)
    place_BX = torch.empty_like(order_BX).scatter_(1, order_BX, places)
    # A sliver above: 0.3 of ten falls just short of three.
    most_B1 = (may_BX.sum(-1, keepdim=True).double() * cache.late.share + 1e-6).floor()
    late_BX = may_BX & (place_BX < most_B1)
    return reason_TK.masked_fill(late_BX.view_as(reason_TK), Reason.LATE)


def agree(plan: LayerPlan, dispatcher: Dispatcher) -> tuple[Tensor, Tensor]:
    """[P, C] counts of what lands now and of what is late. A collective of the group."""
    ids_TK = plan.routing.expert_ids_TK
    now_TK = torch.cat([decision.refresh_TK for decision in plan.decisions])
    counts_2C = torch.stack([dispatcher.counts(ids_TK, now_TK), dispatcher.counts(ids_TK, plan.late_TK)])
    now_PC, late_PC = dispatcher.agree(counts_2C).unbind(1)
    return now_PC, late_PC


def depart(
    x_TD: Tensor, plan: LayerPlan, traffic_PC: Tensor, cache: BlockStep, dispatcher: Dispatcher, compute: Compute
) -> None:
    """Send the late rows off. A collective of the group; ``compute`` gives their outputs, on their way back."""
    assert cache.late is not None
    with cache.timer.section("bookkeeping"):
        branch_N = plan.late_branches()
        k = plan.routing.num_experts_per_tok
        branches = Branches(branch_N // k, plan.routing.expert_ids_TK.flatten()[branch_N])
    coming = dispatcher.dispatch(x_TD, branches, traffic=traffic_PC)
    row_bytes = x_TD.shape[1] * x_TD.element_size()

    def arrive() -> Landing:
        dispatched = coming.wait()
        returning = compute(dispatched)
        slot_N = dispatched.slot_of_branch_N  # and no more of it: the hidden rows are not needed again

        def land() -> None:
            rows_ND = returning.wait()
            with cache.timer.section("bookkeeping"):
                _keep(plan, rows_ND.index_select(0, slot_N), branch_N, cache)

        # An owner holds what it sends until it has arrived.
        rows = branch_N.shape[0] + (0 if dispatched.plan is None else dispatched.row_of_received_R.shape[0])
        return Landing(land, rows * row_bytes + branch_N.nbytes + slot_N.nbytes + plan.num_bytes)

    cache.late.depart(cache.block, arrive)


def _keep(plan: LayerPlan, values_ND: Tensor, branch_N: Tensor, cache: BlockStep) -> None:
    """Store late values as those of the step that they were computed in."""
    k, start = plan.routing.num_experts_per_tok, 0
    for part, decision in zip(plan.parts, plan.decisions, strict=True):
        window = slice(start, start + decision.num_late)
        gates_TK = cache.policy.reference_gates(part.routing(plan.routing))
        mine_N = branch_N[window] - part.tokens.start * k
        part.kept.branches.land(decision.match, mine_N, values_ND[window], cache.step.index, gates_TK)
        start += decision.num_late
