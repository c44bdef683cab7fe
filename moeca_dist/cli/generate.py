"""The command ``moeca generate``: images on the ranks that a launcher started, or on one rank."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeca_dist.cli.arguments import Parser, add_run_arguments, parse_labels
from moeca_dist.cli.quality_preset import QualityPreset, add_quality_arguments, resolve_quality
from moeca_dist.config import Config, load_config, validate_world
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moeca_dist.parallel.mesh import Mesh
    from moeca_dist.runtime.engine import Engine
    from moeca_dist.runtime.output_folder import OutputFolder
    from moeca_dist.types import Request

HELP = "Generate images. Under torchrun or the deepspeed launcher all ranks of the run do it together."
DEFAULT_NUM_IMAGES = 100


def add_arguments(parser: Parser) -> None:
    add_run_arguments(
        parser,
        out="FOLDER",
        out_help="where the results go",
        num_images=DEFAULT_NUM_IMAGES,
        first_seed=0,
        replaced="the results of an earlier run",
    )
    parser.add_argument(
        "--labels", type=parse_labels, metavar="LIST", help="e.g. 0-9 or 1,3,7-9, used in turn; default: all classes"
    )
    parser.add_argument(
        "--compare-uncached", action="store_true", help="generate the same images without the cache too, and compare"
    )
    add_quality_arguments(parser)
    parser.set_defaults(command=_generate, parser=parser)


def _generate(args: argparse.Namespace) -> None:
    config, preset = resolve_quality(load_config(args.config, args.overrides), args)
    validate_world(config, launcher_number("WORLD_SIZE", 1))
    if args.compare_uncached and config.cache.policy == "none" and not preset.automatic:
        raise UserError("--compare-uncached has no effect with cache.policy none: name a policy, or leave it away")
    run_generate(config, preset, args)


def run_generate(config: Config, preset: QualityPreset, args: argparse.Namespace) -> None:
    """Generate on all ranks and write the results on rank 0. No half-written results remain after an error.

    Raises UserError for a wrong checkpoint, label or output folder, on every rank alike and before weights are read.
    Raises PeerLostError if a rank dies or hangs.
    """
    tell_deepspeed_the_device()
    from moeca_dist.parallel.agreement import on_all_ranks
    from moeca_dist.runtime.engine import join
    from moeca_dist.runtime.run_plan import RunPlan
    from moeca_dist.types import Request

    mesh = join(config)
    try:
        plan = on_all_ranks(mesh, lambda: RunPlan.resolve(config, mesh.world_size))
        highest = [Request(index, labels[-1]) for index, labels in enumerate(args.labels or ())]
        on_all_ranks(mesh, lambda: plan.check_requests(highest))
        on_all_ranks(mesh, lambda: plan.check_memory(args.num_images, mesh.device))
        folder = on_all_ranks(
            mesh,
            lambda: _open_folder(args) if mesh.rank == 0 else None,
        )
        try:
            _generate_into(folder, config, preset, mesh, args)
        except BaseException:
            if folder is not None:
                folder.abandon()
            raise
    except UserError:
        mesh.close()
        raise
    # Not after other errors: a group that lost a rank could wait for it again.
    mesh.close()


def _generate_into(
    folder: "OutputFolder | None", config: Config, preset: QualityPreset, mesh: "Mesh", args: argparse.Namespace
) -> None:
    from moeca_dist.runtime.engine import Engine
    from moeca_dist.sampling.latent_decoder import HOW_TO_GET_PIXELS
    from moeca_dist.types import Request

    engine = preset.apply(Engine.from_config(config, mesh=mesh))
    classes = [label for part in args.labels or [range(engine.model.spec.num_classes)] for label in part]
    requests = [Request(index, classes[index % len(classes)], args.seed) for index in range(args.num_images)]
    uncached = None
    if args.compare_uncached:
        add = folder.add_uncached if folder else _drop
        uncached = engine.without_cache().generate_into(add, requests, progress=True)
    report = engine.generate_into(
        folder.add if folder else _drop,
        requests,
        progress=True,
        trace_sink=folder.add_trace if folder else _drop_trace,
    )
    if folder is None:
        return
    if uncached is not None:
        report = report.compared_with(uncached, folder.quality())
    folder.finish(_saved(engine, folder), report)
    print(report.summary())
    if engine.produces_pixels:
        print(f"\npictures: {folder.path / ('grid.png' if uncached is None else 'comparison.png')}")
    else:
        print(f"\nlatents: {folder.path / 'latents.npz'}; for pictures, {HOW_TO_GET_PIXELS}")


def _saved(engine: "Engine", folder: "OutputFolder") -> Config:
    """The configuration that repeats the run, with a calibration that was made for it beside it."""
    config = engine.config
    if engine.calibration is None or config.cache.calibration is not None:
        return config
    path = folder.add_file("calibration.json", engine.calibration.to_json())
    return config.model_copy(update={"cache": config.cache.model_copy(update={"calibration": path})})


def _open_folder(args: argparse.Namespace) -> "OutputFolder":
    from moeca_dist.runtime.output_folder import OutputFolder

    return OutputFolder(args.out, args.num_images, overwrite=args.overwrite, compare=args.compare_uncached)


def _drop(requests: Sequence["Request"], samples: "NDArray[np.generic]") -> None:
    """Where samples go on ranks that write nothing."""


def _drop_trace(rank: int, trace: bytes) -> None:
    """Where traces go on ranks that write nothing."""


def tell_deepspeed_the_device() -> None:
    """Set the variable that tells DeepSpeed its device.

    Otherwise DeepSpeed detects the device when it is imported. It then warns on every rank if the device is the CPU.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def launcher_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number: start the ranks with torchrun")
    return int(text)
