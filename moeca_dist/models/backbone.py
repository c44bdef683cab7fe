"""The forward pass that all families share: embed, blocks, output layer.

Shape suffixes: B images, C channels, H and W (latent) pixels, T tokens of one image, D hidden size.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from moeca_dist.cache.module_cache import TokenIndex
from moeca_dist.cache.network_cache import NetworkStep
from moeca_dist.cache.session import PartStep, StepCache
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import Kernels
from moeca_dist.models.attention import RotaryTable
from moeca_dist.models.blocks import AdaLNBlock, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.layer import MoELayer
from moeca_dist.timing import UNTIMED, Timer


class DiffusionTransformer(nn.Module):
    """A class-conditional diffusion transformer with MoE feed-forwards. It knows nothing of ranks.

    Families supply the blocks and say how tokens learn their positions.
    """

    def __init__(self, spec: ModelSpec, blocks: list[AdaLNBlock]) -> None:
        super().__init__()
        self.spec = spec
        self.kernels: Kernels = REFERENCE
        self.x_embedder = PatchEmbed(spec.in_channels, spec.hidden_size, spec.patch_size)
        self.t_embedder = TimestepEmbedder(spec.hidden_size)
        self.y_embedder = LabelEmbedder(spec.num_classes, spec.hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(spec.hidden_size, spec.patch_size, spec.out_channels)

    def add_positions(self, x_BTD: Tensor, rows: int, columns: int) -> tuple[Tensor, RotaryTable | None]:
        """Return tokens with their absolute positions added, or a rotary table for attention, or both."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def moe_layers(self) -> Iterator[tuple[int, MoELayer]]:
        """Yield (block index, layer) of every MoE layer, in order."""
        for index in self.spec.moe_blocks:
            layer = self.blocks[index].feed_forward
            assert isinstance(layer, MoELayer)
            yield index, layer

    def adaln_blocks(self) -> list[AdaLNBlock]:
        """Return ``blocks`` with their type."""
        return cast(list[AdaLNBlock], list(self.blocks))

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, cache: StepCache | None = None, timer: Timer = UNTIMED
    ) -> Tensor:
        """Return the raw network output [B, C_out, H, W] in the parameters' dtype.

        Args:
            x_BCHW: any float dtype. B may be 0: a rank without images still takes part in the exchange.
            t_B: time as the family's convention has it.
            y_B: int64 labels. The null class is ``spec.null_label``.
            cache: the caches of one step. None computes everything: the exact path.
            timer: measures blocks that run without a cache. A cache brings its own.
        """
        patch = self.spec.patch_size
        rows, columns = x_BCHW.shape[-2] // patch, x_BCHW.shape[-1] // patch
        tokens_BTD = self.x_embedder(x_BCHW.to(self.x_embedder.proj.weight.dtype))
        tokens_BTD, rotary = self.add_positions(tokens_BTD, rows, columns)
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        if cache is None:
            tokens_BTD = self._exact(tokens_BTD, c_BD, rotary, timer)
        elif isinstance(cache, NetworkStep):
            tokens_BTD = self._by_network(tokens_BTD, c_BD, rotary, cache, timer)
        else:
            parts = [self._by_block(tokens_BTD[p.images], c_BD[p.images], rotary, p) for p in cache]
            tokens_BTD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return unpatchify(self.final_layer(tokens_BTD, c_BD), rows, columns, patch)

    def _exact(self, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, timer: Timer) -> Tensor:
        for block in self.adaln_blocks():
            x_BTD = block(x_BTD, c_BD, rotary, timer)
        return x_BTD

    def _by_block(self, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, cache: PartStep) -> Tensor:
        tokens: TokenIndex | None = None
        for index, block in enumerate(self.adaln_blocks()):
            x_BTD, tokens = block.cached(x_BTD, c_BD, rotary, cache.block(index), tokens)
        return x_BTD

    def _by_network(
        self, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, cache: NetworkStep, timer: Timer
    ) -> Tensor:
        due = cache.due(self._time_signal(cache.step.time, c_BD.device) if cache.needs_signal else None)
        if not any(due):
            return cache.expected(due, x_BTD)
        images = cache.images(due)
        computed_BTD = self._exact(x_BTD[images], c_BD[images], rotary, timer)
        cache.store(due, x_BTD, computed_BTD)
        if all(due):
            return computed_BTD
        out_BTD = cache.expected(due, x_BTD)
        out_BTD[images] = computed_BTD
        return out_BTD

    def _time_signal(self, time: float, device: torch.device) -> Tensor:
        """Return shift and scale [2 * D] of the first block's attention input, for a time without image and label.

        The numbers are the same on all ranks, whatever images they have.
        """
        c_1D = self.t_embedder(torch.tensor([time], dtype=torch.float32, device=device))
        shift_1D, scale_1D = self.adaln_blocks()[0].adaLN_modulation(c_1D).chunk(6, dim=-1)[:2]
        return torch.cat([shift_1D, 1 + scale_1D], dim=-1)[0].float()
