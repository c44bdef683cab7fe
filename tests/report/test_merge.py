"""The report over the parts of a job is that of the whole job."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moeca_dist import Engine, Report, Request
from moeca_dist.config import Config
from moeca_dist.report.merge import ReportTotal
from moeca_dist.report.schema import describe_requests
from tests.helpers.golden_files import load_golden

REQUESTS = [Request(index, index % 10) for index in range(5)]


def make_config(folder: Path, **cache: Any) -> Config:
    golden = load_golden("dsmoe_e12")
    return Config.model_validate(
        {
            "model": {
                "checkpoint": str(golden.write_checkpoint(folder / "dsmoe_e12.pt")),
                "device": "cpu",
                **golden.options,
            },
            "cache": cache,
            "sampling": {"num_steps": 6, "batch_size": 2, "cfg_scale": 1.5},
        }
    )


def in_parts(config: Config) -> tuple[Report, list[Report]]:
    engine = Engine.from_config(config)
    whole = engine.generate(REQUESTS)[1]
    return whole, [engine.generate(REQUESTS[first : first + 2])[1] for first in (0, 2, 4)]


@pytest.mark.parametrize(
    "cache",
    [
        {},
        {"policy": "moeca_forecast", "full_steps": [0, 1, 4]},
        {"policy": "moeca", "full_steps": [0, 3]},
        {"policy": "dice_skip"},
        {"policy": "toca"},
        {"policy": "network_forecast", "full_steps": [0, 1, 4]},
    ],
    ids=lambda cache: cache.get("policy", "none"),
)
def test_counts_of_the_parts_are_those_of_the_whole(cache: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = in_parts(make_config(tmp_path, **cache))
    total = ReportTotal()
    for part in parts:
        total.add(asdict(part))
    found = total.result(2.0, {"chunks": 3}, describe_requests(REQUESTS))
    assert found is not None
    for name in ("num_images", "num_steps", "world_size", "flops", "branches", "requests"):
        assert getattr(found, name) == getattr(whole, name), name
    assert asdict(found.exchange) == asdict(whole.exchange)
    assert asdict(found.cache) == asdict(whole.cache)
    assert found.images_per_s == 2.5 and found.batch == {"chunks": 3}
    assert found.denoise_s == pytest.approx(sum(part.denoise_s for part in parts))
    for name, seconds in found.seconds.slowest.items():
        assert seconds == pytest.approx(sum(part.seconds.slowest[name] for part in parts))
        assert sum(found.seconds.per_step[name]) == pytest.approx(seconds)
    assert found.summary()


def test_ranks_add_up_too(two_ranks: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path, policy="moeca_forecast", full_steps=[0, 2])
    whole, parts = two_ranks.run(in_parts_of_two, config)[0]
    total = ReportTotal()
    for part in parts:
        total.add(asdict(part))
    found = total.result(1.0, {}, describe_requests(REQUESTS))
    assert found is not None and asdict(found.exchange) == asdict(whole.exchange)
    assert found.exchange.count_exchanges > 0 and found.branches == whole.branches


def in_parts_of_two(config: Config) -> tuple[Report, list[Report]]:
    from moeca_dist.parallel.mesh import LauncherEnv, Mesh

    engine = Engine.from_config(config, mesh=Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60))
    whole = engine.generate(REQUESTS)[1]
    return whole, [engine.generate(part)[1] for part in (REQUESTS[:4], REQUESTS[4:])]


def test_a_remark_stands_where_every_part_makes_it(tmp_path: Path) -> None:
    part = asdict(Engine.from_config(make_config(tmp_path, policy="fora")).generate(REQUESTS[:1])[1])
    for remarks, expected in ((["a", "a"], "a"), (["a", "b"], None), ([None, "a"], None)):
        total = ReportTotal()
        for remark in remarks:
            total.add(part | {"cache": part["cache"] | {"remark": remark}})
        found = total.result(1.0, {}, {})
        assert found is not None and found.cache.remark == expected


def test_nothing_adds_up_to_nothing() -> None:
    assert ReportTotal().result(1.0, {}, {}) is None
