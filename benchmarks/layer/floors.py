"""What one denoising step must at least move and multiply, counted from published shapes: the two floors of its time.

    python -m benchmarks.layer.floors

Divided by a device's measured copy bandwidth and matrix-product rate they are seconds that no implementation of the
same step gets under. Bytes in bf16: weights once per step, activations as often as the kernels of a cached step pass
over them (``docs/performance.md`` lists the passes).
"""

import argparse

from benchmarks.layer.kernels import BATCHES, FRESH, MODELS
from moeca_dist.models.flops import forward_flops
from moeca_dist.models.registry import published_spec
from moeca_dist.models.spec import ModelSpec

BYTES = 2  # of a bf16 value
# Rows [D] per token, at order 1: attention into the residual, norm and modulation (5), router (1), routed sum (1 and
# two for each branch), shared forecast (3), their sum (3), residual (3).
MOE_BLOCK_ROWS, ROWS_PER_BRANCH, DENSE_BLOCK_ROWS = 16, 2, 8


def full_step(spec: ModelSpec, images: int) -> tuple[int, int]:
    """(bytes, FLOP): all weights and, for every block, the residual stream in and out."""
    rows = 2 * images * spec.num_tokens * spec.depth
    return (weights(spec) + rows * spec.hidden_size) * BYTES, images * forward_flops(spec).total


def cached_step(spec: ModelSpec, images: int) -> tuple[int, int]:
    """(bytes, FLOP) with ``FRESH`` of the branches computed; every expert is taken to have some."""
    work, moe = forward_flops(spec), len(spec.moe_blocks)
    rows = moe * (MOE_BLOCK_ROWS + ROWS_PER_BRANCH * spec.num_experts_per_tok) + (spec.depth - moe) * DENSE_BLOCK_ROWS
    activations = images * spec.num_tokens * spec.hidden_size * rows
    flop = images * (work.router + work.embedding + round(FRESH * work.routed))
    return (activations + modulation_weights(spec) + expert_weights(spec)) * BYTES, flop


def expert_weights(spec: ModelSpec) -> int:
    return len(spec.moe_blocks) * spec.num_experts * 3 * spec.hidden_size * spec.expert_width


def modulation_weights(spec: ModelSpec) -> int:
    return spec.depth * 6 * spec.hidden_size**2


def weights(spec: ModelSpec) -> int:
    moe = len(spec.moe_blocks)
    shared = moe * 3 * spec.hidden_size * spec.shared_width
    dense = (spec.depth - moe) * 2 * spec.hidden_size * spec.dense_width
    return expert_weights(spec) + shared + dense + spec.depth * 4 * spec.hidden_size**2 + modulation_weights(spec)


def table() -> str:
    lines = [
        "| model | batch | full step GB | TFLOP | cached step GB | TFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        spec = published_spec(name)
        for batch in BATCHES:
            (full_bytes, full_flop), (bytes_, flop) = full_step(spec, 2 * batch), cached_step(spec, 2 * batch)
            lines.append(
                f"| {name} | {batch} | {full_bytes / 1e9:.2f} | {full_flop / 1e12:.3f} "
                f"| {bytes_ / 1e9:.2f} | {flop / 1e12:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())
