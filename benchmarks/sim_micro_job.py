"""Measures on all ranks of a torchrun job what the simulator's CPU table needs: experts by rows, and the exchange.

    python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/sim_micro_job.py CONFIG OUT.json

Rank 0 writes seconds of a core (CPU time of the process, so that a busy machine disturbs them less than the clock) for
the routed experts of one MoE layer with so many rows for each, and for the exchange of a layer, beyond what one rank
does in its place; and the latency of its collectives by the clock (the fastest of ten, which a busy machine lengthens).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from moeca_dist.config import load_config
from moeca_dist.models.loading import check_weights
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.parallel.dispatch import AllToAllDispatcher, LocalDispatcher
from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.types import Routing

ROWS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 256, 512)
MEASURE_S = 0.35
LEAST_CALLS = 8


def main(config: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = check_weights(load_config(config, overrides).model)
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu")
    found: dict[str, Any] = {"experts": experts(spec, mesh)}
    if mesh.expert_group is not None:
        found["exchange"] = exchange(spec, mesh.expert_group)
    if mesh.rank == 0:
        Path(out).write_text(json.dumps(found))
    mesh.close()


def experts(spec: ModelSpec, mesh: Mesh) -> dict[str, Any]:
    """Core-seconds of one call: with one row in all, and by rows per expert."""
    layer = RoutedExperts(spec.hidden_size, spec.expert_width, spec.num_experts)
    for weight in layer.parameters():
        weight.data.normal_(0, 0.02)

    def call(counts_E: torch.Tensor) -> Callable[[], None]:
        rows_RD = torch.randn(int(counts_E.sum()), spec.hidden_size)

        def run() -> None:
            with torch.no_grad():
                layer(rows_RD, counts_E)

        return run

    one = torch.zeros(spec.num_experts, dtype=torch.int64)
    one[0] = 1
    least = core_seconds(call(one), mesh.world)
    by_rows = {
        rows: core_seconds(call(torch.full_like(one, rows)), mesh.world) / spec.num_experts for rows in ROWS_PER_EXPERT
    }
    return {"least_s": least, "per_expert_s": by_rows}


def exchange(spec: ModelSpec, group: Exchange) -> dict[str, Any]:
    """``agree_s``: gathering counts; ``cells``: bytes that this rank moves and core-seconds beyond a local layer."""
    placement = ExpertPlacement.contiguous(spec.num_experts, group.size)
    away, local = AllToAllDispatcher(group, placement), LocalDispatcher(spec.num_experts)
    counts = torch.zeros(2 * group.size, dtype=torch.int64)
    agree = wall_seconds(lambda: group.gather_counts(counts), group)
    agree_core = core_seconds(lambda: group.gather_counts(counts), group)
    cells, latency = [], 0.0
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, spec.hidden_size)
        ids_TK = torch.rand(tokens, spec.num_experts).topk(spec.num_experts_per_tok).indices
        routing = Routing(ids_TK, torch.rand(ids_TK.shape))

        def run(dispatcher: Any, routing: Routing = routing, x_TD: torch.Tensor = x_TD) -> None:
            dispatched = dispatcher.dispatch(x_TD, routing.all_branches()).wait()
            rows_ND = dispatcher.combine(dispatched.rows_RD, dispatched).wait()
            dispatcher.weighted_sum(rows_ND, dispatched, routing)

        if not latency:
            latency = wall_seconds(lambda: run(away), group)
        before = group.traffic.bytes_sent
        run(away)
        moved = group.traffic.bytes_sent - before
        extra = core_seconds(lambda: run(away), group) - core_seconds(lambda: run(local), group)
        cells.append({"tokens": tokens, "bytes": moved, "core_s": extra})
    return {"agree_s": agree, "agree_core_s": agree_core, "layer_s": latency, "cells": cells}


def core_seconds(run: Callable[[], Any], group: Exchange | None) -> float:
    """CPU time of one call on this rank, all of its threads; every rank makes the same number of calls."""
    calls = _calls(run, group)
    found = []
    for _ in range(3):
        started = time.process_time()
        for _ in range(calls):
            run()
        found.append((time.process_time() - started) / calls)
    return median(found)


def wall_seconds(run: Callable[[], Any], group: Exchange) -> float:
    """One call by the clock: the tenth percentile."""
    found = []
    for _ in range(10 * _calls(run, group)):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 10]


def _calls(run: Callable[[], Any], group: Exchange | None) -> int:
    run()
    started = time.perf_counter()
    for _ in range(LEAST_CALLS):
        run()
    calls = max(LEAST_CALLS, int(MEASURE_S / ((time.perf_counter() - started) / LEAST_CALLS) / 3))
    return min(calls, 200) if group is None else min(group.gather_objects(min(calls, 200)))


if __name__ == "__main__":
    main(*sys.argv[1:])
