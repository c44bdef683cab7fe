"""The Ray cluster of a batch, joined or started on this machine, and its capacity."""

import logging
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from moeca_dist.errors import UserError

logger = logging.getLogger(__name__)

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]

# Ranks that only wait for each other can share a core; far more of them would starve the machine.
LOCAL_RANKS_PER_CORE = 4
LOCAL_OBJECT_STORE_BYTES = 200_000_000


@dataclass(frozen=True)
class GangShape:
    """The ranks of a gang by bundle of its placement group. A bundle lies on one node."""

    bundles: tuple[int, ...]
    strategy: Strategy
    on_gpu: bool

    @property
    def size(self) -> int:
        return sum(self.bundles)

    @property
    def resources(self) -> list[dict[str, float]]:
        """Return the resources of each bundle: one CPU per rank, and one GPU per rank if ranks run on GPUs."""
        return [{"CPU": float(ranks)} | ({"GPU": float(ranks)} if self.on_gpu else {}) for ranks in self.bundles]

    @property
    def bundle_of_rank(self) -> list[int]:
        return [bundle for bundle, ranks in enumerate(self.bundles) for _ in range(ranks)]

    def __str__(self) -> str:
        unit = "1 CPU and 1 GPU" if self.on_gpu else "1 CPU"
        where = {"STRICT_PACK": "on one node", "STRICT_SPREAD": "each bundle on a node of its own"}.get(self.strategy)
        bundles = "" if set(self.bundles) == {1} else f" in bundles of {', '.join(map(str, self.bundles))}"
        return f"{self.size} ranks of {unit}{bundles}{f', {where}' if where else ''}"


def connect(address: str, gangs: int, gang_size: int, *, dashboard: bool) -> bool:
    """Join the cluster at ``address`` and return whether a local one was started instead.

    A local cluster is started for ``local``, and for ``auto`` if no cluster is found. Raises UserError if nothing
    answers at an explicit address, or if this machine cannot hold the ranks.
    """
    # Ranks that lost a peer raise too; the gang reports the one that is the cause.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address != "local" and _join(address, explicit=address != "auto"):
            return False
        _start_local(gangs, gang_size, dashboard)
        return True
    finally:
        # Ray replaces them when it connects.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _join(address: str, *, explicit: bool) -> bool:
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if explicit or "RAY_ADDRESS" in os.environ:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"no Ray cluster at {os.environ.get('RAY_ADDRESS', address) if not explicit else address} ({reason}): "
                "start one with `ray start --head`, or pass --address local"
            ) from None
        return False
    return True


def _start_local(gangs: int, gang_size: int, dashboard: bool) -> None:
    cores = os.cpu_count() or 1
    ranks = gangs * gang_size
    if ranks > cores * LOCAL_RANKS_PER_CORE:
        raise UserError(
            f"{gangs} gangs of {gang_size} are {ranks} ranks, but this machine has {cores} cores and takes at most "
            f"{LOCAL_RANKS_PER_CORE} ranks on each: lower --gangs or --gang-size, or use a cluster with --address"
        )
    if ranks > cores:
        logger.warning("%d ranks share %d cores: fewer gangs would not be slower", ranks, cores)
    # Ray asks for a token by default, and would leave one in the home folder that later clusters of the user demand.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=max(cores, ranks),
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=dashboard,
        log_to_driver=True,
        logging_level=logging.INFO if dashboard else logging.WARNING,
    )


def actor_class(cls: type, group: str) -> Any:
    """Return ``cls`` as an actor with one thread for its methods in general and one for those of ``group``."""
    remote: Any = ray.remote  # its type does not know of groups
    return remote(concurrency_groups={group: 1})(cls)


def has_gpus() -> bool:
    return any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in ray.nodes())


def dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def gangs_that_fit(shape: GangShape, limit: int, nodes: Sequence[Mapping[str, Any]] | None = None) -> int:
    """Return how many gangs, at most ``limit``, the nodes could hold if they held nothing else."""
    free = [dict(node["Resources"]) for node in (ray.nodes() if nodes is None else nodes) if node["Alive"]]
    for fitting in range(limit):
        if not _take_gang(shape, free):
            return fitting
    return limit


def _take_gang(shape: GangShape, free: list[dict[str, float]]) -> bool:
    """Take the resources of one gang from ``free``. Returns False if they are not there."""
    demands = shape.resources
    if shape.strategy == "STRICT_PACK":
        demands = [{name: sum(demand[name] for demand in demands) for name in demands[0]}]
    used: set[int] = set()
    for demand in demands:
        for index, node in enumerate(free):
            taken = shape.strategy == "STRICT_SPREAD" and index in used
            if not taken and all(node.get(name, 0) >= amount for name, amount in demand.items()):
                for name, amount in demand.items():
                    node[name] -= amount
                used.add(index)
                break
        else:
            return False
    return True


def describe_nodes() -> str:
    """Return the resources of the living nodes, for people."""
    parts = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            gpus = f" {resources['GPU']:g} GPU" if "GPU" in resources else ""
            parts.append(f"{node['NodeManagerAddress']}: {resources.get('CPU', 0):g} CPU{gpus}")
    return "; ".join(parts)
