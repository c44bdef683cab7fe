"""Ranks of one machine, as the processes of ``torch.multiprocessing.spawn``."""

import os
import socket
from contextlib import closing


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become_rank(rank: int, num_ranks: int, port: int) -> None:
    """Set what a launcher would have set for this process; rank 0 listens on ``port``."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
