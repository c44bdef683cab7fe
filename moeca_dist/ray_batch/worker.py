"""One rank of a gang, as a Ray actor.

``join`` imports DeepSpeed after it has set the environment that DeepSpeed reads.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray

from moeca_dist.config import Config
from moeca_dist.ray_batch.store import encode_all
from moeca_dist.types import Request, StepContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moeca_dist.ray_batch.metrics import RankMetrics
    from moeca_dist.runtime.engine import Engine

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class WorkerAddress:
    """The node and process of an actor, with a port that is free on that node."""

    node_id: str
    host: str
    port: int
    pid: int


@dataclass(frozen=True)
class Progress:
    """The progress of a rank. A rank hangs if nothing in here changes while the rank has work."""

    chunk: int | None
    steps: int


class Worker:
    """The rank's network, and its part in the work of the gang."""

    def __init__(self, gang: int, rank: int) -> None:
        self._gang = gang
        self._rank = rank
        self._progress = Progress(None, 0)
        self._engine: Engine | None = None
        self._metrics: RankMetrics | None = None
        logging.basicConfig(level=logging.INFO, format=f"{self!r} %(levelname)s %(message)s", force=True)
        # Libraries report every start at this level; the package's own lines are few.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("moeca_dist").setLevel(logging.INFO)
        # Only DeepSpeed's authors can act on it.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)

    def __repr__(self) -> str:
        """Return the name that Ray puts before every line of the process that the driver prints."""
        return f"gang {self._gang} rank {self._rank}"

    def find_address(self) -> WorkerAddress:
        """Find the node and process of this actor, and a free port."""
        context = ray.get_runtime_context()
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return WorkerAddress(context.get_node_id(), ray.util.get_node_ip_address(), port, os.getpid())

    def join(self, config: Config, addresses: Sequence[WorkerAddress]) -> str:
        """Meet the other ranks and load this rank's part of the model. Returns the name of the rank's device.

        Raises UserError if the checkpoint or the device does not exist, and PeerLostError if a rank is missing.
        """
        _tell_launcher_variables(self._rank, addresses, on_cpu=config.model.device == "cpu")
        import torch

        from moeca_dist.ray_batch.metrics import RankMetrics
        from moeca_dist.runtime.engine import Engine

        if config.model.device == "cpu":
            torch.set_num_threads(1)
        self._engine = Engine.from_config(config)
        device = self._engine.mesh.device
        self._metrics = RankMetrics(self._gang, self._rank, device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    @ray.method(num_returns=2)
    def generate(self, chunk: int, requests: Sequence[Request]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Generate a chunk together with all ranks of the gang.

        Returns:
            The chunk's report and its files by name. On ranks other than 0 there are no files.
        """
        assert self._engine is not None and self._metrics is not None
        self._progress = Progress(chunk, 0)
        files: dict[str, bytes] = {}

        def keep(part: Sequence[Request], samples: "NDArray[np.generic]") -> None:
            files.update(encode_all([request.index for request in part], samples))

        report = asdict(self._engine.generate_into(keep, requests, watcher=self._note_step))
        if self._rank == 0:
            self._note_metrics(report)
        self._progress = Progress(None, 0)
        return report, files

    @ray.method(concurrency_group="watch")
    def progress(self) -> Progress:
        """Return the progress of this rank, even while it works. A process that cannot answer is gone or stopped."""
        if self._metrics is not None:
            self._metrics.note_gpu()
        return self._progress

    def _note_step(self, step: StepContext) -> None:
        self._progress = Progress(self._progress.chunk, self._progress.steps + 1)

    def _note_metrics(self, report: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        self._metrics.note_chunk(report)


def _tell_launcher_variables(rank: int, addresses: Sequence[WorkerAddress], *, on_cpu: bool) -> None:
    """Set what torchrun would set. Every actor sees its own GPU alone, so its local rank is 0."""
    alone = len({each.node_id for each in addresses}) == 1 or len({each.host for each in addresses}) == 1
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(len(addresses)),
        MASTER_ADDR=LOOPBACK if alone else addresses[0].host,
        MASTER_PORT=str(addresses[0].port),
        DS_ACCELERATOR="cpu" if on_cpu else "cuda",
    )
    if alone:
        # Otherwise gloo resolves the host's name, which need not lead anywhere, and crosses a slower interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if on_cpu:
        # One thread per rank: several ranks share the cores, and more threads than cores slow all of them down.
        os.environ["OMP_NUM_THREADS"] = "1"
