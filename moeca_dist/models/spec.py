"""The hyper-parameters of a network, fixed and validated once."""

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any


class TimeConvention(StrEnum):
    """The meaning of the time input, and of the network's prediction."""

    FLOW_NOISE_TO_DATA = "flow_noise_to_data"  # t = 0 is noise, 1 is data; v = data - noise (DSMoE)
    FLOW_DATA_TO_NOISE = "flow_data_to_noise"  # t = 1 is noise, 0 is data; v = noise - data (DiT-MoE XL/G)
    DDPM_EPSILON = "ddpm_epsilon"  # integer t in 0..999; predicts the noise and the variance range (DiT-MoE S/B)


@dataclass(frozen=True)
class ModelSpec:
    """Hyper-parameters of one DiT-MoE network. Sizes are in elements, images in (latent) pixels.

    ``moe_blocks`` lists the block indices whose feed-forward is a MoE layer. The other blocks are dense.
    ``shared_width`` is the hidden width of the one always-on SwiGLU expert, or 0 without such an expert.
    """

    family: str
    depth: int
    hidden_size: int
    num_heads: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    shared_width: int
    moe_blocks: tuple[int, ...]
    input_size: int
    in_channels: int
    out_channels: int
    num_classes: int
    time_convention: TimeConvention
    patch_size: int = 2
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    dense_width: int = 0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must lie in 1..num_experts ({self.num_experts})"
            )
        if self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group {self.n_group} must divide num_experts {self.num_experts}, and topk_group "
                f"{self.topk_group} must lie in 1..n_group"
            )
        if self.num_experts_per_tok > self.topk_group * (self.num_experts // self.n_group):
            raise ValueError(
                f"{self.topk_group} groups of {self.num_experts // self.n_group} experts cannot serve "
                f"num_experts_per_tok {self.num_experts_per_tok}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def null_label(self) -> int:
        """Return the label of the unconditional half in classifier-free guidance."""
        return self.num_classes

    @property
    def is_latent(self) -> bool:
        """Return whether samples are VAE latents (4 channels) and not pixels."""
        return self.in_channels == 4

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict. ``ModelSpec.from_dict`` is its inverse."""
        return asdict(self) | {"moe_blocks": list(self.moe_blocks), "time_convention": self.time_convention.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """Return the spec that ``to_dict`` made JSON-ready. Raises ValueError for unknown hyper-parameters."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model hyper-parameters {unknown}; known are {sorted(known)}")
        return cls(
            **values
            | {
                "moe_blocks": tuple(values["moe_blocks"]),
                "time_convention": TimeConvention(values["time_convention"]),
            }
        )
