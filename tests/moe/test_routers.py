"""Both routers against the naive reference: everyday inputs, hand-made corner cases, and ties.

Among exactly equal scores any choice is right; what is demanded is that the chosen experts are a best set and that
the weights are those of the chosen ones. Slot order means nothing: rows are compared as {expert: weight}.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist.moe.router import SigmoidRouter, SoftmaxRouter
from tests.reference import naive_models as naive

HIDDEN, TOLERANCE = 12, 1e-5
TIE = 1e-6  # differences below it are rounding


def sigmoid_router(weight_ED, bias_E, *, k, n_group=1, topk_group=1, scale=1.0):
    num_experts, hidden = weight_ED.shape
    router = SigmoidRouter(hidden, num_experts, k, n_group, topk_group, scale)
    router.load_state_dict({"weight": weight_ED, "e_score_correction_bias": bias_E})
    return router.requires_grad_(False)


def softmax_router(weight_ED, *, k):
    router = SoftmaxRouter(weight_ED.shape[1], weight_ED.shape[0], k)
    router.load_state_dict({"weight": weight_ED})
    return router.requires_grad_(False)


def columns(routing):
    """Experts and gates of all branches; checks that every token has as many."""
    k = len(routing.token_N) // max(1, routing.num_tokens)
    assert routing.token_N.tolist() == [token for token in range(routing.num_tokens) for _ in range(k)]
    assert routing.start_T.tolist() == [k * token for token in range(routing.num_tokens)]
    return routing.expert_N, routing.gate_N


def as_dicts(routing):
    """One {expert: weight} per token; checks that the ids of a row are distinct."""
    rows = []
    for ids, gates in zip(*(each.view(routing.num_tokens, -1).tolist() for each in columns(routing)), strict=True):
        assert len(set(ids)) == len(ids)
        rows.append(dict(zip(ids, gates, strict=True)))
    return rows


def assert_same_routing(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for expert, weight in theirs.items():
            assert ours[expert] == pytest.approx(weight, abs=TOLERANCE)


def draw(*shape, seed=0, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def one_hot_tokens(logits_TE):
    """Inputs and router weight whose logits are exactly ``logits_TE``: token t is the t-th unit vector."""
    logits_TE = torch.tensor(logits_TE, dtype=torch.float32)
    return torch.eye(len(logits_TE)), logits_TE.T.contiguous()


# ---- everyday inputs ------------------------------------------------------------------------------------------------

GROUPINGS = [  # experts, k, groups, kept groups
    (8, 2, 1, 1),
    (8, 2, 2, 2),
    (8, 2, 4, 2),
    (8, 4, 4, 2),
    (12, 5, 1, 1),
    (12, 3, 3, 1),
    (8, 8, 1, 1),
    (4, 1, 4, 3),
]


@pytest.mark.parametrize(("num_experts", "k", "n_group", "topk_group"), GROUPINGS)
@pytest.mark.parametrize("bias_spread", [0.0, 0.4])
def test_sigmoid_router(num_experts, k, n_group, topk_group, bias_spread):
    weight_ED, x_TD = draw(num_experts, HIDDEN, seed=1, spread=0.5), draw(40, HIDDEN, seed=3)
    # Not below zero, where the choices of dropped groups stand, all tied.
    bias_E = draw(num_experts, seed=2, spread=bias_spread).abs()
    options = {"k": k, "n_group": n_group, "topk_group": topk_group, "scale": 2.5}
    routing = sigmoid_router(weight_ED, bias_E, **options)(x_TD)
    assert routing.expert_N.dtype == torch.int64 and routing.gate_N.dtype == torch.float32
    expected = [naive.dsmoe_route(x_D.double(), weight_ED.double(), bias_E.double(), **options) for x_D in x_TD]
    assert_same_routing(as_dicts(routing), expected)


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (16, 2), (6, 1), (5, 5)])
def test_softmax_router(num_experts, k):
    weight_ED, x_TD = draw(num_experts, HIDDEN, seed=1), draw(40, HIDDEN, seed=3)
    expected = [naive.dit_moe_route(x_D.double(), weight_ED.double(), k=k) for x_D in x_TD]
    assert_same_routing(as_dicts(softmax_router(weight_ED, k=k)(x_TD)), expected)


def test_sigmoid_router_computes_in_fp32_whatever_the_activations():
    weight_ED, bias_E = draw(8, HIDDEN, seed=1), draw(8, seed=2, spread=0.1)
    x_TD = draw(40, HIDDEN, seed=3).bfloat16()
    router = sigmoid_router(weight_ED, bias_E, k=2)
    halved, full = router(x_TD), router(x_TD.float())
    assert halved.gate_N.dtype == torch.float32
    assert torch.equal(halved.expert_N, full.expert_N) and torch.equal(halved.gate_N, full.gate_N)


# ---- hand-made cases ------------------------------------------------------------------------------------------------


def test_the_bias_chooses_but_does_not_weigh():
    x_TD, weight_ED = one_hot_tokens([[2.0, 1.0, 0.0, -1.0]])
    bias_E = torch.tensor([0.0, -1.0, 0.0, 1.0])
    (row,) = as_dicts(sigmoid_router(weight_ED, bias_E, k=2, scale=2.0)(x_TD))
    high, low = torch.tensor([2.0, -1.0]).sigmoid().tolist()
    assert row == pytest.approx({0: 2 * high / (high + low), 3: 2 * low / (high + low)}, abs=TOLERANCE)


def test_groups_keep_a_better_expert_out():
    # Expert 0 is the best of all, but its group's two best lose to those of group 1.
    x_TD, weight_ED = one_hot_tokens([[2.0, -3.0, 1.0, 0.9]])
    bias_E = torch.zeros(4)
    assert as_dicts(sigmoid_router(weight_ED, bias_E, k=2, n_group=2, topk_group=1)(x_TD))[0].keys() == {2, 3}
    assert as_dicts(sigmoid_router(weight_ED, bias_E, k=2)(x_TD))[0].keys() == {0, 2}


def test_dropped_groups_count_as_zero_not_as_forbidden():
    # A negative bias pushes the kept group's second expert below zero, where a dropped expert stands.
    x_TD, weight_ED = one_hot_tokens([[3.0, 0.0, -4.0, -4.0]])
    bias_E = torch.tensor([0.0, -0.6, -1.0, -2.0])
    options = {"k": 2, "n_group": 2, "topk_group": 1, "scale": 1.0}
    (row,) = as_dicts(sigmoid_router(weight_ED, bias_E, **options)(x_TD))
    assert 0 in row and 1 not in row
    chosen = tuple(row)
    scores, _ = naive.dsmoe_scores(x_TD[0], weight_ED, bias_E, n_group=2, topk_group=1)
    assert row == pytest.approx(naive.dsmoe_weights(scores, chosen, 1.0), abs=TOLERANCE)


@pytest.mark.parametrize("k", [1, 2])
def test_one_expert_takes_all_tokens(k):
    logits = [[50.0 if expert == 5 else 0.1 * expert for expert in range(8)] for _ in range(10)]
    x_TD, weight_ED = one_hot_tokens(logits)
    for row in as_dicts(softmax_router(weight_ED, k=k)(x_TD)):
        assert row[5] == pytest.approx(1.0) and sum(row.values()) == pytest.approx(1.0)
    for row in as_dicts(sigmoid_router(weight_ED, torch.zeros(8), k=k, scale=2.0)(x_TD)):
        assert 5 in row and sum(row.values()) == pytest.approx(2.0)


def test_softmax_weights_are_not_renormalised():
    x_TD, weight_ED = one_hot_tokens([[0.0, 0.0, 0.0, 0.0]])
    (row,) = as_dicts(softmax_router(weight_ED, k=2)(x_TD))
    assert list(row.values()) == pytest.approx([0.25, 0.25])


def test_scores_that_underflow_do_not_divide_by_zero():
    x_TD, weight_ED = one_hot_tokens([[-200.0] * 4])
    (row,) = as_dicts(sigmoid_router(weight_ED, torch.zeros(4), k=2)(x_TD))
    assert list(row.values()) == [0.0, 0.0]


def test_no_tokens():
    weight_ED = draw(8, HIDDEN)
    for router in (
        softmax_router(weight_ED, k=3),
        sigmoid_router(weight_ED, torch.zeros(8), k=3),
        sigmoid_router(weight_ED, torch.zeros(8), k=3, n_group=4, topk_group=2),
    ):
        routing = router(torch.empty(0, HIDDEN))
        assert routing.num_tokens == 0 and routing.expert_N.shape == routing.gate_N.shape == (0,)


# ---- ties: any best set, consistent weights -------------------------------------------------------------------------

COARSE = st.integers(-4, 4).map(lambda quarter: quarter / 4)  # few values, so that many scores are exactly equal


def is_best_set(values, chosen):
    return sum(values[index] for index in chosen) >= sum(sorted(values)[-len(chosen) :]) - TIE


def is_valid_choice(choice, chosen, n_group, topk_group):
    """Whether ``chosen`` is a best set under some best selection of groups."""
    totals, size = naive.group_scores(choice, n_group), len(choice) // n_group
    for kept in itertools.combinations(range(n_group), topk_group):
        masked = [value if expert // size in kept else 0.0 for expert, value in enumerate(choice)]
        if is_best_set(totals, kept) and is_best_set(masked, chosen):
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.lists(COARSE, min_size=8, max_size=8), min_size=1, max_size=4),
    bias=st.lists(COARSE, min_size=8, max_size=8),
    grouping=st.sampled_from([(2, 1, 1), (2, 2, 1), (2, 4, 2), (3, 4, 3), (5, 2, 2)]),
)
def test_sigmoid_router_with_ties(logits, bias, grouping):
    k, n_group, topk_group = grouping
    x_TD, weight_ED = one_hot_tokens(logits)
    bias_E = torch.tensor(bias)
    routing = sigmoid_router(weight_ED, bias_E, k=k, n_group=n_group, topk_group=topk_group, scale=2.5)(x_TD)
    for x_D, row in zip(x_TD, as_dicts(routing), strict=True):
        scores, choice = naive.dsmoe_scores(x_D, weight_ED, bias_E)  # one group: the choice before masking
        assert is_valid_choice(choice, tuple(row), n_group, topk_group)
        assert row == pytest.approx(naive.dsmoe_weights(scores, tuple(row), 2.5), abs=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(logits=st.lists(st.lists(COARSE, min_size=8, max_size=8), min_size=1, max_size=4), k=st.integers(1, 8))
def test_softmax_router_with_ties(logits, k):
    x_TD, weight_ED = one_hot_tokens(logits)
    for x_D, row in zip(x_TD, as_dicts(softmax_router(weight_ED, k=k)(x_TD)), strict=True):
        probabilities = naive.dit_moe_probabilities(x_D, weight_ED)
        assert is_best_set(probabilities, tuple(row))
        assert row == pytest.approx({expert: probabilities[expert] for expert in row}, abs=TOLERANCE)
