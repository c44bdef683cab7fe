"""The command line: parse, check, build, run, and turn every outcome into an exit code.

0 done; 2 a mistake of the user, told in one line before any work; 1 a failure; 130 and 143 after SIGINT and SIGTERM.
Only the standard library and the configuration are imported up here: torch and deepspeed take seconds to import, and
``--help`` or a mistyped key must not wait for them.
"""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from moeca_dist import __version__
from moeca_dist.config import Config, load_config, validate_world
from moeca_dist.errors import PeerLostError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moeca_dist.models.convert import Format
    from moeca_dist.outputs import OutputFolder
    from moeca_dist.parallel.mesh import Mesh
    from moeca_dist.types import Request

DEFAULT_NUM_IMAGES = 100
FIRST_RANK_LEAD_S = 5.0
SEED_LIMIT = 2**32  # what sampling.noise can tell apart
# The model options of `moeca convert`: names as in the configuration.
_MODEL_OPTIONS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("family", str),
    ("num_heads", int),
    ("num_experts_per_tok", int),
    ("n_group", int),
    ("topk_group", int),
    ("routed_scaling_factor", float),
    ("input_size", int),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``moeca`` console command; returns the exit code."""
    parser = _Parser(prog="moeca", description="Distributed inference for diffusion transformers with MoE.")
    parser.add_argument("--version", action="version", version=f"moeca {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate_arguments(commands.add_parser("generate", help="generate images", description=_GENERATE_HELP))
    _add_convert_arguments(commands.add_parser("convert", help="rewrite a checkpoint", description=_CONVERT_HELP))
    _add_report_arguments(commands.add_parser("report", help="show what a run did", description=_REPORT_HELP))
    return _exit_code(lambda: _dispatch(parser, argv))


def generate_main(argv: Sequence[str] | None = None) -> int:
    """``launch/generate.py``: the same as ``moeca generate``."""
    parser = _Parser(description=_GENERATE_HELP)
    _add_generate_arguments(parser)
    return _exit_code(lambda: _dispatch(parser, argv))


# ---- commands --------------------------------------------------------------------------------------------------------

_GENERATE_HELP = "Generate images. Under torchrun or the deepspeed launcher all ranks of the run do it together."
_CONVERT_HELP = "Rewrite a checkpoint as a sharded folder, one .safetensors file or a .pt file; keys stay the same."
_REPORT_HELP = "Show the figures of a run: compute, branches, exchange and cache, overall and for each MoE block."


def _add_generate_arguments(parser: "_Parser") -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="YAML")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--num-images", type=_at_least_one, default=DEFAULT_NUM_IMAGES, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--labels", type=parse_labels, metavar="LIST", help="e.g. 0-9 or 1,3,7-9, used in turn; default: all classes"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a config key"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    parser.add_argument(
        "--compare-uncached", action="store_true", help="generate the same images without the cache too, and compare"
    )
    # The deepspeed launcher adds it to every command line; the environment it sets too says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_generate, parser=parser)


def _generate(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    validate_world(config, _launcher_number("WORLD_SIZE", 1))
    if args.compare_uncached and config.cache.policy == "none":
        raise UserError("--compare-uncached has no effect with cache.policy none: name a policy, or leave it away")
    run_generate(config, args)


def run_generate(config: Config, args: argparse.Namespace) -> None:
    """Generate on all ranks and write the results on rank 0.

    Raises UserError, on every rank alike and before weights are read, for what is wrong with checkpoint, labels or
    output folder; PeerLostError if a rank dies or hangs. Either way nothing half-written stays behind.
    """
    _tell_deepspeed_the_device()
    from moeca_dist.engine import check_cache_fits, check_config, join
    from moeca_dist.parallel.agreement import agreed

    mesh = join(config)
    try:
        highest = [labels[-1] for labels in args.labels or ()]
        spec = agreed(mesh, lambda: check_config(config, highest))
        agreed(mesh, lambda: check_cache_fits(config, spec, mesh, args.num_images))
        folder = agreed(
            mesh,
            lambda: _open_folder(args) if mesh.rank == 0 else None,
        )
        try:
            _generate_into(folder, config, mesh, args, args.labels or [range(spec.num_classes)])
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
    folder: "OutputFolder | None", config: Config, mesh: "Mesh", args: argparse.Namespace, labels: Sequence[range]
) -> None:
    from moeca_dist.engine import Engine
    from moeca_dist.types import Request
    from moeca_dist.vae import HOW_TO_GET_PIXELS

    classes = [label for part in labels for label in part]
    requests = [Request(index, classes[index % len(classes)], args.seed) for index in range(args.num_images)]
    engine = Engine.from_config(config, mesh=mesh)
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
    folder.finish(engine.resolved_config, report)
    print(report.summary())
    if engine.produces_pixels:
        print(f"\npictures: {folder.path / ('grid.png' if uncached is None else 'comparison.png')}")
    else:
        print(f"\nlatents: {folder.path / 'latents.npz'}; for pictures, {HOW_TO_GET_PIXELS}")


def _open_folder(args: argparse.Namespace) -> "OutputFolder":
    from moeca_dist.outputs import OutputFolder

    return OutputFolder(args.out, args.num_images, overwrite=args.overwrite, compare=args.compare_uncached)


def _drop(requests: Sequence["Request"], samples: "NDArray[np.generic]") -> None:
    """Where samples go on ranks that write nothing."""


def _drop_trace(rank: int, trace: bytes) -> None:
    """Where traces go on ranks that write nothing."""


def _add_convert_arguments(parser: "_Parser") -> None:
    parser.add_argument("src", type=Path, metavar="SRC", help="a checkpoint in any known wrapping")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument(
        "--to", choices=("sharded", "safetensors", "pt"), help="default: what the ending of DST says, else sharded"
    )
    parser.add_argument("--shards", type=_at_least_one, metavar="N", help="expert files of the sharded format")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    model = parser.add_argument_group("model", "what the shapes in SRC cannot tell, named as in the configuration")
    for name, kind in _MODEL_OPTIONS:
        model.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.set_defaults(command=_convert, parser=parser)


def _convert(args: argparse.Namespace) -> None:
    by_suffix: dict[str, Format] = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt"}
    to: Format = args.to or by_suffix.get(args.dst.suffix, "sharded")
    if args.shards is not None and to != "sharded":
        raise UserError(f"--shards has no effect on a {to} file: remove it, or add --to sharded")
    from moeca_dist.models.convert import convert

    options = {name: getattr(args, name) for name, _ in _MODEL_OPTIONS}
    shards = {} if args.shards is None else {"num_shards": args.shards}
    print(convert(args.src, args.dst, to=to, overwrite=args.overwrite, dtype=args.dtype, **shards, **options))


def _add_report_arguments(parser: "_Parser") -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that `moeca generate --out` wrote")
    parser.add_argument("--plots", action="store_true", help="draw figures per step and per expert into OUT/plots")
    parser.set_defaults(command=_report, parser=parser)


def _report(args: argparse.Namespace) -> None:
    from moeca_dist.report_view import read_report, render

    report = read_report(args.out)
    print(render(report))
    if args.plots:
        from moeca_dist.report_plots import write_plots

        print("\n" + "\n".join(f"plot: {path}" for path in write_plots(report, args.out)))


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError: one line, and only on rank 0. Options are never abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _dispatch(parser: _Parser, argv: Sequence[str] | None) -> None:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = re.findall(r"--[a-z][a-z-]*", args.parser.format_usage())
        close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {args.parser.prog} --help"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    args.command(args)


def parse_labels(text: str) -> list[range]:
    """``0-9`` or ``1,3,7-9`` as ranges in the order given; ranges, because what they hold is not yet checked."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, flags=re.ASCII)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of labels such as 0-9 or 1,3,7-9")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise argparse.ArgumentTypeError(f"{part.strip()} runs backwards; write {high}-{low}")
        ranges.append(range(low, high + 1))
    return ranges


def _at_least_one(text: str) -> int:
    return _integer(text, 1, None)


def _seed(text: str) -> int:
    return _integer(text, 0, SEED_LIMIT - 1)


def _integer(text: str, low: int, high: int | None) -> int:
    wanted = f"an integer in {low}..{high}" if high is not None else f"an integer of at least {low}"
    if (
        not re.fullmatch(r"[-+]?\d+", text, flags=re.ASCII)
        or int(text) < low
        or (high is not None and int(text) > high)
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


# ---- outcomes --------------------------------------------------------------------------------------------------------


def _exit_code(run: Callable[[], None]) -> int:
    try:
        with _sigterm_as_exit(), _quiet():
            run()
    except UserError as error:
        # Every rank found the same mistake; one of them says so.
        if _is_first():
            _complain(error)
        else:
            _wait_for_first()
        return 2
    except PeerLostError as error:
        # Every rank that is left says so: the lost one may be rank 0.
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _wait_for_first() -> None:
    """Launchers end all ranks as soon as one has exited: rank 0 goes first, or its line might be lost."""
    with suppress(SystemExit), _sigterm_as_exit():
        time.sleep(FIRST_RANK_LEAD_S)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _quiet() -> Iterator[None]:
    """Logs and warnings on rank 0 alone, and there without the one that only DeepSpeed's authors can act on."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
        if not _is_first():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _tell_deepspeed_the_device() -> None:
    """Unless told, DeepSpeed detects the device when it is imported and warns on every rank where it is the CPU."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _complain(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that partial outputs are removed; launchers send it to all ranks at once."""

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _launcher_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number: start the ranks with torchrun")
    return int(text)
