"""Noise that belongs to the image: it depends on (seed, image index) alone.

Shape suffixes: B images, C channels, H height, W width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.types import Request

# SeedSequence chops its entropy into 32-bit words and forgets where one number ended; keeping both numbers to one word
# each is what makes different (seed, index) pairs different streams.
_WORD_LIMIT = 2**32


def check_stream(seed: int, index: int) -> None:
    """Raise UserError unless image ``index`` of a run with ``seed`` has a stream of its own.

    Entry points call this early: ranks that already denoise would wait for the one that is refused.
    """
    for name, value in (("seed", seed), ("image index", index)):
        if not 0 <= value < _WORD_LIMIT:
            raise UserError(f"{name} {value} is out of range: choose one in 0..{_WORD_LIMIT - 1}")


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return a CPU generator for image ``index`` of a run with ``seed``. Equal pairs give the same stream.

    The 64-bit state comes from numpy's ``SeedSequence([seed, index])``: neighbouring seeds or indices do not correlate.

    Raises:
        UserError: ``seed`` or ``index`` is outside 0..2**32 - 1.
    """
    check_stream(seed, index)
    state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    return torch.Generator(device="cpu").manual_seed(state)


class NoiseSource:
    """The generators of a batch, one per image.

    They draw image by image on the CPU, and the result is moved afterwards.

    So image i sees the same numbers in every batch, on every rank and on every device.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device | str = "cpu") -> None:
        self._generators = [image_generator(request.seed, request.index) for request in requests]
        self._device = torch.device(device)

    @property
    def num_images(self) -> int:
        return len(self._generators)

    def draw(self, shape_CHW: Sequence[int]) -> Tensor:
        """Return the next standard normal draw of every image: float32 ``[B, C, H, W]``, also for B = 0."""
        x_BCHW = torch.empty(self.num_images, *shape_CHW, dtype=torch.float32)
        for x_CHW, generator in zip(x_BCHW, self._generators, strict=True):
            x_CHW.normal_(generator=generator)
        return x_BCHW.to(self._device)
