"""How fast this machine is at the moment: a shared one changes by a tenth within minutes, and by more within hours."""

import time
from statistics import median

import torch

from moeca_dist.moe.experts import SwiGLU

# Of a size between the benchmarks' models, and more weights than a core's caches hold, as a network has.
TOKENS, HIDDEN_SIZE, WIDTH, LAYERS, TURNS = 128, 384, 1536, 8, 3


class ReferenceWork:
    """The same products every time, on CPU."""

    def __init__(self) -> None:
        self._layers = [SwiGLU(HIDDEN_SIZE, WIDTH) for _ in range(LAYERS)]
        self._x_TD = torch.randn(TOKENS, HIDDEN_SIZE)

    @torch.no_grad()
    def seconds(self) -> float:
        """Core-seconds of this process for a pass through all layers; median of a few."""
        found = []
        for _ in range(TURNS):
            started = time.process_time()
            for layer in self._layers:
                layer(self._x_TD)
            found.append(time.process_time() - started)
        return median(found)
