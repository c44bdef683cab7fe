"""Counted work of one forward pass: matrix products only, 1 multiply-add = 2 FLOP."""

from dataclasses import dataclass

from moeca_dist.models.spec import ModelSpec


@dataclass(frozen=True)
class ForwardFlops:
    """The FLOP of one image in one network evaluation, by part."""

    attention: int
    dense: int
    routed: int
    shared: int
    router: int
    embedding: int
    modulation: int
    """FLOP of the blocks' modulation, which are a part of ``embedding``."""

    @property
    def blocks(self) -> int:
        """Return the FLOP of all blocks, which are saved if no block is computed."""
        return self.attention + self.dense + self.routed + self.shared + self.router + self.modulation

    @property
    def total(self) -> int:
        return self.attention + self.dense + self.routed + self.shared + self.router + self.embedding


def forward_flops(spec: ModelSpec) -> ForwardFlops:
    """Return the FLOP of one image (``spec.num_tokens`` tokens) in one forward pass.

    ``embedding`` holds patches, adaLN and output.
    """
    tokens, hidden, moe_layers = spec.num_tokens, spec.hidden_size, len(spec.moe_blocks)
    projections = 4 * tokens * hidden * hidden
    scores_and_values = 2 * tokens * tokens * hidden
    patch_width = spec.patch_size**2
    conditioning = 6 * hidden * hidden * spec.depth + 2 * hidden * hidden + (256 + hidden) * hidden
    patches = tokens * hidden * patch_width * (spec.in_channels + spec.out_channels)
    return ForwardFlops(
        attention=2 * spec.depth * (projections + scores_and_values),
        dense=2 * (spec.depth - moe_layers) * 2 * tokens * hidden * spec.dense_width,
        routed=2 * moe_layers * tokens * spec.num_experts_per_tok * 3 * hidden * spec.expert_width,
        shared=2 * moe_layers * tokens * 3 * hidden * spec.shared_width,
        router=2 * moe_layers * tokens * hidden * spec.num_experts,
        embedding=2 * (conditioning + patches),
        modulation=2 * 6 * hidden * hidden * spec.depth,
    )


def signal_flops(spec: ModelSpec) -> int:
    """Return the FLOP of the first block's modulation for a time alone."""
    return 2 * ((256 + spec.hidden_size) * spec.hidden_size + 6 * spec.hidden_size**2)
