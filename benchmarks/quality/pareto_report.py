"""From the records of ``pareto.py`` to its JSON file, Markdown table and plot.

Shape suffixes: N images.
"""

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.common.results import PLOT, save
from moeca_dist.demo.data import real_digits
from moeca_dist.demo.judge import Judge, features
from moeca_dist.evaluation.distribution import Gaussian, frechet_distance
from moeca_dist.evaluation.paired import psnr_db

Record = dict[str, Any]
# Okabe and Ito's palette, told apart by the colour-blind too; the markers tell the rest.
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#000000", "#56B4E9", "#CC79A7", "#8C8C00")
MARKERS = "osD^*vPX<>hd"


def summarise(found: Sequence[Record], cases: Sequence[Any], sent: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per configuration, by FLOPs ratio: each figure's mean (wall clock: median) and spread over the seeds."""
    judge, real = Judge.train(), Gaussian.fit(features(real_digits()))
    rows = []
    for case in cases:
        mine = [record for record in found if record["name"] == case.name]
        seeds = [seed_figures(mine, seed, judge, real) for seed in sorted({record["seed"] for record in mine})]
        branches = sum(record["branches_refreshed"] for record in mine)
        rows.append(
            {
                "name": case.name,
                "series": case.series,
                "label": case.label,
                "options": mine[0]["options"],
                "flops_ratio": sum(r["exact_flops"] for r in mine) / sum(r["flops"] for r in mine),
                "wall_ratio": median(figures["wall_ratio"] for figures in seeds),
                "branches_sent_share": branches / sum(record["exact_branches"] for record in mine),
                "bytes_share": sent[case.name] / sent[cases[0].name] if sent else None,
                "cache_bytes_per_image": max(record["cache_bytes_per_image"] for record in mine),
                **{name: spread([figures[name] for figures in seeds]) for name in QUALITY},
                "per_seed": seeds,
            }
        )
    mark_frontier(rows[1:])
    return sorted(rows, key=lambda row: row["flops_ratio"])


QUALITY = ("psnr_db", "pooled_psnr_db", "ssim", "rel_l2", "accuracy", "frechet")


def seed_figures(found: Sequence[Record], seed: int, judge: Judge, real: Gaussian) -> dict[str, float]:
    mine = sorted((record for record in found if record["seed"] == seed), key=lambda record: record["batch"])
    error_N = torch.tensor([value for record in mine for value in record["squared_error"]], dtype=torch.float64)
    energy = sum(sum(record["energy"]) for record in mine)
    images_NHWC = np.concatenate([unpacked(record["images"]) for record in mine])
    return {
        "seed": seed,
        "wall_ratio": median(record["exact_s"] / record["seconds"] for record in mine),
        "seconds_per_image": sum(record["seconds"] for record in mine) / len(error_N),
        "psnr_db": float(psnr_db(error_N).mean()),
        "pooled_psnr_db": float(psnr_db(error_N.mean())),
        "ssim": mean(value for record in mine for value in record["ssim"]),
        "rel_l2": math.sqrt(float(error_N.sum()) / energy),
        "accuracy": judge.accuracy(images_NHWC, np.arange(len(images_NHWC)) % 10),
        "frechet": frechet_distance(Gaussian.fit(features(images_NHWC)), real),
    }


def unpacked(stored: Mapping[str, Any]) -> NDArray[np.uint8]:
    data = zlib.decompress(base64.b64decode(stored["data"]))
    return np.frombuffer(data, dtype=np.uint8).reshape(stored["shape"]).copy()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def mark_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Sets ``non_dominated``: no other row has at least the same PSNR and FLOPs ratio, and more of one of them."""
    points = [(row["flops_ratio"], row["psnr_db"]["mean"]) for row in rows]
    for row, (ratio, psnr) in zip(rows, points, strict=True):
        row["non_dominated"] = not any(r >= ratio and p >= psnr and (r, p) != (ratio, psnr) for r, p in points)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_results(rows: list[dict[str, Any]], setting: Mapping[str, Any], out: Path) -> None:
    save(out, {"conditions": setting, "rows": rows}, markdown(rows, setting))
    plot(rows, setting, out / PLOT)
    print(f"wrote {out}")


METHOD = """\
{images} images per seed, seeds {seeds}, {steps} Euler steps, guidance {cfg}, labels 0-9 in turn, float32, one thread
per process. Every configuration samples the noise of the exact run; figures are means over seeds, ± the standard
deviation over seeds.

- **FLOPs ratio**: counted matrix products of the exact run over those of the row. **Wall clock**: denoising seconds of
  the exact run that came last before it in the same process over those of the row; median over the batches of a seed,
  then over the seeds [lowest, highest seed]. {workers} process(es) ran at the same time.
- **Branches sent**: routed branches that are computed, as a share of the exact run's; where experts are on other ranks,
  these travel. **Bytes**: payload of the all-to-all counted on 2 expert-parallel ranks ({bytes_images} images), as a
  share of the exact run's. **Cache**: peak memory per image, both guidance halves.
- **PSNR** (mean over images), **SSIM** (11 x 11 Gaussian window) and **relative L2** are against the exact sample of
  the same noise, on float images in [0, 1].
- **Accuracy**: share of images that an independent classifier (RBF SVM on real digits) reads as their label.
  **Frechet**: squared Frechet distance to the 1,797 real digits, drawn as the training images are, in the classifier's
  fixed feature space (ink in 8 x 8 cells, 64 raw features in [0, 1], no PCA). With {images} images per seed it has a
  bias that all rows share: read it beside the exact row.
- **●** no other row has at least the same PSNR and FLOPs ratio, and more of one of them."""


def markdown(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    method = METHOD.format(
        images=setting["num_images"],
        seeds=" ".join(map(str, setting["seeds"])),
        steps=setting["num_steps"],
        cfg=setting["cfg_scale"],
        bytes_images=setting["bytes_measured_on_images"],
        workers=setting["workers"],
    )
    best = [f"{row['name']} ({cells(row)[1]}, {cells(row)[6]} dB)" for row in rows if row.get("non_dominated")]
    sections = [
        "# Caching policies: compute, time and bytes against quality",
        f"![PSNR against FLOPs ratio and wall-clock ratio]({PLOT})",
        "Not dominated in FLOPs ratio and PSNR: " + "; ".join(best) + ".",
        table(rows),
        "## Method\n\n" + method,
        "## Conditions",
        "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in setting.items() if value != ""),
    ]
    return "\n\n".join(sections) + "\n"


HEADER = (
    "configuration", "FLOPs ratio", "wall clock", "branches sent", "bytes", "cache", "PSNR dB", "SSIM", "rel. L2",
    "accuracy", "Frechet", "●",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def cells(row: Mapping[str, Any]) -> list[str]:
    is_exact = "non_dominated" not in row
    walls = [figures["wall_ratio"] for figures in row["per_seed"]]
    quality = [
        "-"
        if is_exact and name in ("psnr_db", "ssim", "rel_l2")
        else f"{row[name]['mean']:{form}} ±{row[name]['std']:{form}}"
        for name, form in (
            ("psnr_db", ".1f"),
            ("ssim", ".4f"),
            ("rel_l2", ".4f"),
            ("accuracy", ".1%"),
            ("frechet", ".3f"),
        )
    ]
    return [
        row["name"],
        f"{row['flops_ratio']:.2f}x",
        "1" if is_exact else f"{row['wall_ratio']:.2f}x [{min(walls):.2f}, {max(walls):.2f}]",
        f"{row['branches_sent_share']:.1%}",
        "-" if row["bytes_share"] is None else f"{row['bytes_share']:.1%}",
        f"{row['cache_bytes_per_image'] / 2**20:.2f} MiB",
        *quality,
        "●" if row.get("non_dominated") else "",
    ]


def plot(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], path: Path) -> None:
    """PSNR over FLOPs ratio and over wall-clock ratio, one line per series."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    compute, clock = figure.subplots(1, 2, sharey=True)
    compared = [row for row in rows if "non_dominated" in row]
    series = sorted({row["series"] for row in compared})
    for index, name in enumerate(series):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "label": name}
        points = [row for row in compared if row["series"] == name]
        draw(compute, points, "flops_ratio", style)
        draw(clock, points, "wall_ratio", style)
    compute.set_xlabel("FLOPs of the exact run / FLOPs")
    clock.set_xlabel("seconds of the exact run / seconds (one process)")
    compute.set_ylabel("PSNR against the exact sample of the same noise, dB")
    for axes in (compute, clock):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*compute.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(
        f"Digits model, {setting['num_steps']} steps, guidance {setting['cfg_scale']}, "
        f"{setting['num_images']} images x {len(setting['seeds'])} seeds (bars: standard deviation over seeds)"
    )
    figure.savefig(path, dpi=120)


def draw(axes: Axes, points: Sequence[Mapping[str, Any]], ratio: str, style: Mapping[str, Any]) -> None:
    points = sorted(points, key=lambda row: row[ratio])
    axes.errorbar(
        [row[ratio] for row in points],
        [row["psnr_db"]["mean"] for row in points],
        yerr=[row["psnr_db"]["std"] for row in points],
        linewidth=1.3,
        markersize=6,
        capsize=2,
        elinewidth=0.8,
        **style,
    )
