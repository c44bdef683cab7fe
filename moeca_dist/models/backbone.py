"""The forward pass that all families share: embed, blocks, output layer.

Shape suffixes: B images, C channels, H and W (latent) pixels, T tokens of one image, D hidden size.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from moeca_dist.cache.session import StepCache
from moeca_dist.models.attention import RotaryTable
from moeca_dist.models.blocks import AdaLNBlock, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.layer import MoELayer
from moeca_dist.timing import UNTIMED, Timer


class DiffusionTransformer(nn.Module):
    """A class-conditional diffusion transformer with MoE feed-forwards; knows nothing of ranks.

    Families supply the blocks and say how tokens learn their positions.
    """

    def __init__(self, spec: ModelSpec, blocks: list[AdaLNBlock]) -> None:
        super().__init__()
        self.spec = spec
        self.x_embedder = PatchEmbed(spec.in_channels, spec.hidden_size, spec.patch_size)
        self.t_embedder = TimestepEmbedder(spec.hidden_size)
        self.y_embedder = LabelEmbedder(spec.num_classes, spec.hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(spec.hidden_size, spec.patch_size, spec.out_channels)

    def add_positions(self, x_BTD: Tensor, rows: int, columns: int) -> tuple[Tensor, RotaryTable | None]:
        """Tokens with their absolute positions added, or a rotary table for attention, or both."""
        raise NotImplementedError

    def moe_layers(self) -> Iterator[tuple[int, MoELayer]]:
        """(block index, layer) of every MoE layer, in order."""
        for index in self.spec.moe_blocks:
            layer = self.blocks[index].feed_forward
            assert isinstance(layer, MoELayer)
            yield index, layer

    def adaln_blocks(self) -> list[AdaLNBlock]:
        """``blocks``, as what they are."""
        return cast(list[AdaLNBlock], list(self.blocks))

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor,
        cache: StepCache | None = None,
        timer: Timer = UNTIMED,
    ) -> Tensor:
        """The raw network output [B, C_out, H, W] in the parameters' dtype; exact with ``cache=None``.

        ``x_BCHW``: any float dtype; ``t_B``: time as the family's convention has it; ``y_B``: int64 labels, the null
        class being ``spec.null_label``. B may be 0: a rank without images still takes part in the exchange.
        ``timer`` measures blocks that run without a cache; a cache brings its own.
        """
        patch = self.spec.patch_size
        rows, columns = x_BCHW.shape[-2] // patch, x_BCHW.shape[-1] // patch
        tokens_BTD = self.x_embedder(x_BCHW.to(self.x_embedder.proj.weight.dtype))
        tokens_BTD, rotary = self.add_positions(tokens_BTD, rows, columns)
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        if cache is not None and cache.per_network:
            step, entering_BTD = cache.step, tokens_BTD
            tokens_BTD = cache.serve_network(
                entering_BTD,
                lambda: self._time_signal(step.time, t_B.device),
                lambda images: self._through_blocks(
                    entering_BTD[images],
                    c_BD[images],
                    rotary,
                    None,
                    timer,
                ),
            )
        else:
            tokens_BTD = self._through_blocks(tokens_BTD, c_BD, rotary, cache, timer)
        return unpatchify(self.final_layer(tokens_BTD, c_BD), rows, columns, patch)

    def _through_blocks(
        self,
        tokens_BTD: Tensor,
        c_BD: Tensor,
        rotary: RotaryTable | None,
        cache: StepCache | None,
        timer: Timer,
    ) -> Tensor:
        for index, block in enumerate(self.blocks):
            here = None if cache is None else cache.block(index)
            tokens_BTD = block(tokens_BTD, c_BD, rotary, here, timer)
        return tokens_BTD

    def _time_signal(self, time: float, device: torch.device) -> Tensor:
        """Shift and scale [2 * D] of the first block's attention input for a time alone, without image and label.

        The same numbers on all ranks, whatever images they have.
        """
        c_1D = self.t_embedder(torch.tensor([time], dtype=torch.float32, device=device))
        shift_1D, scale_1D = self.adaln_blocks()[0].adaLN_modulation(c_1D).chunk(6, dim=-1)[:2]
        return torch.cat([shift_1D, 1 + scale_1D], dim=-1)[0].float()
