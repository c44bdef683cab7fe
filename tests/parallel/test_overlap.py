"""What travels between ranks while they compute: the same images, honest seconds, and a peer that is lost meanwhile.

Shape suffixes: D hidden size.
"""

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeca_dist import Engine, Request
from moeca_dist.config import Config
from moeca_dist.errors import PeerLostError
from moeca_dist.parallel.collectives import Collectives, Handle
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.timing import SectionTimer
from tests.helpers.golden_files import load_golden
from tests.helpers.ranks import RankFailedError, RankPool
from tests.whole_runs.test_locations import make_config, ranks  # noqa: F401

FULL_STEPS = [0, 1, 4]
CASES = [
    {},
    {"policy": "moeca_forecast", "full_steps": FULL_STEPS},
    {"policy": "moeca", "full_steps": FULL_STEPS},
    {"policy": "dice_skip", "full_steps": FULL_STEPS},
    {"policy": "random", "full_steps": FULL_STEPS, "location": "owner"},
    {"policy": "random", "full_steps": FULL_STEPS, "ratio": 0.5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def test_a_value_under_way_is_made_when_somebody_waits() -> None:
    made: list[str] = []
    coming = Handle(lambda: made.append("rows") or 2).then(lambda rows: made.append("use") or rows + 1)
    assert made == []
    assert coming.wait() == 3 and made == ["rows", "use"]
    assert Handle.ready(5).wait() == 5


def both_orders(config: Config) -> tuple[bool, list[str]]:
    """On every rank: whether the images are those of waiting at once; what one run did, in its order.

    Three images: ranks have one or none, and of the experts those that nobody is routed to have no rows.
    """
    mesh = Mesh.create(LauncherEnv.read(), ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    wanted = [Request(index, index, seed=5) for index in range(3)]
    events: list[str] = []
    start = Collectives.all_to_all_async

    def noted(self: Collectives, *args: Any) -> Handle[Tensor]:
        events.append("start")
        return start(self, *args).then(lambda rows: events.append("wait") or rows)

    def waited_for(self: Collectives, *args: Any) -> Handle[Tensor]:
        return Handle.ready(start(self, *args).wait())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collectives, "all_to_all_async", waited_for)
        expected, _ = engine.generate(wanted)
        patch.setattr(Collectives, "all_to_all_async", noted)
        for _, layer in engine.model.moe_layers():
            layer.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
        images, _ = engine.generate(wanted)
    return np.array_equal(images, expected), events


@pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])
@pytest.mark.parametrize("cache", CASES)
def test_the_same_images_bit_for_bit(
    ranks,  # noqa: F811
    model,
    cache: dict[str, Any],
    world: tuple[int, int],
) -> None:
    for same, events in ranks(world[0]).run(both_orders, make_config(model, cache, world[1])):
        assert same
        # The shared expert of each full step is computed between the start and the end of a dispatch.
        first = events.index("shared")
        assert events[first - 1 : first + 2] == ["start", "shared", "wait"]


def hide_a_delay() -> tuple[float, float]:
    """Rank 1 comes a second late; rank 0 computes meanwhile. Seconds of its sections."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, device_type="cpu", timeout_s=60)
    group = mesh.expert_group
    assert group is not None
    group.barrier()
    timer = SectionTimer("cpu")
    group.reset_traffic(timer)
    if env.rank == 1:
        time.sleep(1)
    with timer.section("experts"):
        coming = group.all_to_all_async(torch.full((2, 4), float(env.rank)), [1, 1], [1, 1])
        if env.rank == 0:
            time.sleep(1.5)
        arrived = coming.wait()
        timer.end_step(0)
    group.reset_traffic()
    assert arrived[:, 0].tolist() == [0, 1]
    seconds = timer.per_step()
    return seconds[0, "experts"], seconds[0, "exchange"]


def test_seconds_of_exchange_are_those_of_waiting(two_ranks) -> None:
    experts_s, exchange_s = two_ranks.run(hide_a_delay)[0]
    assert exchange_s < 0.5 < 1.4 < experts_s


def lose_a_peer(dies: bool) -> float:
    """Rank 1 dies, or never sends; rank 0 has rows under way to it."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, device_type="cpu", timeout_s=3)
    group = mesh.expert_group
    assert group is not None
    group.barrier()
    if env.rank == 1:
        if dies:
            os._exit(1)
        time.sleep(8)
        return 0.0
    started = time.perf_counter()
    coming = group.all_to_all_async(torch.zeros(2, 4), [1, 1], [1, 1])
    time.sleep(0.5)
    with pytest.raises(PeerLostError, match=r"lost contact while exchanging expert rows: another rank died") as lost:
        coming.wait()
    assert "\n" not in str(lost.value)
    return time.perf_counter() - started


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
def test_a_peer_lost_while_rows_travel(dies: bool) -> None:
    pool = RankPool(2)  # its process group does not survive
    try:
        if dies:
            with pytest.raises(RankFailedError) as failed:
                pool.run(lose_a_peer, True)
            assert "rank 1:\nthe process died" in str(failed.value) and "rank 0" not in str(failed.value)
        else:
            assert pool.run(lose_a_peer, False)[0] < 8
    finally:
        pool.close()
