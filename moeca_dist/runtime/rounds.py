"""Rounds: requests are shared out over ranks, and their samples are brought together.

Shape suffixes: B images of this rank in a round.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeca_dist.parallel.mesh import Mesh
from moeca_dist.types import Request

Sink = Callable[[Sequence[Request], NDArray[np.generic]], None]


def shares_by_round(requests: Sequence[Request], world_size: int, batch_size: int) -> list[list[Sequence[Request]]]:
    """Return the share of every rank in each round: at most ``batch_size``, as even as can be, some perhaps empty.

    The shares follow from the arguments alone, so all ranks make the same number of network evaluations.
    """
    rounds = []
    for start in range(0, len(requests), world_size * batch_size):
        together = requests[start : start + world_size * batch_size]
        bounds = [rank * len(together) // world_size for rank in range(world_size + 1)]
        rounds.append([together[low:high] for low, high in pairwise(bounds)])
    return rounds


def deliver(sink: Sink, mesh: Mesh, shares: Sequence[Sequence[Request]], samples: Tensor) -> None:
    """Call ``sink`` on rank 0 with all requests of a round and their samples [B, ...]. A collective of the world."""
    if mesh.world is None:
        sink(shares[0], samples.numpy())
        return
    parts = mesh.world.gather_to_first(samples, [len(share) for share in shares])
    if parts is not None:
        sink([request for share in shares for request in share], torch.cat(parts).cpu().numpy())
