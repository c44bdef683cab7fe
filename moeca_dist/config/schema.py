"""The sections of a configuration: typed, frozen, with their defaults, bounds and refused combinations."""

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from moeca_dist.errors import UserError

# Strict everywhere else: with coercion `num_steps: true` would run one step.
PathField = Annotated[Path, Strict(False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The network. Options left at None are inferred from the checkpoint, or refused if shapes cannot tell."""

    name: str | None = None
    """A published size, e.g. DSMoE-S-E16. A checkpoint given as well must agree with it."""
    checkpoint: PathField | None = None
    """A published file (.pt, .safetensors) or a folder in our sharded format."""
    random_init: bool = False
    """Random weights for the size ``name``: speed benchmarks without weights."""
    family: str | None = None
    num_heads: int | None = Field(None, ge=1)
    num_experts_per_tok: int | None = Field(None, ge=1)
    n_group: int | None = Field(None, ge=1)
    topk_group: int | None = Field(None, ge=1)
    routed_scaling_factor: float | None = Field(None, gt=0)
    input_size: int | None = Field(None, ge=1)
    """Side of the (latent) image in pixels."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["torch", "triton"] = "torch"
    """Implementation of small operators: PyTorch, or Triton on a CUDA device."""
    cuda_graphs: bool = False
    """Replay evaluations of the network as CUDA graphs, in runs without a cache and on ranks that hold all experts."""


class ParallelConfig(_Section):
    """The split of the world: ``ep_size`` ranks share one set of experts, and such groups are data-parallel."""

    ep_size: int | None = Field(None, ge=1)
    """Ranks of one expert-parallel group. None: the whole world."""
    row_dtype: Literal["exact", "int8"] = "exact"
    """Format of rows between ranks: as computed, or int8 codes with one scale per row. It has no effect on one rank."""
    expert_placement: PathField | None = None
    """File of ``moeca place`` with the owner of each expert. None: equal runs of consecutive experts."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout_s: float = Field(120.0, gt=0, le=86_400)
    """A peer that stays silent for longer ends the run."""


class HalvesConfig(_Section):
    """One list of full steps for each guidance half."""

    conditional: list[int]
    unconditional: list[int]


class CacheConfig(_Section):
    """The reuse between denoising steps. Each policy reads some of the options and refuses the others."""

    policy: Literal[
        "none",
        "fora",
        "taylorseer",
        "moeca",
        "moeca_forecast",
        "network_forecast",
        "toca",
        "teacache",
        "dice_skip",
        "random",
    ] = "none"
    """``none`` is the exact path."""
    interval: int | None = Field(None, ge=1)
    """A full step every so many steps."""
    full_steps: list[int] | HalvesConfig | None = None
    """Indices of the full steps, for both guidance halves or for each."""
    order: int | None = Field(None, ge=0, le=3)
    """Order of the forecast. 0 reuses the stored value."""
    ratio: float | None = Field(None, ge=0, le=1)
    """Share that a cache step computes: of the branches with policy ``random``, of the tokens with ``toca``."""
    attention_sync: bool | None = None
    """Refresh attention row, shared expert and dense blocks of every token that has a refreshed branch."""
    refresh_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the branches to refresh by score. The threshold follows from this share."""
    drift: Literal["signed", "absolute"] | None = None
    """Effect of a falling gate on the refresh score: ``signed`` lowers the score, ``absolute`` raises it."""
    delta: float | None = Field(None, ge=0)
    """Accumulated relative change of the modulation at which policy ``teacache`` computes the network again."""
    calibration: PathField | None = None
    """File of ``moeca calibrate``, which corrects the outputs that the solver gets, in every step."""
    dtype: Literal["model", "bfloat16", "float8_e4m3fn"] = "model"
    """Dtype of stored values. float8 has one scale per row. A step does not round the values that it computes."""
    memory_limit: str | float | None = None
    """Largest cache of a rank: a size such as "2GiB", or a share (above 0, up to 1) of the device's memory.

    On CPU it is a share of the host's memory. A run with a larger cache is refused before sampling.
    """
    location: Literal["home", "owner", "auto"] | None = None
    """Side of the exchange that keeps branch values. ``auto`` is ``owner`` on two ranks, else ``home``.

    None: ``home``. With ``home`` the images are those of one rank for every policy.
    """

    @field_validator("memory_limit")
    @classmethod
    def _check_memory_limit(cls, limit: str | float | None) -> str | float | None:
        if isinstance(limit, str):
            parse_size(limit)
        elif limit is not None and not 0 < limit <= 1:
            raise ValueError(
                f"cache.memory_limit {limit:g} is neither a share of the memory, above 0 and up to 1, nor a size with "
                'a unit such as "2GiB"'
            )
        return limit


class SamplingConfig(_Section):
    """The sampling of images. ``batch_size`` counts images per rank and round."""

    num_steps: int | None = Field(None, ge=1)
    """Number of denoising steps. None: the default of the model's family."""
    cfg_scale: float = Field(1.5, ge=1)
    """Scale of classifier-free guidance. 1 switches guidance off."""
    batch_size: int = Field(32, ge=1)
    vae: PathField | None = None
    """Folder of a local sd-vae-ft-mse. Without it latent models save latents."""


class TelemetryConfig(_Section):
    """Records of a run besides its report. They do not change the images."""

    period_s: float | None = Field(None, ge=0.1, le=3600)
    """Seconds between samples of each rank's GPU. None: no sampling. Reading a GPU takes some 40 ms."""
    trace: int | None = Field(None, ge=1)
    """Number of denoising steps to profile at the beginning, into one trace per rank. None: no trace."""


QualityName = Literal["draft", "balanced", "faithful"]
QUALITY_NAMES: tuple[QualityName, ...] = get_args(QualityName)


class QualityConfig(_Section):
    """Tuned files (``moeca tune``) for this network. `--quality` and `--target-psnr` take the cache of one of them."""

    draft: PathField | None = None
    balanced: PathField | None = None
    faithful: PathField | None = None


class Config(_Section):
    """The values on which one run depends, except the requests themselves."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    sampling: SamplingConfig = SamplingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        model = self.model
        if model.random_init and model.checkpoint is not None:
            raise ValueError("model.random_init and model.checkpoint exclude each other: keep one of them")
        if model.random_init and model.name is None:
            raise ValueError("model.random_init needs model.name, the published size to build")
        if model.random_init and model.family is not None:
            raise ValueError("model.family has no effect with model.random_init, where model.name decides: remove it")
        if model.cuda_graphs and model.device == "cpu":
            raise ValueError("model.cuda_graphs needs a CUDA device, not model.device cpu: remove one of them")
        if self.cache.dtype == model.dtype:
            raise ValueError(f"cache.dtype {model.dtype} has no effect, model.dtype is the same: remove it")
        if self.parallel.backend == "nccl" and model.device == "cpu":
            raise ValueError("parallel.backend nccl needs model.device cuda; use gloo (or auto) on cpu")
        return self

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML that `load_config` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``2GiB``, ``1.5 GB`` or ``300MB``. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?))?B\s*", text)
    size = 0.0
    if match is not None:
        power = " KMGT".index(match[2] or " ")
        size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size < 1:
        raise ValueError(f'cache.memory_limit {text!r} is not a size: state "2GiB", "300MB" or a share such as 0.2')
    return int(size)


def validate_world(config: Config, world_size: int) -> None:
    """Raise `UserError` unless ``parallel.ep_size`` divides ``world_size``."""
    ep_size = config.parallel.ep_size
    if ep_size is not None and world_size % ep_size:
        divisors = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise UserError(
            f"parallel.ep_size {ep_size} does not divide the world size {world_size}; choose one of {divisors}, "
            "or start another number of ranks"
        )
