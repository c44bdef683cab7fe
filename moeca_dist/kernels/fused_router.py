"""Router, top-k and the search for stored branches in one kernel; scores in fp32.

Shape suffixes: T tokens, D hidden size, E experts, K routed experts per token, J entries per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_dist.kernels.launch import rows_apart
from moeca_dist.kernels.types import RoutedTokens, RouterWeights

_TOKENS, _WIDTH = 16, 64  # of one program, and of one step through the hidden size
_NO_ENTRY = 2**30  # older than any step


@triton.jit
def _logits(x_TD, weight_ED, token, is_token, width, experts, x_stride,
            TOKENS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    logits = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        x = tl.load(
            x_TD + token[:, None] * x_stride + column[None, :], mask=is_token[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            weight_ED + expert[None, :] * width + column[:, None],
            mask=(expert < experts)[None, :] & inside[:, None],
            other=0.0,
        )
        logits = tl.dot(x.to(tl.float32), weight.to(tl.float32), logits, input_precision="ieee")
    return logits


@triton.jit
def _route(
    x_TD, weight_ED, bias_E, ids_TJ, used_TJ, out_ids_TK, out_gates_TK, out_entry_TK, out_found_TK,
    tokens, width, experts, x_stride, last_step, gate_scale,
    K: tl.constexpr, J: tl.constexpr, KP: tl.constexpr, JP: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISED: tl.constexpr, OLD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    expert = tl.arange(0, EXPERTS)
    is_expert = (expert < experts)[None, :]
    logits = _logits(x_TD, weight_ED, token, is_token, width, experts, x_stride, TOKENS, EXPERTS, WIDTH)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        # As the reference rounds: a softmax of the activations' dtype.
        logits = logits.to(out_gates_TK.dtype.element_ty).to(tl.float32)
        logits = tl.where(is_expert, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = (powers / tl.sum(powers, axis=1)[:, None]).to(out_gates_TK.dtype.element_ty).to(tl.float32)
    choice = scores
    if BIAS:
        choice += tl.load(bias_E + expert, mask=expert < experts, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(is_expert, choice, float("-inf"))

    slot = tl.arange(0, KP)[None, :]
    ids = tl.full((TOKENS, KP), -2, dtype=tl.int64)
    gates = tl.zeros((TOKENS, KP), dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(choice, axis=1)
        is_best = expert[None, :] == best[:, None]
        ids = tl.where(slot == k, best[:, None].to(tl.int64), ids)
        gates = tl.where(slot == k, tl.sum(tl.where(is_best, scores, 0.0), axis=1)[:, None], gates)
        choice = tl.where(is_best, float("-inf"), choice)
    if NORMALISED:
        gates = gates / (tl.sum(gates, axis=1)[:, None] + 1e-20) * gate_scale

    place = tl.arange(0, JP)[None, :]
    is_place = is_token[:, None] & (place < J)
    held = tl.load(ids_TJ + token[:, None] * J + place, mask=is_place, other=-3)
    used = tl.load(used_TJ + token[:, None] * J + place, mask=is_place, other=0)
    same = (ids[:, :, None] == held[:, None, :]).to(tl.int32)
    found = tl.sum(same, axis=2)
    taken = tl.sum(same, axis=1)
    age = tl.where(place < J, used + taken * (last_step + 2), OLD)
    first, second = tl.arange(0, JP)[None, :, None], tl.arange(0, JP)[None, None, :]
    before = (age[:, None, :] < age[:, :, None]) | ((age[:, None, :] == age[:, :, None]) & (second < first))
    order = tl.sum(before.to(tl.int32), axis=2)
    missing = tl.where((found == 0) & (slot < K), 1, 0)
    nth = tl.cumsum(missing, axis=1) - 1
    index = tl.arange(0, JP)[None, None, :]
    free = tl.sum(tl.where(order[:, None, :] == nth[:, :, None], index, 0), axis=2)
    entry = tl.where(found > 0, tl.sum(same * index, axis=2), free)

    at = token[:, None] * K + slot
    writes = is_token[:, None] & (slot < K)
    tl.store(out_ids_TK + at, ids, mask=writes)
    tl.store(out_gates_TK + at, gates, mask=writes)
    tl.store(out_entry_TK + at, entry.to(tl.int64), mask=writes)
    tl.store(out_found_TK + at, (found > 0).to(tl.uint8), mask=writes)


def route_tokens(x_TD: Tensor, router: RouterWeights, ids_TJ: Tensor, used_TJ: Tensor, last_step: int) -> RoutedTokens:
    tokens, width = x_TD.shape
    experts, entries, k = router.weight_ED.shape[0], ids_TJ.shape[1], router.k
    shape, device = (tokens, k), x_TD.device
    ids_TK = torch.empty(shape, dtype=torch.int64, device=device)
    gates_TK = torch.empty(shape, dtype=torch.float32 if router.scoring == "sigmoid" else x_TD.dtype, device=device)
    entry_TK = torch.empty(shape, dtype=torch.int64, device=device)
    found_TK = torch.empty(shape, dtype=torch.uint8, device=device)
    if tokens:
        x_TD = rows_apart(x_TD)
        _route[(triton.cdiv(tokens, _TOKENS),)](
            x_TD, router.weight_ED, router.weight_ED if router.bias_E is None else router.bias_E, ids_TJ, used_TJ,
            ids_TK, gates_TK, entry_TK, found_TK,
            tokens, width, experts, x_TD.stride(0), last_step, router.scale,
            K=k, J=entries, KP=triton.next_power_of_2(k), JP=triton.next_power_of_2(entries), TOKENS=_TOKENS,
            EXPERTS=max(16, triton.next_power_of_2(experts)), WIDTH=_WIDTH, SIGMOID=router.scoring == "sigmoid",
            BIAS=router.bias_E is not None, NORMALISED=router.normalised, OLD=_NO_ENTRY,
        )  # fmt: skip
    return RoutedTokens(ids_TK, gates_TK, entry_TK, found_TK.view(torch.bool))
