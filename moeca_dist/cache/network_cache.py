"""What the whole network added to its input, kept between steps (TeaCache, arXiv 2411.19108).

Shape suffixes: B images of the network's batch, T tokens of one image, D hidden size, S signal.
"""

from torch import Tensor

from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage


class NetworkCache:
    """The last computed change from the first block's input to the last block's output.

    The change of a signal is accumulated step by step and starts anew when the network is computed.
    """

    def __init__(self, storage: Storage = AS_COMPUTED) -> None:
        self.storage = storage
        self._signal_S: Tensor | None = None
        self._accumulated = 0.0
        self._change_BTD: Packed | None = None

    def is_due(self, signal_S: Tensor, delta: float) -> bool:
        """Whether the accumulated relative L1 change of the signal has reached ``delta``; asked once per step."""
        before_S, self._signal_S = self._signal_S, signal_S
        if before_S is None:
            return True
        # NOTE: one host synchronisation per step on CUDA.
        self._accumulated += ((signal_S - before_S).abs().mean() / before_S.abs().mean()).item()
        return self._accumulated >= delta

    def store(self, change_BTD: Tensor) -> None:
        self._change_BTD, self._accumulated = self.storage.pack(change_BTD), 0.0

    def apply(self, x_BTD: Tensor) -> Tensor:
        assert self._change_BTD is not None, "the first step of a request is computed"
        return x_BTD + self._change_BTD.unpack()

    @property
    def num_bytes(self) -> int:
        return 0 if self._change_BTD is None else self._change_BTD.num_bytes
