"""Networks of namespaces: rates hold, and nothing is left behind whatever ends the process that made them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.scaling import netns
from benchmarks.scaling.netns import Link, Network, namespaces, remove_stale, require
from moeca_dist import UserError

REPOSITORY = Path(__file__).parents[2]
HOLDER = """
import sys, time
from benchmarks.scaling.netns import Link, Network
from moeca_dist.cli.exit_codes import sigterm_as_exit
with sigterm_as_exit(), Network(2, Link(100)) as network:
    print(network.start(1, ["sleep", "600"]).pid, flush=True)
    time.sleep(600)
"""


def names_of(pid: int) -> list[str]:
    return [name for name in namespaces() if name.startswith(f"{netns.PREFIX}-{pid}-")]


def is_running(pid: int) -> bool:
    """Zombies have ended: their parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a network, and the id of the program that it started on a node."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        remove_stale()


@pytest.mark.netns
@pytest.mark.parametrize("rate", [200, 20])
def test_a_link_has_its_rate(rate: float) -> None:
    with Network(2, Link(rate)) as network:
        probe = network.probe()
    assert 0.85 * rate < probe.mbit < 1.1 * rate
    assert 0 < probe.round_trip_ms < 50


@pytest.mark.netns
def test_both_directions_are_limited() -> None:
    """Sending at the node, receiving at the switch."""
    with Network(3, Link(50)) as network:
        for node in range(3):
            for where, interface in ((network._name(node), "eth0"), (network._name("hub"), f"port{node}")):
                shown = [netns._tool("tc"), "-n", where, "qdisc", "show", "dev", interface]
                assert "tbf" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout


@pytest.mark.netns
@pytest.mark.parametrize(("link", "mtu"), [(None, 9000), (Link(100), 9000), (Link(100, mtu=1500), 1500)])
def test_frames_are_large_unless_asked(link: Link | None, mtu: int) -> None:
    """At both ends of the cable, and what a packet of that size needs in between."""
    with Network(2, link) as network:
        for where, interface in ((network._name(0), "eth0"), (network._name("hub"), "port0")):
            shown = [netns._tool("ip"), "-n", where, "link", "show", interface]
            assert f"mtu {mtu} " in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        assert network.probe(0.3).mbit > 50


@pytest.mark.netns
def test_nothing_stays_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), Network(3, Link(100)) as network:
        assert len(names_of(os.getpid())) == 4
        sleeper = network.start(2, ["sleep", "600"])
        raise ZeroDivisionError
    assert names_of(os.getpid()) == [] and sleeper.poll() == -signal.SIGKILL


@pytest.mark.netns
def test_a_network_that_cannot_be_finished_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "discipline", ["root", "no-such-discipline"])
    with pytest.raises(UserError, match="this machine cannot make the network: `tc "), Network(2, Link(100)):
        pass
    assert names_of(os.getpid()) == []


@pytest.mark.netns
def test_sigterm_removes_the_network() -> None:
    with holder() as (process, sleeper):
        assert len(names_of(process.pid)) == 3 and is_running(sleeper)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert names_of(process.pid) == [] and not is_running(sleeper)


@pytest.mark.netns
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_stays() -> None:
    with holder() as (killed, sleeper), holder() as (living, other):
        killed.kill()
        killed.wait()
        left = names_of(killed.pid)
        assert len(left) == 3 and is_running(sleeper)
        with Network(1):
            assert names_of(killed.pid) == []
        for _ in range(50):
            if not is_running(sleeper):
                break
            time.sleep(0.1)
        assert not is_running(sleeper)
        assert len(names_of(living.pid)) == 3 and is_running(other)


@pytest.mark.netns
def test_a_process_id_that_is_used_again_does_not_protect_what_is_stale() -> None:
    name = f"{netns.PREFIX}-{os.getpid()}-1-hub"  # this process did not start one tick after boot
    netns._run("ip", "netns", "add", name)
    assert remove_stale() == [name] and name not in namespaces()


def test_without_root_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="network namespaces need root: run the same command with sudo"):
        require()


def test_without_the_tools_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(netns, "SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="the program ip is missing: install iproute2"):
        require()


@pytest.mark.parametrize("link", [(0, 64, 50), (100, -1, 50), (100, 64, 0)])
def test_links_are_positive(link: tuple[float, int, float]) -> None:
    with pytest.raises(UserError, match="a link's rate, burst and queue must be positive"):
        Link(*link)


@pytest.mark.parametrize("mtu", [100, 9000])
def test_frames_fit_into_the_burst(mtu: int) -> None:
    with pytest.raises(UserError, match="a link's MTU must be at least 576 and its frames fit into the burst"):
        Link(100, burst_kb=8, mtu=mtu)


@pytest.mark.parametrize("num_nodes", [0, 251])
def test_networks_have_a_size(num_nodes: int) -> None:
    with pytest.raises(UserError, match="a network has 1 to 250 nodes"):
        Network(num_nodes)
