"""Ranks that fail on purpose; importable, because Ray's processes load them by name."""

from collections.abc import Sequence
from typing import Any

import ray

from moeca_dist.ray_batch.worker import Worker
from moeca_dist.types import Request

POISONED = 1


class PoisonedChunkWorker(Worker):
    """Rank 0 raises for one chunk, whenever it is tried."""

    @ray.method(num_returns=2)
    def generate(self, chunk: int, requests: Sequence[Request]) -> Any:
        if chunk == POISONED and self._rank == 0:
            raise RuntimeError("these requests are poison")
        return super().generate(chunk, requests)
