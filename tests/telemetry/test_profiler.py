"""Traces of the profiler: one per rank with named ranges, of the asked steps, and of the same images."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moeca_dist import Engine, UserError
from moeca_dist.cli import main
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.telemetry.test_gpu_monitor import make_config, requests


def ranges(trace: bytes) -> Counter[str]:
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    return Counter(event["name"] for event in events if event["name"].startswith("moeca "))


def test_ranges_are_those_of_the_asked_steps(tmp_path: Path) -> None:
    config = make_config(tmp_path, trace=3).model_copy(
        update={"cache": Config.model_validate({"cache": {"policy": "moeca_forecast", "full_steps": [0, 1]}}).cache}
    )
    traces: dict[int, bytes] = {}
    engine = Engine.from_config(config)
    images, report = engine.generate(requests(3), trace_sink=traces.__setitem__)
    assert list(traces) == [0]
    found = ranges(traces[0])
    num_blocks, num_layers = engine.model.spec.depth, len(engine.model.spec.moe_blocks)
    # Two full steps and a cache step were traced of two rounds of four steps.
    assert found["moeca attention"] == 2 * num_blocks
    assert found["moeca experts"] >= 3 * num_layers and found["moeca cache"] >= 3 * num_layers
    assert set(report.seconds.slowest) >= {"attention", "experts", "bookkeeping"}
    plain, _ = Engine.from_config(config.model_copy(update={"telemetry": Config().telemetry})).generate(requests(3))
    assert (plain == images).all()


def test_a_run_of_fewer_steps_is_traced_whole(tmp_path: Path) -> None:
    traces: dict[int, bytes] = {}
    engine = Engine.from_config(make_config(tmp_path, trace=100))
    engine.generate(requests(1), trace_sink=traces.__setitem__)
    assert ranges(traces[0])["moeca attention"] == 4 * engine.model.spec.depth


def test_a_failing_run_stops_the_profiler(tmp_path: Path) -> None:
    def sink(*_: Any) -> None:
        raise ZeroDivisionError

    engine = Engine.from_config(make_config(tmp_path, trace=100))
    with pytest.raises(ZeroDivisionError):
        engine.generate_into(sink, requests(1), trace_sink=lambda rank, trace: None)
    assert not torch.autograd.profiler._is_profiler_enabled
    traces: dict[int, bytes] = {}
    engine.generate(requests(1), trace_sink=traces.__setitem__)
    assert ranges(traces[0])


def test_without_a_place_for_traces_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"telemetry\.trace has no place for its traces here"):
        Engine.from_config(make_config(tmp_path, trace=1)).generate(requests(1))


def traced_on_rank(config: Config) -> dict[int, Counter[str]]:
    mesh = Mesh.create(LauncherEnv.read(), ep_size=2, device_type="cpu", timeout_s=60)
    traces: dict[int, bytes] = {}
    Engine.from_config(config, mesh=mesh).generate(requests(3), trace_sink=traces.__setitem__)
    return {rank: ranges(trace) for rank, trace in traces.items()}


def test_rank_0_gets_the_traces_of_all_ranks(two_ranks, tmp_path: Path) -> None:
    config = make_config(tmp_path, trace=2)
    first, second = two_ranks.run(traced_on_rank, config)
    assert second == {} and list(first) == [0, 1]
    for found in first.values():
        assert found["moeca exchange"] > 0 and found["moeca wait"] > 0 and found["moeca experts"] > 0
    # Both legs of every exchange, each started and waited for.
    assert first[0]["moeca exchange"] == 4 * first[0]["moeca wait"]


def test_the_command_line_puts_them_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(make_config(tmp_path, trace=1).to_yaml())
    argv = ["generate", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--num-images", "1"]
    assert main(argv) == 0
    (path,) = (tmp_path / "out" / "traces").iterdir()
    assert path.name == "rank_000.json.gz" and ranges(path.read_bytes())["moeca attention"] > 0
