"""Rows in int8 in whole networks: every policy and location of values; samples are float latents, relative L2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moeca_dist import Engine, Report, Request
from moeca_dist.config import Config, load_config
from moeca_dist.errors import UserError
from moeca_dist.kernels.int8_rows import SCALE_BYTES
from moeca_dist.parallel.all_to_all import SUM_HEADER_BYTES
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.report.tables import render
from moeca_dist.tuning.experts.record import record_routing
from tests.helpers.golden_files import load_golden
from tests.whole_runs.test_locations import difference, make_config, ranks  # noqa: F401

FULL_STEPS = [0, 1, 4]
APART = {"conditional": [0, 1, 3, 5, 7], "unconditional": [0, 4]}
OWNER = {"location": "owner"}
CASES: list[dict[str, Any]] = [
    {},
    {"policy": "network_forecast", "full_steps": APART},
    {"policy": "teacache", "delta": 0.008},
    {"policy": "fora", "full_steps": APART},
    {"policy": "taylorseer", "full_steps": FULL_STEPS},
    {"policy": "toca", "full_steps": APART},
    {"policy": "moeca_forecast", "full_steps": APART},
    {"policy": "moeca", "full_steps": FULL_STEPS},
    {"policy": "random", "full_steps": FULL_STEPS, "ratio": 0.5},
    {"policy": "dice_skip", "full_steps": FULL_STEPS},
    {"policy": "moeca_forecast", "full_steps": FULL_STEPS, **OWNER},
    {"policy": "random", "full_steps": APART, **OWNER},
]
LARGEST = 1e-3  # relative L2 to the samples of exact rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def with_parallel(config: Config, **parallel: Any) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def five() -> list[Request]:
    return [Request(index, index % 10, seed=7) for index in range(5)]


def make_engine(config: Config) -> Engine:
    mesh = Mesh.create(LauncherEnv.read(), ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    return Engine.from_config(config, mesh=mesh)


def both(config: Config) -> list[tuple[NDArray[np.generic], Report]]:
    """Runs on every rank of a pool: five images with exact rows and with int8 rows."""
    return [make_engine(with_parallel(config, row_dtype=rows)).generate(five()) for rows in ("exact", "int8")]


@pytest.mark.parametrize("cache", CASES)
def test_every_policy_and_location(two_ranks: Any, model: dict[str, Any], cache: dict[str, Any]) -> None:
    (exact, plain), (images, report) = two_ranks.run(both, make_config(model, cache))[0]
    assert 0 < difference(images, exact) < LARGEST
    assert report.exchange.row_dtype == "int8" and plain.exchange.row_dtype == "exact"
    assert report.exchange.collectives == plain.exchange.collectives
    assert report.exchange.bytes_sent < plain.exchange.bytes_sent


@pytest.mark.parametrize("world", [(4, 4), (4, 2)], ids=["EP4", "DP2xEP2"])
@pytest.mark.parametrize("cache", [CASES[index] for index in (0, 1, 8, 10)])
def test_more_ranks(
    ranks: Any,  # noqa: F811
    model: dict[str, Any],
    cache: dict[str, Any],
    world: tuple[int, int],
) -> None:
    """Five images: some ranks have two, some one, some none."""
    (exact, _), (images, _) = ranks(world[0]).run(both, make_config(model, cache, world[1]))[0]
    assert 0 < difference(images, exact) < LARGEST


def without_others(config: Config) -> tuple[Any, Any]:
    """Samples with and without a second image on this rank."""
    engine = make_engine(config)
    return engine.generate(five()[:4])[0], engine.generate(five()[:2])[0]


def test_an_image_stays_what_it_is_beside_others(two_ranks: Any, model: dict[str, Any]) -> None:
    """To rounding, which codes may magnify: a row between two codes."""
    cache = {"policy": "network_forecast", "full_steps": APART}
    beside, alone = two_ranks.run(without_others, with_parallel(make_config(model, cache), row_dtype="int8"))[0]
    assert difference(beside[:1], alone[:1]) < 1e-5


def with_its_reference(config: Config) -> tuple[Any, Any, Any, bool]:
    """Samples of an engine with int8 rows before and after its reference, those of this, and whether they share."""
    engine = make_engine(config)
    before, (exact, _), after = engine.generate(five())[0], engine.without_cache().generate(five()), engine
    shared = engine.without_cache().model.state_dict().items()
    own = engine.model.state_dict()
    return before, exact, after.generate(five())[0], all(own[name].data_ptr() == t.data_ptr() for name, t in shared)


def test_the_reference_has_exact_rows_and_the_same_weights(two_ranks: Any, model: dict[str, Any]) -> None:
    config = make_config(model, {})
    before, exact, after, shared = two_ranks.run(with_its_reference, with_parallel(config, row_dtype="int8"))[0]
    (expected, _), (int8, _) = two_ranks.run(both, config)[0]
    assert np.array_equal(exact, expected) and shared
    assert np.array_equal(before, int8) and np.array_equal(after, int8)


# ---- what is not finite ----------------------------------------------------------------------------------------------


def with_a_broken_output(config: Config) -> list[NDArray[np.generic]]:
    """As ``both``, where rank 1 gets a NaN from an expert of the first MoE layer, in the first evaluation alone."""
    samples = []
    for rows in ("exact", "int8"):
        engine = make_engine(with_parallel(config, row_dtype=rows))
        calls: list[int] = []

        def broken(_: nn.Module, __: Any, out_RD: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(out_RD.shape[0])
            return out_RD.index_fill(0, torch.tensor([0]), torch.nan) if len(calls) == 1 else out_RD

        if engine.mesh.rank == 1:
            next(layer for _, layer in engine.model.moe_layers()).experts.register_forward_hook(broken)
        samples.append(engine.generate(five()[:4])[0])
    return samples


@pytest.mark.parametrize("cache", [CASES[index] for index in (0, 1, 6, 10)])
def test_a_broken_image_is_seen_to_be(two_ranks: Any, model: dict[str, Any], cache: dict[str, Any]) -> None:
    """It has no finite value, as with exact rows, and the other images are whole."""
    exact, int8 = two_ranks.run(with_a_broken_output, make_config(model, cache))[0]
    assert np.array_equal(np.isfinite(int8), np.isfinite(exact))
    whole = np.isfinite(int8).reshape(4, -1)
    assert whole.any(1).tolist() == whole.all(1).tolist() and whole.all(1).sum() == 3


# ---- the report ------------------------------------------------------------------------------------------------------


def counted(config: Config) -> tuple[Report, Report, int, int, int]:
    """On every rank, without a cache: both reports; this rank's branches and pairs with other owners; hidden size."""
    engine = make_engine(config)
    away = [0, 0]

    def count(_: nn.Module, __: Any, routing: Any) -> None:
        owner_N = routing.expert_N // (engine.model.spec.num_experts // 2)
        others_N: Tensor = owner_N != engine.mesh.ep_rank
        away[0] += int(others_N.sum())
        away[1] += int(routing.tokens_with(others_N).sum())

    hooks = [layer.gate.register_forward_hook(count) for _, layer in engine.model.moe_layers()]
    _, report = engine.generate(five())
    for hook in hooks:
        hook.remove()
    _, exact = engine.without_cache().generate(five())
    return report, exact, away[0], away[1], engine.model.spec.hidden_size


def test_bytes_are_what_travels(two_ranks: Any, model: dict[str, Any]) -> None:
    outcomes = two_ranks.run(counted, with_parallel(make_config(model, {}), row_dtype="int8"))
    report, exact, _, _, width = outcomes[0]
    branches, pairs = (sum(outcome[index] for outcome in outcomes) for index in (2, 3))
    coded_bytes = branches * SUM_HEADER_BYTES + pairs * 2 * (SCALE_BYTES + width)
    assert report.exchange.bytes_sent == coded_bytes
    # The figure with exact rows; and the engine's own reference has them.
    assert report.exchange.bytes_full == branches * SUM_HEADER_BYTES + pairs * 2 * 4 * width
    assert exact.exchange.bytes_full == exact.exchange.bytes_sent > 3 * coded_bytes
    assert exact.exchange.row_dtype == "exact"
    assert sum(report.exchange.bytes_per_step) == report.exchange.bytes_sent
    text = render(json.loads(report.to_json()))
    assert "rows travel as" in text and "int8" in text and "rows travel as" not in render(json.loads(exact.to_json()))


def test_on_one_rank_nothing_travels(model: dict[str, Any]) -> None:
    """A job may run on any number of ranks: the same images, and the report says that rows are as computed."""
    config = make_config(model, {"policy": "network_forecast", "full_steps": APART})
    plain, of_plain = Engine.from_config(config, mesh=Mesh.single()).generate(five())
    images, report = Engine.from_config(with_parallel(config, row_dtype="int8"), mesh=Mesh.single()).generate(five())
    assert np.array_equal(images, plain)
    assert report.exchange == of_plain.exchange and report.exchange.row_dtype == "exact"


def traced(config: Config) -> Any:
    trace = record_routing(make_engine(config), five())
    return None if trace is None else trace.refreshed_SLHBTK


def test_a_recorded_run_is_that_of_the_rows(two_ranks: Any, model: dict[str, Any]) -> None:
    refreshed_SLHBTK = two_ranks.run(traced, with_parallel(make_config(model, {}), row_dtype="int8"))[0]
    assert refreshed_SLHBTK.all()


def test_unknown_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("parallel: {row_dtype: fp4}\n")
    with pytest.raises(UserError, match=r"parallel\.row_dtype must be 'exact' or 'int8'"):
        load_config(tmp_path / "run.yaml")
