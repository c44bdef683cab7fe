"""The command ``moeca convert``: rewrite a checkpoint."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeca_dist.cli.arguments import Parser, at_least_one
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    from moeca_dist.checkpoints.convert import Format

HELP = "Rewrite a checkpoint as a sharded folder, one .safetensors file or a .pt file; keys stay the same."
# Model options, named as in the configuration.
_MODEL_OPTIONS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("family", str),
    ("num_heads", int),
    ("num_experts_per_tok", int),
    ("n_group", int),
    ("topk_group", int),
    ("routed_scaling_factor", float),
    ("input_size", int),
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("src", type=Path, metavar="SRC", help="a checkpoint in any known wrapping")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument(
        "--to", choices=("sharded", "safetensors", "pt"), help="default: what the ending of DST says, else sharded"
    )
    parser.add_argument("--shards", type=at_least_one, metavar="N", help="expert files of the sharded format")
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
    from moeca_dist.checkpoints.convert import convert

    options = {name: getattr(args, name) for name, _ in _MODEL_OPTIONS}
    shards = {} if args.shards is None else {"num_shards": args.shards}
    print(convert(args.src, args.dst, to=to, overwrite=args.overwrite, dtype=args.dtype, **shards, **options))
