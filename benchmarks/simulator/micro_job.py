"""Measures on all ranks of a job what the simulator's CPU table needs: experts by rows, and the exchange by bytes.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.simulator.micro_job CONFIG OUT.json

Rank 0 writes seconds of a core (CPU time of the process, so that a busy machine disturbs them less than the clock) for
the routed experts of one MoE layer with so many rows for each; and seconds by the clock of an exchange, as a layer has
it: every rank has computed something else before, so caches are cold and sleeping threads must be woken. (Exchanges in
a loop take a fifth of that.) Of each exchange the rank that came last says how long it took: it waited for nobody.

And by how much that work itself takes longer with exchanges in between than without: the same cores carry the rows, in
threads and in the kernel, and what lay in their caches is gone.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor

from benchmarks.common.machine_speed import FixedWork, reference_seconds
from moeca_dist.checkpoints.from_config import check_weights
from moeca_dist.config import load_config
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.collectives import Collectives
from moeca_dist.parallel.dispatcher import LocalDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.row_packing import RowDtype
from moeca_dist.types import Routing

ROWS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 128, 256, 512)
SHARED_TOKENS = 128
MEASURE_S = 0.7
LEAST_CALLS = 8
ROUNDS = 5
# What a rank computes between two exchanges: about as long as attention and a shared expert, with as many weights.
BETWEEN_S = 0.01
BETWEEN_LAYERS = 2
EXCHANGES, WARM_UP = 80, 6


@torch.no_grad()
def main(config: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = check_weights(load_config(config, overrides).model)
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu")
    assert mesh.expert_group is not None, "an exchange has several ranks"
    group, reference = mesh.expert_group, FixedWork()
    speeds = [reference_seconds(reference, group)]
    found: dict[str, Any] = {
        "experts": experts(spec, group),
        "shared_s_per_token": shared(spec, group),
    }
    speeds.append(reference_seconds(reference, group))
    found["exchange"] = exchange(spec, group)
    speeds.append(reference_seconds(reference, group))
    found["reference_s"] = {"experts": sum(speeds[:2]) / 2, "exchange": sum(speeds[1:]) / 2}
    if mesh.rank == 0:
        Path(out).write_text(json.dumps(found))
    mesh.close()


def experts(spec: ModelSpec, group: Collectives) -> dict[str, Any]:
    """Core-seconds of one call: with one row in all, and by rows per expert."""
    layer = made_experts(spec, spec.num_experts)

    def call(counts_E: Tensor) -> Callable[[], None]:
        rows_RD = torch.randn(int(counts_E.sum()), spec.hidden_size)

        return lambda: layer(rows_RD, counts_E)

    one = torch.zeros(spec.num_experts, dtype=torch.int64)
    one[0] = 1
    least = core_seconds(call(one), group)
    by_rows = {
        rows: core_seconds(call(torch.full_like(one, rows)), group) / spec.num_experts for rows in ROWS_PER_EXPERT
    }
    return {"least_s": least, "per_expert_s": by_rows}


def shared(spec: ModelSpec, group: Collectives) -> float:
    if not spec.shared_width:
        return 0.0
    layer, x_TD = SwiGLU(spec.hidden_size, spec.shared_width), torch.randn(SHARED_TOKENS, spec.hidden_size)
    return core_seconds(lambda: layer(x_TD), group) / SHARED_TOKENS


def made_experts(spec: ModelSpec, count: int) -> RoutedExperts:
    layer = RoutedExperts(spec.hidden_size, spec.expert_width, count)
    for weight in layer.parameters():
        weight.data.normal_(0, 0.02)
    return layer


def exchange(spec: ModelSpec, group: Collectives) -> dict[str, Any]:
    """``agree_s``: gathering counts; ``exact``, ``coded``: of rows as they are and in int8, see ``cells``."""
    counts, agreed, between = torch.zeros(2 * group.size, dtype=torch.int64), Ranks(group), work_between(spec)
    for _ in range(EXCHANGES):
        between()
        with agreed.call():
            group.gather_counts(counts)
    agree_s = agreed.median()
    return {"agree_s": agree_s} | {
        "exact": cells(spec, group, "exact", agree_s, between),
        "coded": cells(spec, group, "int8", agree_s, between),
    }


def cells(
    spec: ModelSpec, group: Collectives, row_dtype: RowDtype, agree_s: float, between: Callable[[], float]
) -> list[dict[str, float]]:
    """Bytes that the busiest rank sends in both legs, their seconds, and the ``stretch`` of work between them.

    The seconds are beyond what one rank does in the place of an exchange, and beyond gathering counts.
    """
    placement, found = ExpertPlacement.contiguous(spec.num_experts, group.size), []
    away, local = AllToAllDispatcher(group, placement, row_dtype), LocalDispatcher(spec.num_experts)
    layer = made_experts(spec, len(placement.experts_of(group.rank)))
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, spec.hidden_size)
        ids_TK = torch.rand(tokens, spec.num_experts).topk(spec.num_experts_per_tok).indices
        routing = Routing.top_k(ids_TK, torch.rand(ids_TK.shape))
        there, back, alone_s, beside_s, apart_s = Ranks(group), Ranks(group), [], [], []
        before = group.traffic.bytes_sent
        # In turns, so that a slow moment of the machine is in both.
        for _ in range(EXCHANGES):
            with there.call():
                sent = away.dispatch(x_TD, routing.branches, routing.gate_N).wait()
            outputs_RD = layer(sent.rows_RD, sent.rows_per_expert_L)
            with back.call():
                away.combine_sums(outputs_RD, sent, routing).wait()
            beside_s.append(between())
            started = time.process_time()
            kept = local.dispatch(x_TD, routing.branches).wait()
            local.weighted_sum(kept.rows_RD, kept, routing)
            alone_s.append(time.process_time() - started)
            apart_s.append(between())
        moved = max(group.gather_objects(group.traffic.bytes_sent - before)) // EXCHANGES
        alone = median(group.gather_objects(median(alone_s[WARM_UP:])))
        seconds = max(0.0, there.median() + back.median() - agree_s - alone)
        stretch = median(group.gather_objects(median(beside_s[WARM_UP:]) / median(apart_s[WARM_UP:])))
        found.append({"bytes": moved, "seconds": seconds, "stretch": stretch})
    return found


class Ranks:
    """Times of calls that all ranks make together."""

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self._mine: list[float] = []

    @contextmanager
    def call(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._mine.append(time.perf_counter() - started)

    def median(self) -> float:
        """Over the calls, of the rank that was in each for the shortest time."""
        by_rank = self._group.gather_objects(self._mine)
        return median([min(call) for call in zip(*by_rank, strict=True)][WARM_UP:])


def work_between(spec: ModelSpec) -> Callable[[], float]:
    """The same work at every call, which gives its core-seconds."""
    work = FixedWork(spec.hidden_size, 4 * spec.hidden_size, BETWEEN_LAYERS)
    once = median(work.seconds() for _ in range(WARM_UP))
    return partial(work.seconds, max(1, round(BETWEEN_S / once)))


def core_seconds(run: Callable[[], Any], group: Collectives) -> float:
    """CPU time of one call on this rank, all of its threads; every rank makes the same number of calls."""
    run()
    started = time.perf_counter()
    for _ in range(LEAST_CALLS):
        run()
    calls = max(LEAST_CALLS, int(MEASURE_S / ((time.perf_counter() - started) / LEAST_CALLS) / ROUNDS))
    calls = min(group.gather_objects(min(calls, 200)))
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(calls):
            run()
        found.append((time.process_time() - started) / calls)
    return median(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
