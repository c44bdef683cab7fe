"""Samples as the solver left them, neither decoded nor rounded to pixels."""

from torch import Tensor

from moeca_dist.sampling.latent_decoder import LatentDecoder


class Unrounded(LatentDecoder):
    """The decoder of an engine whose samples are compared; it needs no autoencoder."""

    def __init__(self) -> None:
        pass

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW.cpu()
