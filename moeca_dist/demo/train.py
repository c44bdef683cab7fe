"""Training of the demo model: a small DSMoE-family network on real handwritten digits, on a CPU, in under an hour.

Shape suffixes: B images, C channels, H and W pixels.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from moeca_dist.checkpoints.tensor_source import spec_metadata
from moeca_dist.demo.balance import LoadBalancer
from moeca_dist.demo.data import IMAGE_SIZE, NUM_CLASSES, Digits, augment, load_split
from moeca_dist.errors import UserError
from moeca_dist.models.registry import FAMILIES
from moeca_dist.models.spec import ModelSpec, TimeConvention

DEMO_SPEC = ModelSpec(
    family="dsmoe",
    depth=8,
    hidden_size=96,
    num_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    expert_width=128,
    shared_width=128,
    moe_blocks=(1, 3, 5, 7),
    input_size=IMAGE_SIZE,
    in_channels=1,
    out_channels=1,
    num_classes=NUM_CLASSES,
    time_convention=TimeConvention.FLOW_NOISE_TO_DATA,
    routed_scaling_factor=2.0,
    dense_width=384,
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings on which the result depends, apart from the network itself."""

    steps: int = 8000
    batch_size: int = 32
    seed: int = 0
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    balance_rate: float = 2e-3
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError(f"steps and batch size must be at least 1, not {self.steps} and {self.batch_size}")

    def schedule(self, step: int) -> float:
        """Return the factor of the learning rate and the balancing rate: linear warm-up, then half a cosine down to
        0.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class OutputPaths:
    """The files of one training run, all beside the checkpoint."""

    checkpoint: Path

    @property
    def state(self) -> Path:
        return self.checkpoint.with_suffix(".state.pt")

    @property
    def history(self) -> Path:
        return self.checkpoint.with_suffix(".loss.json")

    @property
    def plot(self) -> Path:
        return self.checkpoint.with_suffix(".loss.png")


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill a built network in place: DiT's initialisation (arXiv:2212.09748, adaLN-Zero) with larger embeddings.

    Matrices are Xavier uniform (experts one by one), and routers normal(0, 0.02). Every residual branch and the output
    start at zero. So the untrained network is the identity with zero velocity. DiT's normal(0, 0.02) time and label
    embeddings leave a condition of about 0.02 at this width. With them labels were still ignored after 500 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.zero_()
            elif name.startswith("y_embedder"):
                parameter.normal_(0, 0.5, generator=generator)
            elif name.endswith("gate.weight"):
                parameter.normal_(0, 0.02, generator=generator)
            else:
                matrices = parameter if parameter.ndim == 3 else parameter.flatten(1)[None]  # 3: stacked experts
                for matrix in matrices:
                    nn.init.xavier_uniform_(matrix, generator=generator)


def flow_loss(model: nn.Module, digits: Digits, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Return the rectified-flow loss of one random batch.

    It is the mean square error of v = data - noise at z_t = (1-t) noise + t data. t is logit-normal (arXiv:2403.03206,
    section 3.1), drawn in equal-probability strata to lower the gradient's variance. Labels are dropped to the null
    label for classifier-free guidance.
    """
    num_images = config.batch_size
    ids_B = torch.randint(len(digits), (num_images,), generator=generator)
    data_BCHW = augment(digits.ink_NHW[ids_B], generator)
    noise_BCHW = torch.randn(data_BCHW.shape, generator=generator)
    quantile_B = (torch.arange(num_images) + torch.rand(num_images, generator=generator)) / num_images
    t_B = torch.sigmoid(torch.special.ndtri(quantile_B.clamp(1e-4, 1 - 1e-4)))
    dropped_B = torch.rand(num_images, generator=generator) < config.label_dropout
    y_B = torch.where(dropped_B, DEMO_SPEC.null_label, digits.labels_N[ids_B])
    t_B111 = t_B[:, None, None, None]
    v_BCHW = model((1 - t_B111) * noise_BCHW + t_B111 * data_BCHW, t_B, y_B)
    return F.mse_loss(v_BCHW, data_BCHW - noise_BCHW)


class Trainer:
    """The network, its moving average and the optimiser, at some step of a run."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        family = FAMILIES[DEMO_SPEC.family]
        self.model = family.build(DEMO_SPEC)
        self.ema = family.build(DEMO_SPEC).requires_grad_(False)
        init_weights(self.model, config.seed)
        self.ema.load_state_dict(self.model.state_dict())
        self.digits, _ = load_split(config.seed)
        self.balancer = LoadBalancer(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, float]] = []

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step.

        Its random numbers depend on (seed, step) alone, so a resumed run takes the same path.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * config.schedule(self.step)
        loss = flow_loss(self.model, self.digits, config, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        imbalance = self.balancer.step(config.balance_rate * config.schedule(self.step))
        self._update_ema()
        self.step += 1
        return {"loss": loss.item(), "grad_norm": float(grad_norm), "max_over_mean_load": imbalance}

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The average starts short, or the first thousand steps would be dominated by the initial weights.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averaged = self.ema.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                averaged[name].lerp_(value, 1 - decay)  # buffers too: the average router needs its average bias

    def save(self, path: Path) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"nothing to resume at {path}; leave --resume away to start from step 0")
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.config):
            raise UserError(f"{path} was made with other settings: {state['config']}; resume with the same ones")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]


def original_layout(model: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict under the published key names, with one tensor per expert and projection."""
    family = FAMILIES[DEMO_SPEC.family]
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for block in DEMO_SPEC.moe_blocks:
        for parameter, projection in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            stacked = tensors.pop(f"{family.experts_prefix(block)}.{parameter}")
            for expert, weight in enumerate(stacked):
                tensors[family.expert_key(block, expert, projection)] = weight.clone()
    return tensors


def export(trainer: Trainer, path: Path) -> None:
    """Write the averaged network as fp32 safetensors in the original layout, atomically."""
    metadata = spec_metadata(DEMO_SPEC) | {
        "training": json.dumps(asdict(trainer.config) | {"finished_steps": trainer.step}),
        "data": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
    }
    partial = path.with_suffix(".partial")
    save_file(original_layout(trainer.ema), partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors creates files that only their owner can read
    os.replace(partial, path)


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> None:
    """Run (or finish) a training and write the checkpoint, the loss history and its plot.

    Raises UserError if there is nothing to resume, or if the folder cannot be written. Raises UserError also if the
    settings differ from the interrupted run's.
    """
    paths = OutputPaths(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        paths.history.touch()  # found out now, and not when the first weights are saved
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}; choose another --out") from error
    trainer = Trainer(config)
    if resume:
        trainer.load(paths.state)
    earlier_s = trainer.history[-1]["seconds"] if trainer.history else 0.0
    start = time.monotonic()
    recent: list[dict[str, float]] = []
    progress = trange(trainer.step, config.steps, initial=trainer.step, total=config.steps, desc="training")
    for _ in progress:
        recent.append(trainer.train_step())
        if trainer.step % config.log_every == 0 or trainer.step == config.steps:
            means = {key: sum(row[key] for row in recent) / len(recent) for key in recent[0]}
            seconds = round(earlier_s + time.monotonic() - start, 1)
            trainer.history.append({"step": trainer.step, "seconds": seconds} | means)
            progress.set_postfix(loss=f"{means['loss']:.4f}", load=f"{means['max_over_mean_load']:.2f}")
            recent.clear()
        if trainer.step % config.save_every == 0 or trainer.step == config.steps:
            trainer.save(paths.state)
            export(trainer, paths.checkpoint)
            write_history(trainer, paths)


def write_history(trainer: Trainer, paths: OutputPaths) -> None:
    """Write the loss curve as JSON and as a picture (training loss, and the load of the busiest expert)."""
    history = trainer.history
    columns = {key: [round(row[key], 4) for row in history] for key in history[0]} if history else {}
    facts = {"config": asdict(trainer.config), "model_spec": DEMO_SPEC.to_dict()}
    paths.history.write_text(json.dumps(facts | {"history": columns}) + "\n")
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    loss_axis, load_axis = figure.subplots(1, 2)
    loss_axis.semilogy(steps, [row["loss"] for row in history], linewidth=0.8)
    loss_axis.set(xlabel="step", ylabel="flow-matching loss", title="Training loss (mean of 20 steps)")
    load_axis.plot(steps, [row["max_over_mean_load"] for row in history], linewidth=0.8)
    load_axis.set(xlabel="step", ylabel="largest / mean load", title="Busiest expert of the worst MoE layer, per batch")
    figure.savefig(paths.plot, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Run ``launch/train_demo.py``. The exit code is 0 when done and 2 for a mistake of the user."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description="Train the demo model on real handwritten digits (CPU).")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write (.safetensors)")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--resume", action="store_true", help="go on from the .state.pt of an interrupted run")
    args = parser.parse_args(argv)
    try:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads} is too few; choose 1 or more")
        torch.set_num_threads(args.threads)
        train(TrainConfig(args.steps, args.batch_size, args.seed), args.out, resume=args.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
