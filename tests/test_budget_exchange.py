"""Exchange mode ``budget``: rows by priority, what waits, the same images on any number of ranks, and no host waiting.

Shape suffixes: B images, X branches of one image, G groups of experts, R rows, T tokens, K routed experts per token.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moeca_dist.cache.budget import Backlog, Candidates, chosen, select
from moeca_dist.runtime.checks import check_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_dist import Engine, Request, UserError
from moeca_dist.cache.branch_cache import BranchCache
from moeca_dist.cache.session import StepCache
from moeca_dist.cli import main
from moeca_dist.config import Config
from moeca_dist.moe.value_location import budget_groups, budget_rows
from moeca_dist.parallel.all_to_all import FIXED_HEADER_BYTES
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.runtime.cache_memory import cache_size
from tests.helpers.golden_files import load_golden
from tests.whole_runs.test_locations import difference, generate, make_config, ranks  # noqa: F401

FULL_STEPS = [0, 1, 4]
POLICIES = ("moeca_forecast", "moeca", "random", "dice_skip")


# ---- who gets a row --------------------------------------------------------------------------------------------------


@st.composite
def candidates(draw: st.DrawFn) -> tuple[Candidates, int]:
    images, branches, groups = draw(st.integers(0, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    count = images * branches

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=dtype).view(images, branches)

    return Candidates(
        column(st.integers(0, groups - 1), torch.int64),
        column(st.booleans(), torch.bool),
        column(st.booleans(), torch.bool),
        column(st.integers(0, 300), torch.int64).clamp(max=255),
        column(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.25000003, 3.0, 1e30]), torch.float32),
    ), groups


@given(candidates(), st.integers(1, 12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_go_by_priority(drawn: tuple[Candidates, int], rows: int, fill: bool) -> None:
    """Against sorting every image and group: who waited longest, unmatched, wanted, score, position."""
    found, groups = drawn
    images, branches = found.score_BX.shape
    rows = min(rows, branches)
    branch_BGR = select(found.keys(fill=fill), found.group_BX, groups, rows)
    assert branch_BGR.shape == (images, groups, rows)
    for image in range(images):
        for group in range(groups):
            may = [
                (-int(found.waited_BX[image, x]), not found.unmatched_BX[image, x], not found.wanted_BX[image, x],
                 -float(found.score_BX[image, x]), x)
                for x in range(branches)
                if found.group_BX[image, x] == group and (fill or found.wanted_BX[image, x])
            ]  # fmt: skip
            best = sorted(x for *_, x in sorted(may)[:rows])
            assert branch_BGR[image, group].tolist() == best + [branches] * (rows - len(best))
    marks = chosen(branch_BGR, branches)
    assert marks.shape == (images, branches) and int(marks.sum()) == int((branch_BGR < branches).sum())
    demand_BG = found.demand(groups)
    assert int(demand_BG.sum()) == int(found.wanted_BX.sum())


def test_the_backlog_remembers_experts_not_slots() -> None:
    backlog = Backlog()
    first_TK = torch.tensor([[3, 1], [2, 0]])
    assert backlog.waited(first_TK).tolist() == [[0, 0], [0, 0]]
    backlog.note(first_TK, torch.tensor([[True, False], [True, True]]), backlog.waited(first_TK))
    swapped_TK = torch.tensor([[1, 3], [0, 5]])
    waited_TK = backlog.waited(swapped_TK)
    assert waited_TK.tolist() == [[0, 1], [1, 0]]
    backlog.note(swapped_TK, torch.tensor([[False, True], [False, False]]), waited_TK)
    assert backlog.waited(swapped_TK).tolist() == [[0, 2], [0, 0]]
    backlog.clear()
    assert not backlog.waited(swapped_TK).any()


@given(st.data(), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_stand_ins_are_branches_that_the_token_had(data: st.DataObject, extra: int) -> None:
    """Every token has K distinct stored experts; new ones never take the place of a stand-in."""
    tokens, k, experts = 3, 3, 8
    cache = BranchCache(k + extra, forecast=False)

    def routes() -> Tensor:
        return torch.tensor([data.draw(st.permutations(range(experts)))[:k] for _ in range(tokens)])

    stored: list[set[int]] = [set() for _ in range(tokens)]
    for step in range(3):
        ids_TK = routes()
        values_TKD = ids_TK[..., None].float().expand(-1, -1, 2)
        cache.store_all(ids_TK, values_TKD, cache.match(ids_TK), step)
        for token, ids in enumerate(ids_TK.tolist()):
            stored[token] = set(ids) | (stored[token] if extra else set())
    ids_TK = routes()
    match = cache.match(ids_TK)
    marks = data.draw(st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k))
    refresh_TK = torch.tensor(marks).view(tokens, k)
    after, have_TK = cache.stand_ins(match, refresh_TK, ids_TK)
    for token in range(tokens):
        assert len(set(after.entry_TK[token].tolist())) == k and len(set(have_TK[token].tolist())) == k
        for slot in range(k):
            waits = not match.found_TK[token, slot] and not refresh_TK[token, slot]
            expert = int(have_TK[token, slot])
            assert expert in stored[token] if waits else expert == ids_TK[token, slot]
    everything, have_TK = cache.stand_ins(match, torch.ones_like(refresh_TK), ids_TK)
    assert torch.equal(everything.entry_TK, match.entry_TK) and torch.equal(have_TK, ids_TK)


# ---- whole networks --------------------------------------------------------------------------------------------------

WORLDS = pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def budgeted(model: dict[str, Any], cache: dict[str, Any], ep_size: int | None = None, **options: Any) -> Config:
    config = make_config(model, cache, ep_size)
    update = {"exchange": "budget", "budget": 1.0} | options
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


@pytest.mark.parametrize("policy", POLICIES)
def test_enough_rows_are_exact_bit_for_bit(two_ranks, model, policy: str) -> None:
    """On one rank and on two, whose shares of the images differ."""
    cache = {"policy": policy, "full_steps": FULL_STEPS}
    for run in (lambda config: generate(config), lambda config: two_ranks.run(generate, config)[0]):
        expected, exact, _ = run(make_config(model, cache))
        images, report, _ = run(budgeted(model, cache))
        assert np.array_equal(images, expected)
        assert (report.branches, report.flops) == (exact.branches, exact.flops)
        assert report.branches.deferred == 0 and report.exchange.mode == "budget"
        for entry in report.exchange.budget:
            assert entry["deferred"] == 0 and entry["demand"]["1"] <= entry["rows"]


@WORLDS
@pytest.mark.parametrize("policy", ["moeca_forecast", "moeca"])
def test_what_waits_does_not_depend_on_the_ranks(ranks, model, policy: str, world: tuple[int, int]) -> None:  # noqa: F811
    """Far too few rows, in as many groups everywhere: the same branches wait, and the images are the same."""
    cache = {"policy": policy, "full_steps": FULL_STEPS}
    expected, alone, _ = generate(budgeted(model, cache, budget=1, budget_groups=4))
    images, report, _ = ranks(world[0]).run(generate, budgeted(model, cache, world[1], budget=1, budget_groups=4))[0]
    assert difference(images, expected) <= 1e-5
    assert alone.branches.deferred > 0 and report.branches == alone.branches
    assert report.exchange.count_exchanges > 0  # of the full steps alone


def test_what_waits_does_not_depend_on_the_batch(model) -> None:
    config = budgeted(model, {"policy": "moeca_forecast", "full_steps": FULL_STEPS}, budget=1)
    together = config.model_copy(update={"sampling": config.sampling.model_copy(update={"batch_size": 5})})
    assert difference(generate(together)[0], generate(config)[0]) <= 1e-5


def test_a_group_per_rank_changes_only_what_waits(two_ranks, model) -> None:
    """The default: with rows of their own for each rank, images depend on the number of ranks where branches wait."""
    cache = {"policy": "moeca_forecast", "full_steps": FULL_STEPS}
    for budget, waits in ((2, True), (0.5, False)):
        config = budgeted(model, cache, budget=budget)
        images, alone, _ = generate(config)
        shared, apart, _ = two_ranks.run(generate, config)[0]
        assert (alone.branches.deferred > apart.branches.deferred) == waits
        assert (difference(shared, images) > 1e-5) == waits


@pytest.mark.parametrize("policy", ["moeca_forecast", "random"])
def test_full_and_served_halves_side_by_side(two_ranks, model, policy: str) -> None:
    """Steps with full parts travel as in mode exact, and follow the same decisions."""
    halves = {"conditional": [0, 1, 3, 5], "unconditional": [0, 4]}
    cache = {"policy": policy, "full_steps": halves}
    expected, alone, _ = generate(budgeted(model, cache, budget=1, budget_groups=2))
    images, report, _ = two_ranks.run(generate, budgeted(model, cache, budget=1, budget_groups=2))[0]
    assert difference(images, expected) <= 1e-5
    assert alone.branches.deferred > 0 and report.branches == alone.branches
    exact = generate(make_config(model, cache))[0]
    assert np.array_equal(generate(budgeted(model, cache))[0], exact)


def test_rows_that_nobody_needs_are_filled(model) -> None:
    cache = {"policy": "moeca_forecast", "full_steps": FULL_STEPS}
    plain, filled = (generate(budgeted(model, cache, budget=8, budget_fill=fill))[1] for fill in (False, True))
    assert plain.branches.score == 0
    steps, layers = plain.num_steps - len(FULL_STEPS), len(plain.exchange.budget)
    assert filled.branches.refreshed - filled.branches.full_step == 8 * 5 * 2 * steps * layers


@pytest.mark.parametrize("budget", [1, 0.25, [1, 7]])
def test_what_travels_is_what_is_budgeted(two_ranks, model, budget: Any) -> None:
    """Bytes follow from the configuration: ranks with fewer images send padding. Two collectives a layer, no counts."""
    cache = {"policy": "moeca_forecast", "full_steps": FULL_STEPS}
    config = budgeted(model, cache, budget=budget)
    _, report, _ = two_ranks.run(generate, config)[0]
    spec = Engine.from_config(config).model.spec
    rows = [entry["rows"] for entry in report.exchange.budget]
    per_image = [math.ceil(value * 16 * 5) if isinstance(value, float) else value for value in listed(budget)]
    assert rows == per_image
    most_per_round = [2, 1]  # five images, two ranks, two images per rank and round: 2 + 2, then 1 and none
    slots = 2 * sum(most_per_round) * sum(rows)  # both halves
    width = spec.hidden_size * 4
    cached_bytes = 2 * slots * (2 * width + FIXED_HEADER_BYTES)  # there and back, from both ranks
    steps = [step for step in range(report.num_steps) if step not in FULL_STEPS]
    assert [report.exchange.bytes_per_step[step] for step in steps] == [cached_bytes] * len(steps)
    layers = len(rows)
    assert report.exchange.count_exchanges == 2 * layers * len(FULL_STEPS)
    assert report.exchange.collectives == 2 * layers * 2 * report.num_steps


def listed(budget: Any) -> list[Any]:
    return budget if isinstance(budget, list) else [budget, budget]


# ---- nothing waits for the device ------------------------------------------------------------------------------------

WAITING = ("_local_scalar_dense", "nonzero.", "item", "bincount", "masked_select", "is_nonzero", "equal.", "unique",
           "repeat_interleave.Tensor", "lift_fresh")  # fmt: skip
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Walk(TorchDispatchMode):
    """Lists the operators that on CUDA make the host wait for the device, or copy from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        self.operators += 1
        by_mask = name.startswith("index.") and any(m is not None and m.dtype == torch.bool for m in args[1])
        written_by_mask = name.startswith("index_put") and any(m is not None and m.dtype == torch.bool for m in args[1])
        if (
            by_mask
            or written_by_mask
            or name.startswith(WAITING)
            or ((kwargs or {}).get("device") is not None and (name.startswith("_to_copy")))
        ):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def walk_cached_steps(config: Config) -> tuple[list[str], int]:
    """On every rank: what the cached steps of a run would wait for, and how many operators they have."""
    env = LauncherEnv.read()
    engine = Engine.from_config(config, mesh=Mesh.create(env, ep_size=config.parallel.ep_size, device_type="cpu"))
    forward, waits, operators = engine.model.forward, [], []

    def walked(*args: Any, **kwargs: Any) -> Tensor:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, StepCache)), None)
        if cache is None or any(segment.full for segment in cache.segments):
            return forward(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch, Walk() as walk:
            for name in READS:
                read = getattr(Tensor, name)
                patch.setattr(Tensor, name, _noting(name, read, waits))
            out = forward(*args, **kwargs)
        waits.extend(walk.waits)
        operators.append(walk.operators)
        return out

    engine.model.forward = walked  # type: ignore[method-assign]
    engine.generate([Request(index, index % 10) for index in range(3)])
    return waits, sum(operators)


def _noting(name: str, read: Any, waits: list[str]) -> Any:
    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        waits.append(name)
        return read(self, *args, **kwargs)

    return noted


def test_a_cached_step_never_waits_for_the_device(two_ranks, model) -> None:
    cache = {"policy": "moeca_forecast", "full_steps": FULL_STEPS}
    config = budgeted(model, cache, budget=3)
    for waits, operators in [walk_cached_steps(config), *two_ranks.run(walk_cached_steps, config)]:
        assert waits == [] and operators > 1000
    waits, _ = walk_cached_steps(make_config(model, cache))
    assert waits, "mode exact waits: a walk that finds nothing there would prove nothing"


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"exchange": "budget"}, "needs parallel.budget"),
        ({"budget": 3}, "parallel.budget has no effect with parallel.exchange exact"),
        ({"exchange": "exact", "budget_groups": 2}, "parallel.budget_groups has no effect"),
        ({"budget_fill": True}, "parallel.budget_fill has no effect"),
        ({"exchange": "budget", "budget": 0}, "budget"),
        ({"exchange": "budget", "budget": 1.5}, "budget"),
    ],
)
def test_options_without_effect_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"parallel": parallel})


def test_combinations_that_cannot_be_carried_out_are_refused(model) -> None:
    with pytest.raises(UserError, match=r"parallel.exchange budget has no effect with cache.policy fora"):
        check_config(budgeted(model, {"policy": "fora"}), [0])
    with pytest.raises(UserError, match=r"parallel.exchange budget keeps branch values at home"):
        check_config(budgeted(model, {"policy": "random", "placement": "owner"}), [0])
    with pytest.raises(UserError, match=r"lists 3 blocks, but the model has 2 MoE blocks"):
        check_config(budgeted(model, {"policy": "random"}, budget=[1, 2, 3]), [0])
    with pytest.raises(UserError, match=r"budget_groups 24 does not divide 12 experts on 1 ranks"):
        Engine.from_config(budgeted(model, {"policy": "random"}, budget_groups=24))


def test_groups_lie_within_ranks() -> None:
    parallel = Config.model_validate({"parallel": {"exchange": "budget", "budget": 1, "budget_groups": 4}}).parallel
    assert budget_groups(parallel, ExpertPlacement.contiguous(8, 2)) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert (
        budget_groups(parallel, ExpertPlacement.contiguous(10, 4)) == ExpertPlacement.contiguous(10, 4).owner_of_expert
    )
    with pytest.raises(UserError, match="does not divide 10 experts on 2 ranks"):
        budget_groups(parallel, ExpertPlacement.contiguous(10, 2))
    with pytest.raises(UserError, match="does not divide 9 experts on 3 ranks"):
        budget_groups(parallel, ExpertPlacement.contiguous(9, 3))
    assert budget_rows(parallel, [1, 3], 16, 2, (0, 0, 1, 1)) == {1: 1, 3: 1}


def test_the_uncached_reference_is_exact(model) -> None:
    engine = Engine.from_config(budgeted(model, {"policy": "moeca_forecast"})).without_cache()
    assert engine.config.parallel.exchange == "exact" and engine.config.parallel.budget is None


def test_rows_are_read_off_a_run_that_had_enough(model, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """``moeca budget``: with the rows of the highest quantile nothing waits, and the images stay bit for bit."""
    config = budgeted(model, {"policy": "moeca_forecast", "full_steps": FULL_STEPS})
    images, report, _ = generate(config)
    (tmp_path / "report.json").write_text(report.to_json())
    assert main(["budget", str(tmp_path), "--quantile", "1"]) == 0
    stated = yaml.safe_load(capsys.readouterr().out)["parallel"]
    again, few, _ = generate(budgeted(model, {"policy": "moeca_forecast", "full_steps": FULL_STEPS}, **stated))
    assert np.array_equal(again, images) and few.branches.deferred == 0
    assert all(rows < entry["rows"] for rows, entry in zip(stated["budget"], report.exchange.budget, strict=True))
    waiting = generate(budgeted(model, {"policy": "moeca_forecast", "full_steps": FULL_STEPS}, budget=1))[1]
    (tmp_path / "report.json").write_text(waiting.to_json())
    assert main(["budget", str(tmp_path)]) == 2
    assert "branches waited in this run" in capsys.readouterr().err


@pytest.mark.parametrize("full_steps", [FULL_STEPS, list(range(8))], ids=["served", "all full"])
def test_the_size_of_the_cache_is_predicted(model, full_steps: list[int]) -> None:
    """With what waits; nothing of it where no step is served."""
    config = budgeted(model, {"policy": "moeca_forecast", "full_steps": full_steps}, budget=1)
    size = cache_size(config, Engine.from_config(config).model.spec, 8, 1)
    assert size is not None and generate(config)[1].cache.bytes_peak == size.of(2)
