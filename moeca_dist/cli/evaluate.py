"""The command ``moeca evaluate``: measure images against a reference."""

import argparse
from pathlib import Path

from moeca_dist.cli.arguments import Parser, at_least_one, seed
from moeca_dist.errors import UserError
from moeca_dist.evaluation.metric_names import DISTRIBUTION, PAIRED

HELP = (
    "Measure images against a reference: pair by pair with the uncached images of the same seeds, and as a set with "
    "any other. OUT and REF are output folders, npz files (arr_0, uint8 NHWC) or folders of pictures."
)
_METRICS = PAIRED + DISTRIBUTION


def add_arguments(parser: Parser) -> None:
    parser.add_argument("images", type=Path, metavar="OUT", help="the images to measure")
    parser.add_argument(
        "--reference", type=Path, metavar="REF", help="default: OUT/uncached, as --compare-uncached leaves it"
    )
    parser.add_argument(
        "--unpaired", action="store_true", help="REF holds other images: only compare the sets; needs --features"
    )
    parser.add_argument(
        "--features", metavar="FILE|digits", help="a local Inception file, or the demo's own network; adds set metrics"
    )
    parser.add_argument("--lpips", metavar="FILE", help="local torchvision weights of alexnet, vgg16 or squeezenet1_1")
    parser.add_argument("--metrics", type=_metrics, metavar="LIST", help=f"default: all of {','.join(_METRICS)}")
    parser.add_argument(
        "--resamples", type=_resamples, default=200, metavar="N", help="for intervals; 0: none; default: %(default)s"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the resamples; default: %(default)s")
    parser.add_argument("--workers", type=at_least_one, default=1, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the networks; default: cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: evaluation.json in OUT, or beside it")
    parser.set_defaults(command=_evaluate, parser=parser)


def _evaluate(args: argparse.Namespace) -> None:
    from moeca_dist.evaluation.evaluate import evaluate
    from moeca_dist.evaluation.request import Settings

    out = args.out or (args.images if args.images.is_dir() else args.images.parent) / "evaluation.json"
    _check_place(out)
    reference = args.reference
    if reference is None:
        reference = args.images / "uncached"
        if not reference.is_dir():
            raise UserError(f"{args.images} has no uncached images: say what to compare with --reference")
    settings = Settings(
        out=args.images,
        reference=reference,
        unpaired=args.unpaired,
        features=args.features,
        lpips=args.lpips,
        metrics=args.metrics,
        resamples=args.resamples,
        seed=args.seed,
        workers=args.workers,
        device=args.device,
    )
    evaluation = evaluate(settings, progress=True)
    evaluation.write(out)
    print(evaluation.table())
    print(f"\nwritten: {out}")


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file with --out")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: create it, or choose another place with --out")


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in _METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_METRICS)}")
    return names


def _resamples(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor an integer of at least 2")
    return int(text)
