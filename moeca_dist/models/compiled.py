"""Blocks that are evaluated without a cache, compiled with ``torch.compile``: what lies between the large products.

Two functions per network are compiled, each for all blocks alike and for any number of images: a block up to its
feed-forward, and a dense feed-forward with the residual. MoE layers stay as they are, because what they launch follows
from the routing and from other ranks.

Shape suffixes: B images, T tokens of one image, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeca_dist.errors import UserError
from moeca_dist.models.attention import Attention, RotaryTable
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.blocks import AdaLNBlock
from moeca_dist.models.modulation import modulate, normalise
from moeca_dist.timing import UNTIMED, Timer

Upper = Callable[[Attention, nn.Module, Tensor, Tensor, RotaryTable | None], tuple[Tensor, Tensor, Tensor]]
Lower = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

_FEWEST = 2  # fewer images are a shape of their own to the compiler, and not worth one


@dataclass(frozen=True)
class CompiledParts:
    """``models.blocks.BlockParts``, compiled."""

    upper: Upper
    lower: Lower

    def serves(self, x_BTD: Tensor) -> bool:
        return x_BTD.shape[0] >= _FEWEST

    def enter_feed_forward(
        self, block: AdaLNBlock, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, timer: Timer
    ) -> tuple[Tensor, Tensor, Tensor]:
        with timer.section("attention"):
            # The output of the patch embedding is not contiguous, which would be compiled for the first block alone.
            return self.upper(block.attn, block.adaLN_modulation, x_BTD.contiguous(), c_BD, rotary)

    def after_dense(self, dense: nn.Module, x_BTD: Tensor, entering_BTD: Tensor, gate_BD: Tensor) -> Tensor:
        return self.lower(dense, x_BTD, entering_BTD, gate_BD)


def compile_blocks(model: DiffusionTransformer) -> None:
    """Compile now, for the device that the weights are on, and leave the result in the blocks.

    Raises UserError where there is no working compiler.
    """
    parts = CompiledParts(torch.compile(_upper), torch.compile(_lower))
    try:
        _compile_now(model, parts)
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            "model.compile: torch.compile does not work here; it needs a C++ compiler on CPU (g++) and Triton on CUDA: "
            f"install it, or remove model.compile ({cause})"
        ) from error
    for block in model.adaln_blocks():
        block.parts = parts


@torch.no_grad()
def _compile_now(model: DiffusionTransformer, parts: CompiledParts) -> None:
    """At once on all ranks, so that none waits for another's compiler in the middle of an exchange."""
    spec, weight = model.spec, model.x_embedder.proj.weight
    side = spec.input_size // spec.patch_size
    x_BTD = weight.new_zeros(_FEWEST + 1, spec.num_tokens, spec.hidden_size)
    c_BD = weight.new_zeros(_FEWEST + 1, spec.hidden_size)
    x_BTD, rotary = model.add_positions(x_BTD, side, side)
    for tensor in (x_BTD, c_BD):
        torch._dynamo.mark_dynamic(tensor, 0)
    with_experts = set(spec.moe_blocks)
    for index in {min(with_experts), *sorted(set(range(spec.depth)) - with_experts)[:1]}:
        block = model.adaln_blocks()[index]
        after_BTD, entering_BTD, gate_BD = parts.enter_feed_forward(block, x_BTD, c_BD, rotary, UNTIMED)
        if index not in with_experts:
            for tensor in (after_BTD, entering_BTD, gate_BD):
                torch._dynamo.mark_dynamic(tensor, 0)
            parts.after_dense(block.feed_forward, after_BTD, entering_BTD, gate_BD)


def _upper(
    attention: Attention, condition: nn.Module, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream after attention and what enters the feed-forward [B, T, D], and that one's gate [B, D]."""
    shift, scale, gate, shift_ff, scale_ff, gate_ff = condition(c_BD).chunk(6, dim=-1)
    attended_BTD = attention(modulate(normalise(x_BTD), shift, scale), rotary)
    after_BTD = x_BTD + gate[:, None] * attended_BTD
    return after_BTD, modulate(normalise(after_BTD), shift_ff, scale_ff), gate_ff


def _lower(dense: nn.Module, x_BTD: Tensor, entering_BTD: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BTD + gate_BD[:, None] * dense(entering_BTD)
