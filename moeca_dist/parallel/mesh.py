"""The ranks of a run and their process groups.

Only this file creates groups or calls DeepSpeed's group functions. world = DP x EP: consecutive ranks form an
expert-parallel group. Each group holds one full set of experts.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed.comm as dist
import torch
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.ops import __compatible_ops__ as deepspeed_ops
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from moeca_dist.errors import PeerLostError, UserError
from moeca_dist.parallel.collectives import Collectives

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LauncherEnv:
    """Rank and world size as torchrun, the deepspeed launcher or a batch worker set them. Without a launcher there is
    one rank.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def read(cls) -> "LauncherEnv":
        """Read the variables that the launcher set."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _LAUNCHER_VARIABLES))


_LAUNCHER_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Mesh:
    """The place of this rank among all ranks, and the groups of which it is a member.

    ``world`` is None for a single process without process groups. ``expert_group`` is None if ``ep_size`` is 1.
    """

    rank: int
    world_size: int
    ep_size: int
    device: torch.device
    backend: str | None
    world: Collectives | None
    expert_group: Collectives | None

    @property
    def dp_size(self) -> int:
        return self.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.ep_size

    @classmethod
    def single(cls, device: torch.device | None = None) -> "Mesh":
        """Return the mesh of one process without process groups."""
        return cls(0, 1, 1, device or torch.device("cpu"), None, None, None)

    @classmethod
    def create(
        cls,
        launcher: LauncherEnv,
        *,
        ep_size: int | None = None,
        device_type: str = "auto",
        backend: str = "auto",
        timeout_s: float = 120.0,
    ) -> "Mesh":
        """Join the ranks that the launcher started.

        Args:
            ep_size: ranks of one expert-parallel group (default: all ranks).
            timeout_s: seconds after which a rank that does not answer counts as lost.

        Raises UserError if ``ep_size`` does not divide the world, or if this machine lacks the backend or device.
        Raises PeerLostError if the ranks do not all arrive within the timeout.
        """
        ep_size = launcher.world_size if ep_size is None else ep_size
        if ep_size < 1 or launcher.world_size % ep_size:
            raise UserError(f"ep_size {ep_size} does not divide the world size {launcher.world_size}")
        device = _choose_device(device_type, launcher.local_rank)
        if launcher.world_size == 1:
            return cls.single(device)
        backend = _choose_backend(backend, device)
        timeout = timedelta(seconds=timeout_s)
        _join_world(backend, timeout)
        # gloo moves host tensors; NCCL moves those of the device.
        exchange_device = device if backend == "nccl" else torch.device("cpu")
        world = Collectives(None, launcher.rank, launcher.world_size, exchange_device, timeout_s)
        expert_group = None
        if ep_size > 1:
            group = _create_expert_group(ep_size, timeout)
            expert_group = Collectives(group, launcher.rank % ep_size, ep_size, exchange_device, timeout_s)
        return cls(launcher.rank, launcher.world_size, ep_size, device, backend, world, expert_group)

    def close(self) -> None:
        """Leave the groups, so that this process can join others later."""
        if self.world is None:
            return
        dist.destroy_process_group()
        # DeepSpeed remembers groups per process and would hand out the destroyed ones.
        deepspeed_comm.cdb = None
        groups._WORLD_GROUP = None
        for memory in (
            groups._EXPERT_PARALLEL_GROUP,
            groups._EXPERT_PARALLEL_GROUP_RANKS,
            groups._EXPERT_DATA_PARALLEL_GROUP,
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ):
            memory.clear()


def _choose_device(device_type: str, local_rank: int) -> torch.device:
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is cuda, but torch finds no CUDA device here: set model.device=cpu or auto")
    if device_type == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # More ranks than GPUs share them: useful for tests, and only gloo can do it.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _choose_backend(backend: str, device: torch.device) -> str:
    chosen = backend if backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    if chosen == "nccl" and device.type != "cuda":
        raise UserError("parallel.backend is nccl, but the model runs on the CPU: set parallel.backend=gloo or auto")
    return chosen


def _join_world(backend: str, timeout: timedelta) -> None:
    # DeepSpeed would compile a shared-memory op for minutes on the first CPU start, and leave buffers in /dev/shm.
    deepspeed_ops["deepspeed_shm_comm"] = False
    try:
        dist.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(
            f"the ranks did not all meet within {timeout.total_seconds():g} s: {str(error).splitlines()[0]}"
        ) from error


def _create_expert_group(ep_size: int, timeout: timedelta) -> object:
    groups._create_expert_and_data_parallel(ep_size)
    group = groups._get_expert_parallel_group(f"ep_size_{ep_size}")
    # New groups ignore the world's timeout and would wait half an hour for a peer that hangs.
    distributed_c10d._set_pg_timeout(timeout, group)
    return group
