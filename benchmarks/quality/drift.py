"""How much each module's output changes from step to step, and how much each expert matters to the images.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.drift --config configs/demo.yaml

Drift: the relative L2 distance of a module's output from that of the step before, on exact runs. Sensitivity: the
relative change of the final samples where the output of one expert is 1% larger in every step, over 1%. Writes
OUT/data.json and plot.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common.results import DATA, OUT_HELP, PLOT, default_folder
from moeca_dist import Engine
from moeca_dist.config import HalvesConfig
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.types import Request

LARGER = 1.01


def watched(engine: Engine) -> dict[str, Any]:
    """Attention and feed-forward of every block, in the order in which they run."""
    modules: dict[str, Any] = {}
    for index, block in enumerate(engine.model.blocks):
        modules[f"{index} attention"] = block.attn
        kind = "MoE" if index in engine.model.spec.moe_blocks else "dense"
        modules[f"{index} {kind}"] = block.feed_forward
    return modules


def drift(engine: Engine, requests: list[Request]) -> tuple[list[str], NDArray[np.float64]]:
    """Names of modules, and [modules, steps - 1]."""
    rows: dict[str, list[float]] = {}
    before: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            now = (output[0] if isinstance(output, tuple) else output).detach()
            if name in before:
                rows.setdefault(name, []).append(float((now - before[name]).norm() / before[name].norm()))
            before[name] = now

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in watched(engine).items()]
    engine.denoise(requests)
    for handle in handles:
        handle.remove()
    names = [name for name in watched(engine) if name in rows]
    return names, np.array([rows[name] for name in names])


def sensitivity(engine: Engine, requests: list[Request]) -> tuple[list[int], NDArray[np.float64]]:
    """MoE blocks, and [blocks, experts]."""
    exact = engine.denoise(requests)
    blocks, rows = [], []
    for block, layer in engine.model.moe_layers():
        assert isinstance(layer.experts, RoutedExperts)
        w2_LDI, row = layer.experts.w2, []
        for expert in range(engine.model.spec.num_experts):
            kept = w2_LDI[expert].clone()
            w2_LDI[expert].mul_(LARGER)
            changed = engine.denoise(requests)
            w2_LDI[expert].copy_(kept)
            row.append(float((changed - exact).norm() / exact.norm()) / (LARGER - 1))
        blocks.append(block)
        rows.append(row)
        print(f"block {block}: {', '.join(f'{value:.4f}' for value in row)}", flush=True)
    return blocks, np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=default_folder("drift"), help=OUT_HELP)
    parser.add_argument("--num-images", type=int, default=10, help="for the drift")
    parser.add_argument("--sensitivity-images", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    configured = Engine.from_config(args.config)
    engine = configured.without_cache()

    def requests(count: int) -> list[Request]:
        return [Request(index, index % engine.model.spec.num_classes, args.seed) for index in range(count)]

    names, drift_MN = drift(engine, requests(args.num_images))
    blocks, sensitivity_LE = sensitivity(engine, requests(args.sensitivity_images))
    found = {"modules": names, "drift": drift_MN.tolist(), "blocks": blocks, "sensitivity": sensitivity_LE.tolist()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / DATA).write_text(json.dumps(found, indent=1) + "\n")
    draw(args.out / PLOT, names, drift_MN, blocks, sensitivity_LE, configured.config.cache.full_steps)


def draw(
    path: Path,
    names: list[str],
    drift_MN: NDArray[np.float64],
    blocks: list[int],
    sensitivity_LE: NDArray[np.float64],
    full_steps: Any,
) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.2))
    shown = left.imshow(
        np.log10(drift_MN), aspect="auto", extent=(0.5, drift_MN.shape[1] + 0.5, len(names) - 0.5, -0.5)
    )
    figure.colorbar(shown, ax=left, label="log10 of the relative change since the step before")
    if isinstance(full_steps, HalvesConfig):
        for steps, place, colour in ((full_steps.conditional, -1.2, "black"), (full_steps.unconditional, -0.8, "red")):
            left.scatter(steps, [place] * len(steps), marker="|", s=40, color=colour, clip_on=False)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(xlabel="step (marks: full steps, black conditional, red unconditional)", ylim=(len(names) - 0.5, -1.6))
    shown = right.imshow(sensitivity_LE, aspect="auto", cmap="magma")
    figure.colorbar(shown, ax=right, label="relative change of the image per relative change of the expert")
    right.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks])
    right.set(xlabel="expert")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
