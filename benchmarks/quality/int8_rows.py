"""What rows in int8 cost and save: bytes, and the distance of the samples to those of rows as computed.

    python -m benchmarks.quality.int8_rows --ranks 2 --num-images 16

Every policy runs with rows as computed and with int8 rows, on the same noise and ranks. "noise" are rows as computed
with a little noise on the outputs of the routed experts: how far samples move by themselves, which is far with random
weights. Nothing is timed: what bytes are worth depends on the link (``benchmarks/scaling/network.py``). Writes
OUT/data.json and table.md.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.common.hardware import conditions
from benchmarks.common.local_ranks import become_rank, free_port
from benchmarks.common.results import OUT_HELP, default_folder, save
from benchmarks.common.unrounded import Unrounded
from benchmarks.scaling.rank_cases import config_path
from benchmarks.scaling.rank_job import Cell
from moeca_dist import Engine, Report, Request
from moeca_dist.checkpoints.from_config import load_weights
from moeca_dist.config import load_config
from moeca_dist.report.schema import scaled
from moeca_dist.runtime.engine import join
from moeca_dist.tuning.trials import closeness_db

CELLS = (
    Cell("uncached", {"policy": "none"}),
    Cell("network_forecast", {"policy": "network_forecast"}),
    Cell("taylorseer", {"policy": "taylorseer"}),
    Cell("moeca_forecast", {"policy": "moeca_forecast"}),
    Cell("moeca_forecast, owner", {"policy": "moeca_forecast", "location": "owner"}),
)
NOISE, NOISE_LEVEL = "noise", 1e-3


def main() -> None:
    args = parse_arguments()
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    # Now, and not when the results are written: the workers import the code of this moment.
    setting = conditions("cpu") | {"num_images": args.num_images, "seed": args.seed, "note": args.note}
    rows: list[dict[str, Any]] = []
    for name in args.configs:
        for num_ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "rows.json"
                spawn(run_rank, (num_ranks, free_port(), name, args, out), nprocs=num_ranks)
                rows += json.loads(out.read_text())
            write_results(rows, setting, args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["demo"], help="names in configs/, or files; default: demo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="sizes of the expert-parallel group")
    parser.add_argument(
        "--policies", nargs="+", default=[cell.name for cell in CELLS], choices=[cell.name for cell in CELLS]
    )
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=501, help="nothing shipped was fitted on the default")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, default=default_folder("int8_rows"), help=OUT_HELP)
    return parser.parse_args()


def run_rank(rank: int, num_ranks: int, port: int, name: str, args: argparse.Namespace, out: Path) -> None:
    become_rank(rank, num_ranks, port)
    torch.set_num_threads(1)
    config = load_config(config_path(name), ["model.device=cpu", *args.overrides])
    mesh = join(config)
    engine = Engine(config, mesh, load_weights(config.model, mesh, None), Unrounded())
    classes, latent = engine.model.spec.num_classes, engine.model.spec.is_latent
    requests = [Request(index, index % classes, args.seed) for index in range(args.num_images)]
    rows: list[dict[str, Any]] = []
    uncached: Tensor | None = None
    for cell in CELLS:
        if cell.name not in args.policies and cell.name != "uncached":
            continue
        exact: Tensor | None = None
        for form in ("exact", "int8", NOISE):
            samples, report = run(engine, cell, form, requests)
            if rank:
                continue
            exact = samples if exact is None else exact
            uncached = samples if uncached is None else uncached
            facts = {"config": Path(name).stem, "ranks": num_ranks, "policy": cell.name, "rows": form}
            rows.append(facts | figures(samples, exact, uncached, report, latent=latent))
            print(rows[-1], flush=True)
    if rank == 0:
        out.write_text(json.dumps(rows))
    mesh.close()


def run(engine: Engine, cell: Cell, form: str, requests: list[Request]) -> tuple[Tensor, Report]:
    row_dtype = "exact" if form == NOISE else form
    parallel = engine.config.parallel.model_copy(update={"row_dtype": row_dtype})
    config = engine.config.model_copy(update={"cache": cell.section(engine.config.cache), "parallel": parallel})
    with noise(engine) if form == NOISE else nullcontext():
        samples, report = Engine(config, engine.mesh, engine.model, Unrounded()).generate(requests)
    return torch.as_tensor(samples), report


@contextmanager
def noise(engine: Engine) -> Iterator[None]:
    """Within it every output of a routed expert is off by about ``NOISE_LEVEL`` of itself."""
    draw = torch.Generator().manual_seed(engine.mesh.rank)

    def add(_: nn.Module, __: Any, out_RD: Tensor) -> Tensor:
        return out_RD * (1 + NOISE_LEVEL * torch.randn(out_RD.shape, generator=draw))

    hooks = [layer.experts.register_forward_hook(add) for _, layer in engine.model.moe_layers()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def figures(samples: Tensor, exact: Tensor, uncached: Tensor, report: Report, *, latent: bool) -> dict[str, Any]:
    """dB: mean over the images, of their PSNR, or for latents of the energy over that of the difference."""
    to_exact, to_uncached = (closeness_db(samples, other, latent=latent) for other in (exact, uncached))
    return {
        "bytes_sent": report.exchange.bytes_sent,
        "bytes_full": report.exchange.bytes_full,
        "db_to_exact": to_exact.mean().item(),
        "worst_db_to_exact": to_exact.min().item(),
        "rel_l2_to_exact": ((samples - exact).norm() / exact.norm()).item(),
        "db_to_uncached": to_uncached.mean().item(),
        "worst_db_to_uncached": to_uncached.min().item(),
    }


# ---- writing ---------------------------------------------------------------------------------------------------------

METHOD = f"""\
**bytes**: what left its rank, all ranks together, with headers and scales. **of exact**: as a share of the same
policy with rows as computed. **to exact rows**: PSNR of the samples to those of the same policy with rows as computed,
mean over the images (worst image), and relative L2; of latents the energy over that of the difference. **to uncached**:
to the samples without a cache and with rows as computed. "{NOISE}": a control, rows as computed and noise of
{NOISE_LEVEL:g} on the outputs of the routed experts."""

HEADER = ("policy", "rows", "bytes", "of exact", "to exact rows", "relative L2", "to uncached")


def write_results(rows: list[dict[str, Any]], setting: dict[str, Any], out: Path) -> None:
    lines = [
        "# Rows in int8 in the exchange",
        "",
        *(f"- {name}: {value}" for name, value in setting.items() if value != ""),
    ]
    lines += ["", METHOD]
    for config, ranks in dict.fromkeys((row["config"], row["ranks"]) for row in rows):
        mine = [row for row in rows if (row["config"], row["ranks"]) == (config, ranks)]
        lines += ["", f"## {config}, {ranks} ranks", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(cells(row, mine)) + " |" for row in mine]
    save(out, {"conditions": setting, "rows": rows}, "\n".join(lines) + "\n")


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    exact = next(each for each in rows if each["policy"] == row["policy"] and each["rows"] == "exact")
    same, first = row is exact, row["policy"] == "uncached" and row is exact
    return [
        row["policy"],
        row["rows"],
        f"{scaled(row['bytes_sent'], 1024)}iB",
        f"{row['bytes_sent'] / exact['bytes_sent']:.1%}" if exact["bytes_sent"] else "-",
        "-" if same else f"{row['db_to_exact']:.1f} dB ({row['worst_db_to_exact']:.1f})",
        "-" if same else f"{row['rel_l2_to_exact']:.1e}",
        "-" if first else f"{row['db_to_uncached']:.2f} dB ({row['worst_db_to_uncached']:.1f})",
    ]


if __name__ == "__main__":
    main()
