"""Router, top-k and the search for stored branches in one kernel; scores in fp32.

Shape suffixes: T tokens, D hidden size, E experts, K routed experts and entries per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_dist.kernels.launch import rows_apart
from moeca_dist.kernels.types import RoutedTokens, RouterWeights

_TOKENS, _WIDTH = 16, 64  # of one program, and of one step through the hidden size


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
    x_TD, weight_ED, bias_E, stored_ids_TK, out_ids_TK, out_gates_TK, out_entry_TK, out_found_TK,
    tokens, width, experts, x_stride, gate_scale,
    K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISED: tl.constexpr,
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

    at = token[:, None] * K + slot
    is_branch = is_token[:, None] & (slot < K)
    stored = tl.load(stored_ids_TK + at, mask=is_branch, other=-3)
    same = ids[:, :, None] == stored[:, None, :]
    found = tl.sum(same.to(tl.int32), axis=2)
    missing = ((found == 0) & (slot < K)).to(tl.int32)
    free = ((tl.sum(same.to(tl.int32), axis=1) == 0) & (slot < K)).to(tl.int32)
    # The n-th branch that is not stored gets the n-th free entry; 0 and -1 are those that take no part.
    nth_missing, nth_free = tl.cumsum(missing, axis=1) * missing, tl.where(free > 0, tl.cumsum(free, axis=1), -1)
    gets = same | (nth_missing[:, :, None] == nth_free[:, None, :])
    entry = tl.sum(tl.where(gets, tl.arange(0, KP)[None, None, :], 0), axis=2)

    tl.store(out_ids_TK + at, ids, mask=is_branch)
    tl.store(out_gates_TK + at, gates, mask=is_branch)
    tl.store(out_entry_TK + at, entry.to(tl.int64), mask=is_branch)
    tl.store(out_found_TK + at, (found > 0).to(tl.uint8), mask=is_branch)


def route_tokens(x_TD: Tensor, router: RouterWeights, stored_ids_TK: Tensor) -> RoutedTokens:
    tokens, width = x_TD.shape
    experts, k = router.weight_ED.shape[0], router.k
    shape, device = (tokens, k), x_TD.device
    ids_TK = torch.empty(shape, dtype=torch.int64, device=device)
    gates_TK = torch.empty(shape, dtype=torch.float32 if router.scoring == "sigmoid" else x_TD.dtype, device=device)
    entry_TK = torch.empty(shape, dtype=torch.int64, device=device)
    found_TK = torch.empty(shape, dtype=torch.uint8, device=device)
    if tokens:
        assert stored_ids_TK.is_contiguous()
        x_TD = rows_apart(x_TD)
        _route[(triton.cdiv(tokens, _TOKENS),)](
            x_TD, router.weight_ED, router.weight_ED if router.bias_E is None else router.bias_E, stored_ids_TK,
            ids_TK, gates_TK, entry_TK, found_TK,
            tokens, width, experts, x_TD.stride(0), router.scale,
            K=k, KP=triton.next_power_of_2(k), TOKENS=_TOKENS, EXPERTS=max(16, triton.next_power_of_2(experts)),
            WIDTH=_WIDTH, SIGMOID=router.scoring == "sigmoid", BIAS=router.bias_E is not None,
            NORMALISED=router.normalised,
        )  # fmt: skip
    return RoutedTokens(ids_TK, gates_TK, entry_TK, found_TK.view(torch.bool))
