"""Pixels of samples: pixel models need a cast only, latent models a local copy of the sd-vae-ft-mse decoder.

Shape suffixes: B images, C channels, H height, W width (of the image; latents are 1/8 of that per side).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_dist.errors import UserError

LATENT_SCALE = 0.18215  # latents were multiplied by it for training (Rombach et al. 2022, appendix G)
HOW_TO_GET_PIXELS = (
    "install the 'vae' extra (pip install 'moeca_dist[vae]') and set sampling.vae to the path of a local copy of "
    "stabilityai/sd-vae-ft-mse (the folder with config.json and diffusion_pytorch_model.safetensors)"
)


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to uint8 ``[B, H, W, C]`` on the CPU, rounded to nearest.

    Values outside are clamped.
    """
    levels_BCHW = ((x_BCHW.float() + 1) * 127.5).clamp(0, 255).round()
    return levels_BCHW.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


class LatentDecoder:
    """The decoder of a diffusers ``AutoencoderKL`` in a local folder. Nothing is ever downloaded.

    ``chunk_size`` images are decoded at a time: activations at full resolution, not weights, fill the memory.

    Raises:
        UserError: diffusers is not installed, or the folder does not hold a usable autoencoder.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu", chunk_size: int = 4) -> None:
        if chunk_size < 1:
            raise UserError(f"chunk_size {chunk_size} is too small; decode at least 1 image at a time")
        self._device = torch.device(device)
        self._chunk_size = chunk_size
        self._autoencoder = _load_autoencoder(Path(folder)).to(self._device).eval()

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode sampled latents ``[B, C, H/8, W/8]`` to uint8 pixels ``[B, H, W, 3]`` on the CPU. B may be 0.

        Raises:
            UserError: the autoencoder was made for another number of latent channels.
        """
        num_channels = self._autoencoder.config.latent_channels
        if latents_BCHW.shape[1] != num_channels:
            raise UserError(
                f"this autoencoder decodes {num_channels}-channel latents, the samples have {latents_BCHW.shape[1]}; "
                "use the one that the model was trained with"
            )
        if latents_BCHW.shape[0] == 0:
            factor = 2 ** (len(self._autoencoder.config.block_out_channels) - 1)
            height, width = (side * factor for side in latents_BCHW.shape[2:])
            return torch.empty(0, height, width, self._autoencoder.config.out_channels, dtype=torch.uint8)
        chunks = latents_BCHW.to(self._device, torch.float32).split(self._chunk_size)
        return torch.cat([to_uint8(self._autoencoder.decode(chunk / LATENT_SCALE).sample) for chunk in chunks])


def check_autoencoder(folder: Path) -> type[Any]:
    """Check ``folder`` without reading weights, and return the class that loads it.

    The return type is ``Any``, because diffusers is optional. Raises UserError if diffusers is not installed or the
    folder holds no autoencoder.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"decoding latents needs diffusers, which is not installed; {HOW_TO_GET_PIXELS}") from error
    if not (folder / "config.json").is_file():
        raise UserError(f"no autoencoder in {str(folder)!r} (it has no config.json); {HOW_TO_GET_PIXELS}")
    return AutoencoderKL


def _load_autoencoder(folder: Path) -> Any:
    """The ``AutoencoderKL`` in ``folder``, float32."""
    autoencoder_class = check_autoencoder(folder)
    try:
        # Safetensors alone: the .bin beside it is a pickle, and loading one runs code.
        autoencoder, loading = autoencoder_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the autoencoder in {str(folder)!r} ({reason}); {HOW_TO_GET_PIXELS}") from error
    if loading["missing_keys"]:  # diffusers only logs this and would decode with random weights
        first = min(loading["missing_keys"])
        raise UserError(f"the autoencoder in {str(folder)!r} lacks weights such as {first!r}; {HOW_TO_GET_PIXELS}")
    return autoencoder
