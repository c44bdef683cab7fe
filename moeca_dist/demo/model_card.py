"""The figures of the demo's model card: ``python -m moeca_dist.demo.model_card``.

Shape suffixes: N images, B images of one batch, L MoE layers, E experts, T tokens of a batch, K experts per token, H
and W pixels, C channels, P pixels of a flattened 8x8 image.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from moeca_dist.checkpoints.load import load_model
from moeca_dist.demo.data import NUM_CLASSES, augment, load_split, to_uint8
from moeca_dist.demo.judge import Judge, features
from moeca_dist.errors import UserError
from moeca_dist.sampling.guidance import exact
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request, Routing, StepContext

SHIPPED_CHECKPOINT = Path(__file__).with_name("digits.safetensors")

_BATCH = 50
_GRID_ROWS, _GRID_COLUMNS, _GRID_ZOOM = 10, 20, 4


class RoutingWatcher:
    """A counter of the chosen experts, and of the branches of a step that the step before did not have."""

    def __init__(self, model: nn.Module, num_experts: int) -> None:
        gates = [module for _, module in model.named_modules() if hasattr(module, "e_score_correction_bias")]
        self.load_LE = torch.zeros(len(gates), num_experts, dtype=torch.int64)
        self.new_L = torch.zeros(len(gates), dtype=torch.int64)
        self.compared_L = torch.zeros(len(gates), dtype=torch.int64)
        self._previous: list[Tensor | None] = [None] * len(gates)
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda _module, _inputs, routing, layer=layer: self._count(layer, routing))

    def _count(self, layer: int, routing: Routing) -> None:
        ids_TK = routing.expert_N.view(routing.num_tokens, -1)
        self.load_LE[layer] += torch.bincount(ids_TK.flatten(), minlength=self.load_LE.shape[1])
        previous_TK = self._previous[layer]
        if previous_TK is not None:
            kept_TK = (ids_TK[:, :, None] == previous_TK[:, None, :]).any(-1)
            self.new_L[layer] += (~kept_TK).sum()
            self.compared_L[layer] += ids_TK.numel()
        self._previous[layer] = ids_TK

    def next_batch(self) -> None:
        """Forget the last routing: other images are not the next step of these."""
        self._previous = [None] * len(self._previous)

    def summary(self) -> dict[str, Any]:
        """Return, per MoE layer, each expert's share of the branches and the share that is new in a step."""
        shares_LE = self.load_LE / self.load_LE.sum(1, keepdim=True)
        return {
            "expert_share": [[round(value, 4) for value in row] for row in shares_LE.tolist()],
            "max_over_mean_load": [round(value, 3) for value in (shares_LE.amax(1) * shares_LE.shape[1]).tolist()],
            "new_branches_per_step": [round(value, 4) for value in (self.new_L / self.compared_L).tolist()],
        }


def generate(
    model: nn.Module, labels_N: list[int], *, num_steps: int, cfg_scale: float, seed: int
) -> tuple[Tensor, RoutingWatcher]:
    """Sample one image per label on the model's device.

    Returns:
        The images, uint8 [N, H, W, C], and the counts of the routers.
    """
    spec: Any = model.spec
    sampler = sampler_for(spec)
    watcher = RoutingWatcher(model, spec.num_experts)
    requests = [Request(index, label, seed) for index, label in enumerate(labels_N)]
    batches = []
    with tqdm(total=len(requests) * num_steps, desc="image steps", unit_scale=True) as progress:
        for start in range(0, len(requests), _BATCH):
            batch = requests[start : start + _BATCH]

            def on_step(_step: StepContext, advance: int = len(batch)) -> None:
                progress.update(advance)

            watcher.next_batch()
            x_BCHW = sampler.sample(exact(model), batch, cfg_scale=cfg_scale, num_steps=num_steps, on_step=on_step)
            batches.append(to_uint8(x_BCHW))
    return torch.cat(batches), watcher


def variety(images_NHWC: Tensor, labels_N: list[int], seed: int) -> dict[str, float]:
    """Measure how new the images are and how much they differ, by distances between 8x8 ink images.

    Distances are L2 over 64 values in [0, 1]. The nearest training digit (median) tells novelty. Augmented held-out
    digits show the distance of new images, augmented training digits the distance of copies. Spread is the mean
    distance between two images of one class.
    """
    training, held_out = load_split()
    generator = torch.Generator().manual_seed(seed)
    made_NP, copied_NP, new_NP = (
        torch.from_numpy(features(images))
        for images in (images_NHWC, *(to_uint8(augment(part.ink_NHW, generator)) for part in (training, held_out)))
    )
    known_NP = training.ink_NHW.flatten(1)
    return {
        "nearest_training_generated": _nearest(made_NP, known_NP),
        "nearest_training_held_out": _nearest(new_NP, known_NP),
        "nearest_training_copies": _nearest(copied_NP, known_NP),
        "spread_within_class_generated": _spread(made_NP, torch.tensor(labels_N)),
        "spread_within_class_real": _spread(copied_NP, training.labels_N),
    }


def _nearest(from_NP: Tensor, to_NP: Tensor) -> float:
    return round(float(torch.cdist(from_NP, to_NP).amin(1).median()), 3)


def _spread(images_NP: Tensor, labels_N: Tensor) -> float:
    distances = [torch.pdist(images_NP[labels_N == label]).mean() for label in labels_N.unique()]
    return round(float(torch.stack(distances).mean()), 3)


def legibility(images_NHWC: Tensor, labels_N: list[int]) -> dict[str, Any]:
    """Measure how many images the judge reads as their label, overall and per class."""
    judge = Judge.train()
    labels = np.array(labels_N)
    right: NDArray[np.bool_] = judge.read(images_NHWC) == labels
    return {
        "judge_on_held_out_real_digits": round(judge.held_out_accuracy, 4),
        "judge_on_generated": round(float(right.mean()), 4),
        "right_per_class": {
            str(label): f"{right[labels == label].sum()}/{(labels == label).sum()}" for label in sorted(set(labels_N))
        },
    }


def save_grid(images_NHWC: Tensor, path: Path) -> None:
    """Save full rows of up to 200 images, enlarged by whole pixels.

    If the labels are 0..9 in turn, a column shows one digit.
    """
    rows = [images_NHWC[start : start + _GRID_COLUMNS, :, :, 0] for start in range(0, len(images_NHWC), _GRID_COLUMNS)]
    full = [torch.cat(list(row), dim=1) for row in rows[:_GRID_ROWS] if len(row) == _GRID_COLUMNS]
    grid = Image.fromarray(torch.cat(full).numpy())
    grid.resize((grid.width * _GRID_ZOOM, grid.height * _GRID_ZOOM), Image.Resampling.NEAREST).save(path)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}; choose another --out") from error


def _one_line_per_figure(figures: dict[str, dict[str, Any]]) -> str:
    """JSON that can be read and compared line by line."""
    sections = []
    for name, section in figures.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items()]
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}"


def main(argv: list[str] | None = None) -> int:
    """Print the figures as JSON, and write ``grid.png`` and ``evaluation.json``. The exit code is 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m moeca_dist.demo.model_card", description="Judge the demo model.")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder for grid.png and evaluation.json")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    labels_N = [index % NUM_CLASSES for index in range(args.num_images)]
    try:
        if args.num_images < _GRID_COLUMNS:
            raise UserError(f"--num-images {args.num_images} does not fill a row; choose {_GRID_COLUMNS} or more")
        _make_folder(args.out)
        model = load_model(args.checkpoint)
        images_NHWC, watcher = generate(
            model, labels_N, num_steps=args.num_steps, cfg_scale=args.cfg_scale, seed=args.seed
        )
        save_grid(images_NHWC, args.out / "grid.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {
        "settings": {key: vars(args)[key] for key in ("num_images", "num_steps", "cfg_scale", "seed")},
        "legibility": legibility(images_NHWC, labels_N),
        "routing": watcher.summary(),
        "variety": variety(images_NHWC, labels_N, args.seed),
    }
    text = _one_line_per_figure(figures)
    (args.out / "evaluation.json").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
