"""The command ``moeca trace``: record the routing of a run."""

import argparse

from moeca_dist.cli.arguments import Parser, add_run_arguments
from moeca_dist.cli.generate import launcher_number, tell_deepspeed_the_device
from moeca_dist.config import load_config, validate_world
from moeca_dist.errors import UserError

HELP = (
    "Generate images, throw them away and keep which experts every token was routed to, and which branches were "
    "computed: what `moeca place` reads. Under torchrun or the deepspeed launcher all ranks do it together."
)
DEFAULT_NUM_IMAGES = 16


def add_arguments(parser: Parser) -> None:
    add_run_arguments(
        parser,
        out="NPZ",
        out_help="where the trace goes",
        num_images=DEFAULT_NUM_IMAGES,
        first_seed=7,
        replaced="an earlier trace",
    )
    parser.set_defaults(command=_trace, parser=parser)


def _trace(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    validate_world(config, launcher_number("WORLD_SIZE", 1))
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already; choose another --out, or add --overwrite to replace it")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    tell_deepspeed_the_device()
    from moeca_dist.runtime.engine import Engine, join
    from moeca_dist.tuning.experts.record import record_routing
    from moeca_dist.types import Request

    mesh = join(config)
    try:
        engine = Engine.from_config(config, mesh=mesh)
        classes = engine.model.spec.num_classes
        requests = [Request(index, index % classes, args.seed) for index in range(args.num_images)]
        source = f"{args.config.name} {' '.join(args.overrides)} seed {args.seed}"
        trace = record_routing(engine, requests, source)
    except UserError:
        mesh.close()
        raise
    # Not after other errors: a group that lost a rank could wait for it again.
    mesh.close()
    if trace is not None:
        trace.save(args.out)
        print(f"{args.out}: {trace.num_images} images, {trace.num_steps} steps, {len(trace.blocks)} MoE blocks")
