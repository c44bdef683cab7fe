"""Late refreshes: which branches, with what values, on any number of ranks, and what is never late.

Shape suffixes: B images, T tokens, K routed experts per token, D hidden size, N late branches.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist import Engine, Request, UserError
from moeca_dist.cache.late import Landing, LateRefreshes, shallow_blocks
from moeca_dist.cache.layer_cache import BlockStep
from moeca_dist.cache.statistics import Reason
from moeca_dist.config import Config
from moeca_dist.moe import late
from moeca_dist.moe.cached_layer import LayerPlan
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.moe.layer import MoELayer
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.cache_memory import cache_size
from moeca_dist.runtime.checks import check_config
from tests.helpers.golden_files import load_golden
from tests.whole_runs.test_locations import NUM_STEPS, difference, generate, make_config, ranks  # noqa: F401

FULL_STEPS = [0, 1, 4]
LATE_STEPS = {2, 5, 6}  # neither they nor the next ones are full, and 7 is the last
CASES = [
    {"policy": "random", "ratio": 0.5, "order": 1},
    {"policy": "moeca", "refresh_ratio": 0.4},
    {"policy": "dice_skip"},
]
WORLDS = pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def config_of(model: dict[str, Any], cache: dict[str, Any], share: float | None, ep_size: int | None = None) -> Config:
    stated = {} if share is None else {"late_refresh": share}
    return make_config(model, {"full_steps": FULL_STEPS} | cache | stated, ep_size)


def expert_output(experts: RoutedExperts, expert: int, x_D: Tensor) -> Tensor:
    hidden = F.silu(experts.w1[expert] @ x_D) * (experts.w3[expert] @ x_D)
    return experts.w2[expert] @ hidden


@pytest.mark.parametrize("cache", CASES, ids=lambda cache: cache["policy"])
def test_what_is_late_and_what_lands(model, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops: the lowest gates of the stored branches that are refreshed; the outputs of their step's input."""
    share = 0.4
    engine = Engine.from_config(config_of(model, cache, share), mesh=Mesh.single())
    shallow = shallow_blocks(engine.model.spec.moe_blocks)
    inputs: dict[tuple[int, int], Tensor] = {}
    layers = dict(engine.model.moe_layers())
    seen: list[tuple[int, int]] = []
    compute, keep = MoELayer.compute, late._keep

    def remembered(
        self: MoELayer, x_BTD: Tensor, plan: LayerPlan, cache: BlockStep, *rest: Any, **options: Any
    ) -> Tensor:
        inputs[cache.block, cache.step.index] = x_BTD.flatten(0, 1).clone()
        return compute(self, x_BTD, plan, cache, *rest, **options)

    def checked(plan: LayerPlan, values_ND: Tensor, branch_N: Tensor, cache: BlockStep) -> None:
        where = cache.block, cache.step.index
        seen.append(where)
        ids_N, k = plan.routing.expert_ids_TK.flatten()[branch_N], plan.routing.num_experts_per_tok
        for value_D, branch, expert in zip(values_ND, branch_N.tolist(), ids_N.tolist(), strict=True):
            expected_D = expert_output(layers[cache.block].experts, expert, inputs[where][branch // k])
            torch.testing.assert_close(value_D, expected_D, atol=1e-5, rtol=1e-5)
        chosen = set(branch_N.tolist())
        for part, decision in zip(plan.parts, plan.decisions, strict=True):
            first = part.tokens.start * k
            per_image = part.tokens_per_image * k
            reasons, gates = decision.reason_TK.flatten().tolist(), part.routing(plan.routing).gates_TK.flatten()
            assert not (decision.refresh_TK & decision.late_TK).any()
            for image in range(part.num_images):
                window = range(image * per_image, (image + 1) * per_image)
                stored = [n for n in window if reasons[n] in (Reason.SCORE, Reason.FORCED, Reason.LATE)]
                lowest = sorted(stored, key=lambda n: (float(gates[n]), n))[: int(share * len(stored) + 1e-6)]
                assert {n - first for n in chosen} & set(window) == set(lowest)
        keep(plan, values_ND, branch_N, cache)
        for part, decision in zip(plan.parts, plan.decisions, strict=True):
            steps_TK = part.kept.branches._steps_TJ.gather(1, decision.match.entry_TK)
            assert (steps_TK[decision.late_TK] == cache.step.index).all()
            assert (decision.match.found_TK | ~decision.late_TK).all()

    monkeypatch.setattr(MoELayer, "compute", remembered)
    monkeypatch.setattr(late, "_keep", checked)
    _, report = engine.generate([Request(index, index, seed=7) for index in range(2)])
    assert set(seen) == {(block, step) for block in shallow for step in LATE_STEPS} and len(seen) == len(set(seen))
    assert report.branches.late > 0
    for entry in report.cache.per_layer:
        steps = {step for step, count in enumerate(entry["per_step"]["late"]) if count}
        assert steps == (LATE_STEPS if entry["block"] in shallow else set())


@pytest.mark.parametrize("cache", CASES, ids=lambda cache: cache["policy"])
def test_a_share_that_takes_nothing_changes_nothing(two_ranks, model, cache: dict[str, Any]) -> None:
    """Bit for bit, through the same exchanges."""
    for run in (generate, lambda config: two_ranks.run(generate, config)[0]):
        expected, exact, _ = run(config_of(model, cache, None))
        images, report, _ = run(config_of(model, cache, 1e-9))
        assert np.array_equal(images, expected)
        assert report.branches == exact.branches and report.branches.late == 0


@WORLDS
@pytest.mark.parametrize("cache", CASES, ids=lambda cache: cache["policy"])
def test_images_do_not_depend_on_the_ranks(ranks, model, cache: dict[str, Any], world: tuple[int, int]) -> None:  # noqa: F811
    """Five images on ranks of which some have fewer, or none; what is late lands nowhere else."""
    expected, alone, _ = generate(config_of(model, cache, 0.5))
    images, report, _ = ranks(world[0]).run(generate, config_of(model, cache, 0.5, world[1]))[0]
    assert difference(images, expected) <= 1e-5
    assert report.branches == alone.branches and report.branches.late > 0
    on_time, _, _ = generate(config_of(model, cache, None))
    assert difference(expected, on_time) > 1e-5


def test_computed_work_is_counted_where_it_is_done(model) -> None:
    """A late branch is computed work, counted once, in its step; only the values that others see differ."""
    cache = CASES[0]
    engine = Engine.from_config(config_of(model, cache, 0.5), mesh=Mesh.single())
    computed: list[int] = []
    for _, layer in engine.model.moe_layers():
        layer.experts.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[0]))
    _, report = engine.generate([Request(index, index) for index in range(3)])
    counts = report.branches
    assert sum(computed) == counts.refreshed
    assert counts.refreshed == counts.full_step + counts.unmatched + counts.score + counts.forced + counts.late
    assert report.num_steps == NUM_STEPS and "late" in report.to_json()


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("cache", CASES[:2], ids=lambda cache: cache["policy"])
def test_what_is_under_way_counts_as_memory(
    model, cache: dict[str, Any], guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what lands, step by step: values and positions, and of all branches of the layer where they go."""
    config = config_of(model, cache, 0.5)
    config = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"cfg_scale": 1.5 if guided else 1.0})}
    )
    without = config.model_copy(update={"cache": config.cache.model_copy(update={"late_refresh": None})})
    kept_alone = generate(without)[1].cache.bytes_peak
    under_way: dict[tuple[int, int], int] = {}  # by round and step
    rounds: list[LateRefreshes | None] = []  # each has one of its own
    keep = late._keep

    def measured(plan: LayerPlan, values_ND: Tensor, branch_N: Tensor, cache: BlockStep) -> None:
        count, hidden = values_ND.shape
        held = count * (hidden * 4 + 8 + 8) + plan.routing.expert_ids_TK.numel() * (8 + 4 + 8 + 1 + 1 + 1)
        rounds.append(cache.late)
        where = id(cache.late), cache.step.index
        under_way[where] = under_way.get(where, 0) + held
        keep(plan, values_ND, branch_N, cache)

    monkeypatch.setattr(late, "_keep", measured)
    _, report, _ = generate(config)
    assert {step for _, step in under_way} == LATE_STEPS
    assert report.cache.bytes_peak == kept_alone + max(under_way.values())


@pytest.mark.parametrize("cache", CASES, ids=lambda cache: cache["policy"])
def test_the_memory_forecast_is_an_upper_bound(two_ranks, model, cache: dict[str, Any]) -> None:
    """Also of an owner, which holds what it sends until it has arrived. A rank has two images at most."""
    for run, world in ((generate, 1), (lambda config: two_ranks.run(generate, config)[0], 2)):
        config = config_of(model, cache, 1.0)
        spec = Engine.from_config(config, mesh=Mesh.single()).model.spec
        sizes = {}
        for share in (None, 1.0):
            size = cache_size(config_of(model, cache, share), spec, NUM_STEPS, world)
            assert size is not None
            sizes[share] = world * size.of(2)
        without = run(config_of(model, cache, None))[1].cache.bytes_peak
        peak = run(config)[1].cache.bytes_peak
        assert without == sizes[None] < peak <= sizes[1.0]


def test_the_session_computes_before_it_keeps() -> None:
    events: list[str] = []

    def arrive() -> Any:
        events.append("arrive")
        return Landing(lambda: events.append("land"), 7)

    under_way = LateRefreshes(0.5, frozenset({1}))
    under_way.advance()
    under_way.land(1)
    under_way.depart(1, arrive)
    under_way.land(1)
    assert events == [] and under_way.num_bytes == 0
    under_way.advance()
    under_way.advance()
    assert events == ["arrive"] and under_way.num_bytes == 7
    under_way.land(3)
    under_way.land(1)
    under_way.land(1)
    assert events == ["arrive", "land"] and under_way.num_bytes == 0


@pytest.mark.parametrize(
    ("blocks", "shallow"), [((), ()), ((1,), ()), ((1, 3), (1,)), ((1, 3, 5), (1, 3)), ((0, 1, 2, 3), (0, 1))]
)
def test_the_last_third_is_never_late(blocks: tuple[int, ...], shallow: tuple[int, ...]) -> None:
    assert shallow_blocks(blocks) == frozenset(shallow)


@pytest.mark.parametrize(
    ("cache", "parallel", "message"),
    [
        ({"policy": "moeca_forecast"}, {}, "cache.late_refresh has no effect with cache.policy moeca_forecast"),
        ({"policy": "random", "placement": "owner"}, {}, "keeps branch values at home"),
        ({"policy": "random"}, {"exchange": "budget", "budget": 2}, "is for parallel.exchange exact, not budget"),
        ({"policy": "random"}, {"exchange": "budget", "budget": 3}, "is for parallel.exchange exact, not budget"),
        ({"policy": "random", "full_steps": [0, 2, 4, 6]}, {}, "no two steps in a row"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    model, cache: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    config = config_of(model, cache, 0.5)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    with pytest.raises(UserError, match=message):
        check_config(config, [0])
