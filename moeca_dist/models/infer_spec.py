"""The spec of a network, inferred from a checkpoint's keys and shapes, and from stated options."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from moeca_dist.errors import UserError
from moeca_dist.models import dit_moe, dsmoe
from moeca_dist.models.spec import ModelSpec, TimeConvention

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

LATENT_SIZE = 32  # 256 x 256 images behind an 8x VAE: what all published networks were trained on


def dsmoe_spec(shapes: Shapes, options: Mapping[str, Any]) -> ModelSpec:
    """Infer a DSMoE. Heads, k and the gate scale come from the published size or from ``options``."""
    moe_blocks = _blocks_with(shapes, r"blocks\.(\d+)\.mlp\.experts\.blocks\.")
    first = f"blocks.{moe_blocks[0]}.mlp"
    dense = [i for i in range(_depth(shapes)) if f"blocks.{i}.mlp.fc1.weight" in shapes]
    found = _globals(shapes) | {
        "family": "dsmoe",
        "num_experts": _need(shapes, f"{first}.gate.weight")[0],
        "expert_width": _need(shapes, f"{first}.experts.blocks.0.up_proj.weight")[0],
        "shared_width": shapes.get(f"{first}.shared_experts.up_proj.weight", (0,))[0],
        "moe_blocks": moe_blocks,
        "dense_width": shapes[f"blocks.{dense[0]}.mlp.fc1.weight"][0] if dense else 0,
        "input_size": LATENT_SIZE,
        "time_convention": TimeConvention.FLOW_NOISE_TO_DATA,
    }
    known = _published_like(dsmoe.PUBLISHED, found)
    if known is not None:
        found |= _pick(known, ("num_heads", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor"))
    elif "n_group" not in options:
        logger.warning("n_group and topk_group are not stated for this unpublished size: routing without groups")
    return _finish(found, options, needed=("num_heads", "num_experts_per_tok", "routed_scaling_factor"))


def dit_moe_spec(shapes: Shapes, options: Mapping[str, Any]) -> ModelSpec:
    """Infer a DiT-MoE. The head count comes from the norms' size, the published size or ``options``."""
    moe_blocks = _blocks_with(shapes, r"blocks\.(\d+)\.moe\.experts\.")
    first = f"blocks.{moe_blocks[0]}"
    norm = shapes.get(f"{first}.attn.q_norm.weight")
    side = int(_need(shapes, "pos_embed")[1] ** 0.5)
    globals_ = _globals(shapes)
    found = globals_ | {
        "family": "dit_moe",
        "num_experts": _need(shapes, f"{first}.moe.gate.weight")[0],
        "num_experts_per_tok": 2,
        "expert_width": _need(shapes, f"{first}.moe.experts.0.up_proj.weight")[0],
        "shared_width": shapes.get(f"{first}.moe.shared_experts.up_proj.weight", (0,))[0],
        "moe_blocks": moe_blocks,
        "qk_norm": norm is not None,
        "input_size": side * globals_["patch_size"],
        "time_convention": TimeConvention.FLOW_DATA_TO_NOISE if norm else TimeConvention.DDPM_EPSILON,
    }
    known = _published_like(dit_moe.PUBLISHED, found)
    if norm is not None:
        found["num_heads"] = found["hidden_size"] // norm[0]
    elif known is not None:
        found["num_heads"] = known.num_heads
    return _finish(found, options, needed=("num_heads",))


def _globals(shapes: Shapes) -> dict[str, Any]:
    hidden_size, in_channels, patch_size, _ = _need(shapes, "x_embedder.proj.weight")
    return {
        "depth": _depth(shapes),
        "hidden_size": hidden_size,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "out_channels": _need(shapes, "final_layer.linear.weight")[0] // patch_size**2,
        "num_classes": _need(shapes, "y_embedder.embedding_table.weight")[0] - 1,
    }


def _depth(shapes: Shapes) -> int:
    return 1 + max(_blocks_with(shapes, r"blocks\.(\d+)\."))


def _blocks_with(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    return tuple(sorted({int(match[1]) for key in shapes if (match := re.match(pattern, key))}))


def _need(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UserError(f"the checkpoint lacks {key}, without which its size cannot be told")
    return shapes[key]


def _published_like(published: Mapping[str, ModelSpec], found: Mapping[str, Any]) -> ModelSpec | None:
    """Return the published size with the same depth, width and experts, if there is one."""
    same = ("depth", "hidden_size", "num_experts", "expert_width")
    return next((spec for spec in published.values() if all(getattr(spec, name) == found[name] for name in same)), None)


def _pick(spec: ModelSpec, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in names}


def _finish(found: dict[str, Any], options: Mapping[str, Any], needed: tuple[str, ...]) -> ModelSpec:
    stated = found | dict(options)
    missing = [name for name in needed if stated.get(name) is None]
    if missing:
        raise UserError(
            f"this checkpoint is of family {found['family']} but of no published size, and its shapes do not tell "
            f"{', '.join(missing)}: state them, e.g. load_model(..., {missing[0]}=N), model.{missing[0]}=N in a "
            f"configuration or --{missing[0].replace('_', '-')} N of moeca convert"
        )
    try:
        return ModelSpec(**stated)
    except ValueError as error:
        raise UserError(str(error)) from error
