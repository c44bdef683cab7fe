"""What a cluster can hold, by counting."""

from typing import Any

import pytest

from moeca_dist.ray_batch.cluster import GangShape, Strategy, gangs_that_fit


def node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


@pytest.mark.parametrize(
    ("bundles", "strategy", "on_gpu", "nodes", "fitting"),
    [
        ((1, 1), "STRICT_PACK", False, [node(2), node(2)], 2),
        ((1, 1), "STRICT_PACK", False, [node(3), node(1)], 1),
        ((1, 1, 1), "STRICT_PACK", False, [node(2), node(2)], 0),
        ((1, 1, 1), "PACK", False, [node(2), node(2)], 1),
        ((1, 1), "SPREAD", False, [node(4)], 2),
        ((1, 1), "STRICT_SPREAD", False, [node(4)], 0),
        ((1, 1), "STRICT_SPREAD", False, [node(4), node(4)], 4),
        ((2, 2), "STRICT_SPREAD", False, [node(3), node(3)], 1),
        ((1, 1), "STRICT_PACK", True, [node(8, 2), node(8)], 1),
        ((1, 1), "STRICT_PACK", False, [node(2), node(2, alive=False)], 1),
    ],
)
def test_gangs_that_fit(
    bundles: tuple[int, ...], strategy: Strategy, on_gpu: bool, nodes: list[dict[str, Any]], fitting: int
) -> None:
    assert gangs_that_fit(GangShape(bundles, strategy, on_gpu), 9, nodes) == fitting
    assert gangs_that_fit(GangShape(bundles, strategy, on_gpu), 1, nodes) == min(1, fitting)


def test_ranks_of_a_bundle_share_it() -> None:
    shape = GangShape((2, 1), "PACK", on_gpu=True)
    assert shape.bundle_of_rank == [0, 0, 1]
    assert shape.resources == [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]
