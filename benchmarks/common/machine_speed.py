"""How fast this machine is at the moment: a shared one changes by a tenth within minutes, and by more within hours.

A fixed piece of work before and after a measurement says it, and a table of seconds can be brought to its speed.
"""

import time
from statistics import median
from typing import Any

import torch

from moeca_dist.moe.experts import SwiGLU
from moeca_dist.parallel.collectives import Collectives

TOKENS, TURNS = 128, 3
NOT_SECONDS = frozenset({"bytes", "stretch"})


class FixedWork:
    """The same products every time, on CPU. The defaults have a size between those of the benchmarks' models, and more
    weights than a core's caches hold, as a network has.
    """

    def __init__(self, hidden_size: int = 384, width: int = 1536, num_layers: int = 8) -> None:
        self._layers = [SwiGLU(hidden_size, width) for _ in range(num_layers)]
        self._x_TD = torch.randn(TOKENS, hidden_size)

    @torch.no_grad()
    def seconds(self, turns: int = 1) -> float:
        """Core-seconds of this process, of all its threads, for so many passes through all layers."""
        started = time.process_time()
        for _ in range(turns):
            for layer in self._layers:
                layer(self._x_TD)
        return time.process_time() - started


def reference_seconds(work: FixedWork, group: Collectives | None) -> float:
    """Of a pass while all ranks of ``group`` do the same; median of a few, and of the ranks."""
    if group is not None:
        group.barrier()
    mine = median(work.seconds() for _ in range(TURNS))
    return mine if group is None else median(group.gather_objects(mine))


def times(measured: Any, factor: float) -> Any:
    """Measured seconds in dictionaries and lists, each times ``factor``; other figures as they are."""
    if isinstance(measured, dict):
        return {name: value if name in NOT_SECONDS else times(value, factor) for name, value in measured.items()}
    if isinstance(measured, list):
        return [times(value, factor) for value in measured]
    return measured * factor
