"""The link cost model against loops over messages and against time in small steps."""

import numpy as np
import pytest

from benchmarks.simulator.links import Level, LimitedLinks, Topology

ISLANDS = Topology((Level("island", 4, 100.0, 0.5, 0.01), Level("network", 1 << 30, 10.0, 2.0, 0.1)))


def test_all_to_all_is_the_busiest_link_of_any_level() -> None:
    rng = np.random.default_rng(0)
    owners = np.array([0, 3, 5, 9, 11])
    sent = rng.integers(0, 1000, (12, 5))
    load: dict[tuple[str, str, int], int] = {}
    for home in range(12):
        for column, owner in enumerate(owners):
            if home != owner:
                level = "island" if home // 4 == owner // 4 else "network"
                for end, rank in (("out", home), ("in", int(owner))):
                    load[level, end, rank] = load.get((level, end, rank), 0) + int(sent[home, column])
    busiest = max(amount / (100.0 if level == "island" else 10.0) for (level, _, _), amount in load.items())
    # It starts as late as the slower level, and pays 3 peers in the island and 8 outside.
    start = 2.0 + 3 * 0.01 + 8 * 0.1
    assert ISLANDS.all_to_all_s(sent, owners) == pytest.approx(start + busiest)


def test_groups_inside_an_island_do_not_touch_the_network() -> None:
    sent = np.full((4, 4), 50)
    assert ISLANDS.all_to_all_s(sent, np.arange(4)) == pytest.approx(0.5 + 3 * 0.01 + 150 / 100)
    assert ISLANDS.all_to_all_s(np.array([[7]]), np.arange(1)) == 0 and ISLANDS.gather_counts_s(1, 8) == 0


def test_agreements_grow_with_the_square_of_the_ranks() -> None:
    seconds = [ISLANDS.gather_counts_s(ranks, 2 * ranks) for ranks in (1024, 2048)]
    assert seconds[1] / seconds[0] == pytest.approx(4, rel=0.01)


def test_blocks_nest() -> None:
    with pytest.raises(ValueError, match="do not hold whole"):
        Topology((Level("a", 4, 1, 0), Level("b", 6, 1, 0)))


def test_buckets_let_a_burst_through_and_fill_while_idle() -> None:
    links = LimitedLinks(2, bytes_per_s=100.0, burst_bytes=50.0)
    assert links.transfer_s(np.array([30, 10]), np.array([10, 30])) == 0  # both fit into full buckets
    # 20 are left, 10 seconds' worth of a second fill 10 more.
    links.wait(0.1)
    assert links.transfer_s(np.array([80, 0]), np.array([0, 80])) == pytest.approx((80 - 30) / 100)
    links.wait(10.0)
    assert links.transfer_s(np.array([80, 0]), np.array([0, 80])) == pytest.approx((80 - 50) / 100)


def test_buckets_against_small_steps_of_time() -> None:
    rng = np.random.default_rng(1)
    links = LimitedLinks(1, bytes_per_s=1000.0, burst_bytes=200.0)
    tokens, step = 200.0, 1e-4
    for _ in range(20):
        idle, amount = rng.random() * 0.3, float(rng.integers(0, 600))
        links.wait(idle)
        tokens, left, seconds = min(200.0, tokens + idle * 1000), amount, 0.0
        while left > 0:
            passed = min(tokens, left)
            tokens, left = tokens - passed, left - passed
            if left > 0:
                tokens, seconds = min(200.0, tokens + step * 1000), seconds + step
        assert links.transfer_s(np.array([amount]), np.array([0])) == pytest.approx(seconds, abs=2 * step)
