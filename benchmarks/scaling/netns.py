"""Ranks of one machine as nodes of a network: one namespace each, joined by a bridge over links of a limited rate.

    with Network(num_nodes=4, link=Link(rate_mbit=200)) as network:
        network.start(0, ["python", "-c", "..."], env)

Every node has one interface, ``eth0``; a token bucket (``tc`` tbf) limits what it sends and another, at the bridge,
what it receives, as a cable to a switch does. The bridge has a namespace of its own, so the host's network is not
touched. Needs root and iproute2.

Names carry the maker's process id and start time. Leaving the ``with`` block removes them, also after an exception and,
under ``moeca_dist.cli.exit_codes.sigterm_as_exit``, after a SIGTERM. What a killed process left is removed when the
next network is made.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from moeca_dist.errors import UserError

PREFIX = "moecanet"
INTERFACE = "eth0"
BRIDGE = "br0"
RUN_DIRECTORY = Path("/run/netns")
# Cluster networks use jumbo frames, and network cards cut and join them. Here every frame costs the cores that compute
# time in the kernel's virtual cables, bridge and buckets: with 1500 bytes, what overlaps a transfer is held up by it.
JUMBO_MTU = 9000
LEAST_MTU = 576
FRAME_HEADER_BYTES = 14
# Root's PATH often lacks these where a login shell would have them.
SYSTEM_PATHS = ("/usr/sbin", "/sbin")
PROBE = Path(__file__).with_name("link_probe.py")
PROBE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Link:
    """Each node's cable, in either direction. ``queue_ms``: longest wait in the queue; what comes on top is dropped.

    ``mtu``: bytes of a frame without its own header. A rate alone: the kernel's tbf adds no propagation delay, so the
    round trip is that of local processes.
    """

    rate_mbit: float
    burst_kb: int = 64
    queue_ms: float = 50.0
    mtu: int = JUMBO_MTU

    def __post_init__(self) -> None:
        """Raises UserError for what tc would take for something else."""
        if min(self.rate_mbit, self.burst_kb, self.queue_ms) <= 0:
            raise UserError(f"a link's rate, burst and queue must be positive, not {self}")
        if not LEAST_MTU <= self.mtu <= self.burst_kb * 1024 - FRAME_HEADER_BYTES:
            raise UserError(f"a link's MTU must be at least {LEAST_MTU} and its frames fit into the burst, not {self}")

    @property
    def discipline(self) -> list[str]:
        rate, burst, queue = f"{self.rate_mbit:g}mbit", f"{self.burst_kb}kb", f"{self.queue_ms:g}ms"
        return ["root", "tbf", "rate", rate, "burst", burst, "latency", queue]


@dataclass(frozen=True)
class LinkProbe:
    """What one TCP flow got between two nodes; the round trip is of one byte on an idle link, median."""

    mbit: float
    round_trip_ms: float


def require() -> None:
    """Raise UserError unless this process may make network namespaces."""
    if sys.platform != "linux":
        raise UserError(f"network namespaces need Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise UserError("network namespaces need root: run the same command with sudo")
    for tool in ("ip", "tc"):
        if _find(tool) is None:
            raise UserError(f"the program {tool} is missing: install iproute2")


class Network:
    """``num_nodes`` namespaces behind one switch; ``link`` None leaves them unlimited."""

    def __init__(self, num_nodes: int, link: Link | None = None) -> None:
        if not 1 <= num_nodes <= 250:
            raise UserError(f"a network has 1 to 250 nodes, not {num_nodes}")
        self.num_nodes = num_nodes
        self.link = link
        self._owner = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Network":
        """Raises UserError where this process may not, or the kernel cannot."""
        require()
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def start(
        self,
        node: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a program on a node; it is killed when the network is closed."""
        inside = [_tool("ip"), "netns", "exec", self._name(node), *argv]
        process = subprocess.Popen(inside, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        self._processes.append(process)
        return process

    def probe(self, seconds: float = 1.5) -> LinkProbe:
        """Measure the link from node 0 to node 1 with one TCP flow, while nobody else uses it."""
        ends = [
            self.start(node, [sys.executable, str(PROBE), role, self.address(1), str(seconds)], stdout=subprocess.PIPE)
            for node, role in ((0, "send"), (1, "receive"))
        ]
        try:
            round_trip, mbit = (float(end.communicate(timeout=PROBE_TIMEOUT_S)[0]) for end in ends)
        except (ValueError, subprocess.TimeoutExpired):
            raise UserError("the nodes of the network do not reach each other; see what the probes say above") from None
        return LinkProbe(mbit, round_trip)

    def close(self) -> None:
        """Kill what runs on the nodes and remove them; nothing is left behind, whatever state they are in."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._processes.clear()
        for name in namespaces():
            if name.startswith(f"{self._owner}-"):
                _remove(name)

    def _name(self, node: int | str) -> str:
        return f"{self._owner}-{node}"

    def _build(self) -> None:
        hub = self._name("hub")
        mtu = str(JUMBO_MTU if self.link is None else self.link.mtu)
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "-n", hub, "link", "set", BRIDGE, "up")
        for node in range(self.num_nodes):
            name, port = self._name(node), f"port{node}"
            _run("ip", "netns", "add", name)
            # Both ends are born inside their namespaces: neither ever shows on the host.
            ends = ["link", "add", INTERFACE, "netns", name, "type", "veth", "peer", "name", port, "netns", hub]
            _run("ip", *ends)
            _run("ip", "-n", hub, "link", "set", port, "master", BRIDGE, "mtu", mtu, "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
            _run("ip", "-n", name, "link", "set", INTERFACE, "mtu", mtu)
            if self.link is not None:
                _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, *self.link.discipline)
                _run("tc", "-n", hub, "qdisc", "add", "dev", port, *self.link.discipline)


def namespaces() -> list[str]:
    """The namespaces of all networks, of this process and others."""
    if not RUN_DIRECTORY.is_dir():
        return []
    return sorted(entry.name for entry in RUN_DIRECTORY.iterdir() if entry.name.startswith(f"{PREFIX}-"))


def remove_stale() -> list[str]:
    """Remove the networks whose maker is gone, with what still runs on them; returns the names."""
    stale = [name for name in namespaces() if not _maker_lives(name)]
    for name in stale:
        _remove(name)
    return stale


# ---- the system ------------------------------------------------------------------------------------------------------


def _maker_lives(name: str) -> bool:
    """Whether the process that made a namespace still runs; ids are used again, start times are not."""
    parts = name.split("-")
    return len(parts) >= 4 and parts[1].isdecimal() and _started(int(parts[1])) == parts[2]


def _started(pid: int) -> str:
    """Start time of a process in ticks since boot; "gone" without one."""
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "gone"


def _remove(name: str) -> None:
    """Kill what runs in a namespace and delete it, its interfaces with it."""
    listed = subprocess.run([_tool("ip"), "netns", "pids", name], capture_output=True, text=True)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    # Someone else may be cleaning up too: that it is gone is all that matters.
    subprocess.run([_tool("ip"), "netns", "delete", name], capture_output=True)


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PATHS]))


def _tool(tool: str) -> str:
    found = _find(tool)
    assert found is not None, "require() comes first"
    return found


def _run(tool: str, *argv: str) -> None:
    done = subprocess.run([_tool(tool), *argv], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"this machine cannot make the network: `{tool} {' '.join(argv)}` says {reason}")
