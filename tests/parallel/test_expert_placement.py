"""Traces, placement tables and the traffic counted from them, against whole runs on one, two and four ranks.

Images are compared as float latents, relative L2 in fp32; bytes exactly, with what the exchange itself counted.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist import Engine, Request, UserError
from moeca_dist.config import Config
from moeca_dist.parallel.expert_placement import ExpertPlacement, PlacementTable
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.tuning.experts.assign import PlacementEffect, assign_experts, homes, placement_effect
from moeca_dist.tuning.experts.record import record_routing
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import RowBytes, layer_traffic
from tests.helpers.golden_files import load_golden

TOLERANCE = 1e-5
NUM_STEPS = 6
FORECAST = {"policy": "moeca_forecast", "interval": 3}
REQUESTS = tuple(Request(index, index % 3, 5) for index in range(6))
BLOCKS = (1, 3)
SCATTERED = PlacementTable(
    {1: ExpertPlacement((2, 0, 3, 1, 1, 0, 2, 3, 0, 2, 1, 3), 4), 3: ExpertPlacement((0, 0, 0, 1, 1, 3) * 2, 4)}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def make_config(model: dict[str, Any], cache: dict[str, Any], **parallel: Any) -> Config:
    sampling = {"num_steps": NUM_STEPS, "cfg_scale": 1.5, "batch_size": 2}
    return Config.model_validate({"model": model, "parallel": parallel, "cache": cache, "sampling": sampling})


def generate(config: Config) -> tuple[Any, Any]:
    engine = Engine.from_config(config, mesh=_mesh(config))
    images, report = engine.generate(REQUESTS)
    return images, report


def trace_of(config: Config) -> RoutingTrace | None:
    engine = Engine.from_config(config, mesh=_mesh(config))
    dispatchers = [layer.dispatcher for _, layer in engine.model.moe_layers()]
    trace = record_routing(engine, REQUESTS)
    assert all(layer.dispatcher is was for (_, layer), was in zip(engine.model.moe_layers(), dispatchers, strict=True))
    return trace


def _mesh(config: Config) -> Mesh:
    launcher = LauncherEnv.read()
    return Mesh.create(launcher, ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)


REPLICATED = PlacementTable(
    {
        1: ExpertPlacement(SCATTERED.by_block[1].owner_of_expert, 4, (0, 2, 7)),
        3: ExpertPlacement(SCATTERED.by_block[3].owner_of_expert, 4, (1, 11)),
    }
)
TABLES = {"scattered": SCATTERED, "replicated": REPLICATED}


@pytest.mark.parametrize("cache", [{}, FORECAST, FORECAST | {"location": "owner"}])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_gives_the_images_of_equal_runs(model, cache, table, four_ranks, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(TABLES[table].to_json({"by": "hand"}))
    assert PlacementTable.read(path) == TABLES[table]
    equal, _ = four_ranks.run(generate, make_config(model, cache))[0]
    placed, report = four_ranks.run(generate, make_config(model, cache, expert_placement=str(path)))[0]
    alone, _ = generate(make_config(model, {key: v for key, v in cache.items() if key != "location"}))
    assert report.exchange.bytes_sent > 0
    assert np.linalg.norm(placed - equal) <= TOLERANCE * np.linalg.norm(equal)
    if "location" not in cache:
        assert np.linalg.norm(placed - alone) <= TOLERANCE * np.linalg.norm(alone)


@pytest.mark.parametrize("cache", [{}, FORECAST, {"policy": "taylorseer"}])
@pytest.mark.parametrize("name", ["equal runs", *TABLES])
def test_traffic_counted_from_a_trace_is_what_the_run_sends(model, cache, name, four_ranks, tmp_path) -> None:
    path, parallel = tmp_path / "table.json", {}
    table = TABLES.get(name, PlacementTable.contiguous(BLOCKS, 12, 4))
    if name in TABLES:
        parallel = {"expert_placement": str(path)}
        path.write_text(table.to_json({}))
    # One round of all images, and the trace of one rank.
    config = make_config(model, cache, **parallel)
    trace = trace_of(make_config(model, cache))
    _, report = four_ranks.run(generate, config)[0]
    effect = placement_effect(trace, table, 4)
    assert effect.bytes_per_step * NUM_STEPS == report.exchange.bytes_sent > 0
    assert effect.slowest_load >= 1


def test_owner_traffic_counted_from_a_trace_is_what_the_run_sends(model, two_ranks) -> None:
    trace = trace_of(make_config(model, FORECAST))
    cache = FORECAST | {"location": "owner"}
    _, report = two_ranks.run(generate, make_config(model, cache))[0]
    placement, home_N, row = ExpertPlacement.contiguous(12, 2), homes(trace, 2), RowBytes.exact(trace.row_bytes)
    sent = sum(
        layer_traffic(ids.reshape(-1, 5), fresh.reshape(-1, 5), home_N, placement, row, "owner").bytes_sent
        for ids, fresh in zip(
            np.concatenate(trace.expert_ids_SLHBTK), np.concatenate(trace.refreshed_SLHBTK), strict=True
        )
    )
    # Both placements see the same first steps; gates of untouched tokens may move a later choice.
    assert sent == pytest.approx(report.exchange.bytes_sent, rel=0.02)


@pytest.mark.parametrize("cache", [{}, FORECAST])
def test_a_trace_of_four_ranks_is_that_of_one(model, cache, four_ranks, tmp_path: Path) -> None:
    alone = trace_of(make_config(model, cache))
    together = four_ranks.run(trace_of, make_config(model, cache))
    assert together[1:] == [None] * 3
    ids = [np.sort(trace.expert_ids_SLHBTK, -1) for trace in (alone, together[0])]
    assert ids[0].shape == (NUM_STEPS, 2, 2, 6, 16, 5) and (ids[0] == ids[1]).mean() > 0.999
    assert abs(int(alone.refreshed_SLHBTK.sum()) - int(together[0].refreshed_SLHBTK.sum())) < 20
    assert alone.refreshed_SLHBTK.all() == (not cache)
    path = tmp_path / "trace.npz"
    alone.save(path)
    read = RoutingTrace.read(path)
    assert np.array_equal(read.expert_ids_SLHBTK, alone.expert_ids_SLHBTK)
    assert np.array_equal(read.refreshed_SLHBTK, alone.refreshed_SLHBTK)
    assert (read.blocks, read.num_experts, read.row_bytes, read.keeps_branches) == (
        BLOCKS,
        12,
        alone.row_bytes,
        bool(cache),
    )


def test_incomplete_traces_are_refused(model) -> None:
    engine = Engine.from_config(make_config(model, {"policy": "toca"}), mesh=Mesh.single())
    with pytest.raises(UserError, match="routes only some tokens"):
        record_routing(engine, REQUESTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no expert placement"),
        ('{"num_experts": 2, "num_ranks": 2, "owner_of_expert": {"1": [0]}}', "does not place 2 experts"),
        ('{"num_experts": 2, "num_ranks": 2, "owner_of_expert": {"1": [0, 2]}}', "names ranks"),
        (
            '{"num_experts": 2, "num_ranks": 2, "owner_of_expert": {"1": [0, 1]}, "replicated": {"1": [2]}}',
            "replicates",
        ),
        ('{"num_experts": 2, "num_ranks": 2, "owner_of_expert": {"1": [0, 1]}, "replicated": {"3": [0]}}', "block 3"),
        (PlacementTable.contiguous(BLOCKS, 12, 2).to_json({}), "for 12 experts on 2 ranks"),
        (PlacementTable.contiguous((1,), 12, 1).to_json({}), "is for the blocks \\[1\\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(model, content, message, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        generate(make_config(model, {}, expert_placement=str(path)))
    with pytest.raises(UserError, match="does not exist"):
        generate(make_config(model, {}, expert_placement=str(tmp_path / "absent.json")))


def made_trace(ids: np.ndarray, num_experts: int) -> RoutingTrace:
    """One block, one half, one image per index of ``ids`` [S, B, T, K]; everything is computed."""
    ids = ids[:, None, None].astype(np.uint8)
    return RoutingTrace(ids, np.ones(ids.shape, bool), (0,), num_experts, 16, False)


def test_hot_experts_are_spread_and_companions_meet() -> None:
    # Experts 0 and 1 take half of all branches; equal runs put both on rank 0.
    rng = np.random.default_rng(0)
    shape = (4, 4, 32, 1)
    hot = np.where(rng.random(shape) < 0.5, rng.integers(0, 2, shape), rng.integers(2, 8, shape))
    trace, equal = made_trace(hot, 8), PlacementTable.contiguous((0,), 8, 4)
    placed = assign_experts(trace, 4, balance=1.0)
    assert placement_effect(trace, placed, 4).slowest_load < 0.8 * placement_effect(trace, equal, 4).slowest_load
    # Every token takes an expert and its companion four places on.
    first = rng.integers(0, 4, (4, 4, 32, 1))
    trace = made_trace(np.concatenate([first, first + 4], -1), 8)
    placed = assign_experts(trace, 4)
    owner = placed.by_block[0].owner_of_expert
    assert all(owner[e] == owner[e + 4] for e in range(4))
    assert placement_effect(trace, placed, 4).bytes_per_step < 0.7 * placement_effect(trace, equal, 4).bytes_per_step


def test_hot_experts_on_every_rank_send_nothing() -> None:
    # Experts 2 and 5 take most branches: with both on every rank the others' remain, and the load evens out.
    rng = np.random.default_rng(0)
    first = np.where(rng.random((4, 4, 32, 1)) < 0.8, 2, rng.integers(0, 2, (4, 4, 32, 1)))
    trace = made_trace(np.concatenate([first, np.where(rng.random(first.shape) < 0.8, 5, 6)], -1), 8)
    without, two = (assign_experts(trace, 4, replicas=count) for count in (0, 2))
    assert two.by_block[0].replicated == (2, 5)
    assert [len(two.by_block[0].experts_of(rank)) for rank in range(4)] == [4, 4, 3, 3]
    effects = [placement_effect(trace, table, 4) for table in (without, two)]
    assert effects[1].bytes_per_step < 0.35 * effects[0].bytes_per_step
    assert effects[1].slowest_load < 0.8 * effects[0].slowest_load
    everything = assign_experts(trace, 4, replicas=8)
    assert placement_effect(trace, everything, 4) == PlacementEffect(0.0, 1.0)
    with pytest.raises(UserError, match="it has 8"):
        assign_experts(trace, 4, replicas=9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**16))
def test_tables_keep_the_number_of_experts_and_never_cost_more(experts, ranks, balance, seed) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((3, 2, 5, experts)) * rng.random(experts), -1)[..., : min(3, experts)]
    trace, equal = made_trace(ids, experts), ExpertPlacement.contiguous(experts, ranks)
    placement = assign_experts(trace, ranks, balance).by_block[0]
    assert [len(placement.experts_of(rank)) for rank in range(ranks)] == [
        len(equal.experts_of(rank)) for rank in range(ranks)
    ]
    effects = [placement_effect(trace, PlacementTable({0: p}), ranks) for p in (placement, equal)]
    if balance == 1:
        assert effects[0].slowest_load <= effects[1].slowest_load + 1e-9


@pytest.mark.parametrize("replicated", [(), (0, 7)])
def test_traffic_against_a_loop_over_tokens(replicated: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    placement = ExpertPlacement(tuple(rng.integers(0, 5, 12).tolist()), 5, replicated)
    home_T = rng.integers(0, 5, 40)
    ids = np.argsort(rng.random((40, 12)), -1)[:, :4]
    fresh = rng.random(ids.shape) < 0.3
    for returns in ("sums", "branches", "owner"):
        expected, rows_PE = 0, np.zeros((5, 12), int)
        for token in range(40):
            touched, owner_E = fresh[token].any(), placement.owners_for(home_T[token])
            for expert in ids[token][fresh[token]]:
                rows_PE[owner_E[expert], expert] += 1
            for owner in set(range(5)) - {home_T[token]}:
                mine = [slot for slot in range(4) if owner_E[ids[token, slot]] == owner]
                refreshed = sum(bool(fresh[token, slot]) for slot in mine)
                expected += 64 * (refreshed > 0)
                if returns == "owner":
                    expected += touched * (12 * len(mine) + 64 * bool(mine))
                else:
                    expected += refreshed * (8 if returns == "sums" else 4)
                    expected += 64 * ((refreshed > 0) if returns == "sums" else refreshed)
        traffic = layer_traffic(ids, fresh, home_T, placement, RowBytes.exact(64), returns)
        assert traffic.bytes_sent == expected
        assert np.array_equal(traffic.rows_PE, rows_PE)
